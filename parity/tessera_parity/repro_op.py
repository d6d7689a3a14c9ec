"""Repro files of one call: an operation, a loss with its gradient, the sampler, a random stream."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tessera_parity import budget
from tessera_parity.cases import OpCase
from tessera_parity.halves import Half
from tessera_parity.repro_program import write_program_repro
from tessera_parity.repro_source import BRING, Source, module_of
from tessera_shared.dims import suffix_of
from tessera_shared.objectives import IGNORE_INDEX

INDICES = ("token_ids", "labels", "prompt_ids")
"""Names of integer arrays whose values are ids of the vocabulary, so that cutting V cuts them."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of one paired function by NumPy values, or the gradient of its sum by some of them.

    With `moving`, the scalar is a loss sum plus half its denominator where the function returns both, else the sum of
    its values weighted by `weights_BT`; the file computes it and its gradient by every number of those arguments.
    """

    path: str  # mirrored path of the module: "distil.losses"
    function: str
    inputs: Mapping[str, Any]
    moving: tuple[str, ...] = ()
    weights_BT: np.ndarray | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)  # as drawn; arrays say the rest

    @property
    def about(self) -> str:
        """See `Program`."""
        return f"{self.path}.{self.function}"

    @property
    def limit(self) -> float:
        """See `Program`: one operation, its longest sum; a gradient is two over all of the input."""
        longest = max([1, *self.sizes.values(), *(max(value.shape, default=1) for value in self._arrays().values())])
        return budget.mathematics_limit(2, length=longest**2) if self.moving else budget.mathematics_limit(
            1, length=longest
        )  # fmt: skip

    @property
    def size(self) -> tuple[int | None, int | None]:
        """No layers; tokens are the positions of the widest array with a B axis, or with an X axis."""
        tokens = [
            int(np.prod([n for letter, n in zip(suffix, value.shape, strict=False) if letter in "BTX"]))
            for name, value in self._arrays().items()
            if (suffix := suffix_of(name)) is not None and set(suffix) & set("BTX")
        ]
        return None, max(tokens, default=None)

    def floor(self, truth: Mapping[str, np.ndarray]) -> float:
        """See `Program`."""
        floor = budget.cancellation_floor(self.about, self.inputs)
        if not self.moving:
            return floor
        weights = np.ones(1) if self.weights_BT is None else self.weights_BT
        largest = max(float(np.max(np.abs(value), initial=0.0)) for value in truth.values())
        return max(floor, largest, budget.loss_gradient_floor(self.about, self.inputs, weights))

    def lines(self, side: str, source: Source) -> list[str]:
        """See `Program`."""
        source.needs(module_of(side, self.path), self.function)
        rows = [f"    {name!r}: {source.of(value, name)}," for name, value in self.inputs.items()]
        brought = "bring(inputs)" if "." in self.path else "inputs"  # random streams take their key as it is
        lines = ["inputs = {", *rows, "}", *BRING]
        if not self.moving:
            return [*lines, f"result = {self.function}(**{brought})"]
        weights = source.of(np.ones((1, 1)) if self.weights_BT is None else self.weights_BT, "weights_BT")
        return [
            *lines,
            f"weights_BT = array({weights})",
            "",
            "",
            "def scalar(moving):",
            f"    value = {self.function}(**{{**{brought}, **moving}})",
            "    if isinstance(value, tuple):",
            "        return value[0] + 0.5 * value[1]",
            "    return (value * (weights_BT if value.ndim == 2 else weights_BT[..., None])).sum()",
            "",
            "",
            f"moving = {{name: array(inputs[name]) for name in {self.moving!r}}}",
            'result = {"value": scalar(moving), "gradient": gradient(scalar, moving)}',
        ]

    def smaller(self) -> "Iterator[tuple[str, Call]]":
        """Cut axes by their letters in all arrays at once, then arrays of dictionaries, then digits."""
        sizes = self._letters()
        if "N" in sizes and "K" in sizes:
            for heads in fewer(sizes["N"]):
                for kv_heads in sorted({n for n in (1, sizes["K"]) if n <= heads and heads % n == 0}):
                    yield f"heads {sizes['N']} -> {heads}", self._sliced({"N": slice(heads), "K": slice(kv_heads)})
        for letter, size in sizes.items():
            for kept in fewer(size):
                for first in (0, size - kept):
                    yield f"{letter} {size} -> {kept}", self._sliced({letter: slice(first, first + kept)})
        for name, value in self.inputs.items():
            if isinstance(value, Mapping) and all(isinstance(item, np.ndarray) for item in value.values()):
                for what, smaller in smaller_arrays(value):
                    yield f"{name}: {what}", replace(self, inputs={**self.inputs, name: smaller})
            if name == "count" and isinstance(value, int):
                for kept in fewer(value):
                    yield f"count {value} -> {kept}", replace(self, inputs={**self.inputs, name: kept})
        rounded = {name: plainer(value) for name, value in self.inputs.items()}
        if any(rounded[name] is not self.inputs[name] for name in rounded):
            yield "values in eighths", replace(self, inputs=rounded)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: value for name, value in self.inputs.items() if isinstance(value, np.ndarray)}

    def _letters(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, value in self._arrays().items():
            suffix = suffix_of(name)
            if suffix is not None and len(suffix) == value.ndim:
                found |= {letter: size for letter, size in zip(suffix, value.shape, strict=True) if letter.isalpha()}
        return found

    def _sliced(self, parts: Mapping[str, slice]) -> "Call":
        cut = {
            name: _cut(name, value, parts) if isinstance(value, np.ndarray) else value
            for name, value in self.inputs.items()
        }
        if "V" in parts:
            size = len(range(self._letters()["V"])[parts["V"]])
            cut = {name: _fitting(name, value, size) for name, value in cut.items()}
        weights = None if self.weights_BT is None else _cut("weights_BT", self.weights_BT, parts)
        return replace(self, inputs=cut, weights_BT=weights, sizes={})


def fewer(number: int) -> list[int]:
    """Return smaller sizes to try, boldest first: 1, 2, half, one less."""
    return sorted({1, 2, number // 2, number - 1} & set(range(1, number)))


def smaller_arrays(named: Mapping[str, np.ndarray]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield a dictionary of arrays without one of them, and with one of them shorter along one axis."""
    for name, value in named.items():
        if len(named) > 1:
            yield f"no {name}", {other: item for other, item in named.items() if other != name}
        for axis, size in enumerate(value.shape):
            for kept in fewer(size):
                part = (slice(None),) * axis + (slice(kept),)
                yield f"{name} axis {axis} {size} -> {kept}", {**named, name: value[part]}


def plainer(value: Any) -> Any:
    """Return a float array in eighths; the same object where that changes nothing or it is no float array."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return value
    rounded = np.round(value * 8.0) / 8.0
    return value if np.array_equal(rounded, value, equal_nan=True) else rounded


def _cut(name: str, value: np.ndarray, parts: Mapping[str, slice]) -> np.ndarray:
    suffix = suffix_of(name)
    if suffix is None or len(suffix) != value.ndim:
        return value
    return value[tuple(parts.get(letter, slice(None)) for letter in suffix)]


def _fitting(name: str, value: Any, size: int) -> Any:
    if not name.startswith(INDICES) or not isinstance(value, np.ndarray):
        return value
    return np.where(value == IGNORE_INDEX, IGNORE_INDEX, value % size).astype(value.dtype)


def call_of(case: OpCase) -> Call:
    """Return a generated case as a call."""
    path, _, function = case.function.rpartition(".")
    return Call(path=path, function=function, inputs=case.inputs, sizes=case.sizes)


def write_op_repro(oracle: Half, half: Half, case: OpCase, out: Path, *, name: str) -> tuple[list[Path], Call]:
    """Cut a failing operation's inputs and write both files. Raises `ParityError` when nothing departs."""
    return write_program_repro(oracle, half, call_of(case), out, name=name)
