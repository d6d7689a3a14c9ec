"""How often does *same rounding* accuse halves that are legal? Clean runs with different seeds, every flag counted.

    python benchmarks/bench_false_alarms.py --runs 200

Each run is what `parity run --quick` does for the rounding subject: both halves, both dtypes, fresh cases. Halves are
loaded once, so a run costs seconds. Progress is kept beside the report and a second call goes on where the first one
stopped; it starts again when a calibration or the measuring code has changed: old runs say nothing about new bands.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from math import comb
from pathlib import Path

from tessera_parity.calibration.store import DATA, device_kind, machine
from tessera_parity.loading import load_half
from tessera_parity.result import Check, Verdict
from tessera_parity.subjects.context import DEFAULT, FULL, QUICK, Context
from tessera_parity.subjects.rounding import run

REPORTS = Path(__file__).parent / "reports"
ROOM = DATA.parent.parent
CONFIDENCE = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, help="clean runs in all, those already done included")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--lane", choices=(QUICK, DEFAULT, FULL), default=QUICK)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--state", type=Path, default=REPORTS / "false_alarms.json")
    given = parser.parse_args()
    state = read_state(given.state, fingerprint(given.lane, given.device))
    torch, jax = (load_half(name, device=given.device) for name in ("torch", "jax"))
    context = Context(numpy=load_half("numpy"), torch=torch, jax=jax, lane=given.lane, device=given.device)
    for seed in range(given.first_seed, given.first_seed + given.runs):
        if str(seed) not in state["runs"]:
            state["runs"][str(seed)] = one_run(context, seed)
            given.state.parent.mkdir(parents=True, exist_ok=True)
            given.state.write_text(json.dumps(state, indent=1) + "\n")
            print(line_of(seed, state["runs"][str(seed)]), flush=True)
    print(summary(state))


def one_run(context: Context, seed: int) -> dict[str, object]:
    """Return what one clean run said: streams, flags by name, time."""
    start = time.perf_counter()
    checks = list(run(replace(context, seed=seed)))
    return {
        "checks": len(checks),
        "flagged": [name_of(check) for check in checks if check.verdict is Verdict.DIVERGENCE],
        "inconclusive": [name_of(check) for check in checks if check.verdict is Verdict.INCONCLUSIVE],
        "uncalibrated": sum(check.verdict is Verdict.UNCALIBRATED for check in checks),
        "nearest": max((check.observed / check.limit for check in checks if check.limit > 0.0), default=0.0),
        "seconds": round(time.perf_counter() - start, 2),
    }


def name_of(check: Check) -> str:
    return f"{check.sides[-1]} {check.dtype} {check.name}: {check.detail}"


def line_of(seed: int, outcome: dict[str, object]) -> str:
    flags = outcome["flagged"] or "none"
    return f"seed {seed}: {outcome['checks']} checks, flagged {flags}, {outcome['seconds']} s"


def summary(state: dict) -> str:
    runs = state["runs"].values()
    flagged, inconclusive, uncalibrated = (
        sum(bool(run[what]) for run in runs) for what in ("flagged", "inconclusive", "uncalibrated")
    )
    low, high = exact_interval(flagged, len(runs))
    seconds = sorted(run["seconds"] for run in runs)
    quarter, median, three = (seconds[len(seconds) * k // 4] for k in (1, 2, 3))
    return "\n".join(
        [
            f"false alarms: {flagged} of {len(runs)} clean runs",
            f"{CONFIDENCE:.0%} interval (exact binomial): {low:.3%} to {high:.3%}",
            f"checks a run: {max(run['checks'] for run in runs)}",
            f"inconclusive runs: {inconclusive}, uncalibrated runs: {uncalibrated}",
            f"nearest to a limit in any run: {max(run['nearest'] for run in runs):.2f} of it",
            f"seconds a run: median {median}, quartiles {quarter} and {three}",
            f"machine: {machine()}",
        ]
    )


def exact_interval(hits: int, total: int) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a proportion."""
    tail = 0.5 * (1.0 - CONFIDENCE)
    low = 0.0 if hits == 0 else root(lambda p: 1.0 - below(hits - 1, total, p), tail)
    high = 1.0 if hits == total else root(lambda p: 1.0 - below(hits, total, p), 1.0 - tail)
    return low, high


def below(hits: int, total: int, p: float) -> float:
    """Return P(Binomial(total, p) <= hits)."""
    return sum(comb(total, k) * p**k * (1.0 - p) ** (total - k) for k in range(hits + 1))


def root(rising: Callable[[float], float], level: float) -> float:
    """Return where a function that rises over [0, 1] reaches `level`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if rising(middle) > level else (middle, high)
    return 0.5 * (low + high)


def fingerprint(lane: str, device: str) -> str:
    """Return a digest of what a run depends on: calibrations, the measuring code, lane and device."""
    sources = [*ROOM.glob("rounding*.py"), *ROOM.glob("resync*.py"), ROOM / "sequential.py", ROOM / "variants.py"]
    digest = hashlib.sha256(f"{lane} {device}".encode())
    for path in [
        *sorted(sources),
        *sorted(DATA.glob(f"{device_kind(device)}-*.json")),
        ROOM / "subjects" / "rounding.py",
    ]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def read_state(path: Path, current: str) -> dict:
    if path.exists():
        state: dict = json.loads(path.read_text())
        if state.get("fingerprint") == current:
            return state
        print(f"{path.name}: of other bands or code, starting again")
    return {"fingerprint": current, "runs": {}}


if __name__ == "__main__":
    main()
