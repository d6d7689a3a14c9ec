"""Root-mean-square normalization (Zhang & Sennrich 2019, arXiv 1910.07467)."""

import jax.numpy as jnp
from jax import Array, lax

from tessera_jax.model.dtypes import dtype_of
from tessera_shared.numerics import Numerics


def rms_norm(x_BTD: Array, gain_D: Array, *, eps: float, numerics: Numerics) -> Array:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis; the gain multiplies after or before the cast to compute."""
    up, compute = dtype_of(numerics.norm), dtype_of(numerics.compute)
    lifted_BTD = x_BTD.astype(up)
    unit_BTD = lifted_BTD * lax.rsqrt(jnp.mean(lifted_BTD * lifted_BTD, axis=-1, keepdims=True) + eps)
    wide_BTD = jnp.broadcast_to(gain_D.astype(up), unit_BTD.shape)  # in up, so that its gradient is summed in up
    if numerics.norm_gain_after_cast:
        gain_BTD = wide_BTD.astype(compute)
        return unit_BTD.astype(compute) * gain_BTD
    return (unit_BTD * wide_BTD).astype(compute)
