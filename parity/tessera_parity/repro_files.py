"""The shape of a repro file, and running it: observed next to expected, exit status 1 while the two differ."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tessera_parity.localize import Culprit
from tessera_parity.repro_source import Source, side_lines

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
    mine, other = (point.oracle_value, point.half_value) if side == "numpy" else (point.half_value, point.oracle_value)
    layer = "" if culprit.layer is None else f" of layer {culprit.layer}"
    body = [
        f'"""Repro: {culprit.half} departs from the float64 oracle in {culprit.op}{layer}; first seen at {point.what}.',
        "",
        f"Runs {'the oracle' if side == 'numpy' else culprit.half} alone; it saw {mine!r} when this was written.",
        'Exit status: 1 while the two sides differ, 0 when they agree."""',
        "",
        "import sys",
        "",
        "import numpy as np",
        *source.import_lines(),
        *side_lines(side),
    ]
    if source.aside:
        np.savez(path.with_suffix(".npz"), **source.aside)  # type: ignore[arg-type]
        body += ['ASIDE = np.load(__file__.removesuffix(".py") + ".npz")']
    body += [
        *lines,
        f"observed = number({point.pick})",
        f"expected = {_literal(other)}  # the other side's number",
        f"difference = abs(observed - expected) / {point.scale!r}" if np.isfinite(point.scale) and point.scale > 0.0
        else "difference = 0.0 if observed == expected else np.inf",
        f"limit = {point.limit!r}",
        f'print(f"{point.what}: observed {{observed!r}}, expected {{expected!r}}, '
        'difference {difference:.3g}, limit {limit:.3g}")',
        "sys.exit(0 if difference <= limit else 1)",
    ]  # fmt: skip
    path.write_text("\n".join(body) + "\n", encoding="utf-8")
    return path


def _literal(value: float) -> str:
    return repr(value) if np.isfinite(value) else f'float("{value}")'


def confirm(path: Path, *, python_path: Sequence[Path | str] = ()) -> tuple[bool, str]:
    """Run a repro in a process of its own; return whether it showed the divergence (exit 1), and its last line."""
    rooms = [str(entry) for entry in python_path] + [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, str(path)],
        env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(rooms), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=CONFIRM_SECONDS, check=False,
    )  # fmt: skip
    lines = (done.stdout if done.returncode in (0, 1) and done.stdout else done.stderr).strip().splitlines()
    return done.returncode == 1 and done.stdout.count("observed") == 1, lines[-1] if lines else ""
