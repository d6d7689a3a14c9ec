"""Generation over the contiguous cache: prefill, then one token a step."""

from itertools import pairwise

import torch
from torch import Tensor

from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec
from tessera_shared.validate import validate_generation, validate_token_ids
from tessera_torch.model.cache import empty_cache, forward_cached
from tessera_torch.model.params import Params, compute_params
from tessera_torch.serve.sampling import sample


def generate(
    params: Params,
    prompt_ids_BT: Tensor,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    num_tokens: int,
    uniforms_BT: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Return the `num_tokens` int32 tokens that follow prompts of equal length; token t uses `uniforms_BT[:, t]`.

    Every step has the same shapes. Raises DataError for an empty prompt, ids outside the vocabulary, more positions
    than the spec has, or a temperature above 0 without uniforms.
    """
    validate_token_ids(prompt_ids_BT.cpu().numpy(), spec)
    uniforms_shape = None if uniforms_BT is None else tuple(uniforms_BT.shape)
    validate_generation(
        tuple(prompt_ids_BT.shape), spec, num_tokens=num_tokens, uniforms_shape=uniforms_shape, temperature=temperature
    )
    with torch.inference_mode():
        rows, prompt = prompt_ids_BT.shape
        device = prompt_ids_BT.device
        uniforms_BT = torch.zeros((rows, num_tokens), device=device) if uniforms_BT is None else uniforms_BT
        params = compute_params(params, numerics=numerics)
        cache = empty_cache(params, spec=spec, numerics=numerics, batch=rows, capacity=prompt + num_tokens)
        positions_BT = torch.arange(prompt + num_tokens, dtype=torch.int32, device=device).expand(rows, -1)
        ids_BT = torch.zeros((rows, num_tokens), dtype=torch.int32, device=device)
        tokens_BT, start, stop = prompt_ids_BT, 0, prompt
        for step in range(num_tokens):
            logits_BTV, cache = forward_cached(
                params, tokens_BT, cache, spec=spec, numerics=numerics, positions_BT=positions_BT[:, start:stop]
            )
            uniforms_B = uniforms_BT[:, step]
            ids_BT[:, step] = sample(
                logits_BTV[:, -1], uniforms_B, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
            )
            tokens_BT, start, stop = ids_BT[:, step : step + 1], stop, stop + 1
    return ids_BT.clone()  # an inference tensor could not enter a training step


def teacher_forced_logits(
    params: Params, token_ids_BT: Tensor, *, spec: ModelSpec, numerics: Numerics, prefill: int
) -> Tensor:
    """Return the logits of every position: the first `prefill` tokens at once, then one a step through the cache."""
    rows, length = token_ids_BT.shape
    params = compute_params(params, numerics=numerics)
    cache = empty_cache(params, spec=spec, numerics=numerics, batch=rows, capacity=length)
    positions_BT = torch.arange(length, dtype=torch.int32, device=token_ids_BT.device).expand(rows, -1)
    bounds = [0, *range(prefill, length + 1)] if prefill else list(range(length + 1))
    parts = []
    with torch.no_grad():
        for start, stop in pairwise(bounds):
            part = slice(start, stop)
            logits_BTV, cache = forward_cached(
                params,
                token_ids_BT[:, part],
                cache,
                spec=spec,
                numerics=numerics,
                positions_BT=positions_BT[:, part],
            )
            parts.append(logits_BTV)
    return torch.cat(parts, dim=1)
