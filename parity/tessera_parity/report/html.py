"""`report.html`: one self-contained page. Everything that comes from the run is escaped; nothing is fetched."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from tessera_parity.report.heatmap import depth_chart, groups, has_limits, heat_map, legend
from tessera_parity.report.pictures import power_of_ten
from tessera_parity.report.summary import (
    case_text,
    check_message,
    clean,
    false_alarms,
    kill_rate,
    over_limit,
    place,
    repro_command,
    subject_rows,
    verdict_line,
    worst_check,
)
from tessera_parity.report.summary import (
    format_number as plain_number,
)
from tessera_parity.report.training_pictures import qq_figures, trajectory_figures
from tessera_parity.result import SEVERITY, Check, MutantOutcome, Run, Verdict

HTML_FILE = "report.html"
_HEADLINE = {
    Verdict.PARITY: ("✓", "Parity", "Every comparison stayed inside its error budget."),
    Verdict.INCONCLUSIVE: ("?", "Inconclusive", "Too few cases to decide; nothing was seen to depart."),
    Verdict.UNCALIBRATED: ("?", "Uncalibrated", "Rounding cannot be judged on this machine yet: run parity calibrate."),
    Verdict.DIVERGENCE: ("✗", "Divergence", "At least one comparison left its error budget."),
}


def write_html(run: Run, directory: Path) -> None:
    """Write `report.html` into `directory`."""
    (directory / HTML_FILE).write_text(page(run, run_directory=str(directory)), encoding="utf-8")


def page(run: Run, *, run_directory: str) -> str:
    """Return the whole document; `run_directory` appears in the repro commands."""
    panels = {
        "overview": ("Overview", None, _overview(run, run_directory)),
        "checks": ("Checks", len(run.checks), _checks(run, run_directory)),
        "layers": ("Layers", None, _layers(run)),
        "rounding": ("Rounding", None, _rounding(run)),
        "training": ("Training", None, _training(run)),
        "mutants": ("Planted bugs", len(run.mutants), _mutants(run)),
        "environment": ("Environment", None, _environment(run.environment)),
    }
    tabs = "".join(_tab(key, name, count) for key, (name, count, _) in panels.items())
    bodies = "".join(_panel(key, name, body) for key, (name, _, body) in panels.items())
    template = Template(files("tessera_parity.report").joinpath("page.html").read_text(encoding="utf-8"))
    title = _e(verdict_line(run))
    return template.substitute(title=title, header=_header(run), tabs=tabs, panels=bodies, footer=_footer(run))


def _header(run: Run) -> str:
    mark, name, sentence = _HEADLINE[run.verdict]
    worst = worst_check(run)
    if not run.checks:
        sentence = "This run holds no check, so nothing was shown."
    elif worst is not None and worst.verdict is Verdict.DIVERGENCE:
        departs = f"First departs at {place(worst)}" if place(worst) else f"Worst in {worst.subject}, {worst.name}"
        sentence = f"{departs}: {_times(worst)}."
    compared = sum(check.compared for check in run.checks)
    survived = any(not mutant.killed for mutant in run.mutants)
    facts = [
        ("Kill rate", kill_rate(run), "bad" if survived else "good" if run.mutants else "none", "planted bugs caught"),
        ("False alarms", false_alarms(run), _alarm_tone(run), "clean re-runs flagged"),
        ("Compared", f"{compared:,}", "none", f"numbers in {len(run.checks)} checks"),
        ("Run", f"{run.seconds:.1f} s", "none", f"{run.lane} lane, seed {run.seed}"),
    ]
    cards = "".join(_fact(*fact) for fact in facts)
    headline = f'<h1><i aria-hidden="true">{mark}</i>{name}</h1><p class="lead">{_e(sentence)}</p>'
    return (
        f'<header class="v-{run.verdict}"><p class="brand">parity</p>{headline}<dl class="facts">{cards}</dl></header>'
    )


def _fact(name: str, value: str, tone: str, note: str) -> str:
    main, _, rest = value.partition(" (")
    extra = f"<small>{_e(rest.rstrip(')'))}</small>" if rest else ""
    return f'<div class="is-{tone}"><dt>{_e(name)}</dt><dd>{_e(main)} {extra}<span>{_e(note)}</span></dd></div>'


def _alarm_tone(run: Run) -> str:
    if run.false_alarm_rate is None or not run.false_alarm_runs:
        return "none"
    return "bad" if run.false_alarm_rate else "good"


def _overview(run: Run, run_directory: str) -> str:
    if not run.checks:
        return _empty(
            "No check was stored.", "A run that compared nothing is inconclusive; try parity run --quick."
        ) + _left_out(run)
    heads = ("subject", "verdict", "checks", "cases", "numbers", "worst", "observed ÷ limit", "time")
    rows = []
    for row in subject_rows(run):
        over = _over(row.worst)
        cells = (
            f"<b>{_e(row.subject)}</b>", _badge(row.verdict), f"{row.checks:,}", f"{row.cases:,}", f"{row.compared:,}",
            f"<code>{_e(row.worst.name)}</code>", over, f"{row.seconds:.1f} s",
        )  # fmt: skip
        rows.append(_table_row(heads, cells, str(row.verdict)))
    return _worst(run, run_directory) + "<h2>By subject</h2>" + _table(heads, rows) + _left_out(run)


def _worst(run: Run, run_directory: str) -> str:
    worst = worst_check(run)
    if worst is None or worst.verdict is Verdict.PARITY:
        return ""
    return f'<section class="worst v-{worst.verdict}"><h2>Worst case</h2>{_check_facts(worst)}{_repro(worst, run_directory)}</section>'


def _check_facts(check: Check) -> str:
    facts = {
        "what": f"{check.subject} {check.name}",
        "first departs at": place(check),
        "observed": f"{_number(check.observed)}; limit {_number(check.limit)}, {check.unit} ({_times(check)})",
        "asked": f"{check.question}, {' against '.join(check.sides)}, {check.dtype} on {check.device}",
        "how much": f"{check.cases} cases, {check.compared:,} numbers",
        "who moved": check.who or "",
        "note": check.detail,
    }
    return '<dl class="pairs">' + "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in facts.items() if v) + "</dl>"


def _repro(check: Check, run_directory: str) -> str:
    if check.case is None:
        return ""
    command = _e(repro_command(check, run_directory))
    button = '<button type="button" class="copy">Copy</button>'
    case = f"<details><summary>the case</summary><pre>{_e(case_text(check))}</pre></details>"
    return f'<div class="repro"><pre><code>{command}</code></pre>{button}</div>{case}'


def _left_out(run: Run) -> str:
    by_reason: dict[str, list[str]] = {}
    for item in run.left_out:
        what, _, reason = item.partition(": ")
        by_reason.setdefault(reason, []).append(what)
    items = "".join(_left_out_item(reason, named) for reason, named in by_reason.items())
    return "<h2>Left out</h2>" + (f"<ul class=plain>{items}</ul>" if items else "<p>Nothing was left out.</p>")


def _left_out_item(reason: str, named: Sequence[str]) -> str:
    if len(named) <= 3 or not reason:
        return "".join(f"<li>{_e(f'{what}: {reason}' if reason else what)}</li>" for what in named)
    listed = "".join(f"<li>{_e(what)}</li>" for what in named)
    return f"<li><details><summary>{len(named)} × {_e(reason)}</summary><ul class=plain>{listed}</ul></details></li>"


def _checks(run: Run, run_directory: str) -> str:
    if not run.checks:
        return _empty("No check was stored.", "The checks of a run appear here, worst first.")
    counts = {verdict: sum(check.verdict is verdict for check in run.checks) for verdict in Verdict}
    chips = "".join(
        f'<button type="button" class="chip" data-verdict="{verdict}" aria-pressed="false">{verdict} {count}</button>'
        for verdict, count in counts.items()
        if count
    )
    box = '<input id="filter" type="search" placeholder="Filter: op, subject, side, dtype" aria-label="Filter checks">'
    shown = '<output id="shown" aria-live="polite"></output>'
    heads = ("check", "verdict", "sides", "observed", "limit", "observed ÷ limit", "first departs at")
    ordered = sorted(run.checks, key=lambda check: (-SEVERITY[check.verdict], -over_limit(check)))
    rows = [_check_row(heads, check, run_directory) for check in ordered]
    nothing = '<p id="nothing" hidden>No check matches.</p>'
    return (
        f'<div class="tools">{box}<div class="chips">{chips}</div>{shown}</div>' + _table(heads, rows, "list") + nothing
    )


def _check_row(heads: Sequence[str], check: Check, run_directory: str) -> str:
    words = f"{check.subject} <code>{_e(check.name)}</code>".replace(check.subject, _e(check.subject), 1)
    more = f"<details><summary>{words}</summary>{_check_facts(check)}{_repro(check, run_directory)}</details>"
    sides = f"{_e('–'.join(check.sides))} <small>{_e(check.dtype)}, {_e(check.question)}</small>"
    cells = (
        more, _badge(check.verdict), sides, _cell(check.observed), _cell(check.limit), _over(check),
        _e(place(check)),
    )  # fmt: skip
    return _table_row(heads, cells, str(check.verdict), search=check_message(check).lower())


def _layers(run: Run) -> str:
    found = groups(run.checks)
    if not found:
        return _empty(
            "No error by layer in this run.",
            "Subjects that tap every layer, such as forward and gradients, fill this panel.",
        )
    charts: dict[str, dict[str, list[Check]]] = {}
    for group, checks in found.items():
        charts.setdefault(f"{group.subject}, {group.question} in {group.dtype}", {})[group.sides] = checks
    maps = "".join(heat_map(group, checks) for group, checks in found.items() if has_limits(checks))
    depth = "".join(depth_chart(title, by_sides) for title, by_sides in charts.items())
    by_layer = f'<h2>Error by layer and operation</h2>{legend()}<div class="maps">{maps}</div>'
    return f'{by_layer if maps else ""}<h2>Error against depth</h2><div class="figures">{depth}</div>'


def _rounding(run: Run) -> str:
    figures, more = qq_figures(run.checks)
    if not figures:
        return _empty(
            "No pooled rounding evidence in this run.",
            "Checks that ask “same rounding” store one log ratio a case; see parity calibrate.",
        )
    note = (
        "<p>Dots on the line: errors are distributed as the legal implementations' are. A shift means another "
        "rounding, also when it is below.</p>"
    )
    rest = f"<p>{more} more in result.json.</p>" if more else ""
    return f'<h2>Error ratios against calibration</h2>{note}<div class="figures">{"".join(figures)}</div>{rest}'


def _training(run: Run) -> str:
    figures = trajectory_figures(run.checks)
    if not figures:
        return _empty(
            "No series over steps in this run.",
            "The subjects optimizer and trajectory store losses, moments and drift.",
        )
    return f'<h2>Over training steps</h2><div class="figures">{"".join(figures)}</div>'


def _mutants(run: Run) -> str:
    if not run.mutants:
        return _empty(
            "No bug was planted in this run.",
            "Without planted bugs nobody knows whether these checks can fail; see parity mutants.",
        )
    heads = ("planted bug", "in", "kind", "outcome", "caught by", "true op", "named op", "shrunk to")
    ordered = sorted(run.mutants, key=lambda mutant: (mutant.killed, _named_right(mutant) is not False))
    return _table(heads, [_mutant_row(heads, mutant) for mutant in ordered], "list")


def _mutant_row(heads: Sequence[str], mutant: MutantOutcome) -> str:
    outcome = (
        '<span class="badge v-parity">caught</span>'
        if mutant.killed
        else '<span class="badge v-divergence">survived</span>'
    )
    right = {
        True: '<i class="good" title="right op at rank 1">✓</i>',
        False: '<i class="bad" title="another op">✗</i>',
        None: "",
    }
    named = f"<code>{_e(mutant.named_op)}</code> {right[_named_right(mutant)]}" if mutant.named_op else ""
    sizes = [(mutant.repro_layers, "layer"), (mutant.repro_tokens, "token")]
    shrunk = ", ".join(f"{size} {unit}{'' if size == 1 else 's'}" for size, unit in sizes if size is not None)
    detail = f"<small>{_e(mutant.detail)}</small>" if mutant.detail else ""
    expected = f"<code>{_e(mutant.expected_op)}</code>" if mutant.expected_op else ""
    cells = (
        f"<code>{_e(mutant.name)}</code> {detail}", _e(mutant.half), _e(mutant.kind), outcome,
        _e(mutant.killed_by or ""), expected, named, shrunk,
    )  # fmt: skip
    return _table_row(heads, cells, "parity" if mutant.killed else "divergence")


def _named_right(mutant: MutantOutcome) -> bool | None:
    """Whether rank 1 was right; None where nothing was to be named."""
    return None if mutant.expected_op is None else mutant.named_op == mutant.expected_op


def _environment(environment: Mapping[str, Any]) -> str:
    """Draw what is a mapping itself as a side (a column), the rest as facts common to all."""
    sides = {name: value for name, value in environment.items() if isinstance(value, Mapping)}
    differences = environment.get("differences") or []
    common = {name: value for name, value in environment.items() if name not in sides and name != "differences"}
    if not environment:
        return _empty("No environment was stored.", "A run records versions, devices and settings of both sides.")
    facts = "".join(f"<dt>{_e(key)}</dt><dd>{_e(_shown(value))}</dd>" for key, value in common.items())
    listed = "".join(f"<li>{_e(line)}</li>" for line in differences)
    parts = [f"<h2>Settings that differ</h2><ul class=plain>{listed}</ul>"] if listed else []
    parts += [f'<h2>Common</h2><dl class="pairs">{facts}</dl>'] if facts else []
    if sides:
        heads = ("setting", *map(str, sides))
        keys = dict.fromkeys(key for value in sides.values() for key in value)
        rows = [_setting(heads, str(key), [side.get(key) for side in sides.values()]) for key in keys]
        note = "<p>Marked rows: both sides state the setting and state it differently.</p>"
        parts.append(f"<h2>Side by side</h2>{note}{_table(heads, rows, 'list')}")
    return "".join(parts)


def _setting(heads: Sequence[str], key: str, values: Sequence[Any]) -> str:
    stated = [_shown(value) for value in values if value is not None]
    cells = (f"<b>{_e(key)}</b>", *("" if value is None else f"<code>{_e(_shown(value))}</code>" for value in values))
    differs = key != "version" and len(set(stated)) > 1  # versions of two frameworks say nothing about each other
    return _table_row(heads, cells, "differs" if differs else "same")


def _footer(run: Run) -> str:
    started = f"Started {_e(run.started)}. " if run.started else ""
    return f"{started}Schema {run.format_version}. The same data: result.json, checks.jsonl, junit.xml."


def _tab(key: str, name: str, count: int | None) -> str:
    number = "" if count is None else f" <small>{count}</small>"
    names = f'id="tab-{key}" aria-controls="{key}" data-panel="{key}"'
    return f'<button type="button" role="tab" {names}>{name}{number}</button>'


def _panel(key: str, name: str, body: str) -> str:
    heading = f'<h2 class="print">{name}</h2>'
    return f'<section role="tabpanel" id="{key}" aria-labelledby="tab-{key}" tabindex="0">{heading}{body}</section>'


def _table(heads: Sequence[str], rows: Sequence[str], kind: str = "list") -> str:
    head = "".join(f"<th scope=col>{_e(name)}</th>" for name in heads)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _table_row(heads: Sequence[str], cells: Sequence[str], tone: str, search: str = "") -> str:
    data = f' data-search="{_e(search)}"' if search else ""
    body = "".join(f'<td data-head="{_e(head)}">{cell}</td>' for head, cell in zip(heads, cells, strict=True))
    return f'<tr class="r-{_e(tone)}" data-verdict="{_e(tone)}"{data}>{body}</tr>'


def _empty(what: str, hint: str) -> str:
    return f'<div class="empty"><p>{_e(what)}</p><p>{_e(hint)}</p></div>'


def _badge(verdict: Verdict) -> str:
    return f'<span class="badge v-{verdict}">{verdict}</span>'


def _over(check: Check) -> str:
    ratio = over_limit(check)
    return f'<span class="num{" bad" if ratio > 1 else ""}">{_number(ratio)}</span>'


def _times(check: Check) -> str:
    if math.isinf(check.limit):
        return "no limit yet"
    return f"{_number(over_limit(check))} times the limit" if check.limit else "only equality will do"


def _cell(value: float) -> str:
    return f'<span class="num">{_number(value)}</span>'


def _number(value: float) -> str:
    """Return a float as people write it: `1.2×10⁻¹³`."""
    mantissa, _, exponent = plain_number(value).partition("e")
    return f"{mantissa}×{power_of_ten(int(exponent))}" if exponent else mantissa.replace("-", "−")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _e(text: object) -> str:
    return escape(clean(text), quote=True)
