"""Rotary positions, half-split layout (Su et al. 2021, arXiv 2104.09864)."""

import jax.numpy as jnp
from jax import Array

from tessera_jax.model.dtypes import dtype_of
from tessera_shared.numerics import Numerics
from tessera_shared.rope import frequency_list
from tessera_shared.spec import ModelSpec


def rope_tables(positions_BT: Array, *, spec: ModelSpec, numerics: Numerics) -> tuple[Array, Array]:
    """Return cosine and sine of position * inverse frequency, each angle twice (once per half of a head), scaled.

    Angles are products in the rope dtype; the tables [B, T, H] are cast to compute.
    """
    up, compute = dtype_of(numerics.rope), dtype_of(numerics.compute)
    frequencies, attention_factor = frequency_list(spec)
    inverse_H2 = jnp.asarray(frequencies, dtype=up)
    angles = positions_BT[..., None].astype(up) * inverse_H2
    angles_BTH = jnp.concatenate([angles, angles], axis=-1)
    return (jnp.cos(angles_BTH) * attention_factor).astype(compute), (jnp.sin(angles_BTH) * attention_factor).astype(
        compute
    )


def apply_rope(x_BTNH: Array, cos_BTH: Array, sin_BTH: Array) -> Array:
    """Turn pairs (j, j + H/2): x cos + (-second half, first half) sin; both products and the sum round."""
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    rotated_BTNH = jnp.concatenate([-second, first], axis=-1)
    return x_BTNH * cos_BTH[:, :, None, :] + rotated_BTNH * sin_BTH[:, :, None, :]
