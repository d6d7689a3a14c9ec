"""The three implementations behind one face: `numpy` (the oracle), `torch`, `jax`.

A `Half` is a set of freshly imported modules plus the few verbs in which frameworks differ. Subjects are written once,
against this face, and a planted bug is simply another `Half` whose modules were imported from patched source.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Protocol

import numpy as np

Array = Any
"""A NumPy, torch or JAX array."""


class Half(Protocol):
    """One implementation. `module("model.norms").rms_norm` is the function of that name, whichever side this is."""

    name: str  # numpy | torch | jax
    device: str  # cpu | cuda

    def module(self, path: str) -> ModuleType:
        """Return the module at a mirrored path; the oracle answers `model.norms` with `reference.norms`."""

    def shared(self, path: str) -> ModuleType:
        """Return `tessera_shared.<path>` as this half's own modules see it (a planted bug may be in shared)."""

    def array(self, value: np.ndarray[Any, Any], dtype: str | None = None) -> Array:
        """Bring a NumPy array in. Floats become `dtype` (default float64); integers and booleans stay what they are."""

    def numpy(self, value: Array) -> np.ndarray[Any, Any]:
        """Bring an array out. Every float comes as float64 (exact for bfloat16 and float32); integers and booleans as
        they are."""

    def value_and_grad(
        self, function: Callable[[Mapping[str, Array]], Array], params: Mapping[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Return a scalar function's value and its gradient by name (torch, jax; the oracle has no autodiff and
        raises)."""

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of arrays that gives the same, faster where a framework compiles: one jit of a whole pass
        costs JAX a quarter of what compiling its operations one by one does. torch and the oracle return it as it
        is."""
