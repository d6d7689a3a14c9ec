"""Generation over the contiguous cache: prefill, then one token a step."""

from collections.abc import Callable, Iterator
from functools import partial
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
    empty_BT = torch.zeros((prompt_ids_BT.shape[0], 0), dtype=torch.int32, device=prompt_ids_BT.device)
    return torch.stack(ids, dim=1) if ids else empty_BT


def stream_tokens(
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
) -> Iterator[Tensor]:
    """Return an iterator over the tokens that `generate` returns, int32 (B,) each, as soon as one is chosen.

    Every step has the same shapes. The same errors, raised by the call and not by the first token.
    """
    validate_token_ids(prompt_ids_BT.cpu().numpy(), spec)
    uniforms_shape = None if uniforms_BT is None else tuple(uniforms_BT.shape)
    validate_generation(
        tuple(prompt_ids_BT.shape), spec, num_tokens=num_tokens, uniforms_shape=uniforms_shape, temperature=temperature
    )
    if uniforms_BT is None:
        uniforms_BT = torch.zeros((prompt_ids_BT.shape[0], num_tokens), device=prompt_ids_BT.device)
    choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return _tokens(params, prompt_ids_BT, uniforms_BT, choose, spec=spec, numerics=numerics)


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


def _tokens(
    params: Params,
    prompt_ids_BT: Tensor,
    uniforms_BT: Tensor,
    choose: Callable[[Tensor, Tensor], Tensor],
    *,
    spec: ModelSpec,
    numerics: Numerics,
) -> Iterator[Tensor]:
    """Yield one token a row for each column of uniforms. Between two of them inference mode is off: it is the caller's
    time."""
    rows, prompt = prompt_ids_BT.shape
    end = prompt + uniforms_BT.shape[1]
    with torch.inference_mode():
        params = compute_params(params, numerics=numerics)
        cache = empty_cache(params, spec=spec, numerics=numerics, batch=rows, capacity=end)
        positions_BT = torch.arange(end, dtype=torch.int32, device=prompt_ids_BT.device).expand(rows, -1)
    tokens_BT, start = prompt_ids_BT, 0
    for stop in range(prompt, end):
        with torch.inference_mode():
            logits_BTV, cache = forward_cached(
                params, tokens_BT, cache, spec=spec, numerics=numerics, positions_BT=positions_BT[:, start:stop]
            )
            uniforms_B = uniforms_BT[:, stop - prompt]
            ids_B = choose(logits_BTV[:, -1], uniforms_B)
            tokens_BT, start = ids_B[:, None], stop
        yield ids_B.clone()  # an inference tensor could not enter a training step
