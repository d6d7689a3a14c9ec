"""Generation over the contiguous cache: prefill, then one token a step."""

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
    validate_token_ids(prompt_ids_BT, spec)
    validate_generation(
        prompt_ids_BT.shape,
        spec,
        num_tokens=num_tokens,
        uniforms_shape=None if uniforms_BT is None else uniforms_BT.shape,
        temperature=temperature,
    )
    rows, prompt = prompt_ids_BT.shape
    uniforms_BT = np.zeros((rows, num_tokens)) if uniforms_BT is None else uniforms_BT
    cache = empty_cache(params, spec=spec, numerics=numerics, batch=rows, capacity=prompt + num_tokens)
    tokens_BT, positions_BT = prompt_ids_BT, np.tile(np.arange(prompt), (rows, 1))
    out: list[np.ndarray] = []
    for step in range(num_tokens):
        logits_BTV, cache = forward_cached(
            params, tokens_BT, cache, spec=spec, numerics=numerics, positions_BT=positions_BT
        )
        ids_B = sample(
            logits_BTV[:, -1], uniforms_BT[:, step], temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
        out.append(ids_B)
        tokens_BT, positions_BT = ids_B[:, None], np.full((rows, 1), prompt + step)
    return np.stack(out, axis=1) if out else np.zeros((rows, 0), np.int32)


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
