import json
import signal
import subprocess
import sys
import time

import pytest

from tessera_parity.cli.main import run_command_line
from tessera_parity.report.jsonl import read_run
from tessera_parity.store import reopen
from tessera_parity.subjects import SUBJECTS

pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def no_proof(monkeypatch):
    """The proof has tests of its own; here it would only take time."""
    from tessera_parity import runner

    monkeypatch.setattr(runner, "prove", lambda context, seconds, halves=None: None)
    monkeypatch.setattr(runner, "keep_proof", lambda proof, run, store: None)
    monkeypatch.setattr(runner, "false_alarms", lambda context, settings, seconds: (0, None))


def test_list_names_every_subject(capsys):
    assert run_command_line(["list"]) == 0
    out = capsys.readouterr().out
    assert all(subject.name in out for subject in SUBJECTS)


def test_run_writes_its_directory_and_explains_parity(tmp_path, capsys):
    directory = tmp_path / "run"
    arguments = ["run", "block", "--quick", "--only-half", "torch", "--cases", "2", "--report", str(directory)]
    assert run_command_line(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("PARITY")
    run = read_run(directory)
    assert {check.subject for check in run.checks} == {"block"}
    assert run.left_out == ["half jax: --only-half torch"]
    assert run.environment["torch"]["threads"] == "1"
    for name in ("result.json", "checks.jsonl", "junit.xml", "report.html", "state.json"):
        assert (directory / name).stat().st_size > 0
    assert run_command_line(["explain", str(directory)]) == 0
    assert "nothing to explain" in capsys.readouterr().out


def test_a_divergence_exits_with_one_and_is_explained(tmp_path, capsys):
    directory = tmp_path / "run"
    run_command_line(["run", "block", "--quick", "--only-half", "torch", "--cases", "1", "--report", str(directory)])
    stored = json.loads((directory / "result.json").read_text())
    stored["checks"][0] |= {"verdict": "divergence", "observed": 1.0, "op": "model.mlp.mlp_block", "layer": 0}
    (directory / "result.json").write_text(json.dumps(stored))
    capsys.readouterr()
    assert run_command_line(["explain", str(directory / "result.json")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "compute different things" in out
    assert "Look at model.mlp.mlp_block in layer 0" in out
    assert "parity repro" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "gradient"], "try gradients"),
        (["run", "--quick", "--full"], "--quick with --full"),
        (["run", "--against", "keras"], "against = 'keras'"),
        (["run", "--only-half", "mlx"], "only-half = 'mlx'"),
        (["run", "--device", "tpu"], "device = 'tpu'"),
        (["run", "--dtype", "fp4"], "dtype = 'fp4'"),
        (["run", "--seed", "-1"], "--seed"),
        (["run", "--cases", "0"], "--cases"),
        (["run", "block", "--report", "/proc/nobody"], "writable directory"),
        (["run", "--resume", "/nowhere/at/all"], "resume = "),
        (["explain", "/nowhere/at/all"], "result = "),
        (["rum"], "rum"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_two(arguments, said, capsys):
    assert run_command_line(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert "Traceback" not in captured.err


def test_an_interrupt_keeps_what_is_there_and_says_how_to_go_on(tmp_path):
    directory = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "tessera_parity",
        "run",
        "streams",
        "ops",
        "losses",
        "--only-half",
        "torch",
        "--quick",
        "--workers",
        "1",
    ]
    process = subprocess.Popen([*command, "--report", str(directory)], stderr=subprocess.PIPE, text=True)
    state = directory / "state.json"
    while process.poll() is None and not (state.exists() and json.loads(state.read_text())["finished"]):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert f"parity run --resume {directory}" in said
    assert "Traceback" not in said
    assert {check.subject for check in reopen(directory).checks} == {"streams"}


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "tessera_parity", "list"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gradients" in done.stdout


def test_help_and_list_load_no_framework():
    script = (
        "import sys; from tessera_parity.cli.main import run_command_line; run_command_line(['list']); "
        "print([name for name in ('torch', 'jax', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
