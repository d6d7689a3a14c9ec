"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

import math

import torch
from torch import Tensor

from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import layer_prefix
from tessera_torch.model.dtypes import dtype_of
from tessera_torch.model.linear import linear
from tessera_torch.model.norms import rms_norm
from tessera_torch.model.params import Params, Remember, Tap
from tessera_torch.model.rope import apply_rope


def attention_mask(
    positions_BT: Tensor,
    key_positions_BS: Tensor,
    segments_BT: Tensor,
    key_segments_BS: Tensor,
    *,
    window: int | None,
) -> Tensor:
    """Return where a query may look: same segment, 0 <= key position <= its own, and nearer than `window`.

    A negative segment or key position marks an empty place. The mask is boolean, [B, T, S].
    """
    query, key = positions_BT[:, :, None], key_positions_BS[:, None, :]
    same = (segments_BT[:, :, None] == key_segments_BS[:, None, :]) & (segments_BT[:, :, None] >= 0)
    mask_BTS = same & (key >= 0) & (key <= query)
    return mask_BTS if window is None else mask_BTS & (query - key < window)


def attention_scores(q_BTNH: Tensor, k_BSKH: Tensor, *, softcap: float | None, numerics: Numerics) -> Tensor:
    """q k^T / sqrt(H), then softcap * tanh(scores / softcap) when given; query head n uses key head n // G.

    Operands are lifted to the softmax dtype before the product, and the scores stay there.
    """
    up = dtype_of(numerics.softmax)
    rows, queries, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.to(up).reshape(rows, queries, kv_heads, heads // kv_heads, width)
    scores = torch.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH.to(up)) / math.sqrt(width)
    scores_BNTS = scores.reshape(rows, heads, queries, k_BSKH.shape[1])
    return scores_BNTS if softcap is None else softcap * torch.tanh(scores_BNTS / softcap)


def attention_probs(scores_BNTS: Tensor, mask_BTS: Tensor, *, numerics: Numerics) -> Tensor:
    """Softmax in the softmax dtype over the keys that the mask allows, rounded to compute.

    A query that may look nowhere gets zeros, and so does its gradient: no infinity is ever formed.
    """
    mask_B1TS = mask_BTS[:, None, :, :]
    visible = scores_BNTS.to(dtype_of(numerics.softmax)).masked_fill(~mask_B1TS, -1e30)
    shifted = visible - visible.detach().amax(dim=-1, keepdim=True)
    exponentials = shifted.exp().masked_fill(~mask_B1TS, 0.0)
    total = exponentials.sum(dim=-1, keepdim=True)
    nowhere = ~mask_B1TS.any(dim=-1, keepdim=True)
    return (exponentials / total.masked_fill(nowhere, 1.0)).to(dtype_of(numerics.compute))


def attention_mix(probs_BNTS: Tensor, v_BSKH: Tensor) -> Tensor:
    """Average the values by the probabilities, in the probabilities' dtype."""
    rows, heads, queries, keys = probs_BNTS.shape
    kv_heads, width = v_BSKH.shape[2:]
    probs_BKGTS = probs_BNTS.reshape(rows, kv_heads, heads // kv_heads, queries, keys)
    return torch.einsum("bkgts,bskh->btkgh", probs_BKGTS, v_BSKH).reshape(rows, queries, heads, width)


def attention_block(
    params: Params,
    x_BTD: Tensor,
    cos_BTH: Tensor,
    sin_BTH: Tensor,
    mask_BTS: Tensor,
    *,
    layer: int,
    spec: ModelSpec,
    numerics: Numerics,
    remember: Remember | None = None,
    tap: Tap | None = None,
) -> Tensor:
    """Norm, projections, rotation, attention and output projection of one layer, without the residual."""
    prefix, name = layer_prefix(layer) + "self_attn.", f"layers.{layer}.attention."

    def see(what: str, value: Tensor) -> Tensor:
        return value if tap is None else tap(name + what, value)

    gain_D = params[layer_prefix(layer) + "input_layernorm.weight"]
    normed_BTD = see("norm", rms_norm(x_BTD, gain_D, eps=spec.norm_eps, numerics=numerics))
    q, k, v = (see(which, _heads(params, normed_BTD, f"{prefix}{which}_proj.", spec.head_width)) for which in "qkv")
    if spec.qk_norm:
        q = see("q_norm", rms_norm(q, params[prefix + "q_norm.weight"], eps=spec.norm_eps, numerics=numerics))
        k = see("k_norm", rms_norm(k, params[prefix + "k_norm.weight"], eps=spec.norm_eps, numerics=numerics))
    q, k = see("q_rope", apply_rope(q, cos_BTH, sin_BTH)), see("k_rope", apply_rope(k, cos_BTH, sin_BTH))
    if remember is not None:
        k, v = remember(layer, k, v)
    scores_BNTS = see("scores", attention_scores(q, k, softcap=spec.attention_softcap, numerics=numerics))
    probs_BNTS = see("probs", attention_probs(scores_BNTS, mask_BTS, numerics=numerics))
    mix_BTNH = see("mix", attention_mix(probs_BNTS, v))
    flat = mix_BTNH.reshape(*mix_BTNH.shape[:2], -1)
    return see("out", linear(flat, params[prefix + "o_proj.weight"], params.get(prefix + "o_proj.bias")))


def _heads(params: Params, x_BTD: Tensor, name: str, head_width: int) -> Tensor:
    y = linear(x_BTD, params[name + "weight"], params.get(name + "bias"))
    return y.reshape(*y.shape[:2], -1, head_width)
