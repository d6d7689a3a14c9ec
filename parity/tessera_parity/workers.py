"""Subjects and planted bugs side by side, each in a process of its own: half the time on two cores.

A task is a subject, a proof over some halves, or a stretch of clean re-runs. Workers take the next task when they are
free, the longest first; the parent alone writes the run's directory, a subject at a time. Checks do not depend on who
computed them: every case has its own seed.
"""

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any, ClassVar

from tessera_parity.mutants.engine import Proof
from tessera_parity.result import Check, Run
from tessera_parity.store import Settings, Store
from tessera_parity.subjects.context import QUICK, Context, Subject
from tessera_shared.errors import ParityError

LONGEST_FIRST = (
    "kernels",
    "laws",
    "gradients",
    "witness",
    "rounding",
    "losses",
    "trajectory",
    "optimizer",
    "decode",
    "ops",
    "forward",
)
"""Subjects by time taken, as measured over the lanes; the rest follow in the order of the lane. Ends even when the long
ones start first."""

TOGETHER = {"native": "laws"}
"""Subjects that one worker takes after another: both need torch's compiler imported, which takes 3 s, once is enough."""

COMPILING = ("jax", "reference")
OTHERS = ("torch", "shared", "harness")
"""Halves whose planted bugs are tasks apart. JAX compiles for each of the first: they cannot use up the seconds of the
many others, and where all are planted every worker takes a share, because they are the longest task of all."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one worker does next."""

    kind: str  # subject | proof | alarms
    subjects: tuple[str, ...] = ()
    halves: tuple[str, ...] = ()
    share: tuple[int, int] = (0, 1)
    explicit: bool = False


@dataclass(kw_only=True)
class Done:
    """What came of a task."""

    task: Task
    checks: list[Check] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    proof: Proof | None = None
    alarms: tuple[int, float | None] = (0, None)
    environment: dict[str, Any] = field(default_factory=dict)  # of the process that computed it

    def append(self, check: Check) -> None:
        """Keep one check."""
        self.checks.append(check)

    def finish(self, subject: str) -> None:
        """Remember that every check of a subject is there; the parent writes it down."""
        self.finished.append(subject)


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
    names = [subject.name for subject in todo]
    shares = (1 if store.settings.lane == QUICK else num_workers) if proof else 0
    tasks = _tasks(todo, explicit=explicit, shares=shares)
    for done in _finished(store, tasks, num_workers, advance):
        run.left_out += done.left_out
        run.environment = done.environment
        for check in done.checks:
            store.append(check)
        for name in done.finished:
            store.finish(name)
        if done.proof is not None:
            parts.append(done.proof)
        if done.task.kind == "alarms":
            run.false_alarm_runs, run.false_alarm_rate = done.alarms
    order = {name: place for place, name in enumerate([*store.finished, *names])}
    run.checks.sort(key=lambda check: order.get(check.subject, len(order)))
    if proof:
        keep_proof(_joined(parts), run, store)


def _tasks(todo: Sequence[Subject], *, explicit: bool, shares: int) -> list[Task]:
    """Return what workers take, longest first; planted bugs that compile come in `shares` parts, 0 = none are planted."""
    names = [subject.name for subject in todo]
    names.sort(key=lambda name: LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST))
    after = {name: [late for late in names if TOGETHER.get(late) == name] for name in names}
    alone = [name for name in names if TOGETHER.get(name) not in names]
    tasks = [Task(kind="subject", subjects=(name, *after[name]), explicit=explicit) for name in alone]
    if shares:
        tasks += [Task(kind="proof", halves=COMPILING, share=(part, shares)) for part in range(shares)]
        tasks += [Task(kind="proof", halves=OTHERS), Task(kind="alarms")]
    return tasks


def _finished(store: Store, tasks: Sequence[Task], num_workers: int, advance: Callable[[str], None]) -> Iterator[Done]:
    """Yield finished tasks as they come. A worker's error is raised here; whatever ends this early ends the workers."""
    finished = 0
    with _workers(store.settings, num_workers) as pool:
        for future in as_completed([pool.submit(_perform, task) for task in tasks]):
            if isinstance(future.exception(), BrokenProcessPool):
                continue  # of this task and all that were not finished; what was is still to be kept
            done, finished = future.result(), finished + 1
            advance(f"{finished} of {len(tasks)} done, last {', '.join(done.task.subjects) or done.task.kind}")
            yield done
    if finished < len(tasks):
        raise WorkerLost(
            f"workers = {num_workers}: expected them to live to the end, because what one computes goes with it, but one "
            f"was ended from outside (as the system does when memory runs out) with {finished} of {len(tasks)} tasks done; "
            f"try parity run --resume {store.directory} --workers 1"
        )


class WorkerLost(ParityError):
    """A worker process was ended from outside. What was finished is kept."""

    exit_code: ClassVar[int] = 4


@contextmanager
def _workers(settings: Settings, num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool whose processes, and what they have started, are gone afterwards, whatever they are doing."""
    before = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")  # a forked process would share the frameworks' thread pools
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_begin, initargs=(settings, time.time()))
    started: set[BaseProcess] = set()
    try:
        _start(pool)
        started = set(multiprocessing.active_children()) - before
        yield pool
    finally:
        for process in started | (set(multiprocessing.active_children()) - before):
            process.terminate()
            if process.pid is not None:
                with suppress(ProcessLookupError, PermissionError):  # it has no group yet, or none is left in it
                    os.killpg(process.pid, signal.SIGTERM)
        pool.shutdown(cancel_futures=True)


def _start(pool: ProcessPoolExecutor) -> None:
    """Start the processes. Ctrl-C is the parent's: they inherit that they ignore it."""
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pool.submit(os.getpid)  # the first task starts them all
    finally:
        signal.signal(signal.SIGINT, heard)


_STARTED: list[tuple[Settings, float]] = []
_LOADED: list[tuple[Context, dict[str, Any]]] = []
"""What this worker process was started with and what it has loaded; empty in every other process."""


def _begin(settings: Settings, began: float) -> None:
    """Start a worker. Nothing that can fail is done here: an initializer's error would be a lost worker."""
    os.setpgrp()  # one signal then reaches it and what it starts
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _STARTED[:] = [(settings, began)]


def _leave_with_parent() -> None:
    """End this process and what it started when its parent is gone: nobody would hear of what it finds."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def _loaded(settings: Settings) -> tuple[Context, dict[str, Any]]:
    """Return the halves and the environment that they run in, made once a process."""
    from tessera_parity import environment
    from tessera_parity.processes import settle_process
    from tessera_parity.runner import make_context, quiet

    if not _LOADED:
        settle_process()
        context = make_context(settings, quiet)
        facts = environment.describe(torch=context.torch is not None, jax=context.jax is not None)
        _LOADED.append((context, facts))
        gc.collect()
        gc.freeze()  # a collection need not walk over what the frameworks hold for good
    return _LOADED[0]


def _perform(task: Task) -> Done:
    from tessera_parity import runner

    (settings, began) = _STARTED[0]
    context, facts = _loaded(settings)
    done = Done(task=task, environment=facts)
    if task.kind == "subject":
        for subject in runner.subjects_named(task.subjects):
            done.left_out += runner.run_subject(subject, context, done, explicit=task.explicit)
    elif task.kind == "proof":
        wanted = [name for name in task.halves if _is_here(context, name)]
        if wanted:
            seconds = runner.proof_seconds(settings.lane, time.time() - began)
            done.proof = runner.prove(context, seconds, wanted, task.share)
    else:
        seconds = runner.rerun_seconds(settings.lane, time.time() - began)
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
