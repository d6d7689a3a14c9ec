"""The JAX GPT with a planted bug: rotary pairs are neighbors (2i, 2i + 1) as in GPT-J, not (i, i + half)."""

import gpt_jax
import jax.numpy as jnp


def rotate_neighbors(x):
    """Rotate the first half of each head's dimensions; pairs are (2i, 2i + 1)."""
    size = x.shape[-1] // 2
    cos, sin = gpt_jax.tables(x, size)
    even, odd = x[..., 0:size:2], x[..., 1:size:2]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return jnp.concatenate([turned.reshape(*x.shape[:-1], size), x[..., size:]], axis=-1)


def forward(params, inputs, tap):
    """Return the logits of `gpt_jax.forward` with the wrong pairs."""
    return gpt_jax.forward(params, inputs, tap, rotate=rotate_neighbors)
