"""Run subjects in order, keep every check at once, then prove that the harness can fail and that it does not cry
wolf."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from tessera_parity import environment
from tessera_parity.halves import Half
from tessera_parity.loading import load_half, require
from tessera_parity.report.summary import over_limit
from tessera_parity.result import Check, MutantOutcome, Question, Run, Verdict
from tessera_parity.store import Settings, Store
from tessera_parity.subjects import SUBJECTS, kernels
from tessera_parity.subjects.context import FULL, QUICK, Context, Subject
from tessera_shared.errors import MissingDependency, ParityError

if TYPE_CHECKING:
    from tessera_parity.mutants.engine import Proof

NOT_IN_QUICK = {
    "witness": "not in the quick lane, it imports transformers; try --against hf",
}
"""Subjects that the quick lane leaves out, and why."""

ONLY_BY_NAME = {"kernels": "runs by name alone, Triton's interpreter takes minutes; try parity run kernels"}
"""Subjects that no lane takes by itself, and why."""

RERUN = ("forward", "optimizer", "block", "gradients", "losses", "ops")
"""Subjects that are run again on other seeds to measure false alarms."""

QUICK_SECONDS = 48.0
"""What the quick lane may take in all; planted bugs and clean re-runs share what the subjects leave of it."""

PROOF_SECONDS = (5.0, 12.0)
"""Least and most that the quick lane plants bugs for."""

RERUN_SECONDS = {QUICK: 4.0, "default": 20.0, FULL: 60.0}
RERUN_LIMIT = {QUICK: 12, "default": 60, FULL: 300}

MOST_MISSED = 0.05
"""Share of planted bugs that a run may miss and still call its silence parity."""

Advance = Callable[[str], None]


class Keeper(Protocol):
    """Where checks go as they come: the run's `Store`, or a worker's list."""

    def append(self, check: Check) -> None:
        """Keep one check."""

    def finish(self, subject: str) -> None:
        """Remember that every check of a subject is there."""


def subjects_named(names: Sequence[str]) -> list[Subject]:
    """Return subjects by name, in the order of `SUBJECTS`. Raises `ParityError` with suggestions for an unknown one."""
    known = {subject.name: subject for subject in SUBJECTS}
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=2, cutoff=0.4) or list(known)[:3]
            raise ParityError(
                f"subject = {name!r}: expected one of {', '.join(known)}, because these are what is compared; "
                f"try {' or '.join(close)}"
            )
    return [subject for subject in SUBJECTS if subject.name in names]


def chosen_subjects(
    names: Sequence[str], *, lane: str, against_hf: bool, model: str | None = None
) -> tuple[list[Subject], list[str]]:
    """Return what to run, and one line for every subject that this run leaves out. No name means all of the lane."""
    if "model" in names and model is None:
        raise ParityError(
            "subject = 'model' without --model: expected a preset or directory, because that is what it compares; "
            "try --model nano"
        )
    if names:
        chosen = subjects_named([*names, *(["witness"] if against_hf else [])])
        _check_witness(chosen)
        return chosen, []
    wanted = "witness" if against_hf else None
    left_out = {name: why for name, why in NOT_IN_QUICK.items() if lane == QUICK and name != wanted}
    left_out |= ONLY_BY_NAME | ({"model": "no --model was given"} if model is None else {})
    chosen = [subject for subject in SUBJECTS if subject.name not in left_out]
    return chosen, [f"subject {name}: {why}" for name, why in left_out.items()]


def _check_witness(chosen: Sequence[Subject]) -> None:
    """Raise `MissingDependency` when the witness was asked for and is not installed, before anything is written."""
    if "witness" in [subject.name for subject in chosen] and find_spec("transformers") is None:
        raise MissingDependency(
            "transformers = not installed: expected it for subject witness, because it is the third witness; "
            "try pip install 'tessera-testbed[hf,torch]'"
        )


def installed_halves(settings: Settings) -> tuple[list[str], list[str]]:
    """Return the halves to run, and a line for every one that is left out. Imports neither.

    Raises `MissingDependency` when no framework is installed, or not the one asked for.
    """
    names, left_out = [], []
    for name in ("torch", "jax"):
        if settings.only_half not in (None, name):
            left_out.append(f"half {name}: --only-half {settings.only_half}")
        elif find_spec(name) is None and settings.only_half is None:
            left_out.append(f"half {name}: the package {name} is not installed")
        else:
            require(name)
            names.append(name)
    if not names:
        raise MissingDependency(
            "halves = none: expected torch or jax, because there is nothing to hold against the oracle; "
            "try installing tessera-testbed[torch] or tessera-testbed[jax]"
        )
    return names, left_out


def make_context(settings: Settings, advance: Advance) -> Context:
    """Load the halves that are installed."""
    halves: dict[str, Half | None] = {"torch": None, "jax": None}
    for name in installed_halves(settings)[0]:
        advance(f"loading {name}")
        halves[name] = load_half(name, device=settings.device)
    return Context(
        numpy=load_half("numpy"),
        torch=halves["torch"],
        jax=halves["jax"],
        seed=settings.seed,
        lane=settings.lane,
        cases=settings.cases,
        dtype=settings.dtype,
        device=settings.device,
        model=settings.model,
        advance=advance,
    )


def execute(store: Store, *, advance: Advance, explicit: bool = False, proof: bool = True, num_workers: int = 1) -> Run:
    """Run what `store.settings` asks for and is not finished, then the proof; return the whole run.

    `explicit`: the user named the subjects, so a missing package is an error instead of a line in `left_out`. With
    `num_workers` above 1 subjects and planted bugs run in processes of their own (`workers`). A `KeyboardInterrupt`
    passes through; the store then holds everything that was finished.
    """
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    settings = store.settings
    names, left_out = installed_halves(settings)
    run = Run(
        lane=settings.lane,
        seed=settings.seed,
        environment={},
        checks=store.checks,
        left_out=[*settings.left_out, *left_out],
        started=started,
    )
    todo = [subject for subject in subjects_named(settings.subjects) if subject.name not in store.finished]
    proof = proof and settings.subjects != ("kernels",)  # kernels have planted bugs of their own
    if num_workers > 1:
        from tessera_parity.workers import side_by_side

        side_by_side(store, run, todo, num_workers=num_workers, advance=advance, explicit=explicit, proof=proof)
    else:
        context = make_context(settings, advance)
        for subject in todo:
            run.left_out += run_subject(subject, context, store, explicit=explicit)
        if proof:
            advance("planting bugs")
            keep_proof(prove(context, proof_seconds(settings.lane, time.perf_counter() - clock)), run, store)
            advance("repeating clean runs")
            seconds = rerun_seconds(settings.lane, time.perf_counter() - clock)
            run.false_alarm_runs, run.false_alarm_rate = false_alarms(context, settings, seconds=seconds)
    run.mutants += kernels.outcomes(run.checks)
    if not run.environment:
        run.environment = environment.describe(torch="torch" in names, jax="jax" in names)
    run.seconds = time.perf_counter() - clock
    return run


def run_subject(subject: Subject, context: Context, store: Keeper, *, explicit: bool) -> list[str]:
    """Run one subject into the store; return what it had to leave out."""
    clock = time.perf_counter()
    count = 0
    try:
        for check in subject.run(context):
            now = time.perf_counter()
            store.append(replace(check, seconds=now - clock))
            clock, count = now, count + 1
    except MissingDependency as error:
        if explicit:
            raise
        return [f"subject {subject.name}: {error}"]
    if count == 0:
        raise ParityError(
            f"subject = {subject.name}: gave 0 checks: expected at least one, because agreement about nothing is not parity; "
            "try more cases"
        )
    store.finish(subject.name)
    return []


def proof_seconds(lane: str, spent: float) -> float | None:
    """Return how long to plant bugs after `spent` seconds; None = all of them."""
    if lane != QUICK:
        return None
    least, most = PROOF_SECONDS
    return min(most, max(least, QUICK_SECONDS - spent - RERUN_SECONDS[QUICK]))


def rerun_seconds(lane: str, spent: float) -> float:
    """Return how long to repeat clean runs after `spent` seconds; one is always made."""
    return min(RERUN_SECONDS[lane], QUICK_SECONDS - spent) if lane == QUICK else RERUN_SECONDS[lane]


def prove(
    context: Context, seconds: float | None, halves: Sequence[str] | None = None, share: tuple[int, int] = (0, 1)
) -> "Proof":
    """Plant bugs (`tessera_parity.mutants`), into some halves or all; `share` (k, n) plants every nth from the kth on."""
    from tessera_parity.mutants.engine import prove_all

    return prove_all(context, halves=halves, seconds=seconds, share=share)


def keep_proof(proof: "Proof", run: Run, store: Store) -> None:
    """Add what became of planted bugs, and the clean side of the same battery, to `run`."""
    run.mutants = proof.outcomes
    run.left_out += proof.left_out
    for check in [*proof.clean, _applied(proof.outcomes, proof.not_applied), _caught(proof.outcomes)]:
        store.append(check)


def _caught(outcomes: Sequence[MutantOutcome]) -> Check:
    """A harness that misses what was planted cannot say parity."""
    missed = [outcome.name for outcome in outcomes if not outcome.killed]
    share = len(missed) / max(1, len(outcomes))
    return Check(
        subject="mutants",
        name="planted bugs are caught",
        question=Question.EXACT,
        sides=("harness",),
        verdict=Verdict.PARITY if outcomes and share <= MOST_MISSED else Verdict.INCONCLUSIVE,
        cases=len(outcomes),
        compared=len(outcomes),
        observed=share,
        limit=MOST_MISSED,
        unit="share of planted bugs that nothing noticed",
        detail=", ".join(missed[:5]),
    )


def _applied(outcomes: Sequence[MutantOutcome], not_applied: Sequence[str]) -> Check:
    """A planted bug whose source moved away would count as looked for: the run is red."""
    return Check(
        subject="mutants",
        name="planted bugs apply exactly once",
        question=Question.EXACT,
        sides=("harness",),
        verdict=Verdict.DIVERGENCE if not_applied or not outcomes else Verdict.PARITY,
        cases=len(outcomes),
        compared=len(outcomes),
        observed=float(len(not_applied)),
        limit=0.0,
        unit="patches that no longer fit the source",
        detail=", ".join(not_applied[:5]) or ("" if outcomes else "no bug was planted"),
    )


def quiet(what: str) -> None:
    """Show nothing."""
    del what


def false_alarms(context: Context, settings: Settings, *, seconds: float) -> tuple[int, float | None]:
    """Run clean subjects again on other seeds while the lane's time lasts; return (runs, share flagged).

    One run is one subject on one new seed with a few cases. Nothing is planted, so every flag is a false alarm.
    """
    clock, flagged, runs = time.perf_counter(), 0, 0
    known = {subject.name: subject for subject in SUBJECTS}
    while runs == 0 or (runs < RERUN_LIMIT[settings.lane] and time.perf_counter() - clock < seconds):
        name = RERUN[runs % len(RERUN)]
        again = replace(context, seed=context.seed + 1_000_003 * (runs + 1), cases=1, advance=quiet)
        flagged += any(over_limit(check) > 1.0 for check in known[name].run(again))
        runs += 1
    return runs, flagged / runs if runs else None
