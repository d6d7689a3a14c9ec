"""Generation over a paged cache: prefill by dense attention, then one token a step by paged attention and the sampling
kernel. Nothing waits for the device between two tokens."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import EMBEDDING, FINAL_NORM, layer_prefix
from tessera_shared.validate import validate_generation, validate_token_ids
from tessera_torch.fast.layout import Layout, dense_layout
from tessera_torch.fast.packed_weights import PackedWeight
from tessera_torch.fast.projections import Project, packed_projections, projections
from tessera_torch.fast.transformer import Norm, attention_out, logits, mlp, norm_of, qkv
from tessera_torch.kernels import DecodeOps, Ops
from tessera_torch.model.dtypes import dtype_of
from tessera_torch.model.params import Params, compute_params
from tessera_torch.model.rope import rope_tables
from tessera_torch.model.transformer import embed

PAGE_SIZE = 64


class PagedCache(NamedTuple):
    """Keys and values of every layer in pages; row b has pages b * M .. (b + 1) * M - 1."""

    keys: list[Tensor]  # a layer each, [P, Z, K, H], compute dtype
    values: list[Tensor]
    page_table_BM: Tensor  # int32
    lengths_B: Tensor  # int32: positions written


def empty_pages(params: Params, *, spec: ModelSpec, numerics: Numerics, batch: int, capacity: int) -> PagedCache:
    """Return an empty cache for `batch` rows of up to `capacity` positions."""
    device, pages = params[EMBEDDING].device, -(-capacity // PAGE_SIZE)
    shape = (batch * pages, PAGE_SIZE, spec.num_kv_heads, spec.head_width)
    keys, values = (
        [torch.zeros(shape, dtype=dtype_of(numerics.compute), device=device) for _ in range(spec.num_layers)]
        for _ in range(2)
    )
    table_BM = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
    return PagedCache(keys, values, table_BM, torch.zeros(batch, dtype=torch.int32, device=device))


def forward_paged(
    params: Params,
    token_ids_BT: Tensor,
    cache: PagedCache,
    *,
    start: int,
    spec: ModelSpec,
    numerics: Numerics,
    ops: Ops,
    tools: DecodeOps,
    project: Project,
) -> Tensor:
    """Write keys and values of positions `start` .. `start + T - 1` and return the last position's logits, `[B, V]`.

    From an empty cache (start 0) any T; later one token a call. `params` are in the compute dtype; weights of projections
    are `project`'s business. `cache` is written in place, its lengths included.
    """
    rows, length = token_ids_BT.shape
    layout = _moved(dense_layout(rows, length, device=token_ids_BT.device), start)
    cos_BTH, sin_BTH = rope_tables(layout.positions_BT, spec=spec, numerics=numerics)
    normed = norm_of(spec, numerics, ops)
    cache.lengths_B.fill_(start + length)
    stream_BTD = embed(token_ids_BT, params[EMBEDDING])
    change_BTD: Tensor | None = None
    for layer in range(spec.num_layers):
        prefix = layer_prefix(layer)
        x_BTD, stream_BTD = normed(change_BTD, stream_BTD, params[prefix + "input_layernorm.weight"])
        mix_BTNH = _attend(
            params, x_BTD, cache, cos_BTH, sin_BTH, layer, start, spec=spec, ops=ops, tools=tools, normed=normed,
            project=project,
        )  # fmt: skip
        mixed_BTD = attention_out(mix_BTNH, layer=layer, project=project)
        x_BTD, stream_BTD = normed(mixed_BTD, stream_BTD, params[prefix + "post_attention_layernorm.weight"])
        change_BTD = mlp(x_BTD, layer=layer, ops=ops, project=project)
    last_BD = stream_BTD[:, -1].contiguous()
    hidden_BD, _ = normed(None if change_BTD is None else change_BTD[:, -1].contiguous(), last_BD, params[FINAL_NORM])
    return logits(params, hidden_BD, spec=spec, numerics=numerics)


def stream_tokens(
    params: Params,
    prompt_ids_BT: Tensor,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    num_tokens: int,
    ops: Ops,
    packed: Mapping[str, PackedWeight] | None = None,
    uniforms_BT: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Iterator[Tensor]:
    """Return an iterator over the `num_tokens` int32 tokens (B,) that follow prompts of equal length.

    With `packed` (see `pack_model`) the projections' weights are there and not among `params`.
    The same errors as `tessera_torch.serve.decode.stream_tokens`, raised by the call.
    """
    validate_token_ids(prompt_ids_BT.cpu().numpy(), spec)
    uniforms_shape = None if uniforms_BT is None else tuple(uniforms_BT.shape)
    validate_generation(
        tuple(prompt_ids_BT.shape), spec, num_tokens=num_tokens, uniforms_shape=uniforms_shape, temperature=temperature
    )
    if uniforms_BT is None:
        uniforms_BT = torch.zeros((prompt_ids_BT.shape[0], num_tokens), device=prompt_ids_BT.device)
    law = Law(temperature, top_k, top_p, min_p)
    return _tokens(params, packed, prompt_ids_BT, uniforms_BT, law, spec=spec, numerics=numerics, ops=ops)


class Law(NamedTuple):
    """How the next token is drawn."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


def _tokens(
    params: Params,
    packed: Mapping[str, PackedWeight] | None,
    prompt_ids_BT: Tensor,
    uniforms_BT: Tensor,
    law: Law,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    ops: Ops,
) -> Iterator[Tensor]:
    rows, prompt = prompt_ids_BT.shape
    end = prompt + uniforms_BT.shape[1]
    with torch.inference_mode():
        params = compute_params(params, numerics=numerics)
        cache = empty_pages(params, spec=spec, numerics=numerics, batch=rows, capacity=end)
    project = projections(params) if packed is None else packed_projections(params, packed, ops.packed())
    tokens_BT, start, tools = prompt_ids_BT, 0, ops.decode()
    for stop in range(prompt, end):
        with torch.inference_mode():
            logits_BV = forward_paged(
                params,
                tokens_BT,
                cache,
                start=start,
                spec=spec,
                numerics=numerics,
                ops=ops,
                tools=tools,
                project=project,
            )
            ids_B = tools.sample(
                logits_BV, uniforms_BT[:, stop - prompt].contiguous(), temperature=law.temperature, top_k=law.top_k,
                top_p=law.top_p, min_p=law.min_p,
            )  # fmt: skip
            tokens_BT, start = ids_B[:, None], stop
        yield ids_B.clone()


def _attend(
    params: Params,
    x_BTD: Tensor,
    cache: PagedCache,
    cos_BTH: Tensor,
    sin_BTH: Tensor,
    layer: int,
    start: int,
    *,
    spec: ModelSpec,
    ops: Ops,
    tools: DecodeOps,
    normed: Norm,
    project: Project,
) -> Tensor:
    q, k, v = qkv(params, x_BTD, layer=layer, spec=spec, normed=normed, project=project)
    q, k = ops.apply_rope_(q, k, cos_BTH, sin_BTH)
    length, window, softcap = x_BTD.shape[1], spec.window_of(layer), spec.attention_softcap
    for pages, new in ((cache.keys[layer], k), (cache.values[layer], v)):
        pages.view(x_BTD.shape[0], -1, *pages.shape[2:])[:, start : start + length] = new
    if start == 0:
        mix_BTNH: Tensor = ops.flash_attention(q, k, v, window=window, softcap=softcap)[0]
        return mix_BTNH
    mix_BNH: Tensor = tools.paged_attention(
        q[:, 0], cache.keys[layer], cache.values[layer], cache.page_table_BM, cache.lengths_B, window=window,
        softcap=softcap,
    )  # fmt: skip
    return mix_BNH[:, None]


def _moved(layout: Layout, start: int) -> Layout:
    return layout._replace(positions_BT=layout.positions_BT + start)
