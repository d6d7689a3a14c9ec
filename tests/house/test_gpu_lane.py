"""`benchmarks/gpu_lane.py` without a GPU: parts side by side, a report that keeps what is finished, one line for bad input."""

import importlib.util
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

LANE = Path(__file__).parents[2] / "benchmarks" / "gpu_lane.py"


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_lane", LANE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "gpu_name", lambda: "a GPU")
    return module


def result(name: str, code: int = 0) -> dict[str, object]:
    return {"name": name, "command": f"parity {name}", "exit": code, "seconds": 1.0, "printed": "", "largest": ""}


def text_of(folder: Path) -> str:
    return "".join(one.read_text() for one in folder.glob("*.md"))


def run(lane: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_lane.py", "--out", str(out), *words])
    return int(lane.main())


def test_parts_run_side_by_side_and_the_worst_exit_code_is_the_lanes(
    lane: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    together = threading.Barrier(4, timeout=20)

    def part(name: str, *others: object) -> dict[str, object]:
        together.wait()
        return result(name, 3 if name == "tiny" else 0)

    monkeypatch.setattr(lane, "part", part)
    assert run(lane, monkeypatch, tmp_path, "--at-once", "4") == 3
    (report,) = tmp_path.glob("*_parity_a-gpu.md")
    assert all(f"| {name} |" in report.read_text() for name in ("generated", "rounding", "tiny", "qwen3-0-6b"))


def test_what_is_finished_is_kept_when_a_part_is_interrupted(
    lane: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(name: str, *others: object) -> dict[str, object]:
        if name in ("tiny", "qwen3-0-6b"):
            return result(name)
        for _ in range(2000):  # the report says what the lane knows of
            if all(f"| {one} |" in text_of(tmp_path) for one in ("tiny", "qwen3-0-6b")):
                break
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(lane, "part", part)
    assert run(lane, monkeypatch, tmp_path, "--at-once", "1") == 130
    (report,) = tmp_path.glob("*.md")
    assert "| tiny |" in report.read_text()
    assert "| rounding |" not in report.read_text()
    assert "interrupted; 2 parts are in" in capsys.readouterr().err


def test_a_calibration_ends_before_what_reads_it_begins(
    lane: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order: list[str] = []
    monkeypatch.setattr(lane, "part", lambda name, *others: order.append(name) or result(name))
    assert run(lane, monkeypatch, tmp_path, "--calibrate", "--at-once", "4") == 0
    assert order[:3] == ["calibrate", "calibrate-tiny", "calibrate-qwen3-0-6b"]
    assert set(order[3:]) == {"generated", "rounding", "tiny", "qwen3-0-6b"}


def test_an_interrupt_ends_the_parts_that_did_not_hear_it(lane: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "GRACE", 0.2)
    heard = subprocess.Popen([sys.executable, "-c", "pass"])
    deaf = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True)
    with deaf:
        assert deaf.stdout is not None
        assert deaf.stdout.readline() == "ready\n"
        lane.end([heard, deaf])
        assert (heard.wait(20), deaf.wait(20)) == (0, -signal.SIGINT)


DEAF = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever started the tests may have SIGINT ignored
print("ready", flush=True)
time.sleep(60)
"""


def test_no_parts_at_a_time_is_one_line(
    lane: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lane, monkeypatch, tmp_path, "--at-once", "0") == 2
    assert capsys.readouterr().err.startswith("at_once = 0: expected at least 1")
