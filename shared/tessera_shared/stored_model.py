"""What a model directory holds: structure first (names, shapes, dtypes, sizes), then every number.

Each finding names the tensor and the file. Nothing here writes.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from tessera_shared.atomic import recover
from tessera_shared.checksums import checksum_array, checksum_bytes, checksum_file, spec_digest
from tessera_shared.errors import FormatError, SpecError
from tessera_shared.hf_config import end_token_ids, passed_over, spec_from_config
from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec
from tessera_shared.tensor_file import TensorFile, parse_json
from tessera_shared.tensors import EMBEDDING, UNEMBEDDING, tensor_table

CONFIG, MANIFEST, TOKENIZER, GENERATION = "config.json", "tessera.json", "tokenizer.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FORMAT_NAME, FORMAT_VERSION = "tessera-weights", 1

COMPANIONS = (
    GENERATION,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
"""Files that Hugging Face keeps beside the weights; carried along byte for byte, never read for meaning."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TENSOR_ROW = {"dtype", "shape", "file", "xxh3_128"}
_DERIVED_TENSORS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """What reading one file in full showed."""

    file: str
    num_bytes: int
    num_tensors: int
    num_compared: int  # checksums held against tessera.json
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A model directory whose structure has been checked and whose numbers have not been read."""

    directory: Path
    spec: ModelSpec
    config: dict[str, Any]
    manifest: dict[str, Any] | None
    numerics: Numerics | None
    files: dict[str, TensorFile]
    tensors: dict[str, str]  # the spec's tensors and a tied lm_head if there is one -> file
    notes: tuple[str, ...]


def open_model(directory: Path | str) -> OpenedModel:
    """Check the structure of a model directory (descriptions, names, shapes, dtypes, sizes) without reading numbers."""
    folder = Path(directory)
    recover(folder)
    config = read_object(folder / CONFIG)
    try:
        spec = spec_from_config(config)
    except SpecError as error:
        raise FormatError(f"{folder / CONFIG}: {error}") from None
    manifest = _read_manifest(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    if manifest is not None:
        spec = _with_manifest(folder, spec, manifest)
    files = _weight_files(folder)
    where = _where(folder, files)
    _check_names(folder, spec, where)
    for name, info in tensor_table(spec).items():
        _check_entry(files[where[name]], name, info.shape)
    tensors = {name: where[name] for name in tensor_table(spec)}
    if spec.tie_embeddings and UNEMBEDDING in where:
        _check_entry(files[where[UNEMBEDDING]], UNEMBEDDING, tensor_table(spec)[EMBEDDING].shape)
        tensors[UNEMBEDDING] = where[UNEMBEDDING]
    if manifest is not None:
        _check_against_manifest(manifest, files, tensors)
    return OpenedModel(
        directory=folder,
        spec=spec,
        config=config,
        manifest=manifest,
        numerics=_read_numerics(folder, manifest),
        files=files,
        tensors=tensors,
        notes=tuple(_notes(config, manifest, files, tensors)),
    )


def check_contents(opened: OpenedModel, *, allow_nonfinite: bool = False) -> Iterator[FileReport]:
    """Read every file in full and report on each, the small ones first."""
    for file, row in (opened.manifest or {"files": {}})["files"].items():
        path = opened.directory / file
        if "header_xxh3_128" not in row:
            problems = _small_file_problems(path, row)
            yield FileReport(file=file, num_bytes=row["bytes"], num_tensors=0, num_compared=1, problems=tuple(problems))
    for file, opened_file in opened.files.items():
        names = [name for name, home in opened.tensors.items() if home == file]
        found = [problem for name in names for problem in _tensor_problems(opened, name, allow_nonfinite)]
        yield FileReport(
            file=file,
            num_bytes=opened_file.num_bytes,
            num_tensors=len(names),
            num_compared=len(names) if opened.manifest else 0,
            problems=tuple(found),
        )


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes. FormatError names the file that cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}): expected a file; try another path") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. FormatError names the file."""
    return parse_json(read_bytes(path), str(path))


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Return the checksum by which `tessera.json` vouches for itself: of its canonical JSON without that field."""
    return checksum_bytes(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_object(path)
    stated = manifest.pop("manifest_xxh3_128", None)
    if manifest.get("format") != FORMAT_NAME or manifest.get("version") != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format {manifest.get('format')!r} version {manifest.get('version')!r}: expected {FORMAT_NAME!r} "
            f"version {FORMAT_VERSION}, because this reader knows no other; try the Tessera that wrote it"
        )
    if stated != manifest_checksum(manifest):
        raise FormatError(
            f"{path}: its own checksum is {stated}: expected {manifest_checksum(manifest)}, because nothing else "
            "vouches for it; try another copy, or delete it to load the weights unverified"
        )
    _check_manifest_shape(path, manifest)
    return manifest


def _check_manifest_shape(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse a manifest whose checksum is right and whose fields are not those of version 1."""
    files, tensors, real = manifest.get("files"), manifest.get("tensors"), manifest.get("real_vocab_size")
    sound = (
        isinstance(files, dict)
        and isinstance(tensors, dict)
        and (real is None or type(real) is int)
        and isinstance(manifest.get("spec_sha256"), str)
        and isinstance(manifest.get("numerics"), dict | None)
        and all(_PLAIN_NAME.fullmatch(name) and _is_file_row(row) for name, row in files.items())
        and all(isinstance(row, dict) and row.keys() == _TENSOR_ROW for row in tensors.values())
    )
    if not sound:
        raise FormatError(
            f"{path}: fields are missing or of another kind: expected those of docs/format.md; try another copy"
        )


def _is_file_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and type(row.get("bytes")) is int
        and row.keys() in ({"bytes", "xxh3_128"}, {"bytes", "header_xxh3_128"})
    )


def _with_manifest(folder: Path, spec: ModelSpec, manifest: dict[str, Any]) -> ModelSpec:
    try:
        spec = replace(spec, real_vocab_size=manifest["real_vocab_size"])
    except SpecError as error:
        raise FormatError(f"{folder / MANIFEST}: {error}") from None
    if spec_digest(spec) != manifest["spec_sha256"]:
        raise FormatError(
            f"{folder / CONFIG}: describes another model than {MANIFEST} does: expected spec digest "
            f"{manifest['spec_sha256'][:16]}.., found {spec_digest(spec)[:16]}..; try another copy, or delete "
            f"{MANIFEST} if the change was meant"
        )
    return spec


def _read_numerics(folder: Path, manifest: dict[str, Any] | None) -> Numerics | None:
    given = None if manifest is None else manifest["numerics"]
    if given is None:
        return None
    if set(given) != {field.name for field in fields(Numerics)}:
        raise FormatError(f"{folder / MANIFEST}: numerics has fields {sorted(given)}: expected those of Numerics")
    try:
        return Numerics(**given)
    except SpecError as error:
        raise FormatError(f"{folder / MANIFEST}: {error}") from None


def _weight_files(folder: Path) -> dict[str, TensorFile]:
    single, index = (folder / WEIGHTS).is_file(), (folder / INDEX).is_file()
    if single and index:
        raise FormatError(
            f"{folder}: holds {WEIGHTS} and {INDEX}: expected one, because they may differ; try removing one"
        )
    if single:
        return {WEIGHTS: TensorFile(folder / WEIGHTS)}
    if not index:
        raise FormatError(
            f"{folder}: no {WEIGHTS} and no {INDEX}: expected one of them, because other formats (such as pickled .bin "
            "files) are not read; try converting the checkpoint to safetensors"
        )
    names = sorted(set(_weight_map(folder).values()))
    return {name: TensorFile(folder / name) for name in names}


def _weight_map(folder: Path) -> dict[str, str]:
    table = read_object(folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise FormatError(f"{folder / INDEX}: weight_map is {str(table)[:40]}: expected tensor names and their files")
    for name, file in table.items():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file) or not file.endswith(".safetensors"):
            raise FormatError(
                f"{folder / INDEX}: {name}: file {file!r}: expected a plain name that ends in .safetensors, because "
                "shards lie in the directory itself; try fetching the checkpoint again"
            )
        if not (folder / file).is_file():
            raise FormatError(
                f"{folder / INDEX}: {name}: file {file} is not there: expected every shard; try fetching it"
            )
    return table


def _where(folder: Path, files: dict[str, TensorFile]) -> dict[str, str]:
    """Return tensor name -> file, from the headers, and hold it against the index if there is one."""
    where: dict[str, str] = {}
    for file, opened in files.items():
        for name in opened.entries:
            if name in where:
                raise FormatError(f"{folder / file}: {name}: also in {where[name]}: expected it once; try removing one")
            where[name] = file
    if WEIGHTS not in files:
        claimed = _weight_map(folder)
        for name in sorted(claimed.keys() | where.keys()):
            if claimed.get(name) != where.get(name):
                raise FormatError(
                    f"{folder / INDEX}: {name}: said to be in {claimed.get(name)}, is in {where.get(name)}: expected "
                    "the same file, because the index has to describe the shards; try fetching the checkpoint again"
                )
    return where


def _check_names(folder: Path, spec: ModelSpec, where: dict[str, str]) -> None:
    missing = surplus = None
    if spec.num_layers > len(where):  # before a table of absurd length is built
        missing = f"model.layers.{spec.num_layers - 1}"
    else:
        table = tensor_table(spec)
        missing = next((name for name in table if name not in where), None)
        tied = {UNEMBEDDING} if spec.tie_embeddings else set()
        extra = sorted(set(where) - set(table) - tied)
        surplus = next((name for name in extra if not _DERIVED_TENSORS.fullmatch(name)), None)
    if missing is not None:
        raise FormatError(
            f"{missing}: missing from {folder}: expected it, because {CONFIG} describes a model that has it; try "
            "fetching the checkpoint again"
        )
    if surplus is not None:
        raise FormatError(
            f"{surplus}: surplus in {folder / where[surplus]}: expected only the tensors that {CONFIG} describes, "
            "because the model would not use it; try the configuration that belongs to these weights"
        )


def _check_entry(file: TensorFile, name: str, shape: tuple[int, ...]) -> None:
    entry = file.entries[name]
    if entry.shape != shape:
        raise FormatError(
            f"{file.path}: {name}: shape {entry.shape}: expected {shape}, because {CONFIG} says so; try the "
            "configuration that belongs to these weights"
        )
    if entry.dtype not in ("F64", "F32", "BF16", "F16"):
        raise FormatError(
            f"{file.path}: {name}: dtype = {entry.dtype}: expected F64, F32, BF16 or F16, because weights are numbers "
            "here and not codes; try the unquantized checkpoint"
        )


def _check_against_manifest(manifest: dict[str, Any], files: dict[str, TensorFile], tensors: dict[str, str]) -> None:
    for name in sorted(manifest["tensors"].keys() ^ tensors.keys()):
        raise FormatError(f"{name}: in only one of {MANIFEST} and the weight files: expected both; try another copy")
    for name, file in tensors.items():
        entry, row = files[file].entries[name], manifest["tensors"][name]
        found = {"dtype": entry.dtype, "shape": list(entry.shape), "file": file}
        for key, value in found.items():
            if row[key] != value:
                raise FormatError(
                    f"{files[file].path}: {name}: {key} = {value}: expected {row[key]}, because {MANIFEST} says so; "
                    f"try another copy, or delete {MANIFEST} if the change was meant"
                )
    for file, opened in files.items():
        expected = manifest["files"].get(file, {}).get("header_xxh3_128")
        if opened.header_checksum != expected:
            raise FormatError(
                f"{opened.path}: header has checksum {opened.header_checksum}: expected {expected}, because {MANIFEST} "
                "says so; try another copy"
            )


def _notes(
    config: dict[str, Any], manifest: dict[str, Any] | None, files: dict[str, TensorFile], tensors: dict[str, str]
) -> Iterator[str]:
    if manifest is None:
        yield f"unverified: no {MANIFEST}, so there are no checksums to compare with"
    ignored = passed_over(config)
    if ignored:
        yield f"{CONFIG}: passed over, since they do not change the model: {', '.join(ignored)}"
    ends = end_token_ids(config)
    if len(ends) > 1:
        yield f"{CONFIG}: eos_token_id lists {ends}; the spec keeps {ends[0]}, end_token_ids has all"
    kinds = sorted({files[file].entries[name].dtype for name, file in tensors.items()})
    if len(kinds) > 1:
        yield f"tensors have several dtypes: {', '.join(kinds)}"
    if "F16" in kinds:
        yield "tensors are float16, for which there is no numerics policy; float32 holds them exactly"
    derived = sorted({name for opened in files.values() for name in opened.entries} - tensors.keys())
    if derived:
        yield f"passed over {len(derived)} tensors that are derived from {CONFIG}, such as {derived[0]}"


# Contents


def _small_file_problems(path: Path, row: dict[str, Any]) -> list[str]:
    try:
        checksum = checksum_file(path)
    except OSError as error:
        return [
            f"{path}: cannot be read ({error.strerror}): expected it, because {MANIFEST} lists it; try another copy"
        ]
    if checksum == row["xxh3_128"]:
        return []
    return [
        f"{path}: changed since it was written: checksum {checksum}, expected {row['xxh3_128']}; try another copy, or "
        f"delete {MANIFEST} if the change was meant"
    ]


def _tensor_problems(opened: OpenedModel, name: str, allow_nonfinite: bool) -> Iterator[str]:
    file = opened.files[opened.tensors[name]]
    array = file.array(name)
    if opened.manifest is not None:
        expected, found = opened.manifest["tensors"][name]["xxh3_128"], checksum_array(array)
        if found != expected:
            yield f"{file.path}: {name}: altered or torn: checksum {found}, expected {expected}; try another copy"
            return
    if not allow_nonfinite:
        count = _count_nonfinite(array)
        if count:
            yield (
                f"{file.path}: {name}: {count} of {array.size} numbers are NaN or infinite: expected none, because "
                "they spread to every output; try an earlier checkpoint, or allow_nonfinite"
            )
    if name == UNEMBEDDING and opened.spec.tie_embeddings:
        tied = opened.files[opened.tensors[EMBEDDING]].array(EMBEDDING)
        if array.dtype != tied.dtype or checksum_array(array) != checksum_array(tied):
            yield (
                f"{file.path}: {name}: differs from {EMBEDDING}: expected equal bits, because {CONFIG} says "
                "tie_word_embeddings = true; try tie_word_embeddings = false"
            )


def _count_nonfinite(array: np.ndarray) -> int:
    flat_X, count, piece = array.reshape(-1), 0, 1 << 20
    for start in range(0, flat_X.size, piece):
        part_X = flat_X[start : start + piece]
        if array.dtype.name == "bfloat16":
            count += int(np.count_nonzero((part_X.view(np.uint16) & np.uint16(0x7F80)) == np.uint16(0x7F80)))
        else:
            count += int(np.count_nonzero(~np.isfinite(part_X)))
    return count
