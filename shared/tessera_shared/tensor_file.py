"""One safetensors file: written from arrays as they lie in memory, read as lazy views of the mapped file.

Layout: 8 bytes header length, little-endian; JSON `{name: {dtype, shape, data_offsets}}`; the numbers without holes.
Read here rather than through the safetensors package because its NumPy side (0.8) cannot read bfloat16 and copies;
`tests/format` holds the two against each other.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tessera_shared.atomic import write_file
from tessera_shared.checksums import checksum_array, checksum_bytes, raw_bytes
from tessera_shared.errors import FormatError

CODES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""Dtype codes of the format and what they are in NumPy."""

MAX_HEADER_BYTES = 100_000_000
"""The safetensors package refuses a longer header, and so does this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies in its file."""

    dtype: str  # code, such as "BF16"
    shape: tuple[int, ...]
    start: int  # first byte, from the beginning of the file
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """What was written, by checksums taken from the arrays in memory before any byte went out."""

    num_bytes: int
    header_checksum: str  # of the length and the JSON
    tensor_checksums: dict[str, str]


class TensorFile:
    """A safetensors file whose header has been checked against its size. Arrays are views, read when touched.

    The views are private: writing into one changes this process's memory and never the file.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header. FormatError names the file, and the tensor where there is one."""
        self.path = path
        try:
            self.num_bytes = path.stat().st_size
            with path.open("rb") as file:
                prefix = file.read(8)
                length = int.from_bytes(prefix, "little")
                self._check_length(len(prefix), length)
                header = file.read(length)
        except OSError as error:
            raise FormatError(f"{path}: cannot be read ({error.strerror}): expected a safetensors file") from None
        self.header_checksum = checksum_bytes(prefix + header)
        table = parse_json(header, f"{path}: header")
        self.metadata: dict[str, Any] = table.pop("__metadata__", {})
        self.entries = {name: self._entry(name, row, 8 + length) for name, row in table.items()}
        self._check_tiling(8 + length)
        self._bytes_X: np.ndarray | None = None

    def array(self, name: str) -> np.ndarray:
        """Return a tensor as a lazy view (a copy only where the file has it unaligned)."""
        entry = self.entries[name]
        if self._bytes_X is None:
            self._bytes_X = np.asarray(np.memmap(self.path, dtype=np.uint8, mode="c"))
            if self._bytes_X.size != self.num_bytes:
                raise FormatError(
                    f"{self.path}: {self._bytes_X.size} bytes, {self.num_bytes} when it was opened; try again"
                )
        array = self._bytes_X[entry.start : entry.stop].view(CODES[entry.dtype]).reshape(entry.shape)
        return array if array.flags.aligned else array.copy()

    def _check_length(self, prefix_bytes: int, length: int) -> None:
        if prefix_bytes < 8 or not 2 <= length <= min(self.num_bytes - 8, MAX_HEADER_BYTES):
            raise FormatError(
                f"{self.path}: {self.num_bytes} bytes with a header of {length}: expected a header inside the file, "
                "because that is how safetensors begins; the file is cut short or is something else; try fetching it "
                "again"
            )

    def _entry(self, name: str, row: Any, origin: int) -> TensorEntry:
        shape: Any = row.get("shape") if isinstance(row, dict) else None
        offsets: Any = row.get("data_offsets") if isinstance(row, dict) else None
        if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and len(row) == 3):
            raise self._lie(name, f"its row is {str(row)[:80]}: expected dtype, shape and data_offsets")
        if not isinstance(row.get("dtype"), str) or row["dtype"] not in CODES:
            raise self._lie(name, f"dtype = {row.get('dtype')!r}: expected one of {', '.join(CODES)}")
        num_bytes = prod(shape) * CODES[row["dtype"]].itemsize
        if offsets[1] - offsets[0] != num_bytes:
            raise self._lie(
                name,
                f"data_offsets span {offsets[1] - offsets[0]} bytes: expected {num_bytes} for {row['dtype']} {shape}",
            )
        return TensorEntry(dtype=row["dtype"], shape=tuple(shape), start=origin + offsets[0], stop=origin + offsets[1])

    def _check_tiling(self, origin: int) -> None:
        at = origin
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != at:
                raise self._lie(
                    name, f"begins at byte {entry.start}: expected {at}, because there are no holes or overlaps"
                )
            at = entry.stop
        if at != self.num_bytes:
            raise FormatError(
                f"{self.path}: {self.num_bytes} bytes: expected {at}, because its header says so; the file is "
                f"{'cut short' if self.num_bytes < at else 'too long'}; try fetching it again"
            )

    def _lie(self, name: str, what: str) -> FormatError:
        return FormatError(
            f"{self.path}: {name}: {what}, because the header has to describe the file; try fetching it again"
        )


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> WrittenFile:
    """Write a new safetensors file, flushed to the device, wider numbers first so that every tensor is aligned."""
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
    checksums = {name: checksum_array(array) for name, array in ordered}
    header = _header(ordered)

    def chunks() -> Iterator[bytes | memoryview]:
        yield header
        for _, array in ordered:
            yield raw_bytes(array)

    num_bytes = write_file(path, chunks())
    return WrittenFile(num_bytes=num_bytes, header_checksum=checksum_bytes(header), tensor_checksums=checksums)


def dtype_code(name: str, array: np.ndarray) -> str:
    """Return the format's code of an array's dtype: `"BF16"`. FormatError names the tensor if it has none."""
    for code, dtype in CODES.items():
        if array.dtype == dtype:
            return code
    raise FormatError(
        f"{name}: dtype = {array.dtype}: expected one the format has, because it is stored as it is; try float32"
    )


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in `data`. FormatError, opening with `where`, for all else: duplicate keys and NaN too."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{where}: not valid JSON ({str(error)[:80]}): expected an object; try fetching it again"
        ) from None
    if not isinstance(value, dict):
        raise FormatError(f"{where}: a JSON {type(value).__name__}: expected an object; try fetching it again")
    return value


def _header(ordered: list[tuple[str, np.ndarray]]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this word
    at = 0
    for name, array in ordered:
        table[name] = {
            "dtype": dtype_code(name, array),
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} twice")
    return table


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")
