"""Work in boxes of seconds: processes that end with all they started, and jobs of which none is begun too late."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What became of a process."""

    code: int | None  # None: it was stopped when its seconds were over
    out: str
    err: str
    seconds: float

    def problem(self) -> str:
        """Return what went wrong, in a line, or nothing."""
        if self.code is None:
            return f"stopped after {self.seconds:.0f} s"
        lines = self.err.strip().splitlines() or ["no message"]
        return "" if self.code == 0 else f"exit status {self.code}: {lines[-1][:200]}"


def run_boxed(
    command: Sequence[str], *, environment: Mapping[str, str], seconds: float, stopped: Event | None = None
) -> Ran:
    """Run a command for at most `seconds`, or until `stopped` is set, then end it with every process that it started."""
    clock = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, env=dict(environment), stdout=out, stderr=err, start_new_session=True)
        code: int | None = None
        try:
            while (
                code is None and (left := clock + seconds - time.monotonic()) > 0 and not (stopped and stopped.is_set())
            ):
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=min(left, 0.2))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        return Ran(code=code, out=out.read(), err=err.read(), seconds=time.monotonic() - clock)


def told_until(environment: Mapping[str, str], seconds: float) -> dict[str, str]:
    """Return the environment of a process that is to begin nothing when its `seconds` are nearly over."""
    margin = min(15.0, 0.2 * seconds)  # for what is under way then
    return dict(environment) | {"TESSERA_BENCH_UNTIL": str(time.time() + seconds - margin)}


class Box:
    """So many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that remain, never below 0."""
        return max(0.0, self.until - time.monotonic())

    def part(self, seconds: float) -> "Box":
        """Return a box within this one."""
        return Box(min(seconds, self.left()))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process of a part: what to run, for how long at most, and how to read what it leaves."""

    part: str
    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    limit: float  # seconds that it may take
    least: float = 5.0  # it is not begun with fewer seconds left
    read: Callable[[Ran], Record]


def run_jobs(jobs: Sequence[Job], *, workers: int, box: Box, keep: Callable[[Job, Record], None]) -> list[Job]:
    """Run jobs in order, `workers` at a time, keep each record at once; return the jobs that were not begun.

    An interrupt ends those under way, without a record, and begins no other.
    """
    lock, left_out, stopped = Lock(), [], Event()

    def one(job: Job) -> None:
        if stopped.is_set() or box.left() < job.least:
            left_out.append(job)
            return
        seconds = min(job.limit, box.left())
        ran = run_boxed(job.command, environment=told_until(job.environment, seconds), seconds=seconds, stopped=stopped)
        if stopped.is_set():
            return
        try:
            record = job.read(ran)
        except (ValueError, LookupError, TypeError, OSError) as error:  # half-written output must not end the others
            record = {"problem": f"unreadable: {type(error).__name__}: {error}; {ran.problem()}"}
        record |= {"seconds": round(ran.seconds, 1)}
        with lock:
            keep(job, record)
            _say(job, record)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for future in [pool.submit(one, job) for job in jobs]:
                future.result()
        finally:
            stopped.set()  # after an interrupt: leaving the pool waits for its threads
    return left_out


def _say(job: Job, record: Record) -> None:
    told = record.get("told") or record.get("problem") or "done"
    print(f"{job.part:9} {job.name:28} {record['seconds']:6.0f} s  {told}", file=sys.stderr, flush=True)
