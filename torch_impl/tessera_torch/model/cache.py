"""A contiguous key/value cache: slot = position."""

import torch
from torch import Tensor

from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import EMBEDDING, FINAL_NORM, UNEMBEDDING
from tessera_torch.model.attention import attention_mask
from tessera_torch.model.dtypes import dtype_of
from tessera_torch.model.norms import rms_norm
from tessera_torch.model.params import Params, Tap, compute_params
from tessera_torch.model.rope import rope_tables
from tessera_torch.model.transformer import block, embed, unembed

Cache = dict[str, Tensor]


def empty_cache(params: Params, *, spec: ModelSpec, numerics: Numerics, batch: int, capacity: int) -> Cache:
    """Return an empty cache: `positions_BS` is -1, keys and values `layers.{i}.k|v` [B, S, K, H] are zero.

    Keys and values are in the compute dtype, on the parameters' device.
    """
    device, compute = params[EMBEDDING].device, dtype_of(numerics.compute)
    cache: Cache = {"positions_BS": torch.full((batch, capacity), -1, dtype=torch.int32, device=device)}
    for layer in range(spec.num_layers):
        for which in "kv":
            shape = (batch, capacity, spec.num_kv_heads, spec.head_width)
            cache[f"layers.{layer}.{which}"] = torch.zeros(shape, dtype=compute, device=device)
    return cache


def forward_cached(
    params: Params,
    token_ids_BT: Tensor,
    cache: Cache,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    positions_BT: Tensor,
    tap: Tap | None = None,
) -> tuple[Tensor, Cache]:
    """Write new keys and values at their positions, attend to all that the cache holds, return logits and the cache.

    A negative position marks padding: it is not written and its logits mean nothing. Positions must be below the
    capacity. The tensors of `cache` are written in place; go on with the cache that comes back.
    """
    params, places = compute_params(params, numerics=numerics), _places(positions_BT)
    _write(cache["positions_BS"], positions_BT, places)

    def remember(layer: int, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]:
        keys_BSKH, values_BSKH = cache[f"layers.{layer}.k"], cache[f"layers.{layer}.v"]
        _write(keys_BSKH, k_BTKH, places)
        _write(values_BSKH, v_BTKH, places)
        return keys_BSKH, values_BSKH

    def see(name: str, value: Tensor) -> Tensor:
        return value if tap is None else tap(name, value)

    keys_BS = cache["positions_BS"]
    one_BT, one_BS = torch.zeros_like(positions_BT), torch.zeros_like(keys_BS)  # a cache holds one segment a row
    cos_BTH, sin_BTH = rope_tables(positions_BT, spec=spec, numerics=numerics)
    x_BTD = see("embed", embed(token_ids_BT, params[EMBEDDING]))
    for layer in range(spec.num_layers):
        mask_BTS = attention_mask(positions_BT, keys_BS, one_BT, one_BS, window=spec.window_of(layer))
        x_BTD = block(
            params,
            x_BTD,
            cos_BTH,
            sin_BTH,
            mask_BTS,
            layer=layer,
            spec=spec,
            numerics=numerics,
            remember=remember,
            tap=tap,
        )
    x_BTD = see("final_norm", rms_norm(x_BTD, params[FINAL_NORM], eps=spec.norm_eps, numerics=numerics))
    table_VD = params[EMBEDDING if spec.tie_embeddings else UNEMBEDDING]
    return see("logits", unembed(x_BTD, table_VD, softcap=spec.logit_softcap, numerics=numerics)), dict(cache)


_Places = tuple[Tensor, Tensor, Tensor, Tensor]


def _places(positions_BT: Tensor) -> _Places:
    """Say what is written where without shapes that depend on data: padding repeats its row's first real write.

    A row of padding only writes slot 0's old value back. Returns row, source column, slot and whether the row is real.
    """
    real_BT = positions_BT >= 0
    first_B1 = real_BT.to(torch.int32).argmax(dim=1, keepdim=True)
    columns_BT = torch.arange(positions_BT.shape[1], device=positions_BT.device).expand(positions_BT.shape)
    source_BT = torch.where(real_BT, columns_BT, first_B1)
    slot_BT = positions_BT.to(torch.int64).gather(1, source_BT).clamp(min=0)
    row_B1 = torch.arange(positions_BT.shape[0], device=positions_BT.device)[:, None]
    return row_B1.expand(positions_BT.shape), source_BT, slot_BT, real_BT.any(dim=1, keepdim=True)


def _write(memory: Tensor, value: Tensor, places: _Places) -> None:
    row_BT, source_BT, slot_BT, real_B1 = places
    real = real_B1.reshape(-1, *[1] * (value.ndim - 1))
    new = torch.where(real, value[row_BT, source_BT].to(memory.dtype), memory[row_BT, slot_BT])
    memory.index_put_((row_BT, slot_BT), new)
