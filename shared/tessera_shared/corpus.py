"""Text to learn from: the running Python's standard library, or files, folders, JSONL and Parquet that the user names.

Nothing is downloaded. A corpus is pinned by the hash of its content, so two runs can say that they saw the same text,
and is split by a hash of its own, so that no seed moves a document from the held-out side to the training side.
"""

import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from tessera_shared.errors import DataError, MissingDependency
from tessera_shared.validate_text import check_text, decode_utf8

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
"""Left out of the standard library: other people's packages, and tests, which distributions of Python carry or not."""

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".tex", ".html", ".c", ".h", ".rs", ".toml", ".csv", ".json"})
"""What is read from a folder, beside .jsonl and .parquet. A file that is named itself is read whatever its suffix."""

HELD_OUT_OF_16 = 1
"""Documents whose hash modulo 16 is below this are held out."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it comes from (relative to what the user named)."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents for training and held out, in a fixed order, with what pins them."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]  # empty where there was too little text to divide
    manifest: dict[str, Any]  # source, python (standard library only), files, bytes, xxh3_128, skipped: JSON as it is

    @property
    def checksum(self) -> str:
        """XXH3-128 of names, texts and the split."""
        checksum: str = self.manifest["xxh3_128"]
        return checksum


def load_corpus(paths: Sequence[Path | str] = ()) -> Corpus:
    """Return the corpus of `--data`: the standard library where `paths` is empty."""
    return read_corpus(paths) if paths else standard_library()


def standard_library(root: Path | str | None = None) -> Corpus:
    """Return the .py files of the running Python's standard library, held out by top-level module.

    All of a package goes to one side (a hash of its name decides), so near-copies do not leak. Folders of tests and of
    installed packages are left out; a file that is not UTF-8 is left out and named in the manifest. DataError where the
    library is not there as source.
    """
    folder = Path(root or sysconfig.get_paths()["stdlib"])
    documents, skipped = [], []
    for path in _files_under(folder, lambda name: name in SKIPPED_FOLDERS):
        if path.suffix != ".py":
            continue
        name = path.relative_to(folder).as_posix()
        try:
            documents.append(Document(name, decode_utf8(path.read_bytes(), name)))
        except DataError:
            skipped.append(name)
    kept = [document for document in documents if document.text.strip()]
    return _corpus(
        kept, lambda document: document.name.partition("/")[0].removesuffix(".py"), "standard library", skipped
    )


def read_corpus(paths: Sequence[Path | str]) -> Corpus:
    """Return the text of files and folders, held out by a hash of each document's text: copies stay on one side.

    A folder gives its files with a text suffix, .jsonl (objects with the field "text") and .parquet (the column
    "text"), in order of their names, hidden ones left out. DataError names the file, and the byte or line, of what is
    not text, and says so where nothing is left.
    """
    documents: list[Document] = []
    skipped: list[str] = []
    for path in (Path(path) for path in paths):
        if not path.exists():
            raise DataError(f"{path}: not found: expected a file or folder of text; try a path that exists")
        if path.is_dir():
            for file in _files_under(path, lambda name: name.startswith(".")):
                name = f"{path.resolve().name}/{file.relative_to(path).as_posix()}"
                if file.name.startswith(".") or not (file.suffix in TEXT_SUFFIXES or file.suffix in _READERS):
                    skipped.append(name)
                else:
                    documents += _read(file, name)
        else:
            documents += _read(path, path.name)
    kept = [document for document in documents if document.text.strip()]
    if not kept:
        raise DataError(
            f"data = {' '.join(str(path) for path in paths)}: no text: expected at least one document, because there "
            f"is nothing to learn from; try files ending in {', '.join(sorted(TEXT_SUFFIXES)[:4])}, .jsonl or .parquet"
        )
    return _corpus(kept, lambda document: document.text, "files", skipped)


def _read(path: Path, name: str) -> Iterator[Document]:
    return _READERS.get(path.suffix, _read_text)(path, name)


def _read_text(path: Path, name: str) -> Iterator[Document]:
    yield Document(name, decode_utf8(path.read_bytes(), str(path)))


def _read_json_lines(path: Path, name: str) -> Iterator[Document]:
    data = path.read_bytes()
    decode_utf8(data, str(path))
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}: line {number}: not JSON ({str(error)[:60]}): expected one object a line; try repairing it"
            ) from None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise DataError(
                f"{path}: line {number}: {str(row)[:60]}: expected an object with a string 'text', because that field "
                "is the document; try renaming the field"
            )
        yield Document(f"{name}:{number}", check_text(text, f"{path}: line {number}"))


def _read_parquet(path: Path, name: str) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise MissingDependency(
            f"pyarrow = not installed: expected it, because {path} is Parquet; try pip install "
            "'tessera-testbed[parquet]'"
        ) from None
    try:
        table = parquet.ParquetFile(path)
        if "text" not in table.schema_arrow.names:
            raise DataError(
                f"{path}: columns {', '.join(table.schema_arrow.names)[:80]}: expected one called text, because that "
                "column is the documents; try renaming it"
            )
        rows = (row for batch in table.iter_batches(columns=["text"]) for row in batch.column(0).to_pylist())
        for number, text in enumerate(rows, 1):
            if not isinstance(text, str):
                raise DataError(
                    f"{path}: row {number}: {str(text)[:60]}: expected a string in the column text, because it is a "
                    "document; try leaving the row out"
                )
            yield Document(f"{name}:{number}", check_text(text, f"{path}: row {number}"))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not readable as Parquet ({str(error)[:80]}): expected a column text; try fetching it again"
        ) from None


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}


def _files_under(folder: Path, is_skipped: Callable[[str], bool]) -> Iterator[Path]:
    """Yield regular files in an order that does not depend on the file system; links to folders are not followed."""
    for here, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not is_skipped(name))
        for path in (Path(here) / name for name in sorted(names)):
            if path.is_file():
                yield path


def _raise(error: OSError) -> None:
    raise error


def _corpus(
    documents: Sequence[Document], unit: Callable[[Document], str], source: str, skipped: Iterable[str]
) -> Corpus:
    if not documents:
        raise DataError(f"{source}: no text: expected at least one document; try --data with files of your own")
    train, held_out = _split(documents, unit)
    manifest = {
        "source": source,
        "python": platform.python_version() if source == "standard library" else None,
        "files": len({document.name.partition(":")[0] for document in documents}),
        "documents": len(documents),
        "bytes": sum(len(document.text.encode()) for document in documents),
        "held_out_bytes": sum(len(document.text.encode()) for document in held_out),
        "skipped": sorted(skipped),
        "xxh3_128": _checksum(train, held_out),
    }
    return Corpus(train=tuple(train), held_out=tuple(held_out), manifest=manifest)


def _split(documents: Sequence[Document], unit: Callable[[Document], str]) -> tuple[list[Document], list[Document]]:
    """Divide by the unit's hash. With one unit on one side only: move the least hash over, or cut a lone document."""
    hashes = [xxhash.xxh3_64_intdigest(unit(document).encode()) for document in documents]
    is_held_out = [value % 16 < HELD_OUT_OF_16 for value in hashes]
    if len(set(hashes)) > 1 and len(set(is_held_out)) == 1:
        is_held_out = [value == min(hashes) for value in hashes]
    if len(set(hashes)) == 1:
        head, tail = _cut_at_line(documents[0])
        return [head], [tail] if tail.text else []
    pairs = list(zip(documents, is_held_out, strict=True))
    return [document for document, held in pairs if not held], [document for document, held in pairs if held]


def _cut_at_line(document: Document) -> tuple[Document, Document]:
    """Return the first 15/16 of a text, to the end of a line, and the rest (nothing where there is no such line)."""
    cut = document.text.rfind("\n", 0, len(document.text) * 15 // 16) + 1
    if not (document.text[:cut].strip() and document.text[cut:].strip()):
        return document, Document(document.name, "")
    return Document(document.name, document.text[:cut]), Document(document.name, document.text[cut:])


def _checksum(train: Iterable[Document], held_out: Iterable[Document]) -> str:
    digest = xxhash.xxh3_128()
    for side, documents in (("train", train), ("held_out", held_out)):
        for document in documents:
            encoded = document.text.encode()
            digest.update(f"{side}\0{document.name}\0{len(encoded)}\0".encode())
            digest.update(encoded)
    return digest.hexdigest()
