"""A run's directory: settings and finished subjects in `state.json`, checks in `checks.jsonl` as they come, reports at
the end."""

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tessera_parity.report.jsonl import CHECKS_FILE, append_check, read_checks, to_plain
from tessera_parity.result import Check
from tessera_parity.subjects.context import DEFAULT
from tessera_shared.errors import FormatError, ParityError

STATE_FILE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `parity run` was asked for; enough to run it again."""

    subjects: tuple[str, ...]
    lane: str = DEFAULT
    seed: int = 0
    cases: int | None = None
    dtype: str | None = None
    device: str = "cpu"
    model: str | None = None
    only_half: str | None = None
    left_out: tuple[str, ...] = ()  # subjects that this lane does not run, and why


class Store:
    """One run directory."""

    def __init__(self, directory: Path, settings: Settings, finished: list[str], checks: list[Check]) -> None:
        self.directory = directory
        self.settings = settings
        self.finished = finished
        self.checks = checks

    def append(self, check: Check) -> None:
        """Keep one check, on disk at once."""
        self.checks.append(check)
        append_check(self.directory, check)

    def finish(self, subject: str) -> None:
        """Remember that every check of a subject is there."""
        self.finished.append(subject)
        _write_state(self.directory, self.settings, self.finished)


def default_directory(seed: int) -> Path:
    """Return `parity-runs/<timestamp>-<seed>` below the current directory."""
    return Path("parity-runs") / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{seed}"


def create(directory: Path, settings: Settings) -> Store:
    """Make a run directory before any work. Raises `ParityError` when it cannot be written or already holds a run."""
    if (directory / STATE_FILE).exists() or (directory / CHECKS_FILE).exists():
        raise ParityError(
            f"report directory = {directory}: expected a directory without a run, because results are never mixed; "
            f"try --resume {directory} or another directory"
        )
    check_writable(directory)
    _write_state(directory, settings, [])
    return Store(directory, settings, [], [])


def reopen(directory: Path) -> Store:
    """Open an interrupted run: checks of finished subjects stay, a half-done subject is done again.

    Raises `ParityError` when there is no run in the directory and `FormatError` when its state cannot be read.
    """
    path = directory / STATE_FILE
    if not path.exists():
        raise ParityError(
            f"resume = {directory}: expected a directory with {STATE_FILE}, because that is where an interrupted run is; "
            "try parity run --report DIR for a new one"
        )
    check_writable(directory)
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in state["settings"].items()
        }
        settings, finished = Settings(**fields), [str(name) for name in state["finished"]]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path} = unreadable: expected the state of a run, because it says what is done ({error}); try a new run"
        ) from error
    checks = [check for check in read_checks(directory) if check.subject in finished]
    lines = [json.dumps(to_plain(dataclasses.asdict(check)), allow_nan=False) + "\n" for check in checks]
    (directory / CHECKS_FILE).write_text("".join(lines), encoding="utf-8")
    return Store(directory, settings, finished, checks)


def check_writable(directory: Path, *, option: str = "--report") -> None:
    """Raise `ParityError` unless files can be made in `directory`, which is made when missing."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ParityError(
            f"report directory = {directory}: expected a writable directory, because results are stored as they come "
            f"({error.strerror or error}); try {option} with another one"
        ) from error


def _write_state(directory: Path, settings: Settings, finished: list[str]) -> None:
    text = json.dumps({"settings": dataclasses.asdict(settings), "finished": finished}, indent=1)
    temporary = directory / (STATE_FILE + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(directory / STATE_FILE)
