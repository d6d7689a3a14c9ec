"""Whatever is handed in, a person gets one line and an exit code, and no file is written or lost.

Through the console scripts, each in a process of its own, because that is what a person meets: imports, signals, codes.
"""

import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tessera_parity.loading import load_half
from tessera_shared.cli.edge import AGAIN_SECONDS, remembered_interrupts
from tessera_shared.errors import DataError
from tessera_shared.half_loading import load_half_module
from tessera_shared.init import initial_weights
from tessera_shared.numerics import FLOAT32, FLOAT64
from tessera_shared.objectives import DistilOptions, Divergence
from tessera_shared.presets import preset
from tessera_shared.tensor_file import TensorFile, write_tensors
from tessera_shared.tokens import Tokenizer

SCRIPTS = Path(sys.executable).parent
TEXT = "the cat sat on the mat and the dog sat on the log\n" * 200
PAIR = """
frameworks = ("numpy", "numpy")
left = right = lambda params, inputs: inputs
inputs = lambda rng: rng.standard_normal(3)
"""
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""

IMPATIENT = """
import signal, sys

class Impatient:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "numpy":
            sys.meta_path.remove(Impatient)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Impatient)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands are pointed at. It must be the same afterwards, to the byte."""
    root = tmp_path_factory.mktemp("world")
    (root / "text.txt").write_text(TEXT)
    (root / "latin.txt").write_bytes(b"caf\xe9\n")
    (root / "folder").mkdir()
    (root / "tokenizer.json").write_text(Tokenizer.train_bpe([TEXT], 280).text)
    (root / "longer.json").write_text(Tokenizer.train_bpe([TEXT, "some other words entirely, and more"], 300).text)
    done = _run("tessera", "init", "nano", "sound", "--vocab-from", "tokenizer.json", cwd=root)
    assert done.returncode == 0, done.stderr
    for name, damage in {"torn": _cut, "shifted": _other_tokenizer}.items():
        shutil.copytree(root / "sound", root / name)
        damage(root / name)
    (root / "pair.py").write_text(PAIR)
    for name, text in ADAPTERS.items():
        (root / name).write_text(text)
    for name, hidden in {"torchless": ["torch"], "jaxless": ["jax", "flax", "optax"], "bare": ["torch", "jax"]}.items():
        (root / name).mkdir()
        (root / name / "sitecustomize.py").write_text(WITHOUT.format(hidden=hidden))
    (root / "impatient").mkdir()
    (root / "impatient" / "sitecustomize.py").write_text(IMPATIENT)
    return root


def _run(program: str, *arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPTS / program), *arguments]
    environment = _environment(path)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def _environment(path: Path | None = None) -> dict[str, str]:
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return environment if path is None else environment | {"PYTHONPATH": str(path)}


def _tree(directory: Path) -> dict[str, str]:
    """Every path below a directory, with a hash of what a file holds."""
    files = sorted(directory.rglob("*"))
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "/"
        for path in files
    }


@contextmanager
def _unchanged(*directories: Path) -> Iterator[None]:
    before = [_tree(directory) for directory in directories]
    yield
    for directory, tree in zip(directories, before, strict=True):
        now = _tree(directory)
        assert now.keys() == tree.keys(), f"written {now.keys() - tree.keys()}, lost {tree.keys() - now.keys()}"
        assert now == tree


def _assert_one_error(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    shown = f"{done.args}\nexit {done.returncode}\nstdout: {done.stdout[-800:]}\nstderr: {done.stderr[-3000:]}"
    assert done.returncode == code, shown
    lines = done.stderr.splitlines()
    assert len(lines) == 1, shown
    assert lines[0].startswith("error: "), shown
    assert "Traceback" not in done.stdout, shown
    for word in words:
        assert word in lines[0], f"{word!r} is not in what it says\n{shown}"


# --- a model directory that is damaged -------------------------------------------------------------------------------


def _cut(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _other_tokenizer(model: Path) -> None:
    """Give a model a tokenizer with more ids than it has rows, and nothing that would notice by checksum."""
    shutil.copy(model.parent / "longer.json", model / "tokenizer.json")
    (model / "tessera.json").unlink()


def _flip(model: Path) -> None:
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)


def _rewritten(change: Callable[[dict[str, np.ndarray]], None], *, vouched: bool = False) -> Callable[[Path], None]:
    """Return damage that changes the arrays of the weight file; unless `vouched`, there are no checksums to tell."""

    def damage(model: Path) -> None:
        path = model / "model.safetensors"
        file = TensorFile(path)
        arrays = {name: np.array(file.array(name)) for name in file.entries}
        change(arrays)
        path.unlink()
        write_tensors(path, arrays)
        if not vouched:
            (model / "tessera.json").unlink()

    return damage


def _config(**changes: Any) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        (model / "tessera.json").unlink()

    return damage


def _widen(arrays: dict[str, np.ndarray]) -> None:
    arrays[GATE] = arrays[GATE].astype(np.float64)


def _make_integer(arrays: dict[str, np.ndarray]) -> None:
    arrays[GATE] = arrays[GATE].astype(np.int32)


def _transpose(arrays: dict[str, np.ndarray]) -> None:
    arrays[GATE] = np.ascontiguousarray(arrays[GATE].T)


def _drop(arrays: dict[str, np.ndarray]) -> None:
    del arrays[GATE]


def _add(arrays: dict[str, np.ndarray]) -> None:
    arrays["model.layers.0.extra.weight"] = np.ones(3, np.float32)


def _spoil(arrays: dict[str, np.ndarray]) -> None:
    arrays[GATE][1, 2] = np.nan


GATE = "model.layers.1.mlp.gate_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "weights missing": (lambda model: (model / "model.safetensors").unlink(), ("model.safetensors",)),
    "weights torn": (_cut, ("model.safetensors", "cut short")),
    "one bit flipped": (_flip, ("model.safetensors", "checksum")),
    "other dtype than vouched for": (_rewritten(_widen, vouched=True), (GATE, "F64", "F32")),
    "integers as weights": (_rewritten(_make_integer), (GATE, "I32")),
    "a tensor transposed": (_rewritten(_transpose), (GATE, "shape")),
    "a tensor missing": (_rewritten(_drop), (GATE, "missing")),
    "a tensor too many": (_rewritten(_add), ("model.layers.0.extra.weight", "surplus")),
    "NaN weights": (_rewritten(_spoil), (GATE, "model.safetensors")),
    "config contradicts the weights": (_config(hidden_size=128), ("config.json", "shape")),
    "unknown architecture": (_config(architectures=["FooForCausalLM"], model_type="foo"), ("config.json", "foo")),
    "config that is not JSON": (lambda model: (model / "config.json").write_text("{"), ("config.json", "JSON")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_named_and_left_alone(name: str, world: Path, tmp_path: Path) -> None:
    damage, words = DAMAGES[name]
    shutil.copytree(world / "sound", tmp_path / "model")
    damage(tmp_path / "model")
    with _unchanged(tmp_path):
        done = _run("tessera", "verify", "model", cwd=tmp_path)
        _assert_one_error(done, 2, *words)


# --- commands that must not begin ------------------------------------------------------------------------------------

ADAPTERS = {
    "syntax.py": "frameworks = (\n",
    "raises.py": PAIR + "\nraise ValueError('on import')\n",
    "raises_later.py": PAIR.replace("inputs\ninputs", "inputs['no']\ninputs"),
    "nameless.py": 'frameworks = ("numpy", "numpy")\n',
    "mlx.py": PAIR.replace('("numpy", "numpy")', '("mlx", "numpy")'),
    "both.py": PAIR.replace('("numpy", "numpy")', '("torch", "jax")'),
}

TRAIN = "tessera train run --data {world}/text.txt --preset nano --seq-len 16 --batch-size 2 --steps 2"

REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    # files of models
    "convert of a torn model": ("tessera convert {world}/torn out --dtype bfloat16", ("model.safetensors",)),
    "generate from a torn model": ("tessera generate {world}/torn --prompt a", ("model.safetensors",)),
    "generate from nowhere": ("tessera generate nowhere --prompt a", ("nowhere",)),
    "a torn teacher": (TRAIN + " --teacher {world}/torn", ("model.safetensors",)),
    "parity of a torn model": ("parity run model --quick --model {world}/torn --report out", ("model.safetensors",)),
    "parity of no model": ("parity run model --quick --model nowhere --report out", ("nowhere",)),
    "a model that no subject looks at": ("parity run streams --quick --model nowhere --report out", ("model",)),
    # tokenizers and text
    "a tokenizer with more ids": ("tessera generate {world}/shifted --prompt a", ("tokenizer.json", "ids")),
    "another's tokenizer": (
        "tessera train run --model {world}/sound --tokenizer {world}/longer.json --data {world}/text.txt --steps 2",
        ("ids",),
    ),
    "a tokenizer that is not one": (
        "tessera generate {world}/sound --tokenizer {world}/sound/config.json",
        ("config.json",),
    ),
    "an empty corpus": ("tessera train run --data {world}/folder", ("folder", "no text")),
    "text that is not UTF-8": ("tessera train run --data {world}/latin.txt", ("latin.txt", "byte 3", "UTF-8")),
    # lengths
    "rows longer than the positions": ("tessera train run --preset nano --seq-len 1025", ("1025", "1024")),
    "text longer than the positions": ("tessera generate {world}/sound --prompt a --tokens 1025", ("1025", "1024")),
    # places
    "init below a file": ("tessera init nano {world}/text.txt/out", ("text.txt",)),
    "train below a file": (TRAIN.replace(" run ", " {world}/text.txt/run "), ("text.txt",)),
    "train into another's folder": (TRAIN.replace(" run ", " {world}/sound "), ("sound",)),
    "resume of no run": ("tessera train nowhere --resume", ("nowhere",)),
    "report below a file": ("parity run streams --quick --report {world}/text.txt/out", ("text.txt", "writable")),
    "pair report below a file": ("parity check {world}/pair.py --report {world}/text.txt/out", ("text.txt",)),
    "resume of no report": ("parity run --resume nowhere", ("nowhere",)),
    "explain of no report": ("parity explain nowhere", ("nowhere",)),
    "repro of no report": ("parity repro nowhere", ("nowhere",)),
    # adapters
    "an adapter that is not there": ("parity check nowhere.py", ("nowhere.py",)),
    "an adapter that does not parse": ("parity check {world}/syntax.py", ("syntax.py:1", "SyntaxError")),
    "an adapter that raises": ("parity check {world}/raises.py", ("raises.py:6", "ValueError: on import")),
    "an adapter whose side raises": ("parity check {world}/raises_later.py", ("raises_later.py:3", "IndexError")),
    "an adapter without names": ("parity check {world}/nameless.py", ("nameless.py:1", "inputs")),
    "an adapter of a stranger": ("parity check {world}/mlx.py", ("mlx.py:1", "mlx")),
    # names and values
    "an unknown subject": ("parity run opps", ("opps", "try ops")),
    "an unknown preset": ("tessera init nanno out", ("nanno", "nano")),
    "an unknown mutant": ("parity mutants no-such-bug --quick", ("no-such-bug",)),
    "a negative seed of mutants": ("parity mutants --quick --seed -1", ("seed",)),
    "an unknown command": ("parity rum", ("rum",)),
    "an unknown flag": ("parity run --fast", ("--fast",)),
    "two lanes": ("parity run --quick --full", ("--quick", "--full")),
    "no cases": ("parity run ops --cases 0", ("--cases",)),
    "a negative seed": ("parity run ops --seed -1", ("--seed",)),
    "an unknown witness": ("parity run ops --against gguf", ("gguf",)),
    "an unknown half": ("parity run ops --only-half mlx", ("mlx",)),
    "an unknown device": ("parity run ops --device tpu", ("tpu",)),
    "an unknown dtype": ("parity run ops --dtype float8", ("float8",)),
    "calibrating float16": ("parity calibrate --dtype float16", ("float16",)),
    "a negative number of pair cases": ("parity check {world}/pair.py --cases -1", ("cases",)),
    "a dtype to convert to": ("tessera convert {world}/sound out --dtype int4", ("int4",)),
    "a size": ("tessera convert {world}/sound out --max-shard-bytes many", ("many",)),
    "no steps": ("tessera train run --steps 0", ("steps = 0",)),
    "an infinite learning rate": (TRAIN + " --lr inf", ("inf",)),
    "micro-batches that do not divide": (TRAIN + " --accumulate 3", ("accumulate = 3", "batch_size = 2")),
    "distilling without a teacher": (TRAIN + " --distil reverse_kl", ("--teacher",)),
    "an unknown backend": (TRAIN + " --backend mlx", ("mlx",)),
    "a share above one": ("tessera generate {world}/sound --prompt a --top-p 1.5", ("1.5",)),
    "a temperature below zero": ("tessera generate {world}/sound --prompt a --temperature -1", ("-1",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_one_line_and_nothing_is_written(name: str, world: Path, tmp_path: Path) -> None:
    line, words = REFUSED[name]
    program, *arguments = (word.format(world=world) for word in line.split())
    with _unchanged(world, tmp_path):
        done = _run(program, *arguments, cwd=tmp_path)
        _assert_one_error(done, 2, *words)


MISSING = {
    "training without torch": (TRAIN + " --backend torch", "torchless", "torch"),
    "training without jax": (TRAIN + " --backend jax", "jaxless", "jax"),
    "generating without torch": ("tessera generate {world}/sound --prompt a --backend torch", "torchless", "torch"),
    "parity of a half without torch": ("parity run ops --only-half torch --report out", "torchless", "torch"),
    "parity without any half": ("parity run ops --report out", "bare", "torch"),
    "a pair without jax": ("parity check {world}/both.py --report out", "jaxless", "jax"),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_framework_that_is_not_installed_is_exit_code_4(name: str, world: Path, tmp_path: Path) -> None:
    line, without, word = MISSING[name]
    program, *arguments = (word.format(world=world) for word in line.split())
    with _unchanged(world, tmp_path):
        done = _run(program, *arguments, cwd=tmp_path, path=world / without)
        _assert_one_error(done, 4, word, "install")


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def _interrupt(arguments: list[str], cwd: Path, is_time: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
    """Start a command, press Ctrl-C once `is_time`, return how it ended."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, cwd=cwd, env=_environment(), text=True, **streams) as process:  # type: ignore[call-overload]
        deadline = time.monotonic() + 90
        try:
            while not is_time():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline, "it has not begun"
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _assert_says_how_to_go_on(done: subprocess.CompletedProcess[str], command: str) -> None:
    said = done.stdout + done.stderr
    assert done.returncode == 130, said
    assert "Traceback" not in said
    assert len(done.stderr.splitlines()) <= 1, done.stderr
    assert len([line for line in said.splitlines() if command in line]) == 1, said


@pytest.mark.parametrize("command", ["tessera init nano out", "parity run ops --report out"])
def test_interrupting_the_very_start_is_one_line_too(command: str, world: Path, tmp_path: Path) -> None:
    program, *arguments = command.split()
    with _unchanged(world, tmp_path):
        done = _run(program, *arguments, cwd=tmp_path, path=world / "impatient")
        assert (done.returncode, len(done.stderr.splitlines())) == (130, 1), done.stderr
        assert done.stderr.startswith("interrupted")


@contextmanager
def _interrupt_that_is_dropped() -> Iterator[list[object]]:
    """Let the next collection of garbage press Ctrl-C inside a callback, where Python drops it; yield what it says of that."""
    said: list[object] = []

    def collecting(phase: str, info: dict[str, int]) -> None:
        del info
        if phase == "start":
            gc.callbacks.remove(collecting)
            signal.raise_signal(signal.SIGINT)

    before, hook = signal.signal(signal.SIGINT, signal.default_int_handler), sys.unraisablehook
    sys.unraisablehook = said.append
    gc.disable()  # no collection but the test's own
    gc.callbacks.append(collecting)
    try:
        yield said
    finally:
        gc.enable()
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_python_drops_comes_again_without_a_traceback() -> None:
    def collect_and_go_on() -> None:
        gc.collect()
        time.sleep(10)

    with _interrupt_that_is_dropped() as said:
        with remembered_interrupts(), pytest.raises(KeyboardInterrupt):
            collect_and_go_on()
        assert said == []


def test_an_interrupt_that_was_asked_for_does_not_come_again() -> None:
    with _interrupt_that_is_dropped() as said:
        with remembered_interrupts() as is_interrupted:
            assert not is_interrupted()
            gc.collect()
            assert is_interrupted()
            time.sleep(5 * AGAIN_SECONDS)
            assert said == []
            sys.unraisablehook(SimpleNamespace(exc_type=ValueError))  # others are still told of
        assert len(said) == 1
        assert sys.unraisablehook == said.append


def test_an_interrupt_that_is_dropped_at_the_very_end_does_not_come_after_it() -> None:
    with _interrupt_that_is_dropped():
        with remembered_interrupts():
            gc.collect()
        time.sleep(5 * AGAIN_SECONDS)


def test_a_parity_run_that_is_interrupted_keeps_its_checks_and_goes_on(tmp_path: Path) -> None:
    checks, state, run = tmp_path / "out" / "checks.jsonl", tmp_path / "out" / "state.json", str(SCRIPTS / "parity")

    def is_finished(subject: str) -> bool:
        return state.exists() and subject in json.loads(state.read_text())["finished"]

    flags = ["--quick", "--only-half", "torch", "--workers", "1", "--report", "out"]  # one half: half the imports
    command = [run, "run", "files", "text", "ops", *flags]
    done = _interrupt(command, tmp_path, lambda: is_finished("files"))
    _assert_says_how_to_go_on(done, "parity run --resume out")
    kept = [line for line in _lines(checks) if json.loads(line)["subject"] == "files"]
    assert kept
    assert is_finished("files")

    done = _interrupt([run, "run", "--resume", "out", "--workers", "1"], tmp_path, lambda: is_finished("text"))
    _assert_says_how_to_go_on(done, "parity run --resume out")
    lines = _lines(checks)
    assert lines[: len(kept)] == kept, "finished subjects are not done again"
    assert "text" in {json.loads(line)["subject"] for line in lines}


def test_training_that_is_interrupted_saves_and_goes_on(world: Path, tmp_path: Path) -> None:
    metrics, flags = tmp_path / "run" / "metrics.jsonl", TRAIN.format(world=world).split()[2:]
    command = [str(SCRIPTS / "tessera"), "train", *flags, "--steps", "100000"]
    with _unchanged(world):
        done = _interrupt(command, tmp_path, lambda: len(_lines(metrics)) > 1)
        _assert_says_how_to_go_on(done, "tessera train run --backend torch --resume")
        made = json.loads(_lines(metrics)[-1])["step"]
        resumed = _run("tessera", "train", "run", "--resume", "--stop-after", "1", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on after step {made}" in resumed.stdout
    assert [json.loads(line)["step"] for line in _lines(metrics)] == list(range(1, made + 2))


# --- arrays that mean nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["numpy", "torch", "jax"])
def test_where_every_label_is_ignored_loss_and_gradient_are_zero_and_finite(half: str) -> None:
    side = load_half(half)
    losses = side.module("distil.losses")
    rng = np.random.default_rng(0)
    logits_BTV, teacher_BTV = rng.standard_normal((2, 2, 3, 5)) * 1e3
    labels_BT = side.array(np.full((2, 3), -100, np.int32))

    def hard(logits: Any) -> Any:
        return losses.cross_entropy(logits, labels_BT, z_loss=1e-4, numerics=FLOAT64)

    def soft(logits: Any) -> Any:
        options = DistilOptions(divergence=Divergence.FORWARD_KL, hard_weight=0.5)
        return losses.distillation_loss(logits, side.array(teacher_BTV), labels_BT, options=options, numerics=FLOAT64)

    def slope(loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda logits: side.value_and_grad(lambda arrays: loss(arrays["x"])[0], {"x": logits})[1]["x"]

    for loss in (hard, soft):
        total, count = side.compiled(loss)(side.array(logits_BTV))
        assert float(total) == 0.0
        assert int(count) == 0
        if half != "numpy":  # the oracle has no reverse differentiation
            gradient = side.compiled(slope(loss))(side.array(logits_BTV))
            assert np.array_equal(side.numpy(gradient), np.zeros_like(logits_BTV))


@pytest.mark.parametrize(
    ("ids", "num_tokens", "words"),
    [
        ([[1, 512]], 1, ("token_ids_BT[0, 1] = 512", "0 to 511")),
        ([[-1, 1]], 1, ("token_ids_BT[0, 0] = -1",)),
        ([[1, 2]], 1024, ("1025", "1024")),
        ([[]], 1, ("prompt length = 0",)),
    ],
)
def test_ids_outside_the_vocabulary_and_rows_past_the_positions_are_refused(
    backend: str, ids: list[list[int]], num_tokens: int, words: tuple[str, ...]
) -> None:
    spec = preset("nano")
    decode, params = (load_half_module(backend, name) for name in ("serve.decode", "model.params"))
    process = load_half_module(backend, "process")
    with pytest.raises(DataError) as refusal:
        decode.generate(
            params.params_from_numpy(initial_weights(spec, seed=0), dtype="float32"),
            process.array_from_numpy(np.array(ids, dtype=np.int32), device="cpu"),
            spec=spec,
            numerics=FLOAT32,
            num_tokens=num_tokens,
        )
    for word in words:
        assert word in str(refusal.value)
