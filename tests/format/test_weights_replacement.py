"""Writing a model directory: whole or not at all, whenever the process dies."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera_shared import atomic, tensor_file, weights
from tessera_shared.atomic import recover, replace_file, replaced_directory
from tessera_shared.checksums import checksum_array
from tessera_shared.errors import FormatError, SpecError
from tessera_shared.weights import load_model, save_model

from .model_directories import EMBEDDING, SPEC, Arrays, Q, assert_same_bits, made, names_in, outcome


def test_saving_refuses_arrays_that_do_not_fit_the_spec(tmp_path: Path) -> None:
    arrays = made()
    bad: list[tuple[Arrays, str]] = [
        ({name: array for name, array in arrays.items() if name != Q}, f"{Q}: missing"),
        (arrays | {"lm_head.weight": arrays[EMBEDDING]}, "lm_head.weight: surplus"),
        (arrays | {Q: arrays[Q].T.reshape(2, 8)}, "shape"),
        (arrays | {Q: arrays[Q].astype(np.float16)}, "dtype = float16"),
        (arrays | {Q: arrays[Q].astype(">f4")}, "dtype = >f4"),
    ]
    for wrong, word in bad:
        with pytest.raises(FormatError) as caught:
            save_model(tmp_path / "m", SPEC, wrong)
        assert word in str(caught.value)
    with pytest.raises(SpecError, match="logit_softcap"):
        save_model(tmp_path / "m", replace(SPEC, logit_softcap=3.0), arrays)
    with pytest.raises(FormatError, match="max_shard_bytes = 0"):
        save_model(tmp_path / "m", SPEC, arrays, max_shard_bytes=0)
    assert names_in(tmp_path) == []


def test_checksums_are_taken_from_memory_and_not_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that corrupts what it is given must not be believed."""

    def corrupting(path: Path, chunks: Any) -> int:
        pieces = [bytes(chunk) for chunk in chunks]
        if path.suffix == ".safetensors":
            pieces[-1] = pieces[-1][:-1] + bytes([pieces[-1][-1] ^ 1])
        return atomic.write_file(path, pieces)

    monkeypatch.setattr(tensor_file, "write_file", corrupting)
    save_model(tmp_path / "m", SPEC, made())
    assert "checksum" in str(outcome(tmp_path / "m"))


@pytest.mark.parametrize("fails_at", range(5))
def test_a_write_that_fails_leaves_the_old_model_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    save_model(tmp_path / "m", SPEC, made(), max_shard_bytes=300)
    calls = iter(range(99))

    def failing(path: Path, chunks: Any) -> int:
        if next(calls) == fails_at:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        return atomic.write_file(path, chunks)

    monkeypatch.setattr(tensor_file, "write_file", failing)
    monkeypatch.setattr(weights, "write_file", failing)
    with pytest.raises(OSError, match="No space"):
        save_model(tmp_path / "m", SPEC, made(seed=1), max_shard_bytes=300)
    assert outcome(tmp_path / "m") is None
    assert names_in(tmp_path) == ["m"]


@pytest.mark.parametrize("cut", ["before the old is aside", "between the renames", "before the old is removed"])
def test_a_process_killed_while_replacing_leaves_one_whole_model(tmp_path: Path, cut: str) -> None:
    """The kill is real: the process dies by SIGKILL at that point, and the next reader or writer recovers."""
    save_model(tmp_path / "m", SPEC, made())
    script = f"""
import os, shutil, signal, sys
from pathlib import Path
from tessera_shared import atomic
import model_directories as t
from tessera_shared.weights import save_model
die = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
rename, count = Path.rename, [0]
def counted(self, target):
    if count[0] == {["before the old is aside", "between the renames"].index(cut) if "removed" not in cut else 9}:
        die()
    count[0] += 1
    return rename(self, target)
Path.rename = counted
atomic.shutil.rmtree = die
save_model(Path({str(tmp_path / "m")!r}), t.SPEC, t.made(seed=1))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    died = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    expected = made(seed=1) if "removed" in cut else made()
    assert_same_bits(expected, load_model(tmp_path / "m").arrays)
    save_model(tmp_path / "m", SPEC, made(seed=2))
    assert_same_bits(made(seed=2), load_model(tmp_path / "m").arrays)
    assert names_in(tmp_path) == ["m"]


def test_a_directory_that_holds_anything_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    save_model(tmp_path / "m", SPEC, made())
    (tmp_path / "m" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "tokenizer.json").write_text("{}")
    for name, holds in (("home", "thesis.tex"), ("m", "notes.txt"), ("file", "file"), ("partial", "tokenizer.json")):
        with pytest.raises(FormatError, match=f"holds {holds}"):
            save_model(tmp_path / name, SPEC, made(seed=1))
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"
    assert_same_bits(made(), load_model(tmp_path / "m").arrays)


def test_two_writers_of_one_directory_are_kept_apart(tmp_path: Path) -> None:
    with replaced_directory(tmp_path / "m") as staged:
        (staged / "a").write_text("first")
        with pytest.raises(FormatError, match="another process is writing"), replaced_directory(tmp_path / "m"):
            pass
    assert names_in(tmp_path / "m") == ["a"]


def test_what_a_dead_writer_staged_is_cleared_and_recovery_is_idle_when_nothing_happened(tmp_path: Path) -> None:
    (tmp_path / ".m.new").mkdir()
    (tmp_path / ".m.new" / "half").write_text("x")
    assert not recover(tmp_path / "m")
    with replaced_directory(tmp_path / "m") as staged:
        assert names_in(staged) == []
    assert names_in(tmp_path) == ["m"]


def test_replacing_one_file_is_atomic_and_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    replace_file(path, b"one")
    replace_file(path, b"two")

    def full(_: Path, __: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"three")
    assert path.read_bytes() == b"two"
    assert names_in(tmp_path) == ["report.json"]


@settings(max_examples=10)
@given(st.binary(min_size=1, max_size=64))
def test_a_checksum_sees_every_single_bit(data: bytes) -> None:
    array = np.frombuffer(data, np.uint8).copy()
    seen = {checksum_array(array)}
    for bit in range(8 * array.size):
        array[bit // 8] ^= 1 << bit % 8
        seen.add(checksum_array(array))
        array[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 8 * array.size + 1
