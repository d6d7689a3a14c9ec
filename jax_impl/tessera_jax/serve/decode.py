"""Generation over the contiguous cache: prefill, then one token a step."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tessera_jax.model.cache import Cache, empty_cache, forward_cached
from tessera_jax.model.params import Params, compute_params
from tessera_jax.serve.sampling import sample
from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec
from tessera_shared.validate import validate_generation, validate_token_ids


def generate(
    params: Params,
    prompt_ids_BT: Array,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    num_tokens: int,
    uniforms_BT: Array | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Array:
    """Return the `num_tokens` int32 tokens that follow prompts of equal length; token t uses `uniforms_BT[:, t]`.

    The step is compiled once for the prompt and once for all single tokens. Raises DataError for an empty prompt,
    ids outside the vocabulary, more positions than the spec has, or a temperature above 0 without uniforms.
    """
    ids = list(
        stream_tokens(
            params,
            prompt_ids_BT,
            spec=spec,
            numerics=numerics,
            num_tokens=num_tokens,
            uniforms_BT=uniforms_BT,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
    )
    return jnp.stack(ids, axis=1) if ids else jnp.zeros((prompt_ids_BT.shape[0], 0), jnp.int32)


def stream_tokens(
    params: Params,
    prompt_ids_BT: Array,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    num_tokens: int,
    uniforms_BT: Array | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Iterator[Array]:
    """Return an iterator over the tokens that `generate` returns, int32 (B,) each, as soon as one is chosen.

    A token may still be on its way: reading it waits. The same errors, raised by the call and not by the first token.
    """
    validate_token_ids(np.asarray(prompt_ids_BT), spec)
    uniforms_shape = None if uniforms_BT is None else tuple(uniforms_BT.shape)
    validate_generation(
        tuple(prompt_ids_BT.shape), spec, num_tokens=num_tokens, uniforms_shape=uniforms_shape, temperature=temperature
    )
    if uniforms_BT is None:
        uniforms_BT = jnp.zeros((prompt_ids_BT.shape[0], num_tokens), jnp.float32)
    step = partial(_step, spec=spec, numerics=numerics, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    params = compute_params(params, numerics=numerics)
    capacity = prompt_ids_BT.shape[1] + num_tokens
    cache = empty_cache(params, spec=spec, numerics=numerics, batch=prompt_ids_BT.shape[0], capacity=capacity)
    return _tokens(params, prompt_ids_BT, cache, uniforms_BT, step)


def teacher_forced_logits(
    params: Params, token_ids_BT: Array, *, spec: ModelSpec, numerics: Numerics, prefill: int
) -> Array:
    """Return the logits of every position: the first `prefill` tokens at once, then one a step through the cache."""
    rows, length = token_ids_BT.shape
    params = compute_params(params, numerics=numerics)
    cache = empty_cache(params, spec=spec, numerics=numerics, batch=rows, capacity=length)
    positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    bounds = [0, *range(prefill, length + 1)] if prefill else list(range(length + 1))
    parts = []
    for start, stop in pairwise(bounds):
        part = slice(start, stop)
        logits_BTV, cache = forward_cached(
            params, token_ids_BT[:, part], cache, spec=spec, numerics=numerics, positions_BT=positions_BT[:, part]
        )
        parts.append(logits_BTV)
    return jnp.concatenate(parts, axis=1)


def _tokens(
    params: Params, prompt_ids_BT: Array, cache: Cache, uniforms_BT: Array, step: Callable[..., tuple[Array, Cache]]
) -> Iterator[Array]:
    """Yield one token a row for each column of uniforms. The cache is given away: each step donates it to the next."""
    tokens_BT, start, prompt = prompt_ids_BT, 0, prompt_ids_BT.shape[1]
    for index in range(uniforms_BT.shape[1]):
        tokens_BT, cache = step(params, tokens_BT, cache, np.int32(start), uniforms_BT, np.int32(index))
        yield tokens_BT[:, 0]
        start = prompt + index


@partial(
    jax.jit,
    static_argnames=("spec", "numerics", "temperature", "top_k", "top_p", "min_p"),
    donate_argnames=("cache",),
)
def _step(
    params: Params,
    tokens_BT: Array,
    cache: Cache,
    start: Array,
    uniforms_BT: Array,
    index: Array,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Array, Cache]:
    """Feed tokens that begin at position `start`, choose the next with the uniforms of column `index`."""
    positions_T = start + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    positions_BT = jnp.broadcast_to(positions_T, tokens_BT.shape)
    logits_BTV, cache = forward_cached(
        params, tokens_BT, cache, spec=spec, numerics=numerics, positions_BT=positions_BT
    )
    uniforms_B = uniforms_BT[:, index]
    ids_B = sample(logits_BTV[:, -1], uniforms_B, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return ids_B[:, None], cache
