"""`tessera train` and `tessera generate`: runs that stop and go on, in either half, and mistakes that cost nothing."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessera_parity.budget import trajectory_limit
from tessera_shared import run_directory, training_run
from tessera_shared.cli.main import run
from tessera_shared.run_directory import load_state, locked_run
from tessera_shared.weights import load_model

STEPS = 4
TEXT = "".join(f"def add_{n}(x):\n    # adds {n} to x\n    return x + {n}\n\n" for n in range(60))


@pytest.fixture(autouse=True)
def _jax_settings_stay() -> Iterator[None]:
    """A float64 run turns 64-bit types on for its process; other tests have their own idea."""
    jax = sys.modules.get("jax")
    before = None if jax is None else (jax.config.read("jax_enable_x64"), jax.config.jax_default_device)
    yield
    jax = sys.modules.get("jax")
    if jax is not None:
        x64, device = before or (False, None)
        jax.config.update("jax_enable_x64", x64)
        jax.config.update("jax_default_device", device)


@pytest.fixture(scope="module", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokens are kept here, not with the person who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


def test_a_second_run_takes_its_tokens_from_the_first(
    begin: Callable[..., int], finished: Path, cache_home: Path, capsys: Any
) -> None:
    capsys.readouterr()
    kept = sorted((cache_home / "tessera" / "tokens").iterdir())
    assert kept
    assert begin("second", "--steps", "1") == 0
    assert "encoding" not in capsys.readouterr().out
    assert sorted((cache_home / "tessera" / "tokens").iterdir()) == kept


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "code.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def begin(text_file: Path, tmp_path: Path) -> Callable[..., int]:
    """Run `tessera train NAME ...` on the little corpus, tiny enough for a test."""

    def command(name: str, *flags: str) -> int:
        sizes = ["--data", str(text_file), "--batch-size", "2", "--seq-len", "16", "--steps", str(STEPS)]
        return run(["train", str(tmp_path / name), *sizes, *flags])

    return command


@pytest.fixture(scope="module")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run in torch. Tests that change it copy it."""
    pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("finished") / "run"
    flags = ["--data", str(text_file), "--batch-size", "2", "--seq-len", "16", "--steps", str(STEPS)]
    assert run(["train", str(path), *flags]) == 0
    return path


def _metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def _losses(directory: Path) -> list[float]:
    return [record["loss"] for record in _metrics(directory) if "loss" in record]


def _arrays(directory: Path) -> dict[str, np.ndarray]:
    state = load_state(directory)
    assert state is not None
    sides = {"params": state.params, "first": state.first, "second": state.second}
    return {f"{side}/{name}": array for side, arrays in sides.items() for name, array in arrays.items()}


def test_a_resumed_run_is_bit_for_bit_the_unbroken_one(begin: Callable[..., int], tmp_path: Path, backend: str) -> None:
    flags = ("--backend", backend, "--accumulate", "2")
    assert begin("whole", *flags) == 0
    assert begin("broken", *flags, "--stop-after", "1") == 0
    assert len(_losses(tmp_path / "broken")) == 1
    assert run(["train", str(tmp_path / "broken"), "--backend", backend, "--resume"]) == 0
    assert _losses(tmp_path / "broken") == _losses(tmp_path / "whole")
    assert _metrics(tmp_path / "broken")[-1] == _metrics(tmp_path / "whole")[-1]  # the held-out loss
    whole, broken = _arrays(tmp_path / "whole"), _arrays(tmp_path / "broken")
    assert all(np.array_equal(whole[name], broken[name]) for name in whole)
    assert any(np.any(array) for name, array in whole.items() if name.startswith("second/"))


@pytest.mark.parametrize(("first", "second"), [("torch", "jax"), ("jax", "torch")])
def test_a_run_begun_in_one_half_goes_on_in_the_other_as_if_unbroken(
    begin: Callable[..., int], tmp_path: Path, first: str, second: str
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    assert begin("whole", "--backend", first, "--dtype", "float64") == 0
    assert begin("mixed", "--backend", first, "--dtype", "float64", "--stop-after", "2") == 0
    assert run(["train", str(tmp_path / "mixed"), "--backend", second, "--resume"]) == 0
    whole, mixed = _losses(tmp_path / "whole"), _losses(tmp_path / "mixed")
    assert mixed[:2] == whole[:2]
    limit = trajectory_limit(STEPS)
    np.testing.assert_allclose(mixed, whole, rtol=limit, atol=0)
    for name, array in _arrays(tmp_path / "whole").items():
        found = _arrays(tmp_path / "mixed")[name] if name.startswith("params/") else None
        assert found is None or abs(found - array).max() <= limit * abs(array).max()


def test_training_learns_and_leaves_a_model_that_opens_with_its_tokenizer(finished: Path) -> None:
    losses = _losses(finished)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    held_out = _metrics(finished)[-1]
    assert held_out["step"] == STEPS
    assert held_out["held_out_tokens"] > 0
    model = load_model(finished / "model")
    assert model.tokenizer_file is not None
    assert model.spec.eos_token_id == 0
    assert [path.name for path in (finished / "state").iterdir()] == [f"step-{STEPS:08d}"]


def test_a_student_that_starts_as_its_teacher_has_nothing_to_learn(
    begin: Callable[..., int], finished: Path, tmp_path: Path, backend: str
) -> None:
    model = str(finished / "model")
    flags = ("--teacher", model, "--backend", backend, "--dtype", "float64", "--steps", "1")
    assert begin("same", "--model", model, *flags) == 0
    record = _metrics(tmp_path / "same")[0]
    assert 0.0 <= record["loss"] <= trajectory_limit(1)
    assert record["grad_norm"] <= trajectory_limit(1)


def test_distillation_uses_the_teachers_tokenizer_and_the_named_divergence(
    begin: Callable[..., int], finished: Path, tmp_path: Path
) -> None:
    flags = ("--teacher", str(finished / "model"), "--steps", "2", "--seed", "7")
    assert begin("forward", *flags) == 0
    assert begin("reverse", *flags, "--distil", "reverse_kl") == 0
    assert begin("truncated", *flags, "--top-k", "5") == 0
    losses = {name: _losses(tmp_path / name)[0] for name in ("forward", "reverse", "truncated")}
    assert len(set(losses.values())) == 3
    assert all(loss > 0 for loss in losses.values())
    tokenizer = (finished / "tokenizer.json").read_bytes()
    assert (tmp_path / "forward" / "model" / "tokenizer.json").read_bytes() == tokenizer


def test_ctrl_c_saves_after_the_update_in_progress_and_says_how_to_go_on(
    begin: Callable[..., int], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plain = training_run.append_metrics

    def interrupting(directory: Path, record: dict[str, Any]) -> None:
        plain(directory, record)
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training_run, "append_metrics", interrupting)
    assert begin("run") == 130
    monkeypatch.undo()
    assert f"tessera train {tmp_path / 'run'} --backend torch --resume" in capsys.readouterr().out
    assert len(_losses(tmp_path / "run")) == 2
    assert run(["train", str(tmp_path / "run"), "--resume"]) == 0
    assert _losses(tmp_path / "run") == _losses(finished)


@pytest.mark.parametrize("broken", ["save_model", "write_tensors"])
def test_a_save_that_fails_leaves_the_save_before_it(
    begin: Callable[..., int], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    plain, calls = getattr(run_directory, broken), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return plain(*args, **kwargs)

    monkeypatch.setattr(run_directory, broken, failing)
    assert begin("run", "--save-every", "2") == 2
    monkeypatch.undo()
    state = load_state(tmp_path / "run")
    assert state is not None
    assert state.step == 2
    assert run(["train", str(tmp_path / "run"), "--resume"]) == 0
    assert _losses(tmp_path / "run") == _losses(finished)


def test_a_run_killed_before_its_first_save_starts_over(
    begin: Callable[..., int], finished: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    shutil.rmtree(directory / "model")
    assert run(["train", str(directory), "--resume"]) == 0
    assert _losses(directory) == _losses(finished)


def test_an_altered_moment_is_named_and_a_foreign_model_has_no_state(
    finished: Path, tmp_path: Path, capsys: Any
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    (path,) = (directory / "state").glob("*/moments.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert run(["train", str(directory), "--resume", "--steps", "9"]) == 2
    error = capsys.readouterr().err
    assert "moments.safetensors: " in error
    assert "altered" in error
    shutil.rmtree(directory / "state")
    assert run(["train", str(directory), "--resume", "--steps", "9"]) == 2
    assert "no state of the weights" in capsys.readouterr().err


def test_more_steps_may_be_asked_for_and_nothing_else_may_change(finished: Path, tmp_path: Path, capsys: Any) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    for flags, found in (
        (["--seed", "1"], "seed = 1: expected 0"),
        (["--preset", "tiny"], "preset = 'tiny': expected 'nano'"),
        (["--dtype", "float64"], "dtype"),
        (["--steps", "2"], "steps = 2: expected >= 4"),
        (["--data", str(directory)], "data = "),
    ):
        assert run(["train", str(directory), "--resume", *flags]) == 2
        assert found in capsys.readouterr().err
    assert run(["train", str(directory), "--resume", "--steps", "5", "--seed", "0"]) == 0
    assert len(_losses(directory)) == 5
    assert _losses(directory)[:4] == _losses(finished)


def test_a_corpus_that_changed_since_the_run_began_is_refused(
    begin: Callable[..., int], text_file: Path, tmp_path: Path, capsys: Any
) -> None:
    assert begin("run", "--stop-after", "1") == 0
    text_file.write_text(TEXT + "more\n")
    try:
        assert run(["train", str(tmp_path / "run"), "--resume"]) == 2
        assert "corpus = " in capsys.readouterr().err
    finally:
        text_file.write_text(TEXT)


def test_a_run_that_another_process_has_is_left_alone(finished: Path, capsys: Any) -> None:
    with locked_run(finished):
        assert run(["train", str(finished), "--resume"]) == 2
    assert "another process is training here" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_save(
    begin: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    flags = ("--schedule", "constant", "--lr", "1e30", "--warmup", "0", "--save-every", "1")
    assert begin("run", *flags, "--steps", "9") == 2
    error = capsys.readouterr().err
    assert "expected finite numbers" in error
    state = load_state(tmp_path / "run")
    assert state is not None
    assert f"step {state.step} is saved" in error
    assert len(_losses(tmp_path / "run")) == state.step


@pytest.mark.parametrize(
    ("flags", "code", "found"),
    [
        (["--backend", "tensorflow"], 2, "tensorflow"),
        (["--preset", "huge"], 2, "preset = 'huge'"),
        (["--steps", "0"], 2, "steps = 0"),
        (["--batch-size", "3", "--accumulate", "2"], 2, "accumulate = 2"),
        (["--seq-len", "4096"], 2, "seq_len = 4096"),
        (["--lr", "nan"], 2, "schedule.peak = nan"),
        (["--schedule", "step"], 2, "schedule.kind = 'step'"),
        (["--dtype", "float16"], 2, "float16"),
        (["--seed", "-1"], 2, "seed = -1"),
        (["--distil", "forward_kl"], 2, "expected --teacher"),
        (["--teacher", "nowhere"], 2, "nowhere"),
        (["--device", "abacus"], 2, "device = 'abacus'"),
        (["--data", "nowhere"], 2, "nowhere: not found"),
        (["--tokenizer", "nowhere"], 2, "nowhere"),
        (["--resume"], 2, "not a run"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_run_behind(
    begin: Callable[..., int], tmp_path: Path, capsys: Any, flags: list[str], code: int, found: str
) -> None:
    assert begin("run", *flags) == code
    error = capsys.readouterr().err
    assert found in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_existing_run_and_a_folder_of_something_else_are_never_overwritten(
    begin: Callable[..., int], finished: Path, tmp_path: Path, capsys: Any
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert run(["train", str(finished)]) == 2
    assert "a run already" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    assert begin("mine") == 2
    assert "not a run" in capsys.readouterr().err


def test_a_missing_framework_is_exit_4_and_one_line(
    begin: Callable[..., int], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tessera_jax", "jax")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jax", None)
    assert begin("run", "--backend", "jax") == 4
    assert "pip install" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_both_halves_print_the_same_tokens_in_float64(finished: Path, capsys: Any) -> None:
    pytest.importorskip("jax")
    flags = ["--prompt", "def add", "--tokens", "12", "--temperature", "0.9", "--top-p", "0.9", "--ignore-end", "--ids"]
    printed = []
    for backend in ("torch", "jax"):
        command = ["generate", str(finished / "model"), "--backend", backend, "--dtype", "float64", "--seed", "5"]
        assert run([*command, *flags]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1]
    assert len(printed[0]["new_ids"]) == 12
    assert run(["generate", str(finished / "model"), "--dtype", "float64", "--seed", "6", *flags]) == 0
    assert json.loads(capsys.readouterr().out) != printed[0]


def test_generated_text_begins_with_the_prompt(finished: Path, capsys: Any) -> None:
    assert run(["generate", str(finished / "model"), "--prompt", "def add", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("def add")


@pytest.mark.parametrize(
    ("flags", "code", "found"),
    [
        (["--prompt", "x" * 3000], 2, "max_positions"),
        (["--tokens", "2000"], 2, "max_positions"),
        (["--tokens", "0"], 2, "tokens"),
        (["--temperature", "-1"], 2, "temperature = -1.0"),
        (["--temperature", "nan"], 2, "temperature = nan"),
        (["--top-p", "2"], 2, "top_p = 2.0"),
        (["--backend", "tensorflow"], 2, "tensorflow"),
        (["--seed", "-1"], 2, "seed"),
    ],
)
def test_a_mistake_in_generation_is_one_line(
    finished: Path, capsys: Any, flags: list[str], code: int, found: str
) -> None:
    assert run(["generate", str(finished / "model"), *flags]) == code
    captured = capsys.readouterr()
    assert found in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(
    begin: Callable[..., int], finished: Path, tmp_path: Path, capsys: Any
) -> None:
    from tessera_shared.tokens import Tokenizer

    Tokenizer.train_bpe([TEXT * 3 + " ".join(str(n) for n in range(3000))], 900).save(tmp_path / "large.json")
    large = ["--tokenizer", str(tmp_path / "large.json")]
    assert run(["generate", str(finished / "model"), "--prompt", "a", *large]) == 2
    assert "large.json: 900 ids" in capsys.readouterr().err
    assert begin("run", "--model", str(finished / "model"), *large) == 2
    assert "900 ids" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
