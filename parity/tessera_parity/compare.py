"""One metric for arrays: the largest difference relative to the tensor's largest magnitude, with everything odd made
infinite.

Elementwise relative error is no metric (two equally good matmuls differ by half near a cancellation), means and signed
sums hide errors, and a NaN on one side is a difference, never a zero.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tessera_parity.halves import Half
from tessera_shared.errors import ParityError


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far two arrays are apart and where."""

    value: float  # max |a - b| / scale; 0 equal, inf where they cannot be compared
    where: tuple[int, ...]  # index of the worst element, () for scalars and shape mismatches
    scale: float  # the magnitude divided by
    compared: int  # how many numbers
    reason: str = ""  # why infinite

    @property
    def position(self) -> str:
        """The worst index for people: "[1, 5, 0]"."""
        return "[" + ", ".join(map(str, self.where)) + "]"


NEVER = Difference(value=math.inf, where=(), scale=math.nan, compared=1, reason="cannot be compared")
"""The difference of what has no counterpart at all."""


def relative_difference(a: np.ndarray, b: np.ndarray, *, floor: float = 0.0) -> Difference:
    """Return max|a - b| / max(max|a|, max|b|, floor) over finite elements.

    `floor` is the magnitude of terms that cancel inside the operation (a structural zero has no magnitude of its own).
    Shapes, kinds (float, integer, boolean) and the masks of NaN, +inf and -inf must be equal, else the value is
    infinite. Integers and booleans must be equal: their value is 0 or infinite. Nothing to compare raises
    `ParityError`.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return _never(f"shapes {a.shape} and {b.shape}", max(a.size, b.size))
    if _kind(a) != _kind(b):
        return _never(f"kinds {a.dtype} and {b.dtype}", a.size)
    if a.size == 0:
        raise ParityError("compared = 0 numbers: expected at least one, because agreement about nothing is not parity")
    if _kind(a) != "float":
        return _equality(a, b)
    for name, mask_of in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        unequal = mask_of(a) != mask_of(b)
        if unequal.any():
            return _never(f"{name} on one side only", a.size, _index(unequal))
    finite = np.isfinite(a)
    gap = np.zeros(a.shape)
    np.subtract(a, b, out=gap, where=finite)
    gap = np.abs(gap)
    scale = max(
        float(np.max(np.abs(a), initial=0.0, where=finite)), float(np.max(np.abs(b), initial=0.0, where=finite))
    )
    scale = max(scale, floor)
    worst = _index(gap)
    return Difference(
        value=float(gap[worst]) / scale if scale > 0.0 else 0.0, where=worst, scale=scale, compared=int(a.size)
    )


def flatten(half: Half, value: Any, name: str = "out") -> dict[str, np.ndarray]:
    """Return the arrays inside a result (array, scalar, tuple, NamedTuple, dict, None), by path, brought out of the
    half."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return {k: v for key in sorted(value) for k, v in flatten(half, value[key], f"{name}.{key}").items()}
    if isinstance(value, tuple | list):
        labels = getattr(value, "_fields", range(len(value)))
        pairs = zip(labels, value, strict=True)
        return {k: v for label, item in pairs for k, v in flatten(half, item, f"{name}.{label}").items()}
    return {name: half.numpy(value)}


def compare_results(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], *, floor: float = 0.0
) -> tuple[str, Difference]:
    """Return the worst pair of two flattened results: its name and difference (`compared` counts all of them).

    Names on one side only are an infinite difference.
    """
    if a.keys() != b.keys():
        lone = sorted(a.keys() ^ b.keys())
        return lone[0], _never(f"only one side has {', '.join(lone[:3])}", len(lone))
    if not a:
        raise ParityError("compared = 0 arrays: expected at least one, because agreement about nothing is not parity")
    pairs = {name: relative_difference(a[name], b[name], floor=floor) for name in a}
    worst = max(pairs, key=lambda name: pairs[name].value)
    return worst, total_difference(list(pairs.values()))


def total_difference(differences: Sequence[Difference]) -> Difference:
    """Return the worst of several differences, with the number of all that was compared."""
    worst = max(differences, key=lambda difference: difference.value)
    return replace(worst, compared=sum(difference.compared for difference in differences))


def _kind(array: np.ndarray) -> str:
    kinds = {"f": "float", "i": "integer", "u": "integer", "b": "boolean", "c": "complex"}
    return kinds.get(array.dtype.kind, array.dtype.name)


def _equality(a: np.ndarray, b: np.ndarray) -> Difference:
    unequal = a != b
    if unequal.any():
        where = _index(unequal)
        return _never(f"{a[where]} and {b[where]}", a.size, where)
    return Difference(value=0.0, where=_index(unequal), scale=1.0, compared=int(a.size))


def _index(array: np.ndarray) -> tuple[int, ...]:
    return tuple(int(axis) for axis in np.unravel_index(int(np.argmax(array)), array.shape))


def _never(reason: str, compared: int, where: tuple[int, ...] = ()) -> Difference:
    return Difference(value=math.inf, where=where, scale=math.nan, compared=compared, reason=reason)
