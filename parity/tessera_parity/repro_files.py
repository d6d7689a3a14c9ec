"""The shape of a repro file, and running it: observed next to expected, exit status 1 while the two differ."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tessera_parity.localize import Culprit
from tessera_parity.repro_source import PRELUDES, Source

CONFIRM_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """One number in dispute."""

    what: str  # for people: "layers.0.attention.q_rope at row 0, token 1, head 0, dimension 2"
    pick: str  # expression over `result` in the file
    half_value: float
    oracle_value: float
    scale: float
    limit: float
    against: str = "numpy"  # the other side
    raised: str | None = None  # "TypeError: ...": what the half raised instead of a number


def point_of(what: str, pick: str, own: Any, truth: Any, scale: float, culprit: Culprit) -> Point:
    """Return one number in dispute as plain floats."""
    return Point(
        what=what, pick=pick, half_value=float(own), oracle_value=float(truth), scale=float(scale), limit=culprit.limit
    )


def write_file(
    out: Path, name: str, side: str, source: Source, lines: Sequence[str], point: Point, culprit: Culprit
) -> Path:
    """Write one side's file and return its path; arrays too large for it lie in an `.npz` beside it."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}_{side}.py"
    body = [
        *_heading(side, point, culprit),
        "",
        "import sys",
        "",
        "import numpy as np",
        *source.import_lines(),
        *PRELUDES[side],
    ]
    if source.aside:
        np.savez(path.with_suffix(".npz"), **source.aside)  # type: ignore[arg-type]
        body += ['ASIDE = np.load(__file__.removesuffix(".py") + ".npz")']
    body += [*_excuse(side, point, culprit), *lines, *_verdict(side, point, culprit)]
    path.write_text("\n".join(body) + "\n", encoding="utf-8")
    return path


def _heading(side: str, point: Point, culprit: Culprit) -> list[str]:
    layer = "" if culprit.layer is None else f" of layer {culprit.layer}"
    other = "the float64 oracle" if point.against == "numpy" else point.against
    mine = point.half_value if side == culprit.half else point.oracle_value
    saw = repr(mine) if point.raised is None or side != culprit.half else point.raised
    return [
        f'"""Repro: {_said(culprit.half)} departs from {other} in {culprit.op}{layer}; first seen at {point.what}.',
        "",
        f"Runs {_said(side)} alone; it saw {_quoted(saw)} when this was written.",
        'Exit status: 1 while the two sides differ, 0 when they agree."""',
    ]


def _excuse(side: str, point: Point, culprit: Culprit) -> list[str]:
    """Say in one line what a half raises where the other side answers; an uncaught error leaves with status 1."""
    if point.raised is None or side != culprit.half:
        return []
    what, expected = point.what, _literal(point.oracle_value)
    return [
        "sys.excepthook = lambda kind, error, _: print(",
        f'    {what!r} + f": observed {{kind.__name__}}: {{error}}, expected {expected}".replace(chr(10), " ")',
        ")",
    ]


def _verdict(side: str, point: Point, culprit: Culprit) -> list[str]:
    if point.raised is not None and side != culprit.half:
        return [
            f"observed = number({point.pick})",
            f'print({point.what!r} + f": observed {{observed!r}}, expected " + {point.raised!r})',
            "sys.exit(1)  # the other side has no number; its own file says whether it still raises",
        ]
    other = point.oracle_value if side == culprit.half else point.half_value
    return [
        f"observed = number({point.pick})",
        f"expected = {_literal(other)}  # the other side's number",
        f"difference = abs(observed - expected) / {point.scale!r}" if np.isfinite(point.scale) and point.scale > 0.0
        else "difference = 0.0 if observed == expected else np.inf",
        f"limit = {point.limit!r}",
        f'print({point.what!r} + f": observed {{observed!r}}, expected {{expected!r}}, '
        'difference {difference:.3g}, limit {limit:.3g}")',
        "sys.exit(0 if difference <= limit else 1)",
    ]  # fmt: skip


def _said(side: str) -> str:
    return "the oracle" if side == "numpy" else side


def _quoted(text: str) -> str:
    return text.replace("\\", "/").replace('"', "'")


def _literal(value: float) -> str:
    return repr(value) if np.isfinite(value) else f'float("{value}")'


class Confirmed(NamedTuple):
    """Whether a file showed its divergence, its last line, and its exit status (0: the sides agree)."""

    shown: bool
    line: str
    status: int


def confirm(path: Path, *, python_path: Sequence[Path | str] = ()) -> Confirmed:
    """Run a repro in a process of its own: exit status 1 and one line that says what was observed show a divergence."""
    rooms = [str(entry) for entry in python_path] + [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, str(path)],
        env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(rooms), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=CONFIRM_SECONDS, check=False,
    )  # fmt: skip
    lines = (done.stdout if done.returncode in (0, 1) and done.stdout else done.stderr).strip().splitlines()
    shown = done.returncode == 1 and done.stdout.count("observed") == 1
    return Confirmed(shown, lines[-1] if lines else "", done.returncode)
