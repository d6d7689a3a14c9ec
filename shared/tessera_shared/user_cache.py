"""Where this user's caches are: what can be made again and need not be."""

import os
import time
from pathlib import Path

DAY = 86400.0
KEPT_DAYS = 30
"""How long a file that nobody uses is kept."""


def cache_folder(name: str) -> Path | None:
    """Return this user's folder for one kind of thing, below XDG_CACHE_HOME, or ~/.cache. None for a user without a home.

    A relative XDG_CACHE_HOME is passed over, as the XDG base directory specification has it. Nothing is created.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (named if named.is_absolute() else Path.home() / ".cache") / "tessera" / name
    except RuntimeError:  # no HOME, and no entry for this user either
        return None


def mark_used(path: Path) -> None:
    """Let a file of a cache live on: its time of change becomes today. Nothing happens where that is not allowed."""
    try:
        if time.time() - path.stat().st_mtime > DAY:  # not at every use: a write for each would cost more than it tells
            os.utime(path)
    except OSError:
        pass


def forget_unused(folder: Path, *, days: int = KEPT_DAYS) -> int:
    """Remove the files of a cache's folder that were neither made nor `mark_used` for `days`; return how many."""
    oldest, removed = time.time() - days * DAY, 0
    for path in folder.glob("*"):
        try:
            if path.is_file() and path.stat().st_mtime < oldest:
                path.unlink()
                removed += 1
        except OSError:  # another process was first, or the file is not ours
            continue
    return removed
