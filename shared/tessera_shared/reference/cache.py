"""A contiguous key/value cache: slot = position."""

import numpy as np

from tessera_shared.numerics import Numerics
from tessera_shared.reference.attention import attention_mask
from tessera_shared.reference.norms import rms_norm
from tessera_shared.reference.params import Params, Tap, compute_params
from tessera_shared.reference.rope import rope_tables
from tessera_shared.reference.transformer import block, embed, unembed
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import EMBEDDING, FINAL_NORM, UNEMBEDDING

Cache = dict[str, np.ndarray]


def empty_cache(params: Params, *, spec: ModelSpec, numerics: Numerics, batch: int, capacity: int) -> Cache:
    """Return an empty cache: `positions_BS` is -1, keys and values `layers.{i}.k|v` [B, S, K, H] are zero."""
    del params, numerics
    cache: Cache = {"positions_BS": np.full((batch, capacity), -1, np.int32)}
    for layer in range(spec.num_layers):
        for which in "kv":
            cache[f"layers.{layer}.{which}"] = np.zeros((batch, capacity, spec.num_kv_heads, spec.head_width))
    return cache


def forward_cached(
    params: Params,
    token_ids_BT: np.ndarray,
    cache: Cache,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    positions_BT: np.ndarray,
    tap: Tap | None = None,
) -> tuple[np.ndarray, Cache]:
    """Write new keys and values at their positions, attend to all the cache holds, return logits and the new cache.

    A negative position marks padding: it is not written and its logits mean nothing.
    """
    params, new = compute_params(params, numerics=numerics), dict(cache)
    new["positions_BS"] = _written(cache["positions_BS"], positions_BT, positions_BT)

    def remember(layer: int, k_BTKH: np.ndarray, v_BTKH: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for which, value in (("k", k_BTKH), ("v", v_BTKH)):
            new[f"layers.{layer}.{which}"] = _written(cache[f"layers.{layer}.{which}"], positions_BT, value)
        return new[f"layers.{layer}.k"], new[f"layers.{layer}.v"]

    def see(name: str, value: np.ndarray) -> np.ndarray:
        return value if tap is None else tap(name, value)

    cos_BTH, sin_BTH = rope_tables(positions_BT, spec=spec, numerics=numerics)
    keys_BS = new["positions_BS"]
    x_BTD = see("embed", embed(token_ids_BT, params[EMBEDDING]))
    for layer in range(spec.num_layers):
        window = spec.window_of(layer)
        mask = attention_mask(positions_BT, keys_BS, 0 * positions_BT, 0 * keys_BS, window=window)
        x_BTD = block(
            params, x_BTD, cos_BTH, sin_BTH, mask, layer=layer, spec=spec, numerics=numerics, remember=remember, tap=tap
        )
    x_BTD = see("final_norm", rms_norm(x_BTD, params[FINAL_NORM], eps=spec.norm_eps, numerics=numerics))
    table_VD = params[EMBEDDING if spec.tie_embeddings else UNEMBEDDING]
    return see("logits", unembed(x_BTD, table_VD, softcap=spec.logit_softcap, numerics=numerics)), new


def _written(old: np.ndarray, positions_BT: np.ndarray, value: np.ndarray) -> np.ndarray:
    new = old.astype(np.result_type(old, value)) if np.iscomplexobj(value) else old.copy()
    for row, column in np.argwhere(positions_BT >= 0):
        new[row, positions_BT[row, column]] = value[row, column]
    return new
