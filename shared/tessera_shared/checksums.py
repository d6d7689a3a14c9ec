"""XXH3-128 checksums: they find torn and altered data quickly. They do not stand against a forger."""

import hashlib
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import xxhash

from tessera_shared.spec import ModelSpec


def checksum_bytes(data: bytes | memoryview) -> str:
    """Return the XXH3-128 of `data`, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def checksum_array(array: np.ndarray) -> str:
    """Return the XXH3-128 of an array's numbers in C order and machine order, whatever its dtype."""
    return xxhash.xxh3_128_hexdigest(raw_bytes(array))


def checksum_file(path: Path) -> str:
    """Return the XXH3-128 of a file, read a mebibyte at a time."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def raw_bytes(array: np.ndarray) -> memoryview:
    """Return an array's bytes in C order, as little-endian files hold them; a copy only if it was not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def spec_digest(spec: ModelSpec) -> str:
    """Return the SHA-256 of a spec's canonical JSON: equal specs, equal digest, in any process and on any machine."""
    return hashlib.sha256(json.dumps(_plain(spec), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(value: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if is_dataclass(item):
            item = _plain(item)
        elif isinstance(item, int) and (field.type is float or float in get_args(field.type)):
            item = float(item)  # theta = 10000 and 10000.0 are one spec
        plain[field.name] = item
    return plain
