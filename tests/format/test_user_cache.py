"""What a user's cache keeps and what it lets go."""

import os
import time
from pathlib import Path

from tessera_shared.user_cache import DAY, KEPT_DAYS, forget_unused, mark_used


def made(path: Path, days_ago: float) -> Path:
    path.write_bytes(b"x")
    then = time.time() - days_ago * DAY
    os.utime(path, (then, then))
    return path


def test_what_nobody_used_for_a_month_goes_and_nothing_else(tmp_path: Path) -> None:
    old, used, new = (made(tmp_path / name, days) for name, days in (("old", 31), ("used", 31), ("new", KEPT_DAYS - 1)))
    left_over = made(tmp_path / ".half.new-1", 40)
    (tmp_path / "folder").mkdir()
    inside = made(tmp_path / "folder" / "old", 40)
    mark_used(used)
    assert forget_unused(tmp_path) == 2
    assert not old.exists()
    assert not left_over.exists()
    assert used.exists()
    assert new.exists()
    assert inside.exists(), "folders are not gone into"
    assert forget_unused(tmp_path) == 0
    assert forget_unused(tmp_path, days=KEPT_DAYS - 2) == 1


def test_a_use_is_noted_once_a_day(tmp_path: Path) -> None:
    path = made(tmp_path / "file", 0.5)
    before = path.stat().st_mtime
    mark_used(path)
    assert path.stat().st_mtime == before
    mark_used(made(path, 1.5))
    assert time.time() - path.stat().st_mtime < 60


def test_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    mark_used(tmp_path / "none")
    assert forget_unused(tmp_path / "none") == 0
