"""Attention over a page table written out plainly: the reference of `tessera_kernels.triton.paged_attention`.

Each sequence's keys and values are gathered into one tensor, and causal attention runs over them. On float64 inputs this
is the truth; on half-precision inputs the plain same-dtype implementation (see `reference.flash_attention`).
"""

# ruff: noqa: ARG001 - the signature is the kernel's, and a plain implementation has nothing to split

import torch
from torch import Tensor

from tessera_kernels.reference.flash_attention import flash_attention


def paged_attention(
    q_BNH: Tensor,
    key_pages_PZKH: Tensor,
    value_pages_PZKH: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    splits: int | None = None,
    split_size: int | None = None,
    config: object = None,
    check_pages: bool = False,
) -> Tensor:
    """Return out_BNH: one query a sequence, at position length - 1. A sequence of length 0 gives zeros."""
    starts = torch.arange(q_BNH.shape[0] + 1, dtype=torch.int32)
    return paged_prefill(
        q_BNH, key_pages_PZKH, value_pages_PZKH, page_table_BM, lengths_B, starts,
        longest_query=1, scale=scale, softcap=softcap, window=window,
    )  # fmt: skip


def paged_prefill(
    q_XNH: Tensor,
    key_pages_PZKH: Tensor,
    value_pages_PZKH: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    query_starts: Tensor,
    *,
    longest_query: int,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    splits: int | None = None,
    split_size: int | None = None,
    config: object = None,
    check_pages: bool = False,
) -> Tensor:
    """Return out_XNH: query t of sequence i stands at position lengths_B[i] - T_i + t. Rows of no sequence give zeros.

    `longest_query`, `splits`, `split_size`, `config` and `check_pages` are taken so that the signature is the kernel's.
    """
    page_size, edges = key_pages_PZKH.shape[1], query_starts.tolist()
    outs = []
    for i, length in enumerate(lengths_B.tolist()):
        pages = page_table_BM[i, : -(-length // page_size)].long()
        keys_SKH = key_pages_PZKH[pages].flatten(0, 1)[:length]
        values_SKH = value_pages_PZKH[pages].flatten(0, 1)[:length]
        query = q_XNH[None, edges[i] : edges[i + 1]]
        out, _ = flash_attention(
            query, keys_SKH[None], values_SKH[None], scale=scale, softcap=softcap, window=window
        )  # fmt: skip
        outs.append(out[0])
    return torch.cat([*outs, torch.zeros_like(q_XNH[edges[-1] :])])
