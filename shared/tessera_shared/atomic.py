"""Files and directories that appear whole or not at all: write beside, fsync, rename.

A directory is replaced by two renames (old aside, new in). Between them only `.name.old` exists, and `recover` puts it
back; every reader and writer here calls it first. One writer at a time: the staging directory carries a lock that the
operating system drops when its process dies.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tessera_shared.errors import FormatError

Bytes = bytes | memoryview


def write_file(path: Path, chunks: Iterable[Bytes]) -> int:
    """Write `chunks` to a new file, flush it to the device, and return the number of bytes. Not atomic on its own."""
    num_bytes = 0
    with path.open("xb") as file:
        for chunk in chunks:
            num_bytes += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return num_bytes


def replace_file(path: Path, data: Bytes) -> None:
    """Make `path` hold `data`: a reader sees the old file or the new one, whole."""
    staged = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        write_file(staged, [data])
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Flush a directory's list of names to the device."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; when the block ends without an error it becomes `directory`, else it vanishes.

    An existing `directory` stays as it is until the new one is complete and flushed. The caller writes its files with
    `write_file`. FormatError when another process is writing the same directory.
    """
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    recover(directory)
    staged = _beside(directory, "new")
    lock = _locked_empty_directory(staged)
    try:
        yield staged
        sync_directory(staged)
        _swap_in(staged, directory)
    finally:
        if staged.exists():
            shutil.rmtree(staged)
        os.close(lock)


def recover(directory: Path) -> bool:
    """Finish a replacement that was cut between its two renames; return whether the old directory was put back.

    Waits for a writer that is between them just now.
    """
    directory = directory.resolve()
    aside = _beside(directory, "old")
    if not aside.is_dir():
        return False
    with _locked(aside) as ours:
        if not ours:
            return False  # its writer has finished meanwhile
        if directory.exists():
            shutil.rmtree(aside)
            return False
        aside.rename(directory)
        return True


def _swap_in(staged: Path, directory: Path) -> None:
    if not directory.exists():
        staged.rename(directory)
        sync_directory(directory.parent)
        return
    aside = _beside(directory, "old")
    with _locked(directory):
        directory.rename(aside)
        staged.rename(directory)
        sync_directory(directory.parent)
        shutil.rmtree(aside)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Hold a directory's lock; yields False if it had been renamed or removed by the time the lock was ours."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield directory.exists() and directory.stat().st_ino == os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)


def _beside(directory: Path, word: str) -> Path:
    return directory.with_name(f".{directory.name}.{word}")


def _locked_empty_directory(staged: Path) -> int:
    """Create the staging directory, or take over one that a dead process left; return its lock's descriptor."""
    while True:
        staged.mkdir(exist_ok=True)
        descriptor = os.open(staged, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise FormatError(
                f"{staged}: another process is writing here: expected one writer, because a directory is replaced "
                "whole; try again when it has finished"
            ) from None
        if staged.exists() and staged.stat().st_ino == os.fstat(descriptor).st_ino:
            break
        os.close(descriptor)  # its owner renamed it away between our open and our lock
    for left in staged.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return descriptor
