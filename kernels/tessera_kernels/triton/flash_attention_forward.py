"""Attention forward (Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv 2307.08691): out = softmax(u c(Q K^T)) V.

    c(x) = x and u = scale, or with a soft cap c(x) = tanh(x scale / softcap) and u = softcap
    running, tile by tile: m' = max(m, max_s c),  p = 2^(c u log2 e - b),  b = m' u log2 e rounded
                           l' = l 2^((m - m') u log2 e) + sum_s p,  A' = A 2^(...) + P V
    at the end: out = A / l,  lse = u m + ln l

            keys, BLOCK_N at a time ->            masked   whole tiles    masked
          +--------+--------+--------+          window's | no mask work | diagonal and
    BLOCK | S = Q K^T       |        |          far edge | at all       | ragged end
      _M  +--------+--------+--------+
    One program is one tile of queries of one head. HBM: q, k, v read, out, lse and (m, log2 l) written. Shared memory: Q,
    and STAGES tiles of K and V in flight. Registers: S, P, A, m, l, all float32 but P, which is rounded for the product.

Reference: `tessera_kernels.reference.flash_attention`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from tessera_kernels.triton._attention_tiles import (
    key_range,
    load_tile,
    product,
    sees,
    slope_of,
    span,
    store_tile,
    tanh,
)

_NO_SPECIAL = ("queries", "keys", "heads", "section", "longest", "window", "unit", "inner")

LOWEST = tl.constexpr(-1e30)
"""Where a running maximum starts: finite, so that every difference and product with it is a number."""


@triton.jit
def _scores(q, k, inner, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    scores = product(q, tl.trans(k), None, PRECISION)
    if SOFTCAP:
        scores = tanh(scores * inner)
    return scores


@triton.jit
def _weigh(scores, top, total, unit_log2):
    """One step of the online softmax: P of this tile, the new maximum and sum, and what older terms shrink by."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    slope = slope_of(new_top, unit_log2)
    probs = tl.exp2(tl.fma(scores, slope[:, None], -(new_top * slope)[:, None]))
    fade = tl.exp2((top - new_top) * slope)
    return probs, new_top, total * fade + tl.sum(probs, 1), fade


@triton.jit
def _hide(
    scores, row, column, keys, past, window, whole_low, whole_high,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Put -inf where a query does not see the key, in tiles at an edge; a branch costs less than a mask on every tile."""
    if (column < whole_low) | (column >= whole_high):
        key = column + tl.arange(0, BLOCK_N)[None, :]
        seen = key < keys
        if CAUSAL or WINDOW:
            seen = seen & sees(row + tl.arange(0, BLOCK_M)[:, None], key, past, window, CAUSAL, WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def _attend(
    q, top, total, mixed, low, whole_low, whole_high, high, row, keys, past, window, inner, unit_log2,
    k_desc, k_head, stride_ks, v_desc, v_head, stride_vs, batch, kv_head, first,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, VARLEN: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Go through the keys [low, high) and return the running maximum, sum and mix.

    One loop for whole and edge tiles, and none where there are none: ptxas serializes wgmma when accumulators pass from one
    loop to the next, or when a way around the loop sets them to zero.
    """
    if low < high:
        for column in tl.range(low, high, BLOCK_N, num_stages=STAGES):
            k = load_tile(
                k_desc, k_head, batch, kv_head, first, column, keys, stride_ks, BLOCK_N, WIDTH, PADDED, TMA, VARLEN
            )
            scores = _scores(q, k, inner, SOFTCAP, PRECISION)
            scores = _hide(
                scores, row, column, keys, past, window, whole_low, whole_high, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
            )
            probs, top, total, fade = _weigh(scores, top, total, unit_log2)
            mixed = mixed * fade[:, None]
            v = load_tile(
                v_desc, v_head, batch, kv_head, first, column, keys, stride_vs, BLOCK_N, WIDTH, PADDED, TMA, VARLEN
            )
            mixed = product(probs.to(v.dtype), v, mixed, PRECISION)
    return top, total, mixed


@triton.jit
def program_of(pid, blocks, heads_all, section, LAST_FIRST: tl.constexpr):
    """Return (block, sequence-and-head) of a program: `section` heads at a time share the L2 cache, heavy blocks first."""
    group = pid // (section * blocks)
    inside = pid - group * section * blocks
    size = tl.minimum(section, heads_all - group * section)
    block = inside // size
    if LAST_FIRST:
        block = blocks - 1 - block
    return block, group * section + inside % size


@triton.jit(do_not_specialize=_NO_SPECIAL)
def forward_kernel(
    q_desc, k_desc, v_desc, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, top_ptr, spread_ptr, query_starts, key_starts,
    stride_qb, stride_qt, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_ob, stride_ot, stride_on,
    sequences, queries, keys, heads, section, longest, window, unit, inner,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, VARLEN: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module; rows of lse, top and spread are (sequence, head, query), or (head, query) when packed."""
    block, which = program_of(
        tl.program_id(0), (longest + BLOCK_M - 1) // BLOCK_M, sequences * heads, section, CAUSAL
    )  # fmt: skip
    sequence = which // heads
    head = which % heads
    kv_head = head // GROUP
    q_first, q_length = span(query_starts, sequence, queries, VARLEN)
    k_first, k_length = span(key_starts, sequence, keys, VARLEN)
    row = block * BLOCK_M
    if row >= q_length:
        return
    batch = sequence
    lane = (sequence.to(tl.int64) * heads + head) * queries
    if VARLEN:
        batch = sequence * 0
        lane = head.to(tl.int64) * queries + q_first
    q_head = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qn + q_first.to(tl.int64) * stride_qt
    k_head = (
        k_ptr + batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kn + k_first.to(tl.int64) * stride_ks
    )
    v_head = (
        v_ptr + batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vn + k_first.to(tl.int64) * stride_vs
    )
    out_head = (
        out_ptr + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_on + q_first.to(tl.int64) * stride_ot
    )

    q = load_tile(q_desc, q_head, batch, head, q_first, row, q_length, stride_qt, BLOCK_M, WIDTH, PADDED, TMA, VARLEN)
    past = k_length - q_length
    end = tl.minimum(row + BLOCK_M, q_length)
    low, whole_low, whole_high, high = key_range(row, end, k_length, past, window, BLOCK_N, CAUSAL, WINDOW)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, PADDED], tl.float32)
    unit_log2 = unit * 1.4426950408889634
    top, total, mixed = _attend(
        q, top, total, mixed, low, whole_low, whole_high, high, row, k_length, past, window, inner, unit_log2,
        k_desc, k_head, stride_ks, v_desc, v_head, stride_vs, batch, kv_head, k_first,
        CAUSAL, WINDOW, SOFTCAP, VARLEN, WIDTH, PADDED, BLOCK_M, BLOCK_N, STAGES, TMA, PRECISION,
    )  # fmt: skip

    blind = total == 0.0  # saw no key: zeros out, no share in any gradient
    total = tl.where(blind, 1.0, total)
    # the terms are relative to the rounded base, lse and spread to the maximum itself
    exact = slope_of(top, unit_log2) == unit_log2
    spread = tl.log2(total) + tl.where(exact, tl.fma(-top, unit_log2, top * unit_log2), 0.0)
    lse = top * unit + spread * 0.6931471805599453
    rows = tl.arange(0, BLOCK_M)
    inside = row + rows < q_length
    tl.store(top_ptr + lane + row + rows, tl.where(blind, 0.0, top), mask=inside)
    tl.store(spread_ptr + lane + row + rows, tl.where(blind, float("inf"), spread), mask=inside)
    tl.store(lse_ptr + lane + row + rows, tl.where(blind, float("-inf"), lse), mask=inside)
    out = mixed / total[:, None]
    store_tile(out_head, out, row, q_length, stride_ot, BLOCK_M, WIDTH, PADDED)
