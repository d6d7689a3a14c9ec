"""Is a legal variant ever red? Eager, jit, `torch.compile`, other reduction orders and instruction sets on fresh cases.

    python benchmarks/bench_legal_variants.py [--half torch] [--only compile] [--jobs 2]

Every variant runs in a process of its own on cases that calibration never saw, and each of its streams is judged by the
band of its family as a run would judge it. A variant is red when any stream alarms or any single case is gross; on top
the usual variant is judged with a planted shift, which must be red.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from tessera_parity.calibration.store import Entry, load_entry
from tessera_parity.sequential import alpha_per_stream, stand
from tessera_parity.variants import Variant, run_apart, variants_of
from tessera_shared.errors import ParityError

DTYPES = ("float32", "bfloat16")
CASES = 28  # what the quick lane plans
SHIFT = 1.5  # of the logarithm, planted into the usual variant's values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--half", choices=("torch", "jax"), action="append", help="default: both")
    parser.add_argument("--only", action="append", help="name of a variant; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=77_000_000, help="apart from calibration's and every run's")
    parser.add_argument("--jobs", type=int, default=1, help="variants at once")
    given = parser.parse_args()
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs}: expected at least 1, because something is to be measured")
    found = [
        one for half in given.half or ("torch", "jax") for one in variants_of(half, device=given.device, compiled=True)
    ]
    unknown = set(given.only or ()) - {one.name for one in found}
    if unknown:
        parser.error(f"--only {min(unknown)}: expected one of {', '.join(sorted({one.name for one in found}))}")
    variants = [one for one in found if not given.only or one.name in given.only]
    with ThreadPoolExecutor(given.jobs) as pool:  # each thread waits for a process
        red = sum(pool.map(lambda one: _reported(one, given), variants))
    print(f"{len(variants)} legal variants, {red} red")
    return 1 if red else 0


def _reported(variant: Variant, given: argparse.Namespace) -> bool:
    clock = time.perf_counter()
    try:
        measured = run_apart(
            variant, dtypes=DTYPES, cases=given.cases, seed=given.seed, device=given.device,
            cores=max(1, (os.cpu_count() or 1) // given.jobs),
        )  # fmt: skip
    except ParityError as error:
        print(f"{variant.half} {variant.name}: could not run: {error}", flush=True)
        return True
    lines, red = [], False
    for dtype, values in measured.items():
        entry = load_entry(variant.half, dtype, device=given.device)
        if entry is None:
            lines.append(f"{dtype} uncalibrated")
            red = True
            continue
        flagged, judged = judge(entry, variant, values, planned=given.cases)
        shifted, _ = judge(entry, variant, {s: [x + SHIFT for x in v] for s, v in values.items()}, planned=given.cases)
        lines.append(f"{dtype} {len(flagged)} of {judged} streams red {flagged[:2] or ''}, {len(shifted)} when shifted")
        red = red or bool(flagged) or not judged or not shifted
    seconds = time.perf_counter() - clock
    print(f"{variant.half} {variant.name} ({variant.about}): {'; '.join(lines)}; {seconds:.0f} s", flush=True)
    return red


def judge(
    entry: Entry, variant: Variant, values: Mapping[str, Sequence[float]], *, planned: int
) -> tuple[list[str], int]:
    """Return the streams that a run would call divergent, and how many had a band."""
    alpha = alpha_per_stream(max(1, len(values)))
    flagged, judged = [], 0
    for stream, cases in values.items():
        band = entry.band(stream, variant.family, alpha=alpha)
        if band is None:
            continue
        judged += 1
        standing = stand(cases, band, alpha=alpha, planned=planned)
        if standing.alarm or standing.gross is not None:
            flagged.append(stream)
    return flagged, judged


if __name__ == "__main__":
    sys.exit(main())
