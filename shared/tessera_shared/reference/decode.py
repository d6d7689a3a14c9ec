"""Generation over the contiguous cache: prefill, then one token a step."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np

from tessera_shared.numerics import Numerics
from tessera_shared.reference.cache import empty_cache, forward_cached
from tessera_shared.reference.params import Params
from tessera_shared.reference.sampling import sample
from tessera_shared.spec import ModelSpec
from tessera_shared.validate import validate_generation, validate_token_ids


def generate(
    params: Params,
    prompt_ids_BT: np.ndarray,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    num_tokens: int,
    uniforms_BT: np.ndarray | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> np.ndarray:
    """Return the `num_tokens` int32 tokens that follow prompts of equal length; token t uses `uniforms_BT[:, t]`."""
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
    return np.stack(ids, axis=1) if ids else np.zeros((prompt_ids_BT.shape[0], 0), np.int32)


def stream_tokens(
    params: Params,
    prompt_ids_BT: np.ndarray,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    num_tokens: int,
    uniforms_BT: np.ndarray | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Iterator[np.ndarray]:
    """Return an iterator over the tokens that `generate` returns, int32 (B,) each, as soon as one is chosen."""
    validate_token_ids(prompt_ids_BT, spec)
    validate_generation(
        prompt_ids_BT.shape,
        spec,
        num_tokens=num_tokens,
        uniforms_shape=None if uniforms_BT is None else uniforms_BT.shape,
        temperature=temperature,
    )
    uniforms_BT = np.zeros((prompt_ids_BT.shape[0], num_tokens)) if uniforms_BT is None else uniforms_BT
    choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return _tokens(params, prompt_ids_BT, uniforms_BT, choose, spec=spec, numerics=numerics)


def teacher_forced_logits(
    params: Params, token_ids_BT: np.ndarray, *, spec: ModelSpec, numerics: Numerics, prefill: int
) -> np.ndarray:
    """Return the logits of every position: the first `prefill` tokens at once, then one a step through the cache."""
    rows, length = token_ids_BT.shape
    cache = empty_cache(params, spec=spec, numerics=numerics, batch=rows, capacity=length)
    positions_BT = np.tile(np.arange(length), (rows, 1))
    bounds = [0, *range(prefill, length + 1)] if prefill else list(range(length + 1))
    parts = []
    for start, stop in pairwise(bounds):
        logits_BTV, cache = forward_cached(
            params,
            token_ids_BT[:, start:stop],
            cache,
            spec=spec,
            numerics=numerics,
            positions_BT=positions_BT[:, start:stop],
        )
        parts.append(logits_BTV)
    return np.concatenate(parts, axis=1)


def _tokens(
    params: Params,
    prompt_ids_BT: np.ndarray,
    uniforms_BT: np.ndarray,
    choose: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    spec: ModelSpec,
    numerics: Numerics,
) -> Iterator[np.ndarray]:
    rows, prompt = prompt_ids_BT.shape
    capacity = prompt + uniforms_BT.shape[1]
    cache = empty_cache(params, spec=spec, numerics=numerics, batch=rows, capacity=capacity)
    tokens_BT, positions_BT = prompt_ids_BT, np.tile(np.arange(prompt), (rows, 1))
    for step in range(uniforms_BT.shape[1]):
        logits_BTV, cache = forward_cached(
            params, tokens_BT, cache, spec=spec, numerics=numerics, positions_BT=positions_BT
        )
        ids_B = choose(logits_BTV[:, -1], uniforms_BT[:, step])
        yield ids_B
        tokens_BT, positions_BT = ids_B[:, None], np.full((rows, 1), prompt + step)
