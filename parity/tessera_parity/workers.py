"""Subjects and planted bugs side by side, each in a process of its own: half the time on two cores.

A task is a subject, a proof over some halves, or a stretch of clean re-runs. Workers take the next task when they are
free, the longest first; the parent alone writes the run's directory, a subject at a time. Checks do not depend on who
computed them: every case has its own seed.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tessera_parity.mutants.engine import Proof
from tessera_parity.result import Check, Run
from tessera_parity.store import Settings, Store
from tessera_parity.subjects.context import Context, Subject

LONGEST_FIRST = (
    "trajectory",
    "laws",
    "gradients",
    "losses",
    "rounding",
    "witness",
    "optimizer",
    "decode",
    "native",
    "ops",
)
"""Tasks by time taken, as measured; the rest follow in the order of the lane. Ends even when the long ones start
first."""

PROOFS: tuple[tuple[str, ...], ...] = (("jax",), ("torch", "reference", "shared", "harness"))
"""Halves whose planted bugs make one task; JAX compiles for each of its own and takes as long as the rest."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one worker does next."""

    kind: str  # subject | proof | alarms
    subject: str = ""
    halves: tuple[str, ...] = ()
    explicit: bool = False


@dataclass(kw_only=True)
class Done:
    """What came of a task."""

    task: Task
    checks: list[Check] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    proof: Proof | None = None
    alarms: tuple[int, float | None] = (0, None)

    def append(self, check: Check) -> None:
        """Keep one check."""
        self.checks.append(check)

    def finish(self, subject: str) -> None:
        """A worker writes nothing; the parent remembers."""


def side_by_side(
    store: Store,
    run: Run,
    todo: Sequence[Subject],
    *,
    num_workers: int,
    advance: Callable[[str], None],
    explicit: bool,
    proof: bool,
) -> None:
    """Run subjects, the proof and the clean re-runs in `num_workers` processes, into `store` and `run`."""
    from tessera_parity.runner import keep_proof

    parts: list[Proof] = []
    names, tasks = [subject.name for subject in todo], _tasks(todo, explicit=explicit, proof=proof)
    for done in _finished(store.settings, tasks, num_workers, advance):
        run.left_out += done.left_out
        for check in done.checks:
            store.append(check)
        if done.task.kind == "subject" and done.checks:
            store.finish(done.task.subject)
        if done.proof is not None:
            parts.append(done.proof)
        if done.task.kind == "alarms":
            run.false_alarm_runs, run.false_alarm_rate = done.alarms
    order = {name: place for place, name in enumerate([*store.finished, *names])}
    run.checks.sort(key=lambda check: order.get(check.subject, len(order)))
    if proof:
        keep_proof(_joined(parts), run, store)


def _tasks(todo: Sequence[Subject], *, explicit: bool, proof: bool) -> list[Task]:
    names = [subject.name for subject in todo]
    names.sort(key=lambda name: LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST))
    tasks = [Task(kind="subject", subject=name, explicit=explicit) for name in names]
    if proof:
        tasks += [Task(kind="proof", halves=halves) for halves in PROOFS] + [Task(kind="alarms")]
    return tasks


def _finished(
    settings: Settings, tasks: Sequence[Task], num_workers: int, advance: Callable[[str], None]
) -> Iterator[Done]:
    """Yield finished tasks as they come. A worker's error is raised here; an interrupt ends the workers first."""
    spawn = multiprocessing.get_context("spawn")  # a forked process would share the frameworks' thread pools
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: workers inherit that they ignore it
    try:
        pool = spawn.Pool(num_workers, initializer=_begin, initargs=(settings, time.time()))
    finally:
        signal.signal(signal.SIGINT, heard)
    with pool:
        for number, done in enumerate(pool.imap_unordered(_perform, tasks), 1):
            what = done.task.subject or done.task.kind
            advance(f"{number} of {len(tasks)} done, last {what}")
            yield done


_CONTEXT: list[tuple[Context, Settings, float]] = []
"""What this worker process was started with; empty in every other process."""


def _begin(settings: Settings, began: float) -> None:
    """Start a worker: load the halves once."""
    from tessera_parity.processes import settle_process
    from tessera_parity.runner import make_context, quiet

    settle_process()
    _CONTEXT[:] = [(make_context(settings, quiet), settings, began)]


def _perform(task: Task) -> Done:
    from tessera_parity import runner

    context, settings, began = _CONTEXT[0]
    done = Done(task=task)
    spent = time.time() - began
    if task.kind == "subject":
        (subject,) = runner.subjects_named([task.subject])
        done.left_out = runner.run_subject(subject, context, done, explicit=task.explicit)
    elif task.kind == "proof":
        wanted = [name for name in task.halves if _is_here(context, name)]
        if wanted:
            done.proof = runner.prove(context, runner.proof_seconds(settings.lane, spent), wanted)
    else:
        seconds = runner.rerun_seconds(settings.lane, spent)
        done.alarms = runner.false_alarms(context, settings, seconds=seconds)
    return done


def _is_here(context: Context, half: str) -> bool:
    return {"torch": context.torch, "jax": context.jax}.get(half, context.numpy) is not None


def _joined(parts: Sequence[Proof]) -> Proof:
    return Proof(
        outcomes=[outcome for part in parts for outcome in part.outcomes],
        clean=[check for part in parts for check in part.clean],
        left_out=[line for part in parts for line in part.left_out],
        not_applied=[name for part in parts for name in part.not_applied],
        seconds=sum(part.seconds for part in parts),
        clean_seconds=sum(part.clean_seconds for part in parts),
    )
