"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), every step written out."""

import math

import numpy as np

from tessera_shared.numerics import FLOAT64, Numerics
from tessera_shared.reference.linear import linear
from tessera_shared.reference.norms import rms_norm
from tessera_shared.reference.params import Params, Remember, Tap
from tessera_shared.reference.rope import apply_rope
from tessera_shared.reference.rounding import round_to
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import layer_prefix

_MASKED = -1e30  # finite: infinity minus infinity has no derivative


def attention_mask(
    positions_BT: np.ndarray,
    key_positions_BS: np.ndarray,
    segments_BT: np.ndarray,
    key_segments_BS: np.ndarray,
    *,
    window: int | None,
) -> np.ndarray:
    """Return where a query may look: same segment, 0 <= key position <= its own, and nearer than `window`.

    A negative segment or key position marks an empty place.
    """
    query, key = positions_BT[:, :, None], key_positions_BS[:, None, :]
    same = (segments_BT[:, :, None] == key_segments_BS[:, None, :]) & (segments_BT[:, :, None] >= 0)
    mask_BTS = same & (key >= 0) & (key <= query)
    return np.asarray(mask_BTS if window is None else mask_BTS & (query - key < window))


def attention_scores(
    q_BTNH: np.ndarray, k_BSKH: np.ndarray, *, softcap: float | None, numerics: Numerics
) -> np.ndarray:
    """q k^T / sqrt(H), then softcap * tanh(scores / softcap) when given; query head n uses key head n // G."""
    keys_BSNH = np.repeat(k_BSKH, q_BTNH.shape[2] // k_BSKH.shape[2], axis=2)
    scores_BNTS = np.einsum("btnh,bsnh->bnts", q_BTNH, keys_BSNH) / math.sqrt(q_BTNH.shape[-1])
    if softcap is not None:
        scores_BNTS = softcap * np.tanh(scores_BNTS / softcap)
    return round_to(scores_BNTS, numerics.softmax)


def attention_probs(scores_BNTS: np.ndarray, mask_BTS: np.ndarray, *, numerics: Numerics) -> np.ndarray:
    """Softmax over the keys that the mask allows; a query that may look nowhere gets zeros."""
    mask_B1TS = mask_BTS[:, None, :, :]
    visible = np.where(mask_B1TS, scores_BNTS, _MASKED)
    exponentials = np.where(mask_B1TS, np.exp(visible - visible.real.max(axis=-1, keepdims=True)), 0.0)
    total = exponentials.sum(axis=-1, keepdims=True)
    return round_to(exponentials / np.where(mask_B1TS.any(axis=-1, keepdims=True), total, 1.0), numerics.compute)


def attention_mix(probs_BNTS: np.ndarray, v_BSKH: np.ndarray, *, numerics: Numerics = FLOAT64) -> np.ndarray:
    """Average the values by the probabilities."""
    values_BSNH = np.repeat(v_BSKH, probs_BNTS.shape[1] // v_BSKH.shape[2], axis=2)
    return round_to(np.einsum("bnts,bsnh->btnh", probs_BNTS, values_BSNH), numerics.compute)


def attention_block(
    params: Params,
    x_BTD: np.ndarray,
    cos_BTH: np.ndarray,
    sin_BTH: np.ndarray,
    mask_BTS: np.ndarray,
    *,
    layer: int,
    spec: ModelSpec,
    numerics: Numerics,
    remember: Remember | None = None,
    tap: Tap | None = None,
) -> np.ndarray:
    """Norm, projections, rotation, attention and output projection of one layer, without the residual."""
    see: Tap = tap if tap is not None else _pass
    prefix, name = layer_prefix(layer), f"layers.{layer}.attention."
    normed = rms_norm(x_BTD, params[prefix + "input_layernorm.weight"], eps=spec.norm_eps, numerics=numerics)
    normed = see(name + "norm", normed)
    q, k, v = (see(name + which, _heads(params, normed, which, layer, spec, numerics)) for which in "qkv")
    if spec.qk_norm:
        q_gain, k_gain = params[prefix + "self_attn.q_norm.weight"], params[prefix + "self_attn.k_norm.weight"]
        q = see(name + "q_norm", rms_norm(q, q_gain, eps=spec.norm_eps, numerics=numerics))
        k = see(name + "k_norm", rms_norm(k, k_gain, eps=spec.norm_eps, numerics=numerics))
    q = see(name + "q_rope", apply_rope(q, cos_BTH, sin_BTH, numerics=numerics))
    k = see(name + "k_rope", apply_rope(k, cos_BTH, sin_BTH, numerics=numerics))
    if remember is not None:
        k, v = remember(layer, k, v)
    scores = see(name + "scores", attention_scores(q, k, softcap=spec.attention_softcap, numerics=numerics))
    probs = see(name + "probs", attention_probs(scores, mask_BTS, numerics=numerics))
    mix = see(name + "mix", attention_mix(probs, v, numerics=numerics))
    output = prefix + "self_attn.o_proj."
    flat = mix.reshape(*mix.shape[:2], -1)
    out = linear(flat, params[output + "weight"], params.get(output + "bias"), numerics=numerics)
    return see(name + "out", out)


def _heads(
    params: Params, x_BTD: np.ndarray, which: str, layer: int, spec: ModelSpec, numerics: Numerics
) -> np.ndarray:
    name = f"{layer_prefix(layer)}self_attn.{which}_proj."
    y = linear(x_BTD, params[name + "weight"], params.get(name + "bias"), numerics=numerics)
    return y.reshape(*y.shape[:2], -1, spec.head_width)


def _pass(name: str, value: np.ndarray) -> np.ndarray:
    del name
    return value
