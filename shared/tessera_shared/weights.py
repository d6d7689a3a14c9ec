"""A model on disk: the Hugging Face directory (`docs/format.md`), with `tessera.json` beside it to verify against.

Writing is all or nothing. Reading checks names, shapes, dtypes and checksums, names the tensor and the file that is
wrong, and never guesses.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tessera_shared.atomic import recover, replaced_directory, write_file
from tessera_shared.checksums import checksum_bytes, spec_digest
from tessera_shared.errors import FormatError
from tessera_shared.hf_config import config_from_spec, end_token_ids
from tessera_shared.numerics import DTYPES, Numerics
from tessera_shared.spec import ModelSpec
from tessera_shared.stored_model import (
    COMPANIONS,
    CONFIG,
    FORMAT_NAME,
    FORMAT_VERSION,
    GENERATION,
    INDEX,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    check_contents,
    manifest_checksum,
    open_model,
    read_bytes,
    read_object,
)
from tessera_shared.tensor_file import WrittenFile, dtype_code, write_tensors
from tessera_shared.tensors import tensor_table

_OWN_NAMES = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model directory as it was found. `arrays` are lazy private views of the mapped files, by tensor name."""

    directory: Path
    spec: ModelSpec
    arrays: dict[str, np.ndarray]
    config: dict[str, Any]  # config.json, untouched
    generation: dict[str, Any] | None  # generation_config.json, untouched
    tokenizer_file: Path | None
    companions: tuple[Path, ...]  # files to carry along when the model is saved elsewhere
    numerics: Numerics | None  # the policy it was made under, if tessera.json says
    verified: bool  # every checksum of tessera.json was compared
    notes: tuple[str, ...]  # what a reader should be told

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text, from generation_config.json and config.json; `spec.eos_token_id` is only one."""
        return tuple(dict.fromkeys(end_token_ids(self.generation or {}) + end_token_ids(self.config)))


def save_model(
    directory: Path | str,
    spec: ModelSpec,
    arrays: Mapping[str, np.ndarray],
    *,
    tokenizer_file: Path | str | None = None,
    max_shard_bytes: int | None = None,
    numerics: Numerics | None = None,
    companions: Sequence[Path] = (),
) -> None:
    """Write a model directory, whole or not at all; an older model there stays until the new one is complete.

    `arrays` must be exactly the tensors of `tensor_table(spec)`, each float64, float32 or bfloat16 and stored bit for
    bit (NaN payloads too). Checksums are taken from memory before the first byte is written. FormatError for arrays
    that do not fit, and for a `directory` that holds anything but a model, since it is replaced whole; SpecError where
    `config.json` cannot say what `spec` says.
    """
    target = Path(directory)
    config = config_from_spec(spec)
    _check_arrays(spec, arrays)
    dtype = max({array.dtype for array in arrays.values()}, key=lambda kind: kind.itemsize).name
    _refuse_foreign(target)
    shards = _shards(spec, arrays, max_shard_bytes)
    with replaced_directory(target) as staged:
        texts = {CONFIG: _json_bytes(config | {"dtype": dtype, "torch_dtype": dtype})}
        if tokenizer_file is not None:
            texts[TOKENIZER] = read_bytes(Path(tokenizer_file))
        for path in companions:
            if path.name not in COMPANIONS:
                raise FormatError(
                    f"{path}: not a companion file: expected one of {', '.join(COMPANIONS)}; try leaving it out"
                )
            texts[path.name] = read_bytes(path)
        if len(shards) > 1:
            texts[INDEX] = _index(shards)
        written = {
            file: write_tensors(staged / file, {name: arrays[name] for name in names}) for file, names in shards.items()
        }
        manifest = _manifest(spec, arrays, numerics, texts, written)
        for file, data in (texts | {MANIFEST: _json_bytes(manifest)}).items():
            write_file(staged / file, [data])


def load_model(directory: Path | str, *, verify: bool = True, allow_nonfinite: bool = False) -> LoadedModel:
    """Open a model directory. With `verify`, every number is read once: checksums compared, NaN and infinity refused.

    Without `tessera.json` there is nothing to compare with, and `notes` says so. FormatError names tensor and file.
    """
    opened = open_model(directory)
    if verify:
        for report in check_contents(opened, allow_nonfinite=allow_nonfinite):
            if report.problems:
                raise FormatError(report.problems[0])
    notes = opened.notes if verify else (*opened.notes, "unverified: loaded with verify=False")
    folder = opened.directory
    return LoadedModel(
        directory=folder,
        spec=opened.spec,
        arrays={name: opened.files[opened.tensors[name]].array(name) for name in tensor_table(opened.spec)},
        config=opened.config,
        generation=read_object(folder / GENERATION) if (folder / GENERATION).is_file() else None,
        tokenizer_file=folder / TOKENIZER if (folder / TOKENIZER).is_file() else None,
        companions=tuple(folder / name for name in COMPANIONS if (folder / name).is_file()),
        numerics=opened.numerics,
        verified=verify and opened.manifest is not None,
        notes=notes,
    )


def _check_arrays(spec: ModelSpec, arrays: Mapping[str, np.ndarray]) -> None:
    table = tensor_table(spec)
    for name in [*(table.keys() - arrays.keys()), *(arrays.keys() - table.keys())]:
        word = "missing" if name in table else "surplus"
        raise FormatError(f"{name}: {word}: expected exactly the tensors of the spec; try tensor_table(spec)")
    for name, info in table.items():
        if arrays[name].shape != info.shape:
            raise FormatError(
                f"{name}: shape {arrays[name].shape}: expected {info.shape} ({info.letters}), because the spec says "
                "so; try the spec that these arrays were made with"
            )
        if arrays[name].dtype.name not in DTYPES:
            raise FormatError(
                f"{name}: dtype = {arrays[name].dtype}: expected one of {', '.join(DTYPES)}, because a policy exists "
                "for these; try converting it to float32"
            )


def _refuse_foreign(target: Path) -> None:
    recover(target)
    if not target.exists():
        return
    names = sorted(path.name for path in target.iterdir()) if target.is_dir() else [target.name]
    known = {CONFIG, MANIFEST, TOKENIZER, INDEX, *COMPANIONS}
    foreign = [name for name in names if name not in known and not _OWN_NAMES.fullmatch(name)]
    if foreign or (names and CONFIG not in names):
        raise FormatError(
            f"{target}: holds {(foreign or names)[0]}: expected a new or empty directory or one that holds only a "
            "model, because saving replaces it whole; try a directory inside it"
        )


def _shards(spec: ModelSpec, arrays: Mapping[str, np.ndarray], max_bytes: int | None) -> dict[str, list[str]]:
    """Return file name -> tensor names, in table order, each file at most `max_bytes` of numbers (or one tensor)."""
    if max_bytes is not None and max_bytes < 1:
        raise FormatError(f"max_shard_bytes = {max_bytes}: expected >= 1 or None, because it is a size; try 5000000000")
    groups: list[list[str]] = []
    room = 0
    for name in tensor_table(spec):
        size = arrays[name].nbytes
        if not groups or (max_bytes is not None and size > room):
            groups.append([])
            room = max_bytes or 0
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _index(shards: dict[str, list[str]]) -> bytes:
    return _json_bytes({"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}})


def _manifest(
    spec: ModelSpec,
    arrays: Mapping[str, np.ndarray],
    numerics: Numerics | None,
    texts: dict[str, bytes],
    written: dict[str, WrittenFile],
) -> dict[str, Any]:
    files: dict[str, Any] = {
        file: {"bytes": len(data), "xxh3_128": checksum_bytes(data)} for file, data in texts.items()
    }
    files |= {
        file: {"bytes": result.num_bytes, "header_xxh3_128": result.header_checksum} for file, result in written.items()
    }
    tensors = {
        name: {
            "dtype": dtype_code(name, arrays[name]),
            "shape": list(arrays[name].shape),
            "file": file,
            "xxh3_128": checksum,
        }
        for file, result in written.items()
        for name, checksum in result.tensor_checksums.items()
    }
    manifest = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "spec_sha256": spec_digest(spec),
        "real_vocab_size": spec.real_vocab_size,
        "numerics": None if numerics is None else asdict(numerics),
        "files": files,
        "tensors": tensors,
    }
    return manifest | {"manifest_xxh3_128": manifest_checksum(manifest)}


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
