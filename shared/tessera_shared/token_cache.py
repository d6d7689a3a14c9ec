"""Token streams kept on disk, so that a corpus is encoded once. A file is named by the hash of what decides it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import xxhash

from tessera_shared.checksums import checksum_bytes, raw_bytes
from tessera_shared.corpus import Document
from tessera_shared.errors import FormatError
from tessera_shared.packing import TokenStream, join_documents
from tessera_shared.tensor_file import TensorFile, write_tensors
from tessera_shared.tokens import Tokenizer

_FORMAT_VERSION = 1


def cached_stream(
    folder: Path, documents: Sequence[Document], tokenizer: Tokenizer, *, end_id: int | None
) -> TokenStream:
    """Return the documents as a token stream, from `folder` if it was encoded before, else encoded and kept there.

    The file appears whole or not at all. One that is torn or altered is found by its checksum and made anew: it holds
    nothing that cannot be computed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_key(documents, tokenizer, end_id)}.safetensors"
    stream = _read(path)
    if stream is None:
        texts = (document.text for document in documents)
        stream = join_documents(tokenizer.encode_documents(texts), end_id=end_id)
        _write(path, stream)
    return stream


def _key(documents: Sequence[Document], tokenizer: Tokenizer, end_id: int | None) -> str:
    digest = xxhash.xxh3_128()
    for document in documents:
        encoded = document.text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    # the library's version too: a tokenizer.json is read by code that may change
    parts = [_FORMAT_VERSION, tokenizers.__version__, digest.hexdigest(), tokenizer.checksum, end_id]
    return checksum_bytes(json.dumps(parts).encode())


def _read(path: Path) -> TokenStream | None:
    if not path.exists():
        return None
    try:
        file = TensorFile(path)
        token_ids_X, starts, checksum = (file.array(name) for name in ("token_ids_X", "starts", "checksum"))
        stored = TokenStream(token_ids_X=token_ids_X, starts=starts)
    except (FormatError, KeyError):
        return None
    return stored if np.array_equal(checksum, _checksum(stored)) else None


def _write(path: Path, stream: TokenStream) -> None:
    staged = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        arrays = {"token_ids_X": stream.token_ids_X, "starts": stream.starts, "checksum": _checksum(stream)}
        write_tensors(staged, arrays)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _checksum(stream: TokenStream) -> np.ndarray:
    digest = xxhash.xxh3_128()
    for array in (stream.token_ids_X, stream.starts):
        digest.update(array.size.to_bytes(8, "little"))
        digest.update(raw_bytes(array))
    return np.frombuffer(digest.digest(), dtype=np.uint8)
