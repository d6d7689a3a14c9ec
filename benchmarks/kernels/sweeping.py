"""Which configuration is fastest at which shape, and what should `choose_config` say?

    python benchmarks/kernels/session.py sweep [--only op,op]        every op, in boxes of seconds
    python benchmarks/kernels/sweeping.py rms_norm                   one op, here and now

A module of `SOURCES` has a generator of `Sweep`s. Every candidate runs once and must give what the current choice gives;
then each is timed alone with few samples, and the best few and the current choice against each other with more. What came
of a shape is kept at once. The answer goes into `choose_config` by hand, with the date, so that the choice stays a pure
function; a configuration that is not in `CONFIGS` yet goes there too, and is fuzzed like the others.
"""

import argparse
import gc
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parents[1] / room) for room in ("shared", "kernels"))]

import harness  # noqa: E402
import torch  # noqa: E402

SOURCES = {
    "cuda_flash_attention": "bench_cuda_flash_attention",
    "flash_attention": "bench_flash_attention",
    "gate_up": "sweep_memory_bound",
    "linear_cross_entropy": "bench_linear_cross_entropy",
    "linear_distillation": "bench_linear_distillation",
    "cuda_linear_distillation": "bench_cuda_linear_distillation",
    "quant_matmul": "bench_quant_matmul",
    "cuda_quant_matmul": "bench_cuda_quant_matmul",
    "paged_attention": "bench_paged_attention",
    "fp8_matmul": "bench_fp8_matmul",
    "cuda_fp8_matmul": "bench_cuda_fp8_matmul",
    "rms_norm": "sweep_memory_bound",
    "sample": "bench_sample",
    "rope": "sweep_memory_bound",
    "swiglu": "sweep_memory_bound",
    "adamw": "sweep_memory_bound",
}
"""Where an op's sweeps are, what falls shortest of its goal first."""

COARSE, FINE, FINALISTS = 5, 20, 4
"""Samples of every candidate, samples of the best ones, and how many those are beside the current choice."""

NOISE = 1.01
"""A configuration that is faster by less does not replace the current choice."""

APART = 0.03
"""Largest relative distance between a candidate's numbers and the current choice's: bfloat16 sums in another order stay far
below, a wrong tile far above. The fuzz lane judges by the real rule; this only keeps nonsense out of the ranking."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One shape: candidates for one part of an op's configuration."""

    part: str  # what is chosen: "forward", "row kernel"
    key: str  # shapes that choose_config cannot tell apart have the same
    shape: str
    current: Hashable  # what choose_config says now; one of the candidates or none
    candidates: Mapping[Hashable, Callable[[], object]]  # the first call may do what is not timed
    work: float  # floating-point operations, or bytes under the limit `copy`
    limit: str
    beside: Mapping[str, Callable[[], object]] = field(default_factory=dict)  # peers, for scale
    cold: bool = False
    graph: bool = True


def sweeps_of(op: str) -> Iterator[Sweep]:
    """Return an op's sweeps; tensors are made as they are asked for."""
    module = importlib.import_module(SOURCES[op])
    found: Iterator[Sweep] = module.SWEEPS[op]() if SOURCES[op] == "sweep_memory_bound" else module.sweeps()
    return found


def main() -> int:
    """Sweep one op, or compile its candidates; records go to --json as they come, else to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=sorted(SOURCES))
    parser.add_argument("--json", type=Path, help="records so far: shapes in it are not swept again")
    options = parser.parse_args()
    kept = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.exists() else {}
    if harness.is_warm_up():
        _compile(options.op, set(kept.get("shapes", {})))
        return 0
    store = Store(path=options.json, shapes=kept.get("shapes", {}), fatal=kept.get("fatal", []), at=kept.get("at", ""))
    store.blame()
    store.limits = harness.ceilings()
    _sweep(options.op, store)
    if options.json is None:
        print("\n".join(table_of({options.op: store.record()})))
    return 0


@dataclass(kw_only=True)
class Store:
    """What one op's sweep has found, on disk after every shape; `at` is the candidate under way."""

    path: Path | None
    shapes: dict[str, Any]
    fatal: list[str]  # candidates that took their process down
    at: str = ""
    limits: dict[str, float] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)  # shapes that time did not allow

    def blame(self) -> None:
        """Remember a candidate in which the last process ended, so that this one leaves it out."""
        if self.at:
            self.fatal.append(self.at)
            self.at = ""

    def record(self) -> dict[str, Any]:
        """Return plain types."""
        return {
            "shapes": self.shapes, "fatal": self.fatal, "at": self.at, "limits": self.limits, "late": self.late,
            "gpu": harness.gpu_name(),
        }  # fmt: skip

    def save(self) -> None:
        """Write, if there is a file to write to."""
        if self.path is not None:
            fresh = self.path.with_suffix(".new")
            fresh.write_text(json.dumps(self.record()), encoding="utf-8")
            fresh.replace(self.path)


def _compile(op: str, done: set[str]) -> None:
    """Run this process's share of the candidates once, so that their code lies in Triton's cache."""
    share, _, processes = os.environ["TESSERA_BENCH_WARM"].partition("/")
    number = 0
    for sweep in sweeps_of(op):
        for config, function in sweep.candidates.items():
            number += 1
            if number % int(processes) == int(share) and _name(sweep) not in done:
                harness.measure({str(config): function})
        _free()


def _sweep(op: str, store: Store) -> None:
    until = float(os.environ.get("TESSERA_BENCH_UNTIL", "inf"))
    for sweep in sweeps_of(op):
        name = _name(sweep)
        if name in store.shapes:
            continue
        if time.time() > until:
            store.late.append(name)
            continue
        store.shapes[name] = _one(sweep, store)
        store.at = ""
        store.save()
        _free()
    store.save()


def _name(sweep: Sweep) -> str:
    return f"{sweep.part}, {sweep.shape}"


def _free() -> None:
    gc.collect()
    if not harness.is_dry():
        torch.cuda.empty_cache()


def _one(sweep: Sweep, store: Store) -> dict[str, Any]:
    """Judge, time and rank one shape's candidates."""
    working, left_out = _working(sweep, store)
    if not working:
        return _found(sweep, {}, {}, left_out)
    coarse = {config: _time(sweep, {"ours": working[config]}, COARSE)["ours"].median_ms for config in working}
    best = sorted(coarse, key=lambda config: coarse[config])[:FINALISTS]
    finalists = dict.fromkeys([*best, *(c for c in working if c == sweep.current)])
    fine = _time(sweep, {repr(c): working[c] for c in finalists} | dict(sweep.beside), FINE)
    times = {repr(config): fine[repr(config)].median_ms if config in finalists else ms for config, ms in coarse.items()}
    return _found(sweep, times, {name: fine[name].median_ms for name in sweep.beside if name in fine}, left_out)


def _found(
    sweep: Sweep, times: Mapping[str, float], beside: Mapping[str, float], left_out: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "part": sweep.part, "key": sweep.key, "shape": sweep.shape, "current": repr(sweep.current),
        "limit": sweep.limit, "work": sweep.work, "ms": dict(sorted(times.items(), key=lambda item: item[1])),
        "beside": beside, "left_out": left_out,
    }  # fmt: skip


def _time(sweep: Sweep, functions: Mapping[str, Callable[[], object]], samples: int) -> dict[str, harness.Timing]:
    return harness.measure(functions, cold=sweep.cold, graph=sweep.graph, samples=samples)


def _working(sweep: Sweep, store: Store) -> tuple[dict[Hashable, Callable[[], object]], dict[str, str]]:
    """Return the candidates that run and give the current choice's numbers, and why the others do not count."""
    working: dict[Hashable, Callable[[], object]] = {}
    left_out: dict[str, str] = {}
    wanted: list[torch.Tensor] = []
    first = [config for config in sweep.candidates if config == sweep.current]
    for config in dict.fromkeys([*first, *sweep.candidates]):
        store.at = f"{_name(sweep)}: {config!r}"
        if store.at in store.fatal:
            left_out[repr(config)] = "took its process down"
            continue
        store.save()
        try:
            found = _tensors(sweep.candidates[config]())
        except harness.PEER_ERRORS as error:
            left_out[repr(config)] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            continue
        wanted = wanted or found
        apart = _distance(found, wanted)
        if apart <= APART:
            working[config] = sweep.candidates[config]
        else:
            left_out[repr(config)] = f"WRONG: {apart:.2g} away from the current choice's numbers"
    return working, left_out


def _tensors(found: object) -> list[torch.Tensor]:
    several = found if isinstance(found, tuple | list) else (found,)
    return [x.detach().clone() for x in several if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _distance(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """Return the largest relative distance in the Frobenius norm; infinity where a NaN is."""
    if len(found) != len(wanted):
        return math.inf
    apart = [float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)) for a, b in
             zip(found, wanted, strict=True)]  # fmt: skip
    return max((math.inf if math.isnan(one) else one for one in apart), default=0.0)


def choices_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return, for each part and key of one op, the current configuration and the best: least mean log of time over the
    shape's best time, among those that ran at all shapes of the key."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for shape in record["shapes"].values():
        groups.setdefault((shape["part"], shape["key"]), []).append(shape)
    found = []
    for (part, key), shapes in groups.items():
        common = set.intersection(*(set(shape["ms"]) for shape in shapes))
        if common:
            best, current = min(common, key=lambda config: _cost(config, shapes)), shapes[0]["current"]
            gain = math.exp(_cost(current, shapes) - _cost(best, shapes)) if current in common else None
            found.append(
                {"part": part, "key": key, "current": current, "best": best, "gain": gain, "shapes": len(shapes)}
            )
    return found


def suggestions(record: Mapping[str, Any]) -> list[str]:
    """Return, in words, what choose_config should say."""
    lines = []
    for one in choices_of(record):
        what = f"{one['part']}, {one['key']}: {one['current']}"
        if one["gain"] is None:
            lines.append(f"{what} did not run at every shape -> {one['best']}")
        elif one["gain"] < NOISE:
            lines.append(f"{what} stays, no other is {100 * (NOISE - 1):.0f} % faster")
        else:
            lines.append(f"{what} -> {one['best']}, {one['gain']:.3f}x faster over {one['shapes']} shapes")
    return lines


def _cost(config: str, shapes: Iterable[Mapping[str, Any]]) -> float:
    logs = [math.log(shape["ms"][config] / min(shape["ms"].values())) for shape in shapes]
    return sum(logs) / len(logs)


def table_of(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return Markdown: for each op and shape the current and the best configuration, then what to write."""
    lines = ["| op | shape | current us | best us | gain | share of limit | best | beside us |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for op, record in records.items():
        for name, shape in record["shapes"].items():
            if not shape["ms"]:
                lines.append(f"| {op} | {name} | no candidate ran | | | | | |")
                continue
            best, least = next(iter(shape["ms"].items()))
            now = shape["ms"].get(shape["current"], math.nan)
            limit = record["limits"].get(shape["limit"])
            rate = shape["work"] / least / (1e6 if shape["limit"] == "copy" else 1e9)
            share = f"{100 * rate / limit:.0f} % of {shape['limit']}" if limit else ""
            beside = ", ".join(f"{peer} {1e3 * ms:.1f}" for peer, ms in shape["beside"].items())
            lines.append(
                f"| {op} | {name} | {1e3 * now:.1f} | {1e3 * least:.1f} | {now / least:.3f} | {share} | {best} | {beside} |"
            )
    for op, record in records.items():
        lines += ["", f"`{op}.choose_config`:", ""] + [f"- {line}" for line in suggestions(record)]
        wrong = [f"{name}: {config} {why}" for name, shape in record["shapes"].items()
                 for config, why in shape["left_out"].items() if why.startswith(("WRONG", "took"))]  # fmt: skip
        lines += [f"- **{line}**" for line in [*wrong, *(f"fatal: {one}" for one in record["fatal"])]]
        lines += [f"- not swept, time was up: {name}" for name in record["late"]]
    return lines


if __name__ == "__main__":
    sys.exit(main())
