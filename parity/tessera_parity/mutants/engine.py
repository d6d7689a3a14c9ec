"""Plant bugs and see whether the harness notices: fresh patched halves before a generic battery, then localization,
then shrinking.

A probe may kill only after the clean half has passed it in the same run; one that cries wolf is a divergence of its own
(`Proof.clean`) and kills nothing. A patch that does not occur exactly once raises `ParityError`: the run is red.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tessera_parity.halves import Half
from tessera_parity.loading import load_half
from tessera_parity.localize import SURPRISES, Culprit
from tessera_parity.mutants import laws, twins
from tessera_parity.mutants.battery import Observed, Probe
from tessera_parity.mutants.diagnose import Bench, Finding, diagnose, program_of_finding, still_fails
from tessera_parity.mutants.mutant import Mutant
from tessera_parity.repro_program import shrink_program
from tessera_parity.result import Check, MutantOutcome, Question, Verdict
from tessera_parity.shrink import shrink
from tessera_parity.subjects.context import FULL, QUICK, Context
from tessera_shared.errors import ParityError

QUICK_SECONDS = 12.0

QUICK_JAX = 6
"""Planted bugs of the quick lane that need JAX: each compiles what no other has compiled before."""

COSTLY_IN_JAX = {"gradients", "training", "decode", "rounding"}
"""Subjects whose first use compiles hundreds of primitives: more than the quick lane's whole share of seconds."""

SHRINK_ATTEMPTS = 120


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What became of every planted bug, and of the clean halves under the same battery."""

    outcomes: list[MutantOutcome]
    clean: list[Check]
    left_out: list[str] = field(default_factory=list)
    not_applied: list[str] = field(default_factory=list)  # patches that no longer occur exactly once: the run is red

    seconds: float = 0.0  # the whole proof
    clean_seconds: float = 0.0  # of these, the clean halves' pass over the battery before any bug was planted

    @property
    def kill_rate(self) -> float | None:
        """Share of planted bugs that were caught, those that do not apply counted as missed."""
        planted = len(self.outcomes)
        return sum(outcome.killed for outcome in self.outcomes) / planted if planted else None

    @property
    def localization_rate(self) -> float | None:
        """Share of caught bugs whose operation was named at rank 1."""
        caught = [outcome for outcome in self.outcomes if outcome.killed and outcome.expected_op is not None]
        return sum(outcome.named_op == outcome.expected_op for outcome in caught) / len(caught) if caught else None


def catalogue() -> tuple[Mutant, ...]:
    """Return every planted bug."""
    from tessera_parity.mutants import catalogue_harness, catalogue_jax, catalogue_shared, catalogue_torch

    return (
        *catalogue_torch.MUTANTS,
        *catalogue_jax.MUTANTS,
        *catalogue_shared.MUTANTS,
        *catalogue_harness.MUTANTS,
    )


def prove(
    context: Context, *, names: Sequence[str] | None = None, limit: int | None = None, seconds: float | None = None
) -> list[MutantOutcome]:
    """Plant bugs and return what became of each. See `prove_all` for the clean side of the same battery."""
    return prove_all(context, names=names, limit=limit, seconds=seconds).outcomes


def prove_all(
    context: Context,
    *,
    names: Sequence[str] | None = None,
    halves: Sequence[str] | None = None,
    limit: int | None = None,
    seconds: float | None = None,
    share: tuple[int, int] = (0, 1),
) -> Proof:
    """Plant bugs, by name or all, until `limit` or `seconds` run out, in an order that rotates with the seed.

    The quick lane takes as many as fit `QUICK_SECONDS`, the other lanes all; the full lane also shrinks. What was
    left out is said by name and reason. `share` (k, n) takes every nth bug from the kth on, for processes side by side;
    the first of them says what was left out and judges the clean halves. Raises `ParityError` for unknown names.
    """
    first = share[0] == 0
    chosen, left_out = _chosen(context, names, halves)
    chosen, left_out = chosen[share[0] :: share[1]], left_out if first else []
    if seconds is None and context.lane == QUICK and names is None:
        seconds = QUICK_SECONDS
    started = time.perf_counter()
    bench = Bench(context)
    if context.lane != QUICK and first:
        _face_all(bench, halves)
    clean_seconds = time.perf_counter() - started
    outcomes: list[MutantOutcome] = []
    not_applied: list[str] = []
    for index, mutant in enumerate(chosen):
        spent = time.perf_counter() - started
        if (limit is not None and index >= limit) or (seconds is not None and spent > seconds):
            left_out += [f"mutant {rest.name}: the lane's share of mutants was used up" for rest in chosen[index:]]
            break
        context.advance(f"mutant {mutant.name}")
        outcome = _plant(bench, mutant, shrinking=context.lane == FULL)
        if outcome.detail.startswith(_NOT_APPLIED):
            not_applied.append(mutant.name)
        outcomes.append(outcome)
    clean = [_clean_check(bench, half) for half in context.halves if first and bench.clean_results(half)]
    return Proof(
        outcomes=outcomes,
        clean=clean,
        left_out=left_out,
        not_applied=not_applied,
        seconds=time.perf_counter() - started,
        clean_seconds=clean_seconds,
    )


HALVES = ("torch", "jax", "reference", "shared", "harness")
"""Where bugs are planted."""


def check_choice(names: Sequence[str] | None, halves: Sequence[str] | None) -> list[Mutant]:
    """Return the planted bugs that are meant, in the order of `names` or of the catalogue; nothing is loaded.

    Raises `ParityError` for an unknown name or half, and where no bug of `names` is in `halves`.
    """
    every = {mutant.name: mutant for mutant in catalogue()}
    for name in names or ():
        if name not in every:
            raise ParityError(
                f"mutant = {name!r}: expected a name from the catalogue, because a bug that is not there cannot "
                "be planted; try parity mutants without names"
            )
    for half in halves or ():
        if half not in HALVES:
            raise ParityError(
                f"half = {half!r}: expected one of {', '.join(HALVES)}, because bugs are planted there; try "
                f"{HALVES[0]!r}"
            )
    chosen = [every[name] for name in names] if names is not None else list(every.values())
    chosen = [mutant for mutant in chosen if halves is None or mutant.half in halves]
    if names is not None and not chosen:
        raise ParityError(
            f"half = {', '.join(halves or ())}: expected that of a named bug, because no bug is left to plant; try "
            "leaving --half out"
        )
    return chosen


_NOT_APPLIED = "not applied: "


def _chosen(
    context: Context, names: Sequence[str] | None, halves: Sequence[str] | None
) -> tuple[list[Mutant], list[str]]:
    chosen = check_choice(names, halves)
    installed = {half.name for half in context.halves} | {"reference", "shared", "harness"}
    left_out = [f"mutant {m.name}: {m.half} is not installed" for m in chosen if m.half not in installed]
    chosen = [mutant for mutant in chosen if mutant.half in installed]
    if names is None and chosen:
        order = np.random.default_rng((context.seed, 5)).permutation(len(chosen))
        chosen = [chosen[int(index)] for index in order]
    if names is None and context.lane == QUICK:
        compiling = [mutant for mutant in chosen if mutant.half in ("jax", "reference")]
        sample = [mutant for mutant in compiling if not set(mutant.hints) & COSTLY_IN_JAX][:QUICK_JAX]
        left_out += [
            f"mutant {m.name}: the quick lane compiles {QUICK_JAX} in JAX" for m in compiling if m not in sample
        ]
        others = [mutant for mutant in chosen if mutant not in compiling]
        step = len(others) // (len(sample) + 1)
        for index, mutant in enumerate(sample):  # spread out: a slow machine must not spend all its seconds compiling
            others.insert((index + 1) * (step + 1) - 1, mutant)
        chosen = others
    return chosen, left_out


def _face_all(bench: Bench, halves: Sequence[str] | None) -> None:
    """Let the clean halves among those in which bugs are planted face the battery before any bug does."""
    for half in bench.halves:
        if halves is None or half.name in halves:
            for probe in bench.probes:
                bench.clean(probe, half)


def _clean_check(bench: Bench, half: Half) -> Check:
    """Judge a clean half by the probes that planted bugs met: the false-alarm side of the proof."""
    worst, worst_limit, compared, alarms = 0.0, 1.0, 0, []
    faced = bench.clean_results(half)
    for probe, name, difference in faced:
        compared += difference.compared
        if difference.value > probe.limit:
            alarms.append(f"{probe.subject} {probe.op} ({name}: {difference.value:.2g} > {probe.limit:.2g})")
        if difference.value / probe.limit >= worst / worst_limit:
            worst, worst_limit = difference.value, probe.limit
    return Check(
        subject="mutants",
        name=f"clean {half.name} under the battery",
        question=Question.MATHEMATICS,
        sides=("numpy", half.name),
        verdict=Verdict.DIVERGENCE if alarms else Verdict.PARITY,
        cases=len(faced),
        compared=compared,
        observed=worst,
        limit=worst_limit,
        detail="; ".join(alarms),
    )


def _plant(bench: Bench, mutant: Mutant, *, shrinking: bool) -> MutantOutcome:
    started = time.perf_counter()
    killed_by, culprit, detail, layers, tokens = None, None, "", None, None
    try:
        if mutant.half == "harness":
            killed_by, culprit, detail = twins.notice(mutant.patch)
        elif mutant.half == "shared":
            killed_by, culprit, detail = laws.notice(mutant.patch)
        else:
            killed_by, culprit, detail, layers, tokens = _against_battery(bench, mutant, shrinking)
    except ParityError as error:
        if "occurs" not in str(error):
            raise
        detail = f"{_NOT_APPLIED}{error}"
    return MutantOutcome(
        name=mutant.name,
        half=mutant.half,
        kind=mutant.kind,
        killed=killed_by is not None,
        killed_by=killed_by,
        expected_op=mutant.expected_op,
        named_op=None if culprit is None else culprit.op,
        repro_layers=layers,
        repro_tokens=tokens,
        seconds=time.perf_counter() - started,
        detail=detail,
    )


def _against_battery(
    bench: Bench, mutant: Mutant, shrinking: bool
) -> tuple[str | None, Culprit | None, str, int | None, int | None]:
    """Return the subject that noticed, the culprit, a line, and the size of the shrunk case."""
    name = "numpy" if mutant.half == "reference" else mutant.half
    half = load_half(name, device="cpu", patches=(mutant.patch,))
    seen = first_notice(bench, half, hints=mutant.hints)
    if seen is None:
        return None, None, "no probe noticed", None, None
    probe, line = seen
    try:
        finding = diagnose(bench, half, probe)
    except SURPRISES as error:
        return probe.subject, None, f"{line}; localization raised {type(error).__name__}: {error}", None, None
    if finding is None:
        return probe.subject, None, f"{line}; not localized", None, None
    layers = tokens = None
    if shrinking:
        layers, tokens = _shrunk_size(bench, half, finding)
    return probe.subject, finding.culprit, line, layers, tokens


def _shrunk_size(bench: Bench, half: Half, finding: Finding) -> tuple[int | None, int | None]:
    """Return layers and tokens of the smallest case that still shows a bug; nothing is written (`shrinking` does)."""
    if finding.case is not None:
        shrunk = shrink(finding.case, still_fails(bench, half, finding), max_attempts=SHRINK_ATTEMPTS)
        return shrunk.layers, shrunk.tokens
    program = program_of_finding(bench, finding)
    if program is None:
        return None, None
    try:
        return shrink_program(bench.judge_of(half), half, program)[0].size
    except ParityError:  # the probe pools what no program shows by itself
        return None, None


def first_notice(bench: Bench, half: Half, *, hints: Iterable[str] = ()) -> tuple[Probe, str] | None:
    """Return the first probe that departs and a line about it, or None when none does.

    A patched half is held against the oracle; a patched oracle against the halves, which must both disagree with it
    and agree with each other, so that the oracle is who moved.
    """
    hinted = tuple(hints)
    order = sorted(bench.probes, key=lambda probe: probe.subject not in hinted)
    for probe in order:
        if not bench.may_kill(probe, half.name):
            continue
        try:
            observed = probe.observe(half)
        except SURPRISES as error:
            return probe, f"raised {type(error).__name__}: {error}"
        line = _departure(bench, half, probe, observed)
        if line is not None:
            return probe, line
    return None


def _departure(bench: Bench, half: Half, probe: Probe, observed: Observed) -> str | None:
    if half.name != "numpy":
        name, difference = probe.judge(observed, bench.truth(probe))
        return (
            f"{probe.op} {name}: {difference.value:.3g} > {probe.limit:.3g}" if difference.value > probe.limit else None
        )
    witnesses = [probe.observe(other) for other in bench.halves]
    gaps = [probe.judge(observed, witness)[1].value for witness in witnesses]
    apart = max((probe.judge(one, witnesses[0])[1].value for one in witnesses), default=0.0)
    if witnesses and min(gaps) > probe.limit >= apart:
        agreeing = " and ".join(other.name for other in bench.halves)
        return f"{probe.op}: numpy moved, {agreeing} depart from it by {min(gaps):.3g} > {probe.limit:.3g}"
    return None
