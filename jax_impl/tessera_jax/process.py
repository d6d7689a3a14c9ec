"""What a command needs of the framework before and around the work: precision, device, arrays in and out."""

from dataclasses import astuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tessera_shared.errors import SpecError
from tessera_shared.numerics import Numerics


def prepare_process(numerics: Numerics, *, device: str) -> None:
    """Set the process up for a policy on a device ("cpu", "cuda"): 64-bit types on where the policy names float64.

    SpecError where the device is not there.
    """
    try:
        place = jax.devices(device)[0]
    except RuntimeError:
        raise SpecError(
            f"device = {device!r}: expected {jax.default_backend()}, because JAX sees no other here; try --device cpu"
        ) from None
    jax.config.update("jax_default_device", place)  # type: ignore[no-untyped-call]
    if "float64" in astuple(numerics):
        jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]


def array_from_numpy(value: np.ndarray, *, device: str) -> Array:
    """Copy an array to a device, dtype as it is."""
    return jnp.asarray(jax.device_put(value, jax.devices(device)[0]))


def array_to_numpy(value: Array) -> np.ndarray:
    """Copy an array out; integers and float32 or float64."""
    return np.array(value)
