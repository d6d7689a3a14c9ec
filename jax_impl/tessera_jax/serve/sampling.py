"""Choosing the next token: exact inverse of the cumulative distribution, uniforms given."""

import jax
import jax.numpy as jnp
from jax import Array


def greedy(logits_BV: Array) -> Array:
    """Return the likeliest token of each row, the lowest id on ties and the first NaN where there is one, as int32."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def sample(logits_BV: Array, uniforms_B: Array, *, temperature: float, top_k: int, top_p: float, min_p: float) -> Array:
    """Return an int32 token per row: first by (logit down, id up) whose cumulative probability exceeds u * total.

    Kept are the first `top_k` (0 = all), then of these the smallest prefix that holds `top_p` of their mass (as Hugging
    Face and vLLM chain the two), then those with probability >= `min_p` times the largest. `temperature` 0 is greedy.
    At least float32.
    """
    if temperature == 0.0:
        return greedy(logits_BV)
    lifted_BV = logits_BV.astype(jnp.promote_types(logits_BV.dtype, jnp.float32))
    order_BV = jnp.argsort(lifted_BV, axis=-1, descending=True, stable=True).astype(jnp.int32)
    sorted_BV = jnp.take_along_axis(lifted_BV, order_BV, axis=-1)
    probs_BV = jax.nn.softmax((sorted_BV - sorted_BV[:, :1]) / temperature, axis=-1)
    cumulative_BV = jnp.cumsum(probs_BV, axis=-1)
    rank_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)
    kept_BV = probs_BV >= min_p * probs_BV[:, :1]
    num_kept = min(top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    kept_BV &= rank_V < num_kept
    if top_p < 1.0:
        before_BV = jnp.concatenate([jnp.zeros_like(cumulative_BV[:, :1]), cumulative_BV[:, :-1]], axis=-1)
        kept_BV &= before_BV < top_p * cumulative_BV[:, num_kept - 1 : num_kept]
    kept_BV |= rank_V == 0
    last_B1 = jnp.sum(kept_BV, axis=-1, keepdims=True, dtype=jnp.int32) - 1  # every rule keeps a prefix
    threshold_B1 = uniforms_B[:, None].astype(lifted_BV.dtype) * jnp.take_along_axis(cumulative_BV, last_B1, axis=-1)
    passed_B1 = jnp.sum(cumulative_BV <= threshold_B1, axis=-1, keepdims=True, dtype=jnp.int32)
    return jnp.take_along_axis(order_BV, jnp.minimum(passed_B1, last_B1), axis=-1)[:, 0]
