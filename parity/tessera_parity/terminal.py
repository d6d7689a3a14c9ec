"""The run on one screen: the verdict with kill rate and false alarms first, a line a subject, what departs, what to do
next."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tessera_parity.budget import SLACK
from tessera_parity.report.summary import (
    SubjectRow,
    false_alarms,
    format_number,
    format_percent,
    kill_rate,
    over_limit,
    place,
    repro_command,
    subject_rows,
)
from tessera_parity.result import SEVERITY, Check, Question, Run, Verdict

COLORS = {
    Verdict.PARITY: "green",
    Verdict.DIVERGENCE: "red",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.UNCALIBRATED: "yellow",
}
SHORT = {
    Question.MATHEMATICS: "mathematics",
    Question.ROUNDING: "rounding",
    Question.EXACT: "bits",
    Question.LAW: "law",
    Question.WITNESS: "witness",
}
MOST_DIVERGENCES = 6


def headline(run: Run) -> str:
    """Return the first line: `PARITY · kill rate 58/60 (96.7 %) · false alarms 0/24`."""
    killed = sum(mutant.killed for mutant in run.mutants)
    rate = (
        f"{killed}/{len(run.mutants)} ({format_percent(run.kill_rate)})"
        if run.kill_rate is not None
        else kill_rate(run)
    )
    flagged = round((run.false_alarm_rate or 0.0) * run.false_alarm_runs)
    alarms = f"{flagged}/{run.false_alarm_runs}" if run.false_alarm_runs else false_alarms(run)
    return f"{run.verdict.upper()} · kill rate {rate} · false alarms {alarms}"


def print_run(run: Run, directory: Path, console: Console) -> None:
    """Print the summary of a run. At most about 40 lines of 80 columns; everything else is in the reports."""
    console.print(Text(headline(run), style=f"bold {COLORS[run.verdict]}"), soft_wrap=True)
    console.print(_table(subject_rows(run)))
    for check in _departed(run)[:MOST_DIVERGENCES]:
        console.print(Text(divergence_line(check), style=COLORS[check.verdict]), soft_wrap=True)
    hidden = len(_departed(run)) - MOST_DIVERGENCES
    if hidden > 0:
        console.print(f"and {hidden} more in {directory / 'report.html'}", soft_wrap=True)
    missed = [mutant.name for mutant in run.mutants if not mutant.killed]
    if missed:
        console.print(f"planted bugs not caught: {', '.join(missed[:3])}{' ...' if len(missed) > 3 else ''}")
    if run.left_out:
        console.print(f"left out: {left_out_line(run)}", soft_wrap=True)
    for line in next_commands(run, directory):
        console.print(Text(line), soft_wrap=True)


def _table(rows: list[SubjectRow]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("subject", no_wrap=True)
    table.add_column("question", no_wrap=True)
    for name in ("cases", "worst", "limit", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in rows:
        table.add_row(
            row.subject,
            SHORT[row.worst.question],
            str(row.cases),
            format_number(row.worst.observed),
            format_number(row.worst.limit),
            f"{row.seconds:.1f}",
            Text(verdict_word(row), style=COLORS[row.verdict]),
        )
    return table


def verdict_word(row: SubjectRow) -> str:
    """Return the verdict, with `slack` and how many times the limit is above what was seen where that is more than
    tenfold."""
    ratio = over_limit(row.worst)
    if row.verdict is Verdict.PARITY and 0.0 < ratio * SLACK < 1.0:
        return f"parity (slack {1.0 / ratio:.0f}x)"
    return str(row.verdict)


def divergence_line(check: Check) -> str:
    """Return one line about a check that is not parity: subject, name, sides, numbers, where."""
    where = f" at {place(check)}" if place(check) else ""
    numbers = f"{format_number(check.observed)} over {format_number(check.limit)}"
    return f"{check.verdict}: {check.subject} {check.name} ({' / '.join(check.sides)}): {numbers}{where}"


def left_out_line(run: Run) -> str:
    """Return what was left out, mutants counted instead of listed."""
    mutants = sum(line.startswith("mutant ") for line in run.left_out)
    others = [line for line in run.left_out if not line.startswith("mutant ")]
    return "; ".join(others + ([f"{mutants} planted bugs, for lack of time"] if mutants else []))


def next_commands(run: Run, directory: Path) -> list[str]:
    """Return what to type next."""
    if run.verdict is Verdict.PARITY:
        return [f"next: open {directory / 'report.html'}"]
    worst = _departed(run)[:1]
    repro = [f"next: {repro_command(worst[0], str(directory))}"] if worst and worst[0].case else []
    if run.verdict is Verdict.UNCALIBRATED:
        repro.append("next: parity calibrate")
    return [*repro, f"next: parity explain {directory}"]


def _departed(run: Run) -> list[Check]:
    """Checks that are not parity, worst verdict first, in the order of the run: the first is the nearest to the
    cause."""
    found = [check for check in run.checks if check.verdict is not Verdict.PARITY]
    return sorted(found, key=lambda check: -SEVERITY[check.verdict])
