"""Workers: what they find does not depend on them, and none outlives the run or makes it wait for ever."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tessera_parity import runner, store, workers
from tessera_parity.cli.main import run_command_line
from tessera_parity.mutants.engine import HALVES
from tessera_parity.runner import execute
from tessera_parity.store import Settings
from tessera_parity.subjects.context import QUICK
from tessera_shared.errors import MissingDependency

pytest.importorskip("torch")

ONE_HALF = Settings(subjects=("streams", "files", "optimizer"), lane=QUICK, only_half="torch")


def kill_a_worker(what: str) -> None:
    """Do what the system does when memory runs out, once something is finished."""
    if what.startswith("1 of"):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def test_a_killed_worker_is_told_in_one_line_and_what_was_finished_is_kept(tmp_path: Path) -> None:
    opened = store.create(tmp_path, ONE_HALF)
    with pytest.raises(workers.WorkerLost, match=f"try parity run --resume {tmp_path}") as caught:
        execute(opened, advance=kill_a_worker, num_workers=2)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []
    again = store.reopen(tmp_path)
    assert again.finished
    assert {check.subject for check in again.checks} == set(again.finished)


def test_an_error_in_a_worker_is_the_runs_own_and_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jax")
    settings = Settings(subjects=("streams", "files"), lane=QUICK, only_half="jax", device="cuda")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # so that there is no such device
    with pytest.raises(MissingDependency, match="device = 'cuda'"):
        execute(store.create(tmp_path, settings), advance=runner.quiet, num_workers=2)
    assert multiprocessing.active_children() == []


def test_the_proofs_tasks_are_all_halves_once() -> None:
    assert sorted((*workers.COMPILING, *workers.OTHERS)) == sorted(HALVES)
    assert workers._tasks([], explicit=False, shares=0) == []
    proofs = [task for task in workers._tasks([], explicit=False, shares=3) if task.kind == "proof"]
    assert [(task.halves, task.share) for task in proofs] == [
        *((workers.COMPILING, (part, 3)) for part in range(3)),
        (workers.OTHERS, (0, 1)),
    ]


def test_every_subject_is_in_one_task_and_those_that_go_together_are_in_the_same() -> None:
    todo = list(reversed(runner.SUBJECTS))
    tasks = [task.subjects for task in workers._tasks(todo, explicit=False, shares=0)]
    assert sorted(name for names in tasks for name in names) == sorted(subject.name for subject in todo)
    assert ("laws", "native") in tasks
    alone = [subject for subject in todo if subject.name == "native"]
    assert [task.subjects for task in workers._tasks(alone, explicit=True, shares=0)] == [("native",)]


def children_of(process_id: int) -> list[int]:
    """Return the processes that a process has started and that still run."""
    listed = Path(f"/proc/{process_id}/task/{process_id}/children")
    return [int(word) for word in listed.read_text().split()] if listed.exists() else []


def is_running(process_id: int) -> bool:
    state = Path(f"/proc/{process_id}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes where Linux lists them")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_worker_outlives_the_run(tmp_path: Path, number: signal.Signals, code: int) -> None:
    directory = tmp_path / "run"
    what = ["files", "laws", "--full", "--only-half", "torch", "--workers", "2"]
    command = [sys.executable, "-m", "tessera_parity", "run", *what, "--report", str(directory)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    checks = directory / "checks.jsonl"
    while process.poll() is None and not (checks.exists() and checks.stat().st_size):
        time.sleep(0.05)
    started = children_of(process.pid)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert len(started) >= 2
    limit = time.monotonic() + 20.0
    while any(is_running(child) for child in started) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not [child for child in started if is_running(child)]
    if number == signal.SIGINT:
        assert len(said.strip().splitlines()) == 1
        assert f"parity run --resume {directory}" in said


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes where Linux lists them")
def test_what_a_worker_has_started_ends_with_it(tmp_path: Path) -> None:
    noted = tmp_path / "process"
    with workers._workers(ONE_HALF, 1) as pool:
        pool.submit(os.system, f"sleep 300 & echo $! > {noted}").result()
        sleeper = int(noted.read_text())
        assert is_running(sleeper)
    limit = time.monotonic() + 20.0
    while is_running(sleeper) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not is_running(sleeper)


def test_a_witness_that_is_not_installed_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = runner.find_spec
    monkeypatch.setattr(runner, "find_spec", lambda name: None if name == "transformers" else honest(name))
    directory = tmp_path / "run"
    for arguments in (["run", "witness"], ["run", "ops", "--against", "hf"]):
        assert run_command_line([*arguments, "--report", str(directory)]) == 4
        assert capsys.readouterr().err.startswith("error: transformers = not installed")
        assert not directory.exists()
