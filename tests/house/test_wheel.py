"""The wheel in environments of its own, away from the checkout: bare, with one half, with the other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run([UV, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", folder, ROOT], folder)
    return next(folder.glob("*.whl"))


def _run(command: list[object], cwd: Path, expect: int = 0) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == expect, f"{command}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def _environment(folder: Path, wheel: Path, extra: str) -> Path:
    _run([UV, "venv", "-q", "--python", sys.executable, folder / "env"], folder)
    python = folder / "env" / "bin" / "python"
    _run([UV, "pip", "install", "-q", "--python", python, "-c", ROOT / "constraints.txt", f"{wheel}{extra}"], folder)
    return python


def test_without_any_framework_files_can_be_made_and_checked(tmp_path: Path, wheel: Path) -> None:
    bin_ = _environment(tmp_path, wheel, "").parent
    assert "nano" in _run([bin_ / "tessera", "info"], tmp_path)
    _run([bin_ / "tessera", "init", "nano", "model"], tmp_path)
    _run([bin_ / "tessera", "verify", "model"], tmp_path)
    line = _run([bin_ / "tessera", "train", "run", "--backend", "torch", "--steps", "1"], tmp_path, expect=4)
    assert "torch" in line
    assert "Traceback" not in line


TRAIN = """
import importlib.util, numpy as np
assert importlib.util.find_spec("{other}") is None
from tessera_shared.batch import Batch
from tessera_shared.init import initial_weights
from tessera_shared.numerics import FLOAT32
from tessera_shared.objectives import AdamWOptions, Objective
from tessera_shared.presets import preset
from tessera_{half}.model.params import params_from_numpy
from tessera_{half}.train.step import init_state, train_step
spec = preset("nano")
params = params_from_numpy(initial_weights(spec, seed=0), dtype="float32")
ids = np.arange(2 * 9, dtype=np.int32).reshape(2, 9) % spec.vocab_size
position = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8)).copy()
batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), position, np.zeros_like(position))
state = init_state(params, options=AdamWOptions())
losses = []
for _ in range(3):
    state, metrics = train_step(state, [batch], lr=1e-2, spec=spec, numerics=FLOAT32, objective=Objective(), options=AdamWOptions())
    losses.append(float(metrics["loss"]))
assert losses[2] < losses[0], losses
print(losses)
"""


@pytest.mark.parametrize(("half", "other"), [("jax", "torch"), ("torch", "jax")])
def test_each_half_trains_where_the_other_framework_is_not_installed(
    tmp_path: Path, wheel: Path, half: str, other: str
) -> None:
    python = _environment(tmp_path, wheel, f"[{half}]")
    _run([python, "-c", TRAIN.format(half=half, other=other)], tmp_path)
