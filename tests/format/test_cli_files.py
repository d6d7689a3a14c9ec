"""The commands that make, convert and verify files: what they do, and one line for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tessera_shared.cli import edge, info
from tessera_shared.cli.convert import parse_size
from tessera_shared.cli.main import app, run
from tessera_shared.errors import FormatError, MissingDependency, SpecError, TesseraError
from tessera_shared.half_loading import load_half_module
from tessera_shared.init import initial_weights
from tessera_shared.presets import PRESETS
from tessera_shared.tensors import num_parameters
from tessera_shared.tokens import Tokenizer
from tessera_shared.weights import load_model, save_model

COMMAND = [sys.executable, "-c", "from tessera_shared.cli.main import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "nano"
    assert run(["init", "nano", str(directory), "--seed", "3"]) == 0
    return directory


def test_init_writes_the_weights_of_its_seed(model: Path) -> None:
    loaded = load_model(model)
    assert loaded.verified
    assert loaded.spec == PRESETS["nano"]
    for name, array in initial_weights(PRESETS["nano"], seed=3).items():
        assert np.array_equal(loaded.arrays[name], array), name


def test_init_takes_vocabulary_and_end_of_text_from_a_tokenizer_and_copies_it(tmp_path: Path) -> None:
    Tokenizer.train_bpe(["the cat sat on the mat " * 20], 270).save(tmp_path / "tokenizer.json")
    size = Tokenizer.load(tmp_path / "tokenizer.json").vocab_size
    assert run(["init", "nano", str(tmp_path / "m"), "--vocab-from", str(tmp_path / "tokenizer.json")]) == 0
    loaded = load_model(tmp_path / "m")
    assert (loaded.spec.vocab_size, loaded.spec.eos_token_id) == (size, 0)
    assert loaded.tokenizer_file is not None
    assert loaded.tokenizer_file.read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_convert_rounds_reshards_and_comes_back_to_the_rounded_weights(model: Path, tmp_path: Path) -> None:
    narrow, wide = str(tmp_path / "narrow"), str(tmp_path / "wide")
    assert run(["convert", str(model), narrow, "--dtype", "bfloat16", "--max-shard-bytes", "100kB"]) == 0
    assert run(["convert", narrow, wide, "--dtype", "float32", "--architecture", "mistral"]) == 0
    assert len(list((tmp_path / "narrow").glob("*.safetensors"))) == 3
    assert load_model(wide).spec.architecture == "mistral"
    for name, array in load_model(model).arrays.items():
        rounded = array.astype(ml_dtypes.bfloat16)
        assert np.array_equal(load_model(narrow).arrays[name], rounded)
        assert np.array_equal(load_model(wide).arrays[name], rounded.astype(np.float32))


def test_convert_replaces_only_when_told_to(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(model), str(tmp_path / "m")]) == 0
    assert run(["convert", str(model), str(tmp_path / "m"), "--dtype", "float64"]) == 2
    assert "--replace" in capsys.readouterr().err
    assert run(["convert", str(tmp_path / "m"), str(tmp_path / "m"), "--dtype", "float64", "--replace"]) == 0
    assert load_model(tmp_path / "m").arrays["model.norm.weight"].dtype == np.float64


def test_narrowing_that_would_overflow_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = initial_weights(PRESETS["nano"], seed=0, dtype="float64")
    arrays["model.norm.weight"][0] = 1e300
    save_model(tmp_path / "m", PRESETS["nano"], arrays)
    assert run(["convert", str(tmp_path / "m"), str(tmp_path / "n"), "--dtype", "float32"]) == 2
    assert "model.norm.weight: 1 numbers are too large" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_verify_says_what_it_compared(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(model)]) == 0
    out = capsys.readouterr().out
    assert "verified: 2 files, 20 tensors, 21 checksums compared, 0 problems" in out
    assert run(["verify", str(model), "--report", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["verified"], report["num_tensors"], report["problems"]) == (True, 20, [])


def test_verify_names_what_is_damaged_and_exits_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(model), str(tmp_path / "m"), "--max-shard-bytes", "100kB"]) == 0
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    for path in shards:
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)
    capsys.readouterr()
    assert run(["verify", str(tmp_path / "m"), "--report", "json"]) == 2
    captured = capsys.readouterr()
    problems = json.loads(captured.out)["problems"]
    assert len(problems) == len(shards)
    assert all(path.name in problem for path, problem in zip(shards, problems, strict=True))
    assert f"{len(shards)} problems; the first: " in captured.err
    shards[0].write_bytes(b"torn")
    assert run(["verify", str(tmp_path / "m"), "--report", "json"]) == 2
    assert "cut short" in json.loads(capsys.readouterr().out)["problems"][0]


def test_verify_without_checksums_says_that_nothing_was_verified(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(model), str(tmp_path / "m")]) == 0
    (tmp_path / "m" / "tessera.json").unlink()
    capsys.readouterr()
    assert run(["verify", str(tmp_path / "m")]) == 0
    assert "NOT verified: 1 files, 20 tensors, 0 checksums compared" in capsys.readouterr().out


def test_info_lists_every_preset_with_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info"]) == 0
    out = capsys.readouterr().out
    for name, spec in PRESETS.items():
        assert name in out
        assert f"{num_parameters(spec):,}" in out
    assert "gpu" in out


def test_info_does_not_import_a_framework() -> None:
    script = (
        "import sys; from tessera_shared.cli.main import run; code = run(['info']); "
        "sys.exit(code or sum(name in sys.modules for name in ('torch', 'jax', 'transformers', 'flax')))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_kernels_are_files_that_have_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = {
        "reference": ("norms", "rope", "gemm", "adamw"),
        "triton": ("norms", "_private", "rope", "rope_tables"),
        "cuda": ("gemm", "build"),
    }
    for name in (f"{room}/{file}.py" for room, files in rooms.items() for file in files):
        path = tmp_path / "tessera_kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError('must not be imported')")
    place = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "tessera_kernels")]})
    monkeypatch.setattr(info, "find_spec", lambda name: place)
    assert (info.kernel_names("triton"), info.kernel_names("cuda")) == ("norms, rope", "gemm")
    monkeypatch.setattr(info, "find_spec", lambda name: None)
    assert info.kernel_names("triton") == "none"


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in ("init", "info", "convert", "verify"))]
)
def test_help_has_an_example_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 0
    assert "Example: tessera " in capsys.readouterr().out


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tessera ")


BAD = [
    "--nonsense", "nonsense", "init", "init nano", "init giant {new}", "init nano {new} extra", "init nano {model}",
    "init nano {file}", "init nano {file}/x", "init nano {foreign} --replace", "init nano {new} --seed -1",
    "init nano {new} --seed 18446744073709551616", "init nano {new} --seed one", "init nano {new} --dtype float16",
    "init nano {new} --vocab-from {new}", "init nano {new} --vocab-from {file}", "init nano {new} --vocab-from {model}",
    "convert {model}", "convert {new} {other}", "convert {file} {other}", "convert {foreign} {other}",
    "convert {model} {file}", "convert {model} {other} --dtype int8", "convert {model} {other} --architecture gpt",
    "convert {model} {other} --architecture qwen3", "convert {model} {other} --max-shard-bytes 0",
    "convert {model} {other} --max-shard-bytes lots", "convert {model} {foreign} --replace", "verify", "verify {new}",
    "verify {file}", "verify {foreign}", "verify {model} --report xml", "verify {model} {model}", "info extra",
    "convert {model} /dev/null/x", "init nano {long}",
]  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_a_mistake_is_one_line_and_exit_code_2(
    line: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a model")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years")
    places = {name: str(tmp_path / name) for name in ("new", "other", "file", "foreign")}
    places |= {"model": str(model), "long": str(tmp_path / ("x" * 300))}
    before = sorted(tmp_path.rglob("*"))
    assert run([word.format(**places) for word in line.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bare_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "Usage" in capsys.readouterr().out


def test_each_error_leaves_with_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(error: BaseException) -> int:
        def fail(*_: object, **__: object) -> None:
            raise error

        return edge.run_commands(fail, [], program="tessera")  # type: ignore[arg-type]

    assert raising(TesseraError("one\n  two")) == 2
    assert raising(MissingDependency("no torch")) == 4
    assert raising(PermissionError(13, "Permission denied", "x.json")) == 2
    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.splitlines() == [
        "error: one two", "error: no torch", "error: x.json: Permission denied",
        "interrupted; nothing was left half-written",
    ]  # fmt: skip
    with pytest.raises(ZeroDivisionError):  # a defect must stay visible
        raising(ZeroDivisionError())


def test_an_interrupt_inside_generated_code_leaves_with_its_exit_code(tmp_path: Path) -> None:
    """`dataclass` and `namedtuple` run source text: interrupted there, `python -m` would end by the signal instead."""
    (tmp_path / "interrupted.py").write_text(
        "import sys, typer\n"
        "from tessera_shared.cli.edge import run_commands\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def dataclass_made(): exec('raise KeyboardInterrupt')\n"
        "sys.exit(run_commands(app, [], program='interrupted'))\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    environment = {**os.environ, "PYTHONSAFEPATH": ""}  # the module is found in the directory it is started from
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted; nothing was left half-written\n")


def test_interrupting_leaves_no_files(tmp_path: Path) -> None:
    script = "from tessera_shared.cli.main import main; print('ready', flush=True); main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "init", "qwen3-0.6b", "m"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)  # somewhere inside some seconds of drawing weights
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said == "interrupted; nothing was left half-written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_stops_reading_is_not_an_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run([*COMMAND, "info"], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert result.stderr == b""
    assert result.returncode == edge.BROKEN_PIPE


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("5GB", 5 * 10**9), ("2 GiB", 2**31), ("10k", 10_000), ("7MiB", 7 * 2**20), ("3b", 3)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5GB", "GB", "1TB", "1 2"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="max-shard-bytes"):
        parse_size(text)


def test_sizes_are_told_in_powers_of_1000() -> None:
    assert [info.size_text(n) for n in (0, 999, 1000, 1_234_567, 2 * 10**9, 3 * 10**12)] == [
        "0 B", "999 B", "1.0 kB", "1.2 MB", "2.0 GB", "3.0 TB",
    ]  # fmt: skip


# The upward reach


def test_a_half_is_found_by_name(backend: str) -> None:
    module = load_half_module(backend, "model.norms")
    assert module.__name__ == f"tessera_{backend}.model.norms"


def test_an_unknown_half_and_a_missing_framework_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="half = 'mlx'"):
        load_half_module("mlx", "model.norms")
    package = tmp_path / "tessera_torch"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "needs.py").write_text("import torch_that_is_not_there")
    (package / "broken.py").write_text("import tessera_torch.gone")
    (package / "bare.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    for name in [name for name in sys.modules if name.startswith("tessera_torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match=r"torch = not installed.*tessera-testbed\[torch\]"):
        load_half_module("torch", "bare")
    for defect in ("needs", "broken", "absent"):
        with pytest.raises(ModuleNotFoundError) as caught:
            load_half_module("torch", defect)
        assert not isinstance(caught.value, MissingDependency)


def test_every_command_is_documented() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__
