"""`parity check PAIR.py`: are two implementations that are not ours the same mathematics, and where not?"""

import platform
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tessera_parity import budget
from tessera_parity.adapter import Pair, Side, open_pair, shown
from tessera_parity.compare import relative_difference
from tessera_parity.environment import jax_side, machine_line, torch_side
from tessera_parity.pair_evidence import Departure, Evidence, Seen, compare_case, plant_twins, split_tap
from tessera_parity.pair_runs import PairCase, draw_case, observe
from tessera_parity.result import Check, MutantOutcome, Question, Run, Verdict
from tessera_shared.errors import ParityError

CASES = 20
SIZES = (8, 1, 21)
"""Sizes that cases cycle through where `inputs` takes one."""
SMALLER = (1, 2, 3, 8)
"""Sizes tried, smallest first, to shrink a departing case."""
REPEATS = 4
"""Cases that both sides run twice: a side that disagrees with itself cannot be judged."""


def check_pair(
    path: Path,
    *,
    seed: int = 0,
    cases: int = CASES,
    case: int | None = None,
    size: int | None = None,
    advance: Callable[[str], None] = lambda _what: None,
) -> Run:
    """Compare both sides of a pair on `cases` generated cases (or on the one numbered `case`, at `size`).

    Raises `ParityError` for an adapter that cannot be used, with its file and line.
    """
    if cases < 1:
        raise ParityError(
            f"cases = {cases}: expected at least 1, because agreement about nothing is not parity; try --cases 20"
        )
    started = time.monotonic()
    run = Run(lane="check", seed=seed, environment={}, started=datetime.now(UTC).isoformat(timespec="seconds"))
    with open_pair(path) as pair:
        if size is not None and not pair.takes_size:
            raise ParityError(
                f"size = {size}: expected inputs(rng, size) in {shown(pair.path)}, because nothing else takes it"
            )
        run.environment = environment(pair)
        evidence = Evidence(pair=pair)
        drawn: list[PairCase] = []
        for index in range(cases) if case is None else [case]:
            advance(f"case {index + 1} of {cases}")
            chosen = size if size is not None else SIZES[index % len(SIZES)] if pair.takes_size else None
            drawn.append(draw_case(pair, seed=seed, index=index, size=chosen))
            compare_case(evidence, drawn[-1])
        compared_s = time.monotonic() - started
        advance("repeats and planted changes")
        repeats = _repeats(run, pair, drawn[:REPEATS], evidence)
        twins = plant_twins(evidence, drawn[0])
        smallest = _shrink(evidence)
        run.checks = [_check(evidence, *key, seen, smallest) for key, seen in evidence.things.items()]
        run.checks += [_lone_taps(evidence)] if evidence.lone_taps and evidence.taps else []
        run.checks += [repeats, _twins_check(pair, twins)]
        run.checks[0] = replace(run.checks[0], seconds=compared_s)
        run.checks[-1] = replace(run.checks[-1], seconds=time.monotonic() - started - compared_s)
        run.mutants = twins
        run.left_out = left_out(pair, evidence)
    run.seconds = time.monotonic() - started
    return run


def environment(pair: Pair) -> dict[str, Any]:
    """Return what both sides run on: what they share, then one mapping a side."""
    common = {"pair": shown(pair.path), "python": platform.python_version(), "machine": machine_line()}
    return common | {side.label: {"framework": side.half.name} | _settings(side.half.name) for side in pair.sides}


def _settings(framework: str) -> dict[str, Any]:
    if framework == "torch":
        return torch_side()
    return jax_side() if framework == "jax" else {"version": np.__version__}


def left_out(pair: Pair, evidence: Evidence) -> list[str]:
    """Return what this check did not ask, by name and with its reason."""
    found = ["same rounding: a pair check asks for the same mathematics, in float64; working dtypes are not run"]
    if not evidence.taps:
        found.append("localization: the sides have no taps of one name, so only outputs were compared")
    if not pair.grad:
        found.append("gradients: the pair file does not say grad = True")
    if pair.reference is None:
        found.append("who moved: the pair file has no reference")
    if not pair.takes_size:
        found.append("smaller inputs: inputs takes no size")
    return found


def _repeats(run: Run, pair: Pair, cases: Sequence[PairCase], evidence: Evidence) -> Check:
    """Run each side twice on the same case; every difference is a false alarm in waiting."""
    limit = evidence.things["pair", "outputs"].limit
    flagged, compared, worst = 0, 0, 0.0
    for case in cases:
        for side in (pair.left, pair.right):
            once, again = observe(pair, side, case), observe(pair, side, case)
            found = [relative_difference(once.outputs[name], again.outputs[name]) for name in once.outputs]
            found += [
                relative_difference(once.taps[name], again.taps[name]) for name in once.taps if name in again.taps
            ]
            compared += sum(difference.compared for difference in found)
            apart = max(difference.value for difference in found)
            flagged, worst = flagged + (not apart <= limit), max(worst, apart)
    run.false_alarm_runs = 2 * len(cases)
    run.false_alarm_rate = flagged / run.false_alarm_runs
    return Check(
        subject="harness", name="each side against itself", question=Question.LAW,
        sides=(pair.left.label, pair.right.label), verdict=Verdict.DIVERGENCE if flagged else Verdict.PARITY,
        cases=run.false_alarm_runs, compared=compared, observed=worst,
        limit=limit, detail="a side gives other numbers when run twice; try fixing its seeds" if flagged else "",
    )  # fmt: skip


def _shrink(evidence: Evidence) -> Departure | None:
    """Return the departure at the smallest size that still shows it; None when nothing departs."""
    lone = next((seen.case for seen in evidence.things.values() if seen.departs and seen.case), None)
    found = evidence.first or (Departure(case=lone) if lone else None)
    if found is None or found.case.size is None:
        return found
    pair = replace(evidence.pair, grad=False) if found.tap else evidence.pair  # a departing tap says enough
    for size in (size for size in SMALLER if size < found.case.size):
        trial = Evidence(pair=pair, compiled=evidence.compiled)
        smaller = draw_case(pair, seed=found.case.seed, index=found.case.index, size=size)
        compare_case(trial, smaller)
        if found.tap is None and any(seen.departs for seen in trial.things.values()):
            return Departure(case=smaller)
        if found.tap is not None and trial.first is not None and trial.first.tap == found.tap:
            return trial.first
    return found


def _check(evidence: Evidence, subject: str, name: str, seen: Seen, smallest: Departure | None) -> Check:
    assert seen.worst is not None, "every compared thing has been compared once"
    layers = range(max(seen.by_layer, default=-1) + 1)
    agreed = Check(
        subject=subject, name=name, question=Question.MATHEMATICS, sides=_labels(evidence.pair, subject, name),
        verdict=Verdict.PARITY, cases=seen.cases, compared=seen.compared, observed=seen.worst.value, limit=seen.limit,
        series={"error_by_layer": [seen.by_layer.get(layer, 0.0) for layer in layers]} if seen.by_layer else {},
    )  # fmt: skip
    return _departed(evidence, agreed, seen, smallest) if seen.departs else agreed


def _departed(evidence: Evidence, agreed: Check, seen: Seen, smallest: Departure | None) -> Check:
    """Return the check as a divergence: where it begins, which side moved, the case to replay."""
    assert seen.worst is not None, "what departs has been compared"
    tap = smallest.tap if smallest and smallest.tap and _explains(smallest.tap, agreed) else None
    layer, op = split_tap(tap) if tap else (seen.layer, None)
    case = smallest.case if smallest and (tap or agreed.subject != "taps") else seen.case
    notes = [f"worst in {seen.note}", seen.worst.reason]
    if agreed.subject == "pair" and evidence.taps and evidence.first is None:
        notes.append(f"departs after {evidence.taps[-1]}, the last tap that both sides have")
    return replace(
        agreed, verdict=Verdict.DIVERGENCE, op=op, layer=layer, case=_replay(evidence.pair, case) if case else None,
        position=f"index {smallest.position if tap and smallest else seen.worst.position}", who=_who(evidence),
        detail="; ".join(filter(None, notes)),
    )  # fmt: skip


def _explains(tap: str, check: Check) -> bool:
    """Whether the first departing tap is what a check is about: outputs and gradients, and among taps its own class."""
    return check.subject != "taps" or split_tap(tap)[1] == check.name


def _labels(pair: Pair, subject: str, name: str) -> tuple[str, str]:
    if subject != "reference":
        return pair.left.label, pair.right.label
    assert pair.reference is not None, "a reference was compared"
    return pair.reference.label, (pair.left if name == "left" else pair.right).label


def _who(evidence: Evidence) -> str | None:
    moved = [side.label for side in _judged(evidence) if evidence.things["reference", side.role].departs]
    return " and ".join(moved) if moved else None


def _judged(evidence: Evidence) -> list[Side]:
    return [evidence.pair.left, evidence.pair.right] if ("reference", "left") in evidence.things else []


def _replay(pair: Pair, case: PairCase) -> dict[str, Any]:
    size = [] if case.size is None else ["--size", str(case.size)]
    words = ["parity", "check", shown(pair.path), "--seed", str(case.seed), "--case", str(case.index), *size]
    return {
        "pair": shown(pair.path),
        "seed": case.seed,
        "index": case.index,
        "size": case.size,
        "command": shlex.join(words),
    }


def _lone_taps(evidence: Evidence) -> Check:
    named = ", ".join(f"{name} ({side})" for name, side in list(evidence.lone_taps.items())[:5])
    return Check(
        subject="taps", name="names", question=Question.EXACT,
        sides=(evidence.pair.left.label, evidence.pair.right.label),
        verdict=Verdict.DIVERGENCE, cases=1, compared=len(evidence.taps) + len(evidence.lone_taps),
        observed=float(len(evidence.lone_taps)), limit=budget.EXACT, unit="taps on one side only",
        detail=f"only one side taps {named}; a tap without a twin compares nothing",
    )  # fmt: skip


def _twins_check(pair: Pair, twins: Sequence[MutantOutcome]) -> Check:
    missed = [twin.name for twin in twins if not twin.killed]
    return Check(
        subject="harness", name="planted changes are caught", question=Question.EXACT,
        sides=(pair.left.label, pair.right.label),
        verdict=Verdict.DIVERGENCE if missed else Verdict.PARITY, cases=len(twins), compared=len(twins),
        observed=float(len(missed)), limit=budget.EXACT, unit="planted changes missed",
        detail=f"this check cannot be trusted: it missed {', '.join(missed[:5])}" if missed else "",
    )  # fmt: skip
