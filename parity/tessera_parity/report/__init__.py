"""Every report is drawn from one `Run`: result.json, checks.jsonl, junit.xml, report.html, GitHub annotations."""

from pathlib import Path

from tessera_parity.report.annotations import print_annotations
from tessera_parity.report.html import write_html
from tessera_parity.report.jsonl import write_result
from tessera_parity.report.junit import write_junit
from tessera_parity.report.summary import verdict_line
from tessera_parity.result import Run
from tessera_shared.errors import ParityError

__all__ = ["verdict_line", "write_reports"]


def write_reports(run: Run, directory: Path) -> None:
    """Write every report of `run` into `directory` (made when missing); print annotations when a GitHub runner listens.

    Raises `ParityError` when the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_result(run, directory)
        write_junit(run, directory)
        write_html(run, directory)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ParityError(
            f"report directory = {directory}: expected a writable folder, because {reason}; try --out"
        ) from error
    print_annotations(run)
