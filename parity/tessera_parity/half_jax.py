"""The JAX half behind the common face. Loading it switches 64-bit types on for the whole process."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from tessera_parity.half_numpy import is_float
from tessera_parity.halves import Array
from tessera_parity.loading import FreshModules
from tessera_shared.errors import MissingDependency


class JaxHalf:
    """See `tessera_parity.halves.Half`."""

    name = "jax"

    def __init__(self, fresh: FreshModules, device: str = "cpu") -> None:
        jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]  # without it float64 silently becomes float32
        self._fresh = fresh
        self.device = device
        self._device = _device(device)

    def module(self, path: str) -> ModuleType:
        """Return this copy's `tessera_jax.<path>`."""
        return self._fresh.load(f"tessera_jax.{path}")

    def shared(self, path: str) -> ModuleType:
        """Return `tessera_shared.<path>` as this half's own modules see it: patched where a planted bug is in
        shared."""
        return self._fresh.load(f"tessera_shared.{path}")

    def array(self, value: np.ndarray[Any, Any], dtype: str | None = None) -> Array:
        """Return an array on the half's device. Floats become `dtype`, default float64; integers keep their width."""
        value = np.asarray(value)
        if is_float(value):
            value = np.asarray(value, dtype=np.float64).astype(jnp.dtype(dtype or "float64"))
        return jax.device_put(np.array(value), self._device)

    def numpy(self, value: Array) -> np.ndarray[Any, Any]:
        """Return floats as float64 (exact for the narrower ones), the rest as it is."""
        value = np.asarray(value)
        return np.array(value, np.float64) if is_float(value) else value

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `jax.jit` of it."""
        return cast(Callable[..., Any], jax.jit(function))

    def value_and_grad(
        self, function: Callable[[Mapping[str, Array]], Array], params: Mapping[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Return value and gradients by name."""
        value, grads = jax.value_and_grad(function)(dict(params))
        return value, dict(grads)


def _device(device: str) -> Any:
    """Return the device, or None where it is JAX's default: arrays that are not committed to a device have the same
    signature as what a compiled function returns, so a step is compiled once and not twice."""
    platform = "gpu" if device.startswith("cuda") else device
    try:
        found = jax.devices(platform)[0]
    except RuntimeError as error:
        raise MissingDependency(
            f"device = {device!r}: expected a platform that this JAX can use, because the half runs there "
            f"({str(error).splitlines()[0]}); try --device cpu"
        ) from error
    return None if found == jax.devices()[0] else found
