"""A program: a few lines of source that a repro file consists of, and that is run here, in a half, from the same text.

What is evaluated while shrinking is thus what the file will say. The lines may use `np`, `array` (NumPy in), `cast`
(to a dtype by name) and `gradient`, which every file defines for its side, and whatever `Source` imports; they leave
their answer in `result`: an array, or dictionaries and tuples of arrays.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from tessera_parity.compare import Difference, compare_results, flatten
from tessera_parity.halves import Half
from tessera_parity.localize import STATE, SURPRISES, Culprit
from tessera_parity.repro_files import Point, point_of, write_file
from tessera_parity.repro_source import PRELUDES, Source
from tessera_parity.shrink import cut_down
from tessera_shared.errors import ParityError

MAX_ATTEMPTS = 150
MAX_SECONDS = 60.0


class Program(Protocol):
    """One thing to compute on either side. Frozen; `smaller` yields cut copies."""

    @property
    def about(self) -> str:
        """What is computed, for people: `distil.losses.forward_kl`."""

    @property
    def limit(self) -> float:
        """How far two sides may be apart in float64."""

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Layers and tokens, where it has any."""

    def lines(self, side: str, source: Source) -> list[str]:
        """Return source that computes `result` on a side."""

    def smaller(self) -> "Iterator[tuple[str, Program]]":
        """Yield what is one cut away, boldest first."""

    def floor(self, truth: Mapping[str, np.ndarray]) -> float:
        """Return the magnitude of what cancels inside, to divide by when the result itself is smaller."""


P = TypeVar("P", bound=Program)


@dataclass(frozen=True, kw_only=True)
class Departure:
    """How a half's answer leaves the other side's: by a number, by a shape, or by raising."""

    name: str  # of the worst array
    difference: Difference
    own: Mapping[str, np.ndarray]
    truth: Mapping[str, np.ndarray]
    raised: str | None = None  # "TypeError: ...": the half raised where the other side answered


def evaluate(half: Half, program: Program) -> Any:
    """Run a program's lines in a half, planted bugs and all, and return its `result`."""
    source = Source()
    lines = program.lines(half.name, source)
    names: dict[str, Any] = {"np": np, "array": half.array, "ASIDE": source.aside}
    exec("\n".join(PRELUDES[half.name]), names)
    names["array"] = half.array
    for module, wanted in source.imports.items():
        found = half.module(module.split(".", 1)[1]) if half.name != "numpy" and _own(module, half) else None
        found = found if found is not None else half.shared(module.removeprefix("tessera_shared."))
        names |= {name: getattr(found, name) for name in wanted}
    with np.errstate(all="ignore"):  # a cut case may divide by what was cut away; both sides then say so alike
        exec("\n".join(lines), names)
    return names["result"]


def _own(module: str, half: Half) -> bool:
    return module.startswith(f"tessera_{half.name}.")


def departure(truth: Half, half: Half, program: Program) -> Departure | None:
    """Return how a half leaves the truth on a program, or None; what the truth cannot answer is no case."""
    try:
        expected = flatten(truth, evaluate(truth, program))
    except SURPRISES:
        return None
    try:
        own = flatten(half, evaluate(half, program))
    except SURPRISES as error:
        line = (str(error).strip().splitlines() or [""])[0]
        never = Difference(value=float("inf"), where=(), scale=float("nan"), compared=1)
        return Departure(
            name="", difference=never, own={}, truth=expected, raised=f"{type(error).__name__}: {line}"[:300]
        )
    if not expected or any(value.size == 0 for value in expected.values()):
        return None
    name, difference = compare_results(own, expected, floor=program.floor(expected))
    if difference.value <= program.limit:
        return None
    return Departure(name=name, difference=difference, own=own, truth=expected)


def shrink_program(
    truth: Half, half: Half, program: P, *, max_attempts: int = MAX_ATTEMPTS, max_seconds: float = MAX_SECONDS
) -> tuple[P, Departure]:
    """Cut a program while the same kind of departure shows. Raises `ParityError` where nothing departs."""
    first = departure(truth, half, program)
    if first is None:
        raise ParityError(
            f"repro of {program.about}: expected a divergence of {half.name}, because a repro must show one; try the "
            "version and machine that wrote the report"
        )
    raising = first.raised

    def fails(smaller: Program) -> bool:
        found = departure(truth, half, smaller)
        return found is not None and _kind(found.raised) == _kind(raising)

    def stage(given: Program) -> Iterator[tuple[str, Program]]:
        return given.smaller()

    found = cut_down(program, fails, (stage,), max_attempts=max_attempts, max_seconds=max_seconds)  # type: ignore[arg-type]
    last = departure(truth, half, found.thing)
    assert last is not None, "the shrinker returns what fails"
    return found.thing, last


def _kind(raised: str | None) -> str | None:
    return None if raised is None else raised.partition(":")[0]


def write_program_repro(truth: Half, half: Half, program: P, out: Path, *, name: str) -> tuple[list[Path], P]:
    """Shrink a program and write one file a side. Raises `ParityError` where nothing departs."""
    small, found = shrink_program(truth, half, program)
    return write_program_files(truth, half, small, found, out, name=name), small


def write_program_files(
    truth: Half, half: Half, program: Program, found: Departure, out: Path, *, name: str
) -> list[Path]:
    """Write the two files of a program as it is."""
    culprit = Culprit(
        half=half.name, op=program.about, observed=found.difference.value, limit=program.limit, direction=STATE,
    )  # fmt: skip
    picks = picks_of(evaluate(truth, program))
    point = replace(_point(program, found, picks, culprit), against=truth.name, raised=found.raised)
    paths = []
    for side in (half.name, truth.name):
        source = Source()
        lines = program.lines(side, source)
        paths.append(write_file(out, name, side, source, lines, point, culprit))
    return paths


def picks_of(value: Any, name: str = "out", pick: str = "result") -> dict[str, str]:
    """Return, for every array that `flatten` finds in a result, the expression that picks it out."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        parts: Sequence[tuple[Any, Any, str]] = [(key, item, f"[{key!r}]") for key, item in value.items()]
    elif isinstance(value, tuple | list):
        labels = getattr(value, "_fields", range(len(value)))
        parts = [(label, item, f"[{index}]") for index, (label, item) in enumerate(zip(labels, value, strict=True))]
    else:
        return {name: pick}
    return {k: v for label, item, step in parts for k, v in picks_of(item, f"{name}.{label}", pick + step).items()}


def _point(program: Program, found: Departure, picks: Mapping[str, str], culprit: Culprit) -> Point:
    if found.raised is not None:
        which = next(iter(found.truth))
        where = (0,) * found.truth[which].ndim
        pick = picks[which] + (f"[{where}]" if where else "")
        what = f"{program.about} {which}{list(where)}"
        return point_of(what, pick, 0.0, found.truth[which][where], float("nan"), culprit)
    if found.name not in found.own or found.name not in picks:
        raise ParityError(
            f"repro of {program.about}: expected the same arrays of both sides, because a file compares one number, but "
            f"{found.difference.reason}; try parity run"
        )
    own, truth = found.own[found.name], found.truth[found.name]
    what, pick = f"{program.about} {found.name}", picks[found.name]
    if own.ndim != truth.ndim:
        return point_of(f"axes of {what}", f"np.ndim({pick})", own.ndim, truth.ndim, float("nan"), culprit)
    if own.shape != truth.shape:
        axis = next(axis for axis in range(own.ndim) if own.shape[axis] != truth.shape[axis])
        sizes = own.shape[axis], truth.shape[axis]
        return point_of(f"length of axis {axis} of {what}", f"np.shape({pick})[{axis}]", *sizes, float("nan"), culprit)
    where = found.difference.where or (0,) * own.ndim
    picked = f"{pick}[{where}]" if where else pick
    return point_of(f"{what}{list(where)}", picked, own[where], truth[where], found.difference.scale, culprit)
