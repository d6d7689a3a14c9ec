"""The small generic battery that planted bugs and clean halves alike must face: question 1, float64, one budget.

A `Probe` is written once against `Half`; the oracle's answer is its truth. Nothing here knows any particular bug: the
probes are the functions of the paired surface on odd, unequal sizes, with the inputs that real bugs needed to show
(long positions, tiny and large scales, large offsets, ignored labels, packed rows, ties, masked rows, uneven
micro-batches).
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tessera_parity import budget
from tessera_parity.compare import Difference, compare_results, flatten
from tessera_parity.halves import Array, Half
from tessera_parity.repro_op import Call
from tessera_parity.repro_program import Program
from tessera_shared.numerics import UNIT_ROUNDOFF

Observed = dict[str, np.ndarray]

ROUNDINGS = 40
"""Roundings in float32 behind one element of a tapped value of the battery's models: a sum of at most 20 terms and
its rest."""

DIRECTIONS = 2
"""Directions along which a gradient is held against the oracle's complex-step derivative."""

SIZES = {"B": 2, "T": 6, "S": 6, "D": 12, "F": 10, "N": 4, "K": 2, "H": 4, "V": 19, "L": 2}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One thing to look at: `observe` says what a half makes of fixed inputs, by name."""

    subject: str  # ops | forward | gradients | losses | optimizer | training | decode | sampling | randomness
    op: str  # what is named when this probe is the first to see a bug
    observe: Callable[[Half], Observed]
    depth: int = 1  # operations in a row, for the budget
    rounding: bool = False  # working dtype: judged by how many elements round otherwise, in units of what is allowed
    gradient: bool = False  # derivatives of one scalar: judged against the largest of them
    model: int | None = None  # index of the model case that localization replays, where a whole model runs
    program: Program | None = None  # the same as source, for a repro; `program_of` makes it where it is a plain call

    @property
    def limit(self) -> float:
        """Return what float64 allows here; in the working dtype the judgement is already in units of what is
        allowed."""
        return 1.0 if self.rounding else budget.mathematics_limit(self.depth)

    def name_of(self, observed: str) -> str:
        """Return the operation to name when the observed array of this name departs."""
        return observed.split("|", 1)[1] if self.rounding else self.op

    def judge(self, observed: Observed, truth: Observed) -> tuple[str, Difference]:
        """Return the worst of the observed arrays and how far it is from the truth."""
        if self.rounding:
            return judge_rounding(observed, truth)
        floor = 0.0
        if self.gradient:  # a structural zero has no magnitude of its own
            floor = max((float(np.max(np.abs(value), initial=0.0)) for value in truth.values()), default=0.0)
        return compare_results(observed, truth, floor=floor)


def judge_rounding(observed: Observed, truth: Observed) -> tuple[str, Difference]:
    """Return the first array, in order, in which too many elements round otherwise, or else the one that comes nearest.

    Names are `dtype|operation`. In bfloat16 an element may differ from the oracle's single rounding only when its
    float32 error (at most gamma_n of `ROUNDINGS` roundings on either side) straddles a rounding boundary, which lie
    2u apart or farther: a share of 2 gamma_n / u is expected at most, and six standard deviations of that Poisson
    count, plus six, are allowed. Wider arrays are judged element by element against the same gamma_n of their own
    dtype, with the same allowance.
    """
    worst_name, worst = "", Difference(value=-1.0, where=(), scale=1.0, compared=0)
    for name, value in truth.items():
        mine = observed.get(name)
        if mine is None or mine.shape != value.shape or not np.array_equal(np.isfinite(mine), np.isfinite(value)):
            return name, Difference(value=float("inf"), where=(), scale=1.0, compared=value.size)
        gap = np.abs(mine - value)
        loose = (
            gap > 0.0
            if name.startswith("bfloat16|")
            else gap > 2 * budget.gamma(ROUNDINGS, "float32") * np.abs(value).max()
        )
        expected = value.size * 2 * budget.gamma(ROUNDINGS, "float32") / UNIT_ROUNDOFF["bfloat16"]
        ratio = float(np.count_nonzero(loose)) / (expected + 6.0 * expected**0.5 + 6.0)
        where = tuple(int(i) for i in np.unravel_index(int(np.argmax(gap)), gap.shape))
        if ratio > worst.value:
            worst_name, worst = name, Difference(value=ratio, where=where, scale=1.0, compared=value.size)
        if ratio > 1.0:
            break
    return worst_name, worst


def bring(half: Half, value: Any) -> Any:
    """Bring NumPy arrays in, inside dicts, lists and named tuples too; leave everything else as it is."""
    if isinstance(value, np.ndarray):
        return half.array(value)
    if isinstance(value, Mapping):
        return {name: bring(half, item) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(bring(half, item) for item in value))
    if isinstance(value, list):
        return [bring(half, item) for item in value]
    return value


@dataclass(frozen=True)
class Calling:
    """An observer of one call of one paired function."""

    path: str
    function: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, half: Half) -> Observed:
        """Call it in a half."""
        target = getattr(half.module(self.path), self.function)
        placed = {name: bring(half, value) for name, value in self.kwargs.items()}
        return flatten(half, target(*(bring(half, arg) for arg in self.args), **placed))


def calling(path: str, function: str, *args: Any, **kwargs: Any) -> Calling:
    """Return an observer of one call of one paired function."""
    return Calling(path, function, args, kwargs)


def program_of(oracle: Half, probe: Probe) -> Program | None:
    """Return what a probe computes as a program of its own, or None where it is none."""
    if probe.program is not None or not isinstance(probe.observe, Calling):
        return probe.program
    seen = probe.observe
    names = inspect.signature(getattr(oracle.module(seen.path), seen.function)).parameters
    inputs = {**dict(zip(names, seen.args, strict=False)), **seen.kwargs}
    return Call(path=seen.path, function=seen.function, inputs=inputs)


def differentiating(
    function: Callable[[Half, Mapping[str, Array]], Array], named: Mapping[str, np.ndarray]
) -> Callable[[Half], Observed]:
    """Return an observer of a scalar's value and of its gradient along fixed random directions, by name of the
    argument.

    The halves differentiate in reverse and project; the oracle takes a complex step along each direction. No bug is
    orthogonal to a random direction but by accident, and there are two.
    """
    ways = directions(named)

    def observe(half: Half) -> Observed:
        if half.name == "numpy":
            return _complex_steps(half, function, named, ways)
        value, grads = half.value_and_grad(lambda leaves: function(half, leaves), bring(half, dict(named)))
        out = {"value": half.numpy(value)}
        for name in named:
            grad = half.numpy(grads[name])
            out[name] = np.array([np.vdot(way[name], grad) for way in ways])
        return out

    return observe


def directions(named: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Return the fixed directions for arrays of these names and shapes."""
    rng = np.random.default_rng(7)
    return [{name: rng.standard_normal(value.shape) for name, value in named.items()} for _ in range(DIRECTIONS)]


def _complex_steps(
    half: Half,
    function: Callable[[Half, Mapping[str, Array]], Array],
    named: Mapping[str, np.ndarray],
    ways: list[dict[str, np.ndarray]],
) -> Observed:
    step = 1e-30
    out: Observed = {"value": np.asarray(function(half, dict(named)), np.float64)}
    for name, value in named.items():
        moved = [function(half, {**named, name: value + 1j * step * way[name]}) for way in ways]
        out[name] = np.array([float(np.imag(result)) / step for result in moved])
    return out
