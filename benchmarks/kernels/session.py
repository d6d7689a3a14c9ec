"""One command for one call on a lent GPU: parts in boxes of seconds, kept after every op, continued by the next call.

    python benchmarks/kernels/session.py doctor check+sanitize=200 time --seconds 580
    python benchmarks/kernels/session.py check:rope,adamw=90 time:rope,adamw profile --seconds 400
    python benchmarks/kernels/session.py time --dry --only rope --out DIR        the same on a CPU, numbers mean nothing

Parts: `doctor` what is on the machine, `check` every configuration against float64, `sanitize` the same cases under memcheck,
`time` every row beside its peers, `sweep` which configuration is fastest, `profile` Nsight Compute's counters. `a+b` run at
the same time; `part:op,op` does these ops alone, again if they are done. `time` and `sweep` first compile everything in many
processes. No op is begun that its box has no time for, one
under way is stopped when the box ends, and `session.json`, `chosen.json` and `report.md` in --out are written after every op;
a call that finds an earlier `session.json` (in --out, else in --from) goes on from there. Exit code: 0 all that ran was
right, 1 something was not, 2 wrong arguments, 4 no GPU, 130 interrupted. README.md beside this has the order for 30 minutes.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parents[1] / room) for room in ("shared", "kernels"))]

from boxed import Box, Job, Record, run_jobs  # noqa: E402
from session_parts import PARTS, Part, Setting, choices, is_warm, mark_warm  # noqa: E402

WARM_SHARE = 0.4
"""Most of a part's box that compiling may take: what is not compiled by then is when it is timed."""

RETRIES = 2
"""Further tries of an op of which a peer or a candidate took the process down; each leaves one more out."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Parts that run at the same time, and their seconds; None = what is left."""

    parts: tuple[str, ...]
    ops: tuple[str, ...]  # none = all
    seconds: float | None


class UsageError(Exception):
    """What is wrong with the command line, in a line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; print the report."""
    options = _options(arguments)
    try:
        steps = _steps(options.step)
        only = _known(
            tuple(word for word in options.only.split(",") if word), [name for step in steps for name in step.parts]
        )
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    if options.plan:
        print("\n".join(_plan(steps, only)))
        return 0
    if not options.dry and not _has_gpu():
        print("gpu = none: expected an NVIDIA GPU that torch can see, because kernels are timed on it; try --dry",
              file=sys.stderr)  # fmt: skip
        return 4
    state, box = State.load(options.out, options.earlier), Box(options.seconds)
    with tempfile.TemporaryDirectory(prefix="tessera-session-") as folder:
        setting = Setting(dry=options.dry, folder=Path(folder), lane=options.lane)
        for step in steps:
            inner = box.part(step.seconds if step.seconds is not None else box.left())
            again = options.again or bool(step.ops)
            runner = Runner(
                state=state, setting=setting, box=inner, only=step.ops or only, again=again, workers=options.workers
            )
            runner.run(step)
    state.save()
    print(state.report())
    return 1 if state.problems() else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = os.environ.get("OUT") or ".session"
    parser.add_argument("step", nargs="+", help=f"PART[+PART...][:OP,OP][=SECONDS], of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=570.0, help="of the whole call; nothing runs longer")
    parser.add_argument("--only", default="", help="names of ops with commas between; default: all of each part")
    parser.add_argument("--out", type=Path, default=Path(out), help="default: $OUT, else .session")
    parser.add_argument("--from", dest="earlier", type=Path, default=Path(".session"), help="an earlier call's --out")
    parser.add_argument("--again", action="store_true", help="do what is done already once more")
    parser.add_argument("--lane", default="quick", choices=("quick", "default", "full"), help="of check and sanitize")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)),
                        help="processes at a time where nothing is timed")  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="on a CPU: tiny shapes, Triton's interpreter, no tools")
    parser.add_argument("--plan", action="store_true", help="only print what would run and the seconds it should take")
    return parser.parse_args(arguments)


def _steps(words: Sequence[str]) -> list[Step]:
    steps = []
    for word in words:
        names, _, seconds = word.partition("=")
        names, _, ops = names.partition(":")
        parts = tuple(names.split("+"))
        for name in parts:
            if name not in PARTS:
                raise UsageError(
                    f"part = {name!r}: expected one of {', '.join(PARTS)}, because a session has these; try --plan"
                )
        if len(parts) > 1 and any(PARTS[name].timed for name in parts):
            raise UsageError(f"step = {word!r}: expected timed parts alone, because what runs beside them would be in their times; "
                             "try them as steps of their own")  # fmt: skip
        try:
            asked = _known(tuple(op for op in ops.split(",") if op), parts)
            steps.append(Step(parts=parts, ops=asked, seconds=float(seconds) if seconds else None))
        except ValueError:
            raise UsageError(
                f"step = {word!r}: expected PART=SECONDS, because {seconds!r} is no number; try {names}=120"
            ) from None
    return steps


def _known(asked: tuple[str, ...], parts: Sequence[str]) -> tuple[str, ...]:
    """Return the ops asked for. Raises `UsageError` for one that no part knows."""
    known = sorted({op for name in parts for op in PARTS[name].ops})
    for op in asked:
        if op not in known:
            raise UsageError(
                f"op = {op!r}: expected one of {', '.join(known)}, because {', '.join(parts)} know no other"
            )
    return asked


def _plan(steps: Sequence[Step], only: Sequence[str]) -> list[str]:
    lines = []
    for step in steps:
        for name in step.parts:
            part = PARTS[name]
            wanted = step.ops or only
            ops = [op for op in part.ops if not wanted or op in wanted or name == "doctor"]
            how = "one after the other" if part.timed else "at the same time"
            told = ", ".join(f"{op} {part.expected(op):.0f}" for op in ops)
            lines.append(f"{name}: {sum(map(part.expected, ops)):.0f} process-seconds expected, {how}: {told}")
    return lines


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class State:
    """What all calls so far have found, by part and op."""

    def __init__(self, folder: Path, parts: dict[str, dict[str, Record]]) -> None:
        self.folder, self.parts = folder, parts

    @classmethod
    def load(cls, out: Path, earlier: Path) -> "State":
        """Return what `out` holds, else what `earlier` holds, else nothing."""
        for folder in (out, earlier):
            path = folder / "session.json"
            if path.exists():
                return cls(out, json.loads(path.read_text(encoding="utf-8")))
        return cls(out, {})

    def known(self, part: str, op: str) -> Record:
        """Return an op's record, or an empty one."""
        return self.parts.get(part, {}).get(op, {})

    def keep(self, part: str, op: str, record: Record) -> None:
        """Remember a record, on disk too."""
        self.parts.setdefault(part, {})[op] = record | {"at_utc": f"{datetime.now(UTC):%Y-%m-%d %H:%M}"}
        self.save()

    def save(self) -> None:
        """Write the state, the sweeps' answer and the report; each file is whole at any time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / "session.json", json.dumps(self.parts))
        _write(self.folder / "chosen.json", json.dumps(choices(self.parts.get("sweep", {})), indent=1))
        _write(self.folder / "report.md", self.report())

    def report(self) -> str:
        """Return everything as Markdown, for the eyes and for `benchmarks/reports`."""
        lines = [f"# Kernels: session of {datetime.now(UTC):%Y-%m-%d}"]
        for name, part in PARTS.items():
            if self.parts.get(name):
                lines += ["", f"## {name}", "", *part.report(self.parts[name])]
        return "\n".join(lines) + "\n"

    def problems(self) -> list[str]:
        """Return what went wrong, in lines; a shape that time did not allow is no problem."""
        return [f"{part} {op}: {record['problem']}" for part, records in self.parts.items()
                for op, record in records.items() if record.get("problem")]  # fmt: skip


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


@dataclass(frozen=True, kw_only=True)
class Runner:
    """One step under way."""

    state: State
    setting: Setting
    box: Box
    only: Sequence[str]
    again: bool
    workers: int

    def run(self, step: Step) -> None:
        """Do what is not done yet."""
        jobs: list[Job] = []
        for name in step.parts:
            part = PARTS[name]
            ops = [op for op in part.ops if self._is_wanted(name, op)]
            if part.timed:
                self._warm(name, part, ops)
                self._measure(name, part, ops)
            else:
                jobs += [part.job(op, self.setting, self.state.known(name, op)) for op in ops]
        left_out = run_jobs(jobs, workers=1 if self.setting.dry else self.workers, box=self.box, keep=self._keep)
        self._say_late(left_out)

    def _is_wanted(self, name: str, op: str) -> bool:
        if name == "doctor":
            return True
        done = bool(self.state.known(name, op).get("done"))
        return (not self.only or op in self.only) and (self.again or not done)

    def _warm(self, name: str, part: Part, ops: Sequence[str]) -> None:
        """Compile in many processes what is about to be timed."""
        cold = [op for op in ops if self.setting.dry or self.again or not is_warm(name, op)]
        jobs = [job for op in cold for job in part.warm(op, self.setting)]
        if not jobs:
            return
        inner = self.box.part(WARM_SHARE * self.box.left())
        clock, count = time.monotonic(), 1 if self.setting.dry else self.workers
        left_out = run_jobs(jobs, workers=count, box=inner, keep=lambda job, record: None)
        print(f"{name}: {len(jobs) - len(left_out)} of {len(jobs)} processes compiled in {time.monotonic() - clock:.0f} s",
              file=sys.stderr, flush=True)  # fmt: skip
        if not left_out and not self.setting.dry:
            for op in cold:
                mark_warm(name, op)

    def _measure(self, name: str, part: Part, ops: Sequence[str]) -> None:
        """Time op by op; one that a peer or a candidate took down is tried again without it."""
        known = {op: {} if self.again else self.state.known(name, op) for op in ops}
        for _ in range(1 + RETRIES):
            jobs = [part.job(op, self.setting, known[op]) for op in ops]
            left_out = run_jobs(jobs, workers=1, box=self.box, keep=self._keep)
            self._say_late(left_out)
            ops = [
                op for op in ops if self.state.known(name, op).get("again") and op not in {job.name for job in left_out}
            ]
            known = {op: self.state.known(name, op) for op in ops}
            if not ops:
                return

    def _keep(self, job: Job, record: Record) -> None:
        self.state.keep(job.part, job.name, record)

    def _say_late(self, jobs: Sequence[Job]) -> None:
        if jobs:
            print(
                f"not begun, time is up: {', '.join(f'{job.part} {job.name}' for job in jobs)}",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept: the same command goes on from there", file=sys.stderr)
        sys.exit(130)
