"""A contiguous key/value cache: slot = position."""

import jax.numpy as jnp
from jax import Array

from tessera_jax.model.attention import attention_mask
from tessera_jax.model.dtypes import dtype_of
from tessera_jax.model.norms import rms_norm
from tessera_jax.model.params import Params, Tap, compute_params
from tessera_jax.model.rope import rope_tables
from tessera_jax.model.transformer import block, embed, unembed
from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import EMBEDDING, FINAL_NORM, UNEMBEDDING

Cache = dict[str, Array]


def empty_cache(params: Params, *, spec: ModelSpec, numerics: Numerics, batch: int, capacity: int) -> Cache:
    """Return an empty cache: `positions_BS` is -1, keys and values `layers.{i}.k|v` [B, S, K, H] are zero.

    Keys and values are in the compute dtype.
    """
    del params
    compute = dtype_of(numerics.compute)
    cache: Cache = {"positions_BS": jnp.full((batch, capacity), -1, dtype=jnp.int32)}
    for layer in range(spec.num_layers):
        for which in "kv":
            shape = (batch, capacity, spec.num_kv_heads, spec.head_width)
            cache[f"layers.{layer}.{which}"] = jnp.zeros(shape, dtype=compute)
    return cache


def forward_cached(
    params: Params,
    token_ids_BT: Array,
    cache: Cache,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    positions_BT: Array,
    tap: Tap | None = None,
) -> tuple[Array, Cache]:
    """Write new keys and values at their positions, attend to all that the cache holds, return logits and the cache.

    A negative position marks padding: it is not written and its logits mean nothing. Positions must be below the
    capacity. Donate `cache` to a compiled step and it is written in place; go on with the cache that comes back.
    """
    params, new = compute_params(params, numerics=numerics), dict(cache)
    new["positions_BS"] = _written(cache["positions_BS"], positions_BT, positions_BT)

    def remember(layer: int, k_BTKH: Array, v_BTKH: Array) -> tuple[Array, Array]:
        for which, value in (("k", k_BTKH), ("v", v_BTKH)):
            new[f"layers.{layer}.{which}"] = _written(cache[f"layers.{layer}.{which}"], positions_BT, value)
        return new[f"layers.{layer}.k"], new[f"layers.{layer}.v"]

    def see(name: str, value: Array) -> Array:
        return value if tap is None else tap(name, value)

    keys_BS = new["positions_BS"]
    one_BT, one_BS = jnp.zeros_like(positions_BT), jnp.zeros_like(keys_BS)  # a cache holds one segment a row
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
    return see("logits", unembed(x_BTD, table_VD, softcap=spec.logit_softcap, numerics=numerics)), new


def _written(memory: Array, positions_BT: Array, value: Array) -> Array:
    slots_BT = jnp.where(positions_BT < 0, memory.shape[1], positions_BT)  # a negative index would wrap; this one drops
    rows_B1 = jnp.arange(memory.shape[0], dtype=jnp.int32)[:, None]
    return memory.at[rows_B1, slots_BT].set(value.astype(memory.dtype), mode="drop")
