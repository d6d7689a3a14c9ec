"""A worker process that hangs, faults or is stopped: what its op's report says, and that a planted bug's end is no op's."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tessera_parity import kernel_watch, kernel_worker
from tessera_parity.kernel_watch import RESTARTS, Report, wait, work

FUZZED = {"op": "rope", "failure": ""}


def lines(*said: tuple[str, object]) -> str:
    return "".join(json.dumps({"kind": kind, "what": what}) + "\n" for kind, what in said)


def bug(number: int) -> dict[str, object]:
    return {"op": "rope", "number": number, "what": "a", "caught": True, "by": "q", "seconds": 1.0}


def test_a_worker_is_read_up_to_the_last_whole_line() -> None:
    report = Report(op="rope")
    report.read(lines(("at", "Case(1)")) + "printed by a kernel\n" + lines(("lost", "illegal")) + '{"kind": "at", "wh')
    assert (report.last, report.ended, report.fuzzed) == ("Case(1)", "the device was lost (illegal)", None)


@pytest.mark.parametrize(
    ("said", "ended", "gone", "caught"),
    [
        ([("fuzzed", FUZZED), ("at", "bug 1: b")], "silent for 90 s: it hangs", True, [1]),
        ([("fuzzed", FUZZED), ("at", "bug 1: a"), ("bug", bug(1)), ("at", "bug 2: b")], "silent", True, [1, 2]),
        ([("fuzzed", FUZZED), ("at", "bug 1: b"), ("lost", "illegal memory access")], "", False, [1]),
        ([("fuzzed", FUZZED), ("at", "bug 1: a"), ("bug", bug(1))], "silent", True, [1]),  # between two bugs: nobody's
        ([("at", "Case(1)")], "silent", True, []),
        ([("at", "Case(1)"), ("lost", "illegal memory access")], "", False, []),
        ([("at", "bug 1: b")], "silent", True, []),  # bugs come after cases
        ([("fuzzed", FUZZED), ("at", "bug 1: b")], "exit status -9: no message", False, []),  # memory ran out
        ([("fuzzed", FUZZED), ("at", "bug 1: b")], "stopped after 900 s", False, []),
    ],
)
def test_only_a_planted_bug_is_caught_by_the_device_that_it_takes_away(
    said: list[tuple[str, object]], ended: str, gone: bool, caught: list[int]
) -> None:
    report = Report(op="rope")
    report.read(lines(*said))
    report.ended, report.gone = ended or report.ended, gone or report.gone
    before, bugs = report.ended, len(report.bugs)
    again = report.caught_by_its_end()
    assert [one["number"] for one in report.bugs] == caught
    assert again == (len(caught) > bugs)
    assert bool(report.ended) != again
    if again:
        assert report.bugs[-1] == {**bug(caught[-1]), "what": "b", "by": before, "seconds": 0.0}


@pytest.mark.parametrize("hanging", [{2}, {1, 3}, {3}, set(range(1, 4)), set()])
def test_a_new_process_goes_on_after_a_bug_that_hangs(hanging: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def run(report: Report, command: list[str], until: float, silence: float | None) -> None:
        begun.append(int(command[command.index("--bugs-after") + 1]))
        assert silence
        if begun[-1] == 0:
            report.read(lines(("fuzzed", FUZZED)))
        for number in range(begun[-1] + 1, 4):
            report.read(lines(("at", f"bug {number}: b")))
            if number in hanging:
                report.ended, report.gone = "silent for 90 s: it hangs", True
                return
            report.read(lines(("bug", bug(number))))

    monkeypatch.setattr(kernel_watch, "_run", run)
    report = work("rope", device="cuda", lane="default")
    assert [one["number"] for one in report.bugs] == [1, 2, 3]
    assert begun == [0, *sorted(hanging)]
    assert not report.ended


def test_processes_lost_to_bugs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(report: Report, command: list[str], until: float, silence: float | None) -> None:
        report.read(lines(("fuzzed", FUZZED), ("at", f"bug {report.planted + 1}: b")))
        report.ended, report.gone = "silent", True

    monkeypatch.setattr(kernel_watch, "_run", run)
    report = work("rope", device="cuda", lane="default")
    assert report.planted == 1 + RESTARTS
    assert "processes were lost" in report.ended


def test_a_worker_on_a_cpu_may_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float | None] = []
    monkeypatch.setattr(kernel_watch, "_run", lambda report, command, until, silence: heard.append(silence))
    work("rope", device="cpu", lane="quick", seed=3, cases=2)
    work("rope", device="cuda:1", lane="quick")
    assert heard == [None, kernel_watch.SILENT_SECONDS["cuda"]]


@pytest.fixture
def speaking(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    said = tmp_path / "said"
    script = "import time\nfor _ in range(6): print('{}', flush=True); time.sleep(0.5)\ntime.sleep(60)"
    with said.open("w") as out, subprocess.Popen([sys.executable, "-c", script], stdout=out) as process:
        yield process, said
        process.kill()


def test_silence_counts_from_the_last_word(speaking: tuple[subprocess.Popen[bytes], Path]) -> None:
    clock = time.monotonic()
    assert wait(*speaking, until=clock + 50, silence=1.7) == "silent for 1.7 s: it hangs"
    assert speaking[1].read_text().count("{}") == 6


def test_time_is_up_for_one_who_speaks_too(speaking: tuple[subprocess.Popen[bytes], Path]) -> None:
    assert wait(*speaking, until=time.monotonic() + 1, silence=50).startswith("stopped after 1 s")


def test_nothing_is_said_of_one_who_ends(tmp_path: Path) -> None:
    said = tmp_path / "said"
    said.touch()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        assert wait(process, said, until=time.monotonic() + 50, silence=50) == ""


@pytest.mark.parametrize(
    ("ends", "silence", "says", "caught"),
    [
        ("time.sleep(60)", 1.0, "silent for 1 s: it hangs", True),
        ("time.sleep(60)", None, "stopped after", False),
        ("sys.exit('no room')", 1.0, "exit status 1: no room", False),
        ("os.kill(os.getpid(), 9)", 1.0, "exit status -9: no message", False),
    ],
)
def test_a_process_that_ends_at_a_bug(ends: str, silence: float | None, says: str, caught: bool) -> None:
    script = f"import os, sys, time; print({lines(('fuzzed', FUZZED), ('at', 'bug 1: b'))!r}, flush=True); {ends}"
    report = Report(op="rope")
    kernel_watch._run(report, [sys.executable, "-c", script], time.monotonic() + 3, silence)
    assert report.ended.startswith(says)
    assert report.caught_by_its_end() == caught


def test_a_number_of_bugs_below_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        kernel_worker.main(["rope", "--bugs-after", "-1"])
    assert left.value.code == 2
    assert "--bugs-after = -1: expected 0 or more" in capsys.readouterr().err


def test_a_real_worker_goes_on_after_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(op="rope", fuzzed=FUZZED, bugs=[bug(1)])
    command = [sys.executable, "-m", "tessera_parity.kernel_worker", "rope", "--lane", "quick", "--bugs-after", "1"]
    kernel_watch._run(report, command, time.monotonic() + 300, None)
    assert not report.ended
    assert report.fuzzed is FUZZED  # no case was run again
    assert [one["number"] for one in report.bugs] == list(range(1, len(report.bugs) + 1))
    assert report.planted > 2
    assert all(one["caught"] for one in report.bugs)
