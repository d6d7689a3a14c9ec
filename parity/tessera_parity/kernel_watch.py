"""One op's worker process (`kernel_worker`), watched: what it said, and why it ended when it did not end by itself.

A planted bug may make a GPU wait for ever or fault, after which the process answers nothing. That is a way to be caught:
it is written down as such, and a new process goes on with the next bug. Anywhere else the op is red, with the last case
that it was at.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WORKER_SECONDS = {"quick": 300.0, "default": 900.0, "full": 1800.0}
"""After this a worker is stopped and its op is red: it compiles without end."""

SILENT_SECONDS = {"cuda": 90.0}
"""A worker on a GPU that says no new case for so long hangs; none was silent so long in a green lane on an H200, twelve of
them compiling side by side. The interpreter and the emulator end by themselves."""

RESTARTS = 5
"""Processes after the first that an op gets, each after a bug that a GPU did not come back from."""

NAME = "bug "
"""Begins what a worker says of a bug that it plants: "bug 3: the new line"."""


@dataclass(kw_only=True)
class Report:
    """What the processes of one op said."""

    op: str
    fuzzed: dict[str, Any] | None = None
    bugs: list[dict[str, Any]] = field(default_factory=list)
    last: str = ""  # the case or bug that it was at
    ended: str = ""  # why there is nothing more; empty = it finished
    gone: bool = False  # the device did not answer any more, or was lost

    def read(self, text: str) -> None:
        """Take in what a process printed; the last line of a killed one may be half a line."""
        for line in text.rpartition("\n")[0].splitlines():
            if not line.startswith("{"):
                continue  # what an interpreted kernel printed
            said = json.loads(line)
            if said["kind"] == "at":
                self.last = said["what"]
            elif said["kind"] == "fuzzed":
                self.fuzzed = said["what"]
            elif said["kind"] == "bug":
                self.bugs.append(said["what"])
            elif said["kind"] == "lost":
                self.ended, self.gone = f"the device was lost ({said['what']})", True

    def caught_by_its_end(self) -> bool:
        """Write down the bug that the device did not come back from, if it was at one; the report is open again."""
        from tessera_parity.kernel_fuzz import Bug

        name = f"{NAME}{self.planted + 1}: "
        if not (self.gone and self.fuzzed and self.last.startswith(name)):
            return False
        what = self.last.removeprefix(name)
        bug = Bug(op=self.op, number=self.planted + 1, what=what, caught=True, by=self.ended, seconds=0.0)
        self.bugs.append(asdict(bug))
        self.ended, self.gone = "", False
        return True

    @property
    def planted(self) -> int:
        """Bugs whose end is known."""
        return len(self.bugs)


def work(name: str, *, device: str, lane: str, seed: int = 0, cases: int | None = None) -> Report:
    """Run one op's worker to its end, in as many processes as its planted bugs take, and return what it said."""
    command = [sys.executable, "-m", "tessera_parity.kernel_worker", name, "--device", device]
    command += ["--seed", str(seed), "--lane", lane]
    command += ["--cases", str(cases)] if cases is not None else []
    silence = SILENT_SECONDS.get(device.partition(":")[0])
    report, until = Report(op=name), time.monotonic() + WORKER_SECONDS[lane]
    for _ in range(1 + RESTARTS):
        _run(report, [*command, "--bugs-after", str(report.planted)], until, silence)
        if not report.caught_by_its_end():
            return report
    report.ended = f"{1 + RESTARTS} processes were lost to planted bugs"
    return report


def _run(report: Report, command: list[str], until: float, silence: float | None) -> None:
    """Run one process and read what it said."""
    rooms = os.pathsep.join(entry for entry in sys.path if entry)
    environment = os.environ | {"PYTHONPATH": rooms, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="tessera-kernels-") as folder:
        said, wrong = Path(folder) / "said", Path(folder) / "wrong"
        with said.open("w") as out, wrong.open("w") as err:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
            try:
                stopped = wait(process, said, until=until, silence=silence)
            finally:
                process.kill()
                process.wait()
        report.read(said.read_text(encoding="utf-8"))
        if stopped:
            report.ended, report.gone = stopped, silence is not None and stopped.startswith("silent")
        elif process.returncode != 0 and not report.ended:
            lines = wrong.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
            report.ended = f"exit status {process.returncode}: {lines[-1][:300]}"


def wait(process: subprocess.Popen[bytes], said: Path, *, until: float, silence: float | None) -> str:
    """Wait for a process and return why it must be stopped, empty when it ended by itself.

    `until` is a time of the monotonic clock; `silence` is how many seconds its output `said` may stay as it is.
    """
    size, since, began = -1, time.monotonic(), time.monotonic()
    while True:
        try:
            process.wait(0.2)
            return ""
        except subprocess.TimeoutExpired:
            now, grown = time.monotonic(), said.stat().st_size
        if grown != size:
            size, since = grown, now
        if silence is not None and now - since > silence:
            return f"silent for {silence:g} s: it hangs"
        if now > until:
            return f"stopped after {now - began:.0f} s"
