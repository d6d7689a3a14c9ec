"""`tessera verify`: read every byte of a model and say what was compared."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tessera_shared.cli.info import size_text
from tessera_shared.errors import FormatError
from tessera_shared.stored_model import FileReport, check_contents, open_model


class ReportForm(StrEnum):
    """How the report is printed."""

    TEXT = "text"
    JSON = "json"


def verify(
    directory: Annotated[Path, typer.Argument(help="A model directory.", show_default=False)],
    report: Annotated[ReportForm, typer.Option(help="How to print what was found.")] = ReportForm.TEXT,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinite weights.")
    ] = False,
) -> None:
    """Check a model's structure and every checksum; exit 0 if all is well, 2 if not.

    Without tessera.json there are no checksums: structure and finiteness are checked, and the summary says so.
    """
    as_json = report is ReportForm.JSON
    summary = examine(directory, allow_nonfinite=allow_nonfinite, console=None if as_json else Console())
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    if summary["problems"]:
        first, count = summary["problems"][0], len(summary["problems"])
        raise FormatError(first if count == 1 else f"{count} problems; the first: {first}")


def examine(directory: Path, *, allow_nonfinite: bool, console: Console | None) -> dict[str, Any]:
    """Return what verifying a directory shows, as plain data; tell `console` about each file as it is done."""
    try:
        opened = open_model(directory)
    except FormatError as error:
        return _summary(directory, [], [str(error)], [], verified=False)
    reports = []
    for report in check_contents(opened, allow_nonfinite=allow_nonfinite):
        reports.append(report)
        if console is not None:
            _tell_file(console, report)
    problems = [problem for report in reports for problem in report.problems]
    verified = opened.manifest is not None and not problems
    summary = _summary(directory, reports, problems, list(opened.notes), verified=verified)
    if console is not None:
        _tell_summary(console, summary)
    return summary


def _summary(
    directory: Path, reports: list[FileReport], problems: list[str], notes: list[str], *, verified: bool
) -> dict[str, Any]:
    return {
        "directory": str(directory),
        "verified": verified,
        "num_tensors": sum(report.num_tensors for report in reports),
        "num_compared": sum(report.num_compared for report in reports),
        "problems": problems,
        "notes": notes,
        "files": [asdict(report) for report in reports],
    }


def _tell_file(console: Console, report: FileReport) -> None:
    state = "[red]FAILED[/]" if report.problems else "ok" if report.num_compared else "read, nothing to compare with"
    tensors = f", {report.num_tensors} tensors" if report.num_tensors else ""
    console.print(f"{escape(report.file)}  {size_text(report.num_bytes)}{tensors}  {state}", soft_wrap=True)
    for problem in report.problems:
        console.print(f"  {escape(problem)}", soft_wrap=True, highlight=False)


def _tell_summary(console: Console, summary: dict[str, Any]) -> None:
    for note in summary["notes"]:
        console.print(f"note: {escape(note)}", soft_wrap=True, highlight=False)
    word = "verified" if summary["verified"] else "NOT verified"
    console.print(
        f"{word}: {len(summary['files'])} files, {summary['num_tensors']} tensors, {summary['num_compared']} "
        f"checksums compared, {len(summary['problems'])} problems",
        soft_wrap=True,
    )
