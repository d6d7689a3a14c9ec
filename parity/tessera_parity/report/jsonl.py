"""`result.json` and `checks.jsonl`: the schema as strict JSON, and back.

JSON has no infinity and no NaN, and an observed difference of infinity is exactly what a shape mismatch gives. Such
floats are written as the strings "inf", "-inf", "nan", and read back where the schema says float.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tessera_parity.result import Check, MutantOutcome, Question, Run, Verdict
from tessera_shared.errors import FormatError

RESULT_FILE = "result.json"
CHECKS_FILE = "checks.jsonl"


def to_plain(value: Any) -> Any:
    """Return `value` in strict JSON types: NumPy values as numbers and lists, non-finite floats as strings."""
    if isinstance(value, np.ndarray | np.generic):
        return to_plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value:g}"
    return value if isinstance(value, str | int | float | None) else str(value)


def append_check(directory: Path, check: Check) -> None:
    """Append one check to `checks.jsonl`, flushed, so that an interrupted run keeps what it has seen."""
    with (directory / CHECKS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(to_plain(asdict(check)), allow_nan=False) + "\n")


def read_checks(directory: Path) -> list[Check]:
    """Return the checks of `checks.jsonl`, none without the file. A torn last line is dropped, others raise."""
    path = directory / CHECKS_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return [_check(_parse(line, path, number), path) for number, line in enumerate(whole, start=1)]


def write_result(run: Run, directory: Path) -> None:
    """Write `result.json` and rewrite `checks.jsonl` so that both hold exactly this run."""
    (directory / RESULT_FILE).write_text(
        json.dumps(to_plain(run.to_json()), allow_nan=False, indent=1), encoding="utf-8"
    )
    lines = [json.dumps(to_plain(asdict(check)), allow_nan=False) + "\n" for check in run.checks]
    (directory / CHECKS_FILE).write_text("".join(lines), encoding="utf-8")


def read_run(directory: Path) -> Run:
    """Return the run stored in `result.json`; raises `FormatError` when it is missing or not of this schema."""
    path = directory / RESULT_FILE
    if not path.exists():
        raise FormatError(
            f"result = {path}: expected a file, because `parity run` writes one; try another run directory"
        )
    stored = _parse(path.read_text(encoding="utf-8"), path, 1)
    if not isinstance(stored, dict) or stored.get("format_version") != 1:
        raise FormatError(f"result = {path}: expected format_version 1; try the version of parity that wrote it")
    derived = {"verdict", "kill_rate"}
    fields = {key: value for key, value in stored.items() if key not in derived}
    try:
        fields["checks"] = [_check(check, path) for check in fields["checks"]]
        fields["mutants"] = [MutantOutcome(**mutant) for mutant in fields["mutants"]]
        return Run(**fields)
    except (KeyError, TypeError) as error:
        raise FormatError(f"result = {path}: expected the fields of this version, because {error}") from error


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"{path.name} line {line} = {text[:40]!r}: expected JSON, because {error.msg}") from error


def _check(stored: Any, path: Path) -> Check:
    try:
        floats = {key: float(stored[key]) for key in ("observed", "limit", "seconds")}
        series = {key: [float(item) for item in items] for key, items in stored["series"].items()}
        enums = {"question": Question(stored["question"]), "verdict": Verdict(stored["verdict"])}
        return Check(**(stored | floats | enums | {"series": series, "sides": tuple(stored["sides"])}))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} = a check that cannot be read: {error!r}; try a fresh run directory") from error
