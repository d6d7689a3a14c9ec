"""Parameters: one flat dict by the tensor table's names, and the way in and out through NumPy."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax import Array

from tessera_jax.model.dtypes import dtype_of
from tessera_shared.numerics import Numerics

Params = Mapping[str, Array]
Tap = Callable[[str, Array], Array]
"""Sees every named value of the forward pass and returns what to go on with."""
Remember = Callable[[int, Array, Array], tuple[Array, Array]]
"""(layer, new keys, new values) -> all keys and values to attend to: what a cache does."""


def params_from_numpy(arrays: Mapping[str, np.ndarray], *, dtype: str, device: str = "cpu") -> dict[str, Array]:
    """Copy arrays (bfloat16 as `ml_dtypes.bfloat16`) to the first device of a platform ("cpu", "cuda") as `dtype`.

    On the default device they stay uncommitted, so that a compiled function may still spread them over a mesh.
    """
    target, place = dtype_of(dtype), jax.devices(device)[0]
    anywhere = None if place == jax.devices()[0] else place
    return {name: jax.device_put(np.array(array).astype(target), anywhere) for name, array in arrays.items()}


def params_to_numpy(params: Params) -> dict[str, np.ndarray]:
    """Copy parameters out; bfloat16 comes as `ml_dtypes.bfloat16`, bit for bit."""
    return {name: np.array(array) for name, array in params.items()}


def compute_params(params: Params, *, numerics: Numerics) -> dict[str, Array]:
    """Return the parameters cast to the compute dtype; gradients flow through the cast."""
    compute = dtype_of(numerics.compute)
    return {name: array.astype(compute) for name, array in params.items()}
