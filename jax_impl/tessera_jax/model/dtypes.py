"""Names of dtypes to JAX's."""

import jax
import jax.numpy as jnp
import numpy as np

from tessera_shared.errors import SpecError
from tessera_shared.numerics import DTYPES


def dtype_of(name: str) -> np.dtype:
    """Return the dtype called `name`. Raises SpecError for an unknown name, and for float64 that JAX would truncate."""
    if name not in DTYPES:
        raise SpecError(
            f"dtype = {name!r}: expected one of {', '.join(DTYPES)}, because every cast must be known to both halves; "
            "try 'float32'"
        )
    if name == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise SpecError(
            "dtype = 'float64': expected jax_enable_x64, because without it JAX computes in float32 and says nothing; "
            "try jax.config.update('jax_enable_x64', True)"
        )
    return jnp.dtype(name)
