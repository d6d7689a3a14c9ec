"""Where this user's caches are: what can be made again and need not be."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """Return this user's folder for one kind of thing, below XDG_CACHE_HOME, or ~/.cache. None for a user without a home.

    A relative XDG_CACHE_HOME is passed over, as the XDG base directory specification has it. Nothing is created.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (named if named.is_absolute() else Path.home() / ".cache") / "tessera" / name
    except RuntimeError:  # no HOME, and no entry for this user either
        return None
