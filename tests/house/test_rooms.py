"""The building: rooms, names that must not collide, and what may import what."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {
    "shared": "tessera_shared",
    "kernels": "tessera_kernels",
    "torch_impl": "tessera_torch",
    "jax_impl": "tessera_jax",
    "parity": "tessera_parity",
}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_no_package_and_holds_exactly_one(room: str) -> None:
    assert not (ROOT / room / "__init__.py").exists()
    packages = [p.name for p in (ROOT / room).iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert packages == [ROOMS[room]]
    assert (ROOT / room / ROOMS[room] / "py.typed").exists()


def test_nothing_at_the_root_puts_the_root_on_the_path() -> None:
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "--import-mode=importlib" in settings["addopts"]
    assert settings["pythonpath"] == list(ROOMS)


def test_the_wheel_is_told_about_every_room() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    assert sorted(packages) == sorted(f"{room}/{package}" for room, package in ROOMS.items())


def test_transformers_imports_with_the_checkout_as_working_directory() -> None:
    pytest.importorskip("transformers")
    code = "import sys; sys.path.insert(0, ''); from transformers import LlamaConfig; print(LlamaConfig().hidden_size)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4096"


def _contracts(folder: Path) -> subprocess.CompletedProcess[str]:
    linter = Path(sys.executable).with_name("lint-imports")
    rooms = ":".join(str(folder / room) for room in ROOMS)
    return subprocess.run(
        [linter, "--no-cache", "--config", str(folder / "pyproject.toml")],
        cwd=folder,
        env={"PYTHONPATH": rooms, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("torch_impl/tessera_torch/planted.py", "import jax\n", "the torch side never loads jax"),
        ("jax_impl/tessera_jax/planted.py", "import tessera_torch\n", "floors"),
        ("shared/tessera_shared/planted.py", "import torch\n", "shared speaks numpy only"),
        ("jax_impl/tessera_jax/planted.py", "import transformers\n", "transformers is a witness"),
        ("shared/tessera_shared/planted.py", "import tessera_parity\n", "floors"),
    ],
)
def test_a_planted_import_breaks_the_contract_by_name(tmp_path: Path, file: str, line: str, contract: str) -> None:
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / file).write_text(line)
    done = _contracts(tmp_path)
    assert done.returncode == 1
    broken = [text for text in done.stdout.splitlines() if text.endswith("BROKEN")]
    assert any(contract in text for text in broken), done.stdout


def test_the_contracts_hold() -> None:
    done = _contracts(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_legend_in_the_docs_is_the_legend_in_the_code() -> None:
    from tessera_shared.dims import LEGEND

    rows = [line.split("|") for line in (ROOT / "docs" / "dims.md").read_text().splitlines() if line.startswith("| ")]
    table = {row[1].strip(): row[2].strip() for row in rows[1:] if row[1].strip() not in ("---", "letter")}
    assert table == LEGEND
