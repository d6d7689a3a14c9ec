"""Pictures for the HTML report: small inline SVGs, drawn here: sharp, light, in the page's own colors.

Pictures are chosen by the keys of `Check.series`. Subjects may rely on this list (index = layer, step or case):

- `error_by_layer`, `limit_by_layer`: heat map (the check's name is the tap class, its row) and error against depth;
  without `limit_by_layer` the check's limit, except under "same rounding", whose limit is in another unit.
- `log_ratio` (or `log_ratio_sorted`) with `log_ratio_calibration` (a sample) or `calibration_quantiles` (evenly spaced,
  extremes included): QQ plot of pooled log error ratios; without a calibration against the normal distribution.
- `loss_<side>` (`loss_torch`, `loss_jax`, ...): one loss curve a side in one picture, and the largest gap between them.
- `moment_<what>`, `limit_moment_<what>`: difference of optimizer moments against steps, with its limit.
- `drift_<what>`, `limit_drift_<what>`: parameter drift against steps, with its predicted bound.
- `limit`: the limit of every moment and drift line of its check that has none of its own.
- `step`: the steps that loss, moment and drift values belong to; without it 0, 1, 2, ...
- any other key is drawn as a line under its own name, so that nothing stored goes unseen.

A value that is not finite is a cross on the top edge, an exact zero on a logarithmic axis a hollow dot on the floor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import NormalDist

from tessera_parity.report.summary import clean

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 38
MOST_POINTS = 240
EDGE = 1e-9  # in steps: how far past its end, which is rounded too, an axis still takes a tick
LARGEST = 1e200
"""What is drawn as not finite from here on: an axis must be able to hold a tenfold of both ends' difference."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series of a picture. `xs` and `ys` are of one length; `ys` may hold inf and nan."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    dashed: bool = False  # limits and bounds
    dots_only: bool = False
    under: bool = False  # drawn wide and pale, so that a second line on top of it leaves both visible


@dataclass(frozen=True)
class Axis:
    """A range of values on a span of pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value, kept inside the span."""
        low, high, value = (_log10(v) if self.log else v for v in (self.low, self.high, value))
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return self.start + share * (self.stop - self.start)


def figure(
    title: str, lines: Sequence[Line], *, x_label: str, y_label: str, log: bool = False, diagonal: bool = False
) -> str:
    """Return a `<figure>`: caption, legend in HTML (so that it wraps and never overlaps), and the picture."""
    legend = "".join(
        f'<li><i class="swatch s{_shade(lines, line)}"></i>{escape(clean(line.name))}</li>'
        for line in lines
        if len(lines) > 1
    )
    picture = line_chart(lines, x_label=x_label, y_label=y_label, log=log, diagonal=diagonal, title=title)
    heading = f"<figcaption>{escape(clean(title))}</figcaption>"
    return f"<figure>{heading}{f'<ul class=legend>{legend}</ul>' if legend else ''}{picture}</figure>"


def line_chart(
    lines: Sequence[Line], *, x_label: str, y_label: str, log: bool = False, diagonal: bool = False, title: str = ""
) -> str:
    """Return an SVG of lines over one pair of axes. `diagonal` shares one range between both axes and draws x = y."""
    xs = [x for line in lines for x in line.xs if _drawable(x)]
    ys = [y for line in lines for y in line.ys if _drawable(y)]
    if diagonal:
        xs = ys = xs + ys
    x_axis = _axis(xs, LEFT, WIDTH - RIGHT, log=False, tight=not diagonal)
    y_axis = _axis(ys, HEIGHT - BOTTOM, TOP, log=log, tight=False)
    body = [_grid(x_axis, y_axis, whole=not diagonal)]
    if diagonal:
        ends = (x_axis.low, x_axis.high)
        body.append(_path([(x_axis.at(v), y_axis.at(v)) for v in ends], "s0 dash"))
    body += [_line(_thinned(line), x_axis, y_axis, _shade(lines, line)) for line in lines]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    body.append(_label(x_label, f'x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 5}"'))
    body.append(_label(y_label, f'transform="translate(11 {middle:.0f}) rotate(-90)"'))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(title)}">{"".join(body)}</svg>'


def quantile_pairs(
    sample: Sequence[float], calibration: Sequence[float], *, extremes: bool = False
) -> tuple[list[float], list[float]]:
    """Return calibration quantiles and sorted finite sample at the plotting positions (i - 1/2) / n.

    `extremes` says that the calibration is evenly spaced quantiles, smallest and largest included, not a sample.
    Without a calibration sample the quantiles are the normal distribution's with the sample's mean and deviation.
    """
    ordered = sorted(filter(_drawable, sample))
    reference = sorted(filter(_drawable, calibration))
    shares = [(index + 0.5) / len(ordered) for index in range(len(ordered))]
    if reference:
        return [_quantile(reference, share, extremes) for share in shares], ordered
    mean = sum(ordered) / max(1, len(ordered))
    deviation = math.sqrt(sum((value - mean) ** 2 for value in ordered) / max(1, len(ordered)))
    normal = NormalDist(mean, deviation or 1.0)
    return [normal.inv_cdf(share) for share in shares], ordered


def power_of_ten(exponent: int) -> str:
    """Return 10 to a power as people write it: `10⁻¹²`, `1`, `10`."""
    return {0: "1", 1: "10"}.get(exponent, "10" + str(exponent).translate(_SUPERSCRIPTS))


def ticks(axis: Axis, *, most: int = 6, whole: bool = False) -> list[float]:
    """Return round values inside an axis: decades on a logarithmic one, 1-2-5 steps on a linear one."""
    if axis.log:
        first, last = round(_log10(axis.low)), round(_log10(axis.high))
        stride = max(1, math.ceil((last - first) / (most - 1)))
        return [10.0**power for power in range(first, last + 1, stride)]
    rough = (axis.high - axis.low) / (most - 1)
    scale = 10.0 ** math.floor(_log10(rough))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= rough * 0.999)
    step = max(1.0, step) if whole else step
    first, last = math.ceil(axis.low / step - EDGE), math.floor(axis.high / step + EDGE)
    return [index * step for index in range(first, last + 1)]


def _axis(values: Sequence[float], start: float, stop: float, *, log: bool, tight: bool) -> Axis:
    if log:
        positive = [value for value in values if value > 1 / LARGEST]
        first = math.floor(_log10(min(positive, default=1e-16)) - 1e-9)
        last = math.ceil(_log10(max(positive, default=1.0)) + 1e-9)
        first -= any(value <= 1 / LARGEST for value in values)  # a floor of its own for exact zeros
        return Axis(10.0**first, 10.0 ** max(last, first + 1), start, stop, log=True)
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1 / LARGEST):  # one value, but for rounding
        room = 0.5 * max(1.0, 1e-3 * abs(low))
        low, high = low - room, high + room
    margin = 0.0 if tight else 0.06 * (high - low)
    return Axis(low - margin, high + margin, start, stop)


def _grid(x_axis: Axis, y_axis: Axis, *, whole: bool) -> str:
    parts = []
    for value in ticks(y_axis, most=5):
        y = y_axis.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_tick(value, y_axis)}</text>')
    for value in ticks(x_axis, whole=whole):
        x = x_axis.at(value)
        anchor = "end" if x > WIDTH - RIGHT - 8 and len(_tick(value, x_axis)) > 2 else "middle"
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
        )
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">{_tick(value, x_axis)}</text>'
        )
    return "".join(parts)


def _line(line: Line, x_axis: Axis, y_axis: Axis, shade: int) -> str:
    runs: list[list[tuple[float, float]]] = [[]]
    marks = []
    for x, y in zip(line.xs, line.ys, strict=True):
        if not _drawable(y) or not _drawable(x):
            runs.append([])
            marks.append(_cross(x_axis.at(x) if _drawable(x) else WIDTH - RIGHT, TOP + 4))
            continue
        point = (x_axis.at(x), y_axis.at(y))
        runs[-1].append(point)
        hollow = y_axis.log and y <= 1 / LARGEST
        if hollow or line.dots_only or (len(line.xs) <= 48 and not line.dashed and not line.under):
            look = f"s{shade} hollow" if hollow else f"s{shade}"
            marks.append(f'<circle class="{look}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="2.6"/>')
    style = f"s{shade}{' dash' if line.dashed else ''}{' under' if line.under else ''}"
    paths = [] if line.dots_only else [_path(run, style) for run in runs if len(run) > 1]
    if line.dashed and len(line.xs) == 1 and runs[-1]:  # a limit known at one place still shows as a line
        y = runs[-1][0][1]
        paths.append(_path([(LEFT, y), (WIDTH - RIGHT, y)], style))
    return "".join(paths + marks)


def _label(text: str, where: str) -> str:
    return f'<text class="axis" text-anchor="middle" {where}>{_text(text)}</text>'


def _path(points: Sequence[tuple[float, float]], style: str) -> str:
    steps = " ".join(f"{'L' if index else 'M'}{x:.1f} {y:.1f}" for index, (x, y) in enumerate(points))
    return f'<path class="{style}" d="{steps}"/>'


def _cross(x: float, y: float) -> str:
    return f'<path class="cross" d="M{x - 3:.1f} {y - 3} l6 6 m0 -6 l-6 6"/>'


def _thinned(line: Line) -> Line:
    """Keep the smallest and the largest value of each stretch, so that a spike survives thinning."""
    if len(line.xs) <= MOST_POINTS:
        return line
    stretch = math.ceil(2 * len(line.xs) / MOST_POINTS)
    kept: list[int] = []
    for start in range(0, len(line.xs), stretch):
        block = range(start, min(start + stretch, len(line.xs)))
        odd = [index for index in block if not _drawable(line.ys[index])]
        ranked = sorted(block, key=lambda index: line.ys[index])
        kept += sorted({*odd[:1], ranked[0], ranked[-1]})
    xs, ys = [line.xs[index] for index in kept], [line.ys[index] for index in kept]
    return Line(name=line.name, xs=xs, ys=ys, dashed=line.dashed, dots_only=line.dots_only, under=line.under)


def _shade(lines: Sequence[Line], line: Line) -> int:
    """Return the color class: 0 for limits, 1 to 6 for data in order."""
    data = [other for other in lines if not other.dashed]
    return 0 if line.dashed else 1 + next(i for i, other in enumerate(data) if other is line) % 6


def _quantile(ordered: Sequence[float], share: float, extremes: bool) -> float:
    place = share * (len(ordered) - 1) if extremes else share * len(ordered) - 0.5
    below = max(0, min(len(ordered) - 1, math.floor(place)))
    above = min(len(ordered) - 1, below + 1)
    return ordered[below] + (ordered[above] - ordered[below]) * max(0.0, min(1.0, place - below))


def _tick(value: float, axis: Axis) -> str:
    if axis.log:
        return power_of_ten(round(_log10(value)))
    span = axis.high - axis.low
    if value == 0 or abs(value) < 1e-9 * span:
        return "0"
    if span < 1e-3 or max(abs(axis.low), abs(axis.high)) >= 1e5:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def _drawable(value: float) -> bool:
    return abs(value) < LARGEST  # false for NaN too


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else -400.0


def _text(text: str) -> str:
    return escape(clean(text), quote=True)
