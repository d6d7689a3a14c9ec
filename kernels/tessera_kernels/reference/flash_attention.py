"""Attention written out plainly: the reference of `tessera_kernels.triton.flash_attention`.

O = softmax(cap(scale Q K^T) + mask) V, cap(x) = softcap tanh(x / softcap); the log-sum-exp of each row comes out beside it.
On float64 inputs this is the truth; on half-precision inputs it is the plain same-dtype implementation: products in
the input dtype, softmax and log-sum-exp in float32.
"""

import torch
from torch import Tensor

_MASKED = -1e30  # finite: infinity minus infinity has no derivative


def flash_attention(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
    config: object = None,
) -> tuple[Tensor, Tensor]:
    """Return (out_BTNH, lse_BNT); query t stands at key position t + S - T. A row that sees nothing gives 0 and -inf.

    `deterministic` and `config` are taken so that the signature is the kernel's; they change nothing here.
    """
    del deterministic, config
    up = torch.promote_types(q_BTNH.dtype, torch.float32)
    rows, queries, heads, width = q_BTNH.shape
    keys, kv_heads = k_BSKH.shape[1:3]
    scores_BNTS = _scores(q_BTNH, k_BSKH).to(up) * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        scores_BNTS = softcap * torch.tanh(scores_BNTS / softcap)
    mask_TS = visible(queries, keys, causal=causal, window=window, device=q_BTNH.device)
    seen = scores_BNTS.masked_fill(~mask_TS, _MASKED)
    top_BNT1 = seen.detach().amax(-1, keepdim=True) if keys else seen.new_zeros(rows, heads, queries, 1)
    terms_BNTS = (seen - top_BNT1).exp().masked_fill(~mask_TS, 0.0)
    nowhere_T1 = ~mask_TS.any(-1, keepdim=True)
    total_BNT1 = terms_BNTS.sum(-1, keepdim=True).masked_fill(nowhere_T1, 1.0)
    lse_BNT = (top_BNT1 + total_BNT1.log()).masked_fill(nowhere_T1, -torch.inf).squeeze(-1)
    probs_BNTS = (terms_BNTS / total_BNT1).to(q_BTNH.dtype)
    probs_BKGTS = probs_BNTS.reshape(rows, kv_heads, heads // kv_heads, queries, keys)
    out_BTNH = torch.einsum("bkgts,bskh->btkgh", probs_BKGTS, v_BSKH).reshape(q_BTNH.shape)
    return out_BTNH, lse_BNT


def flash_attention_varlen(
    q_XNH: Tensor,
    k_YKH: Tensor,
    v_YKH: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *,
    longest_query: int,
    longest_key: int,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
    config: object = None,
) -> tuple[Tensor, Tensor]:
    """Attention within each packed sequence, one after the other; (out_XNH, lse_NX), unused rows 0 and -inf."""
    del longest_query, longest_key, deterministic, config
    q_edges, k_edges = query_starts.tolist(), key_starts.tolist()
    outs, lses = [], []
    for i in range(len(q_edges) - 1):
        query, key = slice(q_edges[i], q_edges[i + 1]), slice(k_edges[i], k_edges[i + 1])
        out, lse = flash_attention(
            q_XNH[None, query], k_YKH[None, key], v_YKH[None, key],
            scale=scale, causal=causal, window=window, softcap=softcap,
        )  # fmt: skip
        outs.append(out[0])
        lses.append(lse[0])
    unused_XNH = torch.zeros_like(q_XNH[q_edges[-1] :])
    lses.append(unused_XNH[..., 0].T.to(torch.promote_types(q_XNH.dtype, torch.float32)) - torch.inf)
    return torch.cat([*outs, unused_XNH]), torch.cat(lses, -1)


def visible(queries: int, keys: int, *, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Which key s the query t sees, [T, S]: not ahead when causal, and nearer than `window` (both ways when not)."""
    ahead_TS = torch.arange(keys, device=device) - (torch.arange(queries, device=device)[:, None] + keys - queries)
    mask_TS = ahead_TS <= 0 if causal else torch.ones_like(ahead_TS, dtype=torch.bool)
    return mask_TS if window is None else mask_TS & (ahead_TS.abs() < window)


def _scores(q_BTNH: Tensor, k_BSKH: Tensor) -> Tensor:
    rows, queries, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(rows, queries, kv_heads, heads // kv_heads, width)
    return torch.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH).flatten(1, 2)
