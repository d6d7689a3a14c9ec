"""Token streams kept for the next run of the same user, so that a corpus is encoded once.

A file is named by what decides its tokens, the text, the tokenizer and the end id, and says inside which versions of
this package and of the `tokenizers` library made it: code that reads a tokenizer.json may change.
"""

import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import tokenizers
import xxhash

from tessera_shared.atomic import sync_directory
from tessera_shared.checksums import checksum_bytes, raw_bytes
from tessera_shared.corpus import Document
from tessera_shared.errors import FormatError
from tessera_shared.packing import TokenStream, join_documents
from tessera_shared.tensor_file import TensorFile, write_tensors
from tessera_shared.tokens import Tokenizer
from tessera_shared.user_cache import cache_folder, forget_unused, mark_used

_FORMAT_VERSION = 2


def token_folder() -> Path | None:
    """Return where this user's token streams are; None for a user without a home."""
    return cache_folder("tokens")


def cached_stream(
    folder: Path | None,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    end_id: int | None,
    say: Callable[[str], None] = lambda line: None,
) -> TokenStream:
    """Return the documents as a token stream, from `folder` if it was encoded before, else encoded and kept there.

    A file appears whole or not at all. One that is torn, altered or of another version is made anew: it holds nothing
    that cannot be computed, so what lies in `folder` and was not used for a month goes. `say` hears, in one line, that
    the text is encoded and why, and where nothing can be kept (no folder, no right to write, a full disk), which is no
    error.
    """
    path = None if folder is None else folder / f"{_key(documents, tokenizer, end_id)}.safetensors"
    stored, why = (None, "") if path is None else _read(path)
    if stored is not None:
        return stored
    say(f"encoding {len(documents)} documents{why}")
    stream = join_documents(tokenizer.encode_documents(document.text for document in documents), end_id=end_id)
    if path is not None:
        try:
            _write(path, stream)
            forget_unused(path.parent)
        except OSError as error:
            say(f"{path.parent}: tokens are not kept for the next run ({error.strerror or error})")
    return stream


def _key(documents: Sequence[Document], tokenizer: Tokenizer, end_id: int | None) -> str:
    digest = xxhash.xxh3_128()
    for document in documents:
        encoded = document.text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return checksum_bytes(json.dumps([digest.hexdigest(), tokenizer.checksum, end_id]).encode())


def _read(path: Path) -> tuple[TokenStream | None, str]:
    """Return what is stored, or nothing and why it cannot be used."""
    try:
        file = TensorFile(path)
        made_by = file.array("made_by")
        if made_by.tobytes() != _made_by().tobytes():
            return None, f" again: {path} is of {bytes(made_by)[:60].decode(errors='replace')}"
        token_ids_X, starts, checksum = (file.array(name) for name in ("token_ids_X", "starts", "checksum"))
        mark_used(path)
        is_whole = np.array_equal(checksum, _checksum(token_ids_X, starts, path.stem))
        return (TokenStream(token_ids_X=token_ids_X, starts=starts), "") if is_whole else (None, _damaged(path))
    except (FormatError, KeyError, OSError):
        return None, _damaged(path) if path.exists() else ""


def _damaged(path: Path) -> str:
    return f" again: {path} is damaged"


def _write(path: Path, stream: TokenStream) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    staged = path.with_name(f".{path.name}.new-{os.getpid()}")
    checksum = _checksum(stream.token_ids_X, stream.starts, path.stem)
    arrays = {"made_by": _made_by(), "token_ids_X": stream.token_ids_X, "starts": stream.starts, "checksum": checksum}
    try:
        write_tensors(staged, arrays)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    sync_directory(path.parent)


def _made_by() -> np.ndarray:
    try:
        ours = version("tessera-testbed")
    except PackageNotFoundError:
        ours = "from source"
    text = f"tessera {ours}, tokenizers {tokenizers.__version__}, format {_FORMAT_VERSION}"
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _checksum(token_ids_X: np.ndarray, starts: np.ndarray, key: str) -> np.ndarray:
    digest = xxhash.xxh3_128(key.encode())  # a file under another's name is no more use than a torn one
    for array in (token_ids_X, starts):
        digest.update(f"{array.dtype} {array.size} ".encode())
        digest.update(raw_bytes(array))
    return np.frombuffer(digest.digest(), dtype=np.uint8)
