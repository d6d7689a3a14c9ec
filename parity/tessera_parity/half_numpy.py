"""The oracle behind the common face: `tessera_shared.reference`, float64 (or complex128 for complex-step
derivatives)."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from tessera_parity.halves import Array
from tessera_parity.loading import FreshModules
from tessera_shared.errors import ParityError

FOLDERS = {"losses": "distil", "optim": "train", "step": "train", "sampling": "serve", "decode": "serve"}
"""Mirrored folder of the oracle's modules, which lie flat; the others are the model's."""


class NumpyHalf:
    """See `tessera_parity.halves.Half`."""

    name = "numpy"
    device = "cpu"

    def __init__(self, fresh: FreshModules) -> None:
        self._fresh = fresh

    def module(self, path: str) -> ModuleType:
        """Return `reference.<last word of path>`, or `tessera_shared.<path>` for what shared itself has
        (randomness)."""
        folder, _, base = path.rpartition(".")
        if folder and folder == FOLDERS.get(base, "model"):
            return self._fresh.load(f"tessera_shared.reference.{base}")
        return self._fresh.load(f"tessera_shared.{path}")

    def shared(self, path: str) -> ModuleType:
        """Return `tessera_shared.<path>` as this half's own modules see it: patched where a planted bug is in
        shared."""
        return self._fresh.load(f"tessera_shared.{path}")

    def array(self, value: np.ndarray[Any, Any], dtype: str | None = None) -> Array:  # noqa: ARG002 - the protocol
        """Return a copy. Floats become float64 whatever `dtype` says: the oracle rounds where the policy casts, not
        here."""
        value = np.asarray(value)
        return np.array(value, dtype=np.float64) if is_float(value) else np.array(value)

    def numpy(self, value: Array) -> np.ndarray[Any, Any]:
        """Return floats as float64, the rest as it is."""
        value = np.asarray(value)
        return np.array(value, np.float64) if is_float(value) else value

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` itself."""
        return function

    def value_and_grad(
        self,
        function: Callable[[Mapping[str, Array]], Array],  # noqa: ARG002 - the protocol
        params: Mapping[str, Array],  # noqa: ARG002
    ) -> tuple[Array, dict[str, Array]]:
        """Raise: the oracle differentiates along one direction at a time (`directional_derivative`)."""
        raise ParityError(
            "half = 'numpy' has no reverse differentiation: expected torch or jax, because the oracle is plain NumPy; "
            "try directional_derivative"
        )

    def directional_derivative(
        self,
        function: Callable[[Mapping[str, Array]], Array],
        params: Mapping[str, np.ndarray],
        direction: Mapping[str, np.ndarray],
    ) -> float:
        """Return d/dh f(params + h direction) at 0 by the complex step: Im f(params + i h direction) / h, h = 1e-30.

        Exact to rounding, without the subtraction of finite differences (Squire & Trapp 1998). Names that `direction`
        lacks stay real.
        """
        step = 1e-30
        moved: dict[str, np.ndarray] = {
            name: value.astype(np.complex128) + 1j * step * direction[name] if name in direction else value
            for name, value in params.items()
        }
        return float(np.imag(function(moved)) / step)


def is_float(value: np.ndarray) -> bool:
    """Is this a real floating dtype? ml_dtypes' bfloat16 included, which NumPy itself files under void."""
    return value.dtype.kind == "f" or value.dtype.name == "bfloat16"
