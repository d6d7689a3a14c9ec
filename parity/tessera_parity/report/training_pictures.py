"""Pictures over steps and cases: loss trajectories, optimizer moments, drift, QQ plots, and all else stored."""

import math
from collections.abc import Sequence
from dataclasses import replace

from tessera_parity.report.pictures import Line, figure, quantile_pairs
from tessera_parity.report.summary import over_limit
from tessera_parity.result import Check, Verdict

MOST_QQ = 24
_KNOWN = (
    "error_by_layer",
    "limit_by_layer",
    "step",
    "limit",
    "log_ratio",
    "log_ratio_sorted",
    "log_ratio_calibration",
    "calibration_quantiles",
)


def trajectory_figures(checks: Sequence[Check]) -> list[str]:
    """Return, check by check, loss curves of all sides in one picture, then moments, drift, and other series."""
    found: list[str] = []
    for check in checks:
        named = [key for key, values in check.series.items() if values and key not in _KNOWN]
        losses = [key for key in named if key.startswith("loss_")]
        title = f"{check.subject} {check.name}, {'–'.join(check.sides)}"
        if losses:
            found += _losses(check, losses, title)
        for prefix, what in (("moment", "difference of moments"), ("drift", "drift of parameters")):
            found += _with_limits(check, [key for key in named if key.startswith(prefix)], f"{title}: {what}")
        for key in named:
            if not key.startswith(("loss_", "moment", "drift", "limit_moment", "limit_drift")):
                found.append(_generic(check, key, title))
    return found


def qq_figures(checks: Sequence[Check]) -> tuple[list[str], int]:
    """Return QQ plots of the checks that store log ratios, worst first, and how many more there are than shown."""
    stored = [check for check in checks if _ratios(check)]
    stored.sort(key=lambda check: (check.verdict is not Verdict.DIVERGENCE, -over_limit(check)))
    return [_qq(check) for check in stored[:MOST_QQ]], max(0, len(stored) - MOST_QQ)


def _qq(check: Check) -> str:
    quantiles = check.series.get("calibration_quantiles", [])
    calibration = quantiles or check.series.get("log_ratio_calibration", [])
    xs, ys = quantile_pairs(_ratios(check), calibration, extremes=bool(quantiles))
    against = "calibration quantiles" if calibration else "normal quantiles (no calibration)"
    title = f"{check.subject} {check.name}, {' against '.join(check.sides)}, {check.dtype}"
    line = Line(name="cases", xs=xs, ys=ys, dots_only=True)
    return figure(title, [line], x_label=against, y_label="log error ratio", diagonal=True)


def _losses(check: Check, keys: Sequence[str], title: str) -> list[str]:
    lines = [_over_steps(check, key, key.removeprefix("loss_")) for key in keys]
    lines[0] = replace(lines[0], under=len(lines) > 1)
    found = [figure(f"{title}: loss", lines, x_label="step", y_label="loss")]
    if len(lines) > 1 and len({len(line.ys) for line in lines}) == 1:
        gaps = [max(values) - min(values) for values in zip(*(line.ys for line in lines), strict=True)]
        gap = Line(name="gap", xs=lines[0].xs, ys=[math.nan if math.isinf(value) else value for value in gaps])
        found.append(figure(f"{title}: largest gap", [gap], x_label="step", y_label="|difference| of losses", log=True))
    return found


def _ratios(check: Check) -> list[float]:
    return check.series.get("log_ratio") or check.series.get("log_ratio_sorted", [])


def _with_limits(check: Check, keys: Sequence[str], title: str) -> list[str]:
    if not keys:
        return []
    lines = [_over_steps(check, key, key.partition("_")[2] or key) for key in keys]
    own = [f"limit_{key}" for key in keys if check.series.get(f"limit_{key}")]
    bounds = own or [key for key in ("limit",) if check.series.get(key)]
    lines += [_over_steps(check, key, key.replace("_", " "), dashed=True) for key in bounds]
    return [
        figure(
            title,
            lines,
            x_label="step",
            y_label="difference",
            log=all(y >= 0 or y != y for line in lines for y in line.ys),
        )
    ]


def _generic(check: Check, key: str, title: str) -> str:
    return figure(f"{title}: {key.replace('_', ' ')}", [_over_steps(check, key, key)], x_label="index", y_label="value")


def _over_steps(check: Check, key: str, name: str, *, dashed: bool = False) -> Line:
    values = check.series[key]
    steps = check.series.get("step", [])
    xs = steps[: len(values)] if len(steps) >= len(values) else [float(index) for index in range(len(values))]
    return Line(name=name, xs=xs, ys=values, dashed=dashed)
