"""Configs, indexes and manifests that do not fit the weights beside them: refused by file and name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tessera_shared import tensor_file
from tessera_shared.stored_model import check_contents, manifest_checksum, open_model
from tessera_shared.weights import save_model

from .model_directories import (
    EMBEDDING,
    SPEC,
    Q,
    forget_checksums,
    made,
    outcome,
)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", ".x.safetensors", "x.bin", 3, ""]
)
def test_an_index_cannot_lead_out_of_the_directory(sound: Path, tmp_path: Path, file: Any) -> None:
    directory = tmp_path / "m"
    shutil.copytree(sound, directory)
    forget_checksums(directory)
    tensor_file.write_tensors(tmp_path / "secret.safetensors", made())
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"][Q] = file
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    complaint = str(outcome(directory))
    assert Q in complaint
    assert "plain name" in complaint


def test_an_index_that_does_not_describe_its_shards_is_refused(sound: Path, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(sound, directory)
    forget_checksums(directory)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    home = index["weight_map"]
    elsewhere = next(file for file in home.values() if file != home[Q])

    def complaint_after(weight_map: Any) -> str:
        path.write_text(json.dumps({"weight_map": weight_map}))
        return str(outcome(directory))

    assert Q in complaint_after(home | {Q: elsewhere})
    assert Q in complaint_after({name: file for name, file in home.items() if name != Q})
    assert "ghost" in complaint_after(home | {"ghost": elsewhere})
    assert "not there" in complaint_after(home | {Q: "model-00009-of-00009.safetensors"})
    assert "weight_map" in complaint_after([1])
    assert "weight_map" in complaint_after({})


@pytest.mark.parametrize(
    ("file", "text", "word"),
    [
        ("config.json", "{", "JSON"),
        ("config.json", "[1]", "expected an object"),
        ("config.json", '{"model_type": "llama", "rope_theta": NaN}', "JSON"),
        ("config.json", '{"model_type": "gpt2"}', "model_type"),
        ("config.json", '{"model_type": "mistral", "num_hidden_layers": 1000000000}', "missing"),
        ("tessera.json", "{}", "version"),
        ("tessera.json", '{"format": "tessera-weights", "version": 2}', "version 2"),
        ("tessera.json", '{"format": "tessera-weights", "version": 1}', "its own checksum"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused_by_file(tmp_path: Path, file: str, text: str, word: str) -> None:
    save_model(tmp_path / "m", SPEC, made())
    if file == "config.json":
        forget_checksums(tmp_path / "m")
    (tmp_path / "m" / file).write_text(text)
    complaint = str(outcome(tmp_path / "m"))
    assert file in complaint
    assert word in complaint


@pytest.mark.parametrize(
    "change",
    [
        {"files": None}, {"tensors": []}, {"real_vocab_size": "5"}, {"real_vocab_size": 99},
        {"numerics": {"param": "x"}},
        {"files": {"../../etc/passwd": {"bytes": 1, "xxh3_128": "0"}}}, {"files": {"config.json": {}}}, {"files": {}},
        {"tensors": {EMBEDDING: {}}}, {"spec_sha256": "0"}, {"surprise": 1},
    ],
)  # fmt: skip
def test_a_manifest_that_vouches_for_nonsense_is_still_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    save_model(tmp_path / "m", SPEC, made())
    path = tmp_path / "m" / "tessera.json"
    manifest = json.loads(path.read_text())
    del manifest["manifest_xxh3_128"]
    manifest |= change
    path.write_text(json.dumps(manifest | {"manifest_xxh3_128": manifest_checksum(manifest)}))
    complaint = outcome(tmp_path / "m")
    assert complaint is None if change == {"surprise": 1} else complaint is not None


def test_missing_weights_both_layouts_at_once_and_a_changed_config_are_refused(sound: Path, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(sound, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert "config.json" in str(outcome(directory))
    (directory / "config.json").write_text(json.dumps(config))  # same meaning, other bytes
    assert "changed since it was written" in str(outcome(directory))
    forget_checksums(directory)
    tensor_file.write_tensors(directory / "model.safetensors", made())
    assert "they may differ" in str(outcome(directory))
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").unlink()
    assert "no model.safetensors" in str(outcome(directory))
    (directory / "config.json").unlink()
    assert "config.json: cannot be read" in str(outcome(directory))


def test_a_report_lists_every_problem_and_not_only_the_first(sound: Path, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(sound, directory)
    (directory / "tokenizer.json").write_text("{}")
    shards = sorted(directory.glob("*.safetensors"))
    for path in shards:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    reports = list(check_contents(open_model(directory)))
    assert {report.file for report in reports if report.problems} == {"tokenizer.json", *(p.name for p in shards)}
