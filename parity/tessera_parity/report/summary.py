"""What every report says in words: the verdict line, the worst check, one sentence a check."""

import json
import math
import shlex
from dataclasses import dataclass

from tessera_parity.result import SEVERITY, Check, Run, Verdict


@dataclass(frozen=True, kw_only=True)
class SubjectRow:
    """One line of the summary table: everything that one subject compared."""

    subject: str
    verdict: Verdict
    checks: int
    cases: int
    compared: int
    worst: Check
    seconds: float


def clean(text: object) -> str:
    """Return `text` with what neither XML 1.0 nor UTF-8 can carry (controls, lone surrogates) made visible."""
    return "".join(character if _printable(ord(character)) else "\N{REPLACEMENT CHARACTER}" for character in str(text))


def format_number(value: float) -> str:
    """Return a float in at most eight characters: `0`, `3.1e-13`, `0.42`, `inf`, `nan`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.2g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def format_percent(share: float) -> str:
    """Return a share as a percentage that never rounds a loss away: 0.9999 is `99.99 %`, not `100 %`."""
    digits = 1
    while digits < 6 and share not in (0.0, 1.0) and float(f"{100 * share:.{digits}f}") in (0.0, 100.0):
        digits += 1
    return f"{100 * share:.0f} %" if share in (0.0, 1.0) else f"{100 * share:.{digits}f} %"


def over_limit(check: Check) -> float:
    """Return |observed| / limit. Not a number, or anything but 0 where the limit is 0, is infinitely over."""
    if math.isnan(check.observed) or math.isnan(check.limit):
        return math.inf
    if check.limit == 0:
        return 0.0 if check.observed == 0 else math.inf
    return math.inf if math.isinf(check.observed) else abs(check.observed) / check.limit


def worst_check(run: Run) -> Check | None:
    """Return the check with the worst verdict; among those a localized one, then the furthest over its limit."""
    return max(run.checks, key=_badness, default=None)


def place(check: Check) -> str:
    """Return where a check departs, as far as it was localized: `attention.q_rope, layer 1, row 0, token 5`."""
    layer = None if check.layer is None else f"layer {check.layer}"
    return ", ".join(part for part in (check.op, layer, check.position) if part)


def check_message(check: Check) -> str:
    """Return one line about one check: where, what was seen, what was allowed, and which side moved."""
    seen = f"observed {format_number(check.observed)}, limit {format_number(check.limit)} ({check.unit})"
    parts = [
        f"{check.verdict}: {check.subject} {check.name}",
        place(check) and f"first departs at {place(check)}",
        seen,
        f"{check.question}, {' against '.join(check.sides)}, {check.dtype} on {check.device}",
        f"{check.cases} cases, {check.compared} numbers compared",
        check.who and f"moved: {check.who}",
        check.detail,
    ]
    return " ".join(clean("; ".join(part for part in parts if part)).split())


def verdict_line(run: Run) -> str:
    """Return the one line that heads every report: verdict, what departs, kill rate, false alarms, amount compared."""
    worst = worst_check(run)
    parts = [run.verdict.upper()]
    if worst is not None and worst.verdict is not Verdict.PARITY:
        parts.append(f"{worst.subject} {worst.name}" + (f" at {place(worst)}" if place(worst) else ""))
    parts += [f"kill rate {kill_rate(run)}", f"false alarms {false_alarms(run)}"]
    compared = sum(check.compared for check in run.checks)
    parts.append(f"{len(run.checks)} checks, {compared:,} numbers, {run.seconds:.1f} s, seed {run.seed}")
    return clean(" | ".join(parts))


def kill_rate(run: Run) -> str:
    """Return `58 of 60 (96.7 %)`, or that no bug was planted."""
    if run.kill_rate is None:
        return "not measured (no bug planted)"
    return f"{sum(m.killed for m in run.mutants)} of {len(run.mutants)} ({format_percent(run.kill_rate)})"


def false_alarms(run: Run) -> str:
    """Return `0 of 200 (0 %)`, or that no clean run was repeated."""
    if run.false_alarm_rate is None or run.false_alarm_runs == 0:
        return "not measured (no clean re-run)"
    flagged = round(run.false_alarm_rate * run.false_alarm_runs)
    return f"{flagged} of {run.false_alarm_runs} ({format_percent(run.false_alarm_rate)})"


def subject_rows(run: Run) -> list[SubjectRow]:
    """Return one row a subject, in the order in which subjects first reported."""
    by_subject: dict[str, list[Check]] = {}
    for check in run.checks:
        by_subject.setdefault(check.subject, []).append(check)
    return [_subject_row(subject, checks) for subject, checks in by_subject.items()]


def repro_command(check: Check, run_directory: str) -> str:
    """Return the command that replays a check's worst case: its own `command`, else `parity repro` of the run."""
    if check.case and isinstance(check.case.get("command"), str):
        return str(check.case["command"])
    return clean(shlex.join(["parity", "repro", run_directory]))


def case_text(check: Check, *, limit: int = 1500) -> str:
    """Return the worst case as JSON, cut at `limit` characters with a note that `result.json` holds the whole."""
    text = json.dumps(check.case, indent=1, default=str)
    return text if len(text) <= limit else text[:limit] + f"\n… {len(text) - limit} more characters in result.json"


def _subject_row(subject: str, checks: list[Check]) -> SubjectRow:
    worst = max(checks, key=_badness)
    return SubjectRow(
        subject=subject,
        verdict=worst.verdict,
        checks=len(checks),
        cases=sum(check.cases for check in checks),
        compared=sum(check.compared for check in checks),
        worst=worst,
        seconds=sum(check.seconds for check in checks),
    )


def _badness(check: Check) -> tuple[int, bool, float]:
    return SEVERITY[check.verdict], check.op is not None, over_limit(check)


def _printable(code: int) -> bool:
    return (
        code in (0x9, 0xA, 0xD)
        or 0x20 <= code < 0x7F
        or 0xA0 <= code < 0xD800
        or 0xE000 <= code < 0xFFFE
        or code >= 0x10000
    )
