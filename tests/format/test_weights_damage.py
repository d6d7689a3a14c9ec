"""Weight files that were cut, flipped, or lie about themselves: no damage goes unseen."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessera_shared.stored_model import open_model
from tessera_shared.weights import save_model

from .model_directories import (
    EMBEDDING,
    SPEC,
    Arrays,
    Q,
    forget_checksums,
    made,
    outcome,
    rewrite,
)


def test_a_flip_of_any_byte_of_any_file_is_detected_or_changed_nothing(sound: Path, tmp_path: Path) -> None:
    """Every 3rd byte, each by one of eight masks; in weights and checksummed files not one may pass."""
    directory = tmp_path / "m"
    shutil.copytree(sound, directory)
    unseen: dict[str, int] = {}
    for path in sorted(directory.iterdir()):
        original = path.read_bytes()
        step = 29 if path.name == "tessera.json" else 3
        for at in range(0, len(original), step):
            mask = 1 << (at // step % 8)
            path.write_bytes(original[:at] + bytes([original[at] ^ mask]) + original[at + 1 :])
            if outcome(directory) is None:
                unseen[path.name] = unseen.get(path.name, 0) + 1
        path.write_bytes(original)
    assert outcome(directory) is None
    assert unseen.keys() <= {"tessera.json"}  # between its words a space may become a tab


def test_a_flip_in_a_weight_names_the_tensor_and_the_file(sound: Path, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(sound, directory)
    opened = open_model(directory)
    entry = opened.files[opened.tensors[Q]].entries[Q]
    path = directory / opened.tensors[Q]
    data = bytearray(path.read_bytes())
    data[entry.stop - 1] ^= 1
    path.write_bytes(data)
    complaint = outcome(directory)
    assert complaint is not None
    assert Q in complaint
    assert path.name in complaint
    assert "checksum" in complaint


@pytest.mark.parametrize("vouched", [True, False])
def test_a_file_cut_at_any_64_bytes_is_refused(sound: Path, tmp_path: Path, vouched: bool) -> None:
    directory = tmp_path / "m"
    shutil.copytree(sound, directory)
    if not vouched:
        forget_checksums(directory)
    for path in sorted(directory.glob("*.safetensors")):
        original = path.read_bytes()
        for length in [*range(0, len(original), 64), len(original) - 1]:
            path.write_bytes(original[:length])
            complaint = outcome(directory)
            assert complaint is not None
            assert path.name in complaint
        path.write_bytes(original + b"\0")
        assert "too long" in str(outcome(directory))
        path.write_bytes(original)
    assert outcome(directory) is None if vouched else True


def edited_header(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = edit(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def set_row(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].__setitem__(key, value)


def overlap(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (set_row(EMBEDDING, "shape", [8, 4]), "data_offsets"),
        (set_row(EMBEDDING, "shape", [4, 7]), "shape"),
        (set_row(EMBEDDING, "shape", [-7, -4]), "row"),
        (set_row(EMBEDDING, "shape", "7x4"), "row"),
        (set_row(EMBEDDING, "shape", [True, 28]), "row"),
        (set_row(EMBEDDING, "dtype", "F8_E4M3"), "dtype"),
        (set_row(EMBEDDING, "dtype", "I16"), "dtype"),
        (set_row(EMBEDDING, "dtype", ["BF16"]), "dtype"),
        (set_row(EMBEDDING, "data_offsets", [0]), "row"),
        (set_row(EMBEDDING, "data_offsets", [2**70, 2**70 + 56]), "row"),
        (set_row(EMBEDDING, "data_offsets", [10**6, 10**6 + 56]), "begins at byte"),
        (set_row(EMBEDDING, "surprise", 1), "row"),
        (overlap, "begins at byte"),
        (lambda header: header.__setitem__("model.norm.weight", 3), "row"),
        (lambda header: b"[]", "expected an object"),
        (lambda header: b"{" * 100_000, "JSON"),
        (lambda header: b"\xff\xfe{}", "JSON"),
        (lambda header: b'{"a": {}, "a": {}}', "twice"),
        (lambda header: b'{"a": NaN}', "JSON"),
        (lambda header: b"{}", "bytes: expected"),
        (lambda header: b"", "header"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], Any], word: str) -> None:
    save_model(tmp_path / "m", SPEC, made())
    forget_checksums(tmp_path / "m")
    edited_header(tmp_path / "m", edit)
    complaint = outcome(tmp_path / "m")
    assert complaint is not None
    assert "model.safetensors" in complaint
    assert word in complaint


def test_a_header_length_beyond_the_file_allocates_nothing(tmp_path: Path) -> None:
    save_model(tmp_path / "m", SPEC, made())
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes((2**63 - 1).to_bytes(8, "little") + path.read_bytes()[8:])
    assert "header" in str(outcome(tmp_path / "m"))


@pytest.mark.parametrize("vouched", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop(Q), (Q, "missing")),
        (lambda a: a.__setitem__("model.layers.1.mlp.up_proj.weight", a[Q]), ("model.layers.1.mlp", "surplus")),
        (lambda a: a.__setitem__("lm_head.bias", a["model.norm.weight"]), ("lm_head.bias", "surplus")),
        (lambda a: a.__setitem__(Q, a[Q].reshape(2, 8)), (Q, "shape (2, 8): expected (4, 4)")),
        (lambda a: a.__setitem__(Q, a[Q].astype(np.int32)), (Q, "dtype = I32")),
    ],
)
def test_a_tensor_that_is_missing_surplus_or_misshapen_is_named(
    tmp_path: Path, vouched: bool, change: Callable[[Arrays], Any], words: tuple[str, str]
) -> None:
    arrays = made()
    save_model(tmp_path / "m", SPEC, arrays)
    if not vouched:
        forget_checksums(tmp_path / "m")
    change(arrays)
    rewrite(tmp_path / "m", arrays)
    complaint = str(outcome(tmp_path / "m"))
    assert all(word in complaint for word in words), complaint


def test_another_dtype_than_the_manifest_says_is_named(tmp_path: Path) -> None:
    arrays = made()
    save_model(tmp_path / "m", SPEC, arrays)
    rewrite(tmp_path / "m", arrays | {Q: arrays[Q].astype(np.float32)})
    assert "dtype = F32: expected BF16" in str(outcome(tmp_path / "m"))
