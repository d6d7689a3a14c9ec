"""Threefry-2x32-20 in JAX: the bits of `tessera_shared.randomness`, with 64-bit types on or off.

`jax.random` numbers its blocks in an order of its own and JAX may change it; these counters are ours.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from tessera_jax.model.dtypes import dtype_of
from tessera_shared.errors import SpecError
from tessera_shared.randomness import PARITY, ROTATIONS, ROUNDS, check_counters


def threefry_2x32(key_2: Array | np.ndarray, counters_X2: Array | np.ndarray) -> Array:
    """Encrypt counters: uint32 words. See the shared function for the rounds."""
    key_2, counters_X2 = jnp.asarray(key_2, dtype=jnp.uint32), jnp.asarray(counters_X2, dtype=jnp.uint32)
    words = [key_2[0], key_2[1], key_2[0] ^ key_2[1] ^ jnp.uint32(PARITY)]
    first, second = counters_X2[..., 0] + words[0], counters_X2[..., 1] + words[1]
    for round_index in range(ROUNDS):
        rotation = ROTATIONS[round_index % 8]
        first = first + second
        second = ((second << jnp.uint32(rotation)) | (second >> jnp.uint32(32 - rotation))) ^ first
        if round_index % 4 == 3:
            injection = round_index // 4 + 1
            first = first + words[injection % 3]
            second = second + words[(injection + 1) % 3] + jnp.uint32(injection)
    return jnp.stack([first, second], axis=-1)


def random_bits(key_2: Array | np.ndarray, start: int, count: int) -> Array:
    """Return two random 32-bit words for each of `count` counters from `start`: uint32 [X, 2].

    `start` is a Python integer: it may need 64 bits, which a traced value would not have while 64-bit types are off.
    """
    check_counters(start, count)
    low_start, high_start = np.uint32(start & 0xFFFFFFFF), np.uint32((start >> 32) & 0xFFFFFFFF)
    low_X = jnp.arange(count, dtype=jnp.uint32) + low_start
    carry_X = (low_X < low_start).astype(jnp.uint32)  # the sum wrapped
    return threefry_2x32(key_2, jnp.stack([low_X, carry_X + high_start], axis=-1))


def uniforms(key_2: Array | np.ndarray, start: int, count: int, *, dtype: str = "float64") -> Array:
    """Return a uniform in [0, 1) for each of `count` counters from `start`: [X]; 24 bits in float32, 53 in float64.

    SpecError for float64 while 64-bit types are off.
    """
    if dtype not in ("float32", "float64"):
        raise SpecError(
            f"dtype = {dtype!r}: expected 'float32' or 'float64', because fewer bits are not uniform; try 'float32'"
        )
    kind = dtype_of(dtype)
    bits_X2 = random_bits(key_2, start, count)
    if dtype == "float32":
        return jnp.asarray((bits_X2[:, 0] >> jnp.uint32(8)).astype(kind) * np.float32(2.0**-24))
    high_X, low_X = (bits_X2[:, 0] >> jnp.uint32(5)).astype(kind), (bits_X2[:, 1] >> jnp.uint32(6)).astype(kind)
    return jnp.asarray((high_X * 2.0**26 + low_X) * 2.0**-53)
