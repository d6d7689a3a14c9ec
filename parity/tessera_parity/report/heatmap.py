"""Layer pictures: the heat map (tap class by layer, error over limit, logarithmic colors) and error against depth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tessera_parity.report.pictures import Line, figure, power_of_ten
from tessera_parity.report.summary import clean, format_number, over_limit
from tessera_parity.result import Check, Question

OUTSIDE = ("embed", "final_norm", "logits")
"""Taps outside every layer; they fill the first or last rows, in a column of their own."""

FORWARD_ORDER = (
    "embed", "attention.norm", "attention.q", "attention.k", "attention.v", "attention.q_norm", "attention.k_norm",
    "attention.q_rope", "attention.k_rope", "attention.scores", "attention.probs", "attention.mix", "attention.out",
    "residual", "mlp.norm", "mlp.gate", "mlp.up", "mlp.act", "mlp.down", "out", "final_norm", "logits",
)  # fmt: skip

_STEPS = (-6, -4, -3, -2, -1, 0, 1, 3)
"""Color h0 is an exact zero, h1 below 10^-6 of the limit, ..., h6 up to the limit, h7 and above over it."""


@dataclass(frozen=True)
class Group:
    """Checks that share one heat map: one subject, question, dtype and pair of sides."""

    subject: str
    question: str
    sides: str
    dtype: str

    @property
    def title(self) -> str:
        """The caption: `forward, numpy against torch, same mathematics in float64`."""
        return f"{self.subject}, {self.sides}, {self.question} in {self.dtype}"


def groups(checks: Sequence[Check]) -> dict[Group, list[Check]]:
    """Return the checks that have a layer axis, by heat map, with their subject's taps outside the layers."""
    grouped: dict[Group, list[Check]] = {}
    for check in checks:
        grouped.setdefault(_group(check), []).append(check)
    layered = {group: list(filter(_has_place, found)) for group, found in grouped.items() if any(map(_by_layer, found))}
    layered = {group: found for group, found in layered.items() if has_limits(found) or _depth(found) > 1}
    return {group: sorted(found, key=_rank) for group, found in layered.items()}


def has_limits(checks: Sequence[Check]) -> bool:
    """Whether errors by layer stand next to limits in their own unit; without them there is no color to give."""
    return any(math.isfinite(limit) for check in checks for _, limit in _by_layer(check).values())


def heat_map(group: Group, checks: Sequence[Check]) -> str:
    """Return a table: one row a tap class in forward order, one column a layer, colored by error over limit."""
    depth = _depth(checks)
    outside = any(check.name in OUTSIDE for check in checks)
    every = max(1, math.ceil(depth / 16))
    heads = "".join(f"<th scope=col>{layer if layer % every == 0 else ''}</th>" for layer in range(depth))
    head = f"<tr><th scope=col>layer</th>{heads}{'<th scope=col>–</th>' if outside else ''}</tr>"
    rows = "".join(_row(check, depth, outside) for check in checks)
    caption = f"<figcaption>{escape(clean(group.title))}</figcaption>"
    table = (
        f'<div class="scroll" tabindex="0"><table class="heat"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    )
    return f'<figure class="wide">{caption}{table}</figure>'


def legend() -> str:
    """Return the color key of the heat map: each color's range of error over limit."""
    names = [
        "0",
        *(f"≤ {power_of_ten(step)}" for step in _STEPS[:6]),
        *(f"≤ {power_of_ten(s)}" for s in _STEPS[6:]),
        "more",
    ]
    keys = "".join(f'<li><i class="h{index}"></i>{name}</li>' for index, name in enumerate(names))
    return f'<ul class="legend keys"><li>error ÷ limit:</li>{keys}</ul>'


def depth_chart(title: str, by_sides: dict[str, list[Check]]) -> str:
    """Return error against depth: for each pair of sides the worst tap of every layer, and the tightest limit."""
    lines = []
    limits: dict[int, float] = {}
    for sides, checks in by_sides.items():
        worst: dict[int, float] = {}
        for check in checks:
            for layer, (error, limit) in _by_layer(check).items():
                worst[layer] = _larger(worst.get(layer, 0.0), error)
                limits |= {layer: min(limits.get(layer, math.inf), limit)} if math.isfinite(limit) else {}
        lines.append(Line(name=sides, xs=sorted(worst), ys=[worst[layer] for layer in sorted(worst)]))
    if limits:
        lines.append(Line(name="limit", xs=sorted(limits), ys=[limits[layer] for layer in sorted(limits)], dashed=True))
    return figure(title, lines, x_label="layer", y_label="worst error", log=True)


def shade(ratio: float) -> int:
    """Return the color class of one cell: 0 exact, 1 to 6 within the limit, 7 to 9 over it."""
    if ratio == 0:
        return 0
    if not math.isfinite(ratio):
        return len(_STEPS) + 1
    return 1 + sum(ratio > 10.0**step for step in _STEPS)


def _row(check: Check, depth: int, outside: bool) -> str:
    cells = _by_layer(check)
    found = [_cell(check.name, layer, *cells[layer]) if layer in cells else "<td></td>" for layer in range(depth)]
    if outside:
        single = check.name in OUTSIDE and not cells
        found.append(_cell(check.name, None, check.observed, check.limit) if single else "<td></td>")
    return f"<tr><th scope=row>{escape(clean(check.name))}</th>{''.join(found)}</tr>"


def _cell(name: str, layer: int | None, error: float, limit: float) -> str:
    ratio = _ratio(error, limit)
    where = name if layer is None else f"{name}, layer {layer}"
    words = escape(clean(f"{where}: {format_number(error)}, limit {format_number(limit)}"), quote=True)
    over = " over" if ratio > 1 else ""
    return f'<td class="h{shade(ratio)}{over}" title="{words}"><span class="unseen">{words}</span></td>'


def _by_layer(check: Check) -> dict[int, tuple[float, float]]:
    errors = check.series.get("error_by_layer", [])
    limits = check.series.get("limit_by_layer", [])
    same_unit = check.question is not Question.ROUNDING  # whose own limit is on a pooled ratio, not on an error
    every = check.limit if same_unit else math.inf
    return {layer: (error, limits[layer] if layer < len(limits) else every) for layer, error in enumerate(errors)}


def _depth(checks: Sequence[Check]) -> int:
    return max(max(_by_layer(check), default=0) for check in checks) + 1


def _ratio(error: float, limit: float) -> float:
    if math.isnan(error):
        return math.inf
    return abs(error) / limit if limit else (0.0 if error == 0 else math.inf)


def _larger(a: float, b: float) -> float:
    return math.inf if math.isnan(b) else max(a, abs(b))


def _group(check: Check) -> Group:
    return Group(check.subject, str(check.question), " against ".join(check.sides), check.dtype)


def _has_place(check: Check) -> bool:
    return bool(_by_layer(check)) or check.name in OUTSIDE


def _rank(check: Check) -> tuple[int, float]:
    known = FORWARD_ORDER.index(check.name) if check.name in FORWARD_ORDER else len(FORWARD_ORDER)
    return known, -over_limit(check) if known == len(FORWARD_ORDER) else 0.0
