"""Attention backward (Dao 2023, arXiv 2307.08691, algorithm 2; gradient through the log-sum-exp added).

    P = 2^((c - m) u log2 e - log2 l)          from the forward's m and log2 l
    delta = sum_h dO O - dlse                   one pass before
    dV = P^T dO,   dP = dO V^T,   dS = P (dP - delta) c'(Q K^T),   dQ = scale dS K,   dK = scale dS^T Q

    key_kernel: a tile of BLOCK_N keys stays,         query_kernel: a tile of BLOCK_M queries stays,
    queries of all heads of its group stream by:      keys stream by:
        +----+ Q, dO ->  S^T = K Q^T                      +----+ K, V ->  S = Q K^T
        |K, V|           dP^T = V dO^T                    |Q,dO|          dP = dO V^T
        +----+ dV += P^T dO, dK += dS^T Q                 +----+ dQ += dS K
               (fused: dQ += dS K, added into float32 in HBM)

Split: both kernels, 7 products, each sum in one fixed order (deterministic). Fused: key_kernel alone, 5 products, and dQ
by atomic additions in no fixed order. Query heads of one group are summed in key_kernel's registers: no atomics for GQA.
HBM: all inputs once per pass, dQ in float32 when fused. Shared memory: the tile that stays and STAGES of those that
stream. Registers: S, dP, dS and the accumulators, float32; P and dS are rounded to the input dtype for the products.

Reference: autograd through `tessera_kernels.reference.flash_attention`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from tessera_kernels.triton._attention_tiles import (
    add_tile,
    key_range,
    load_tile,
    probabilities,
    product,
    query_range,
    sees,
    span,
    store_tile,
    tanh,
)
from tessera_kernels.triton.flash_attention_forward import program_of

_NO_SPECIAL = ("queries", "keys", "heads", "section", "longest", "window", "unit", "inner", "scale", "rows")


@triton.jit(do_not_specialize=("queries", "heads"))
def delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, stride_ob, stride_ot, stride_on, stride_db, stride_dt, stride_dn, queries, heads,
    HAS_DLSE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta[sequence, head, query] = sum_h dO O - dlse for BLOCK queries; packed tensors are one sequence."""
    row = tl.program_id(0) * BLOCK
    which = tl.program_id(1).to(tl.int64)
    sequence = which // heads
    head = which % heads
    out_head = out_ptr + sequence * stride_ob + head * stride_on
    dout_head = dout_ptr + sequence * stride_db + head * stride_dn
    out = load_tile(out_head, out_head, 0, 0, 0, row, queries, stride_ot, BLOCK, WIDTH, PADDED, False, False)
    dout = load_tile(dout_head, dout_head, 0, 0, 0, row, queries, stride_dt, BLOCK, WIDTH, PADDED, False, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    rows = row + tl.arange(0, BLOCK)
    places = which * queries + rows
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + places, mask=rows < queries, other=0.0)
    tl.store(delta_ptr + places, delta, mask=rows < queries)


@triton.jit
def _hide(
    probs, query, key, row, whole_low, whole_high, past, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Put 0 where a query does not see the key, in tiles at an edge: `row` counts what streams by."""
    if CAUSAL or WINDOW:  # noqa: SIM102 - known when compiled, the other is not
        if (row < whole_low) | (row >= whole_high):
            probs = tl.where(sees(query, key, past, window, CAUSAL, WINDOW), probs, 0.0)
    return probs


@triton.jit
def _stream_queries(
    dk, dv, k, v, low, whole_low, whole_high, high, column, queries, past, window, unit_log2, inner,
    q_desc, q_head, stride_qt, dout_desc, dout_head, stride_dt, top_row, spread_row, delta_row,
    sum_desc, sum_head, stride_sum, batch, head, first,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, VARLEN: tl.constexpr, ADD: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    KEYS_FIRST: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of queries [low, high) of one head to dK and dV, and theirs to the sums of dQ when fused.

    KEYS_FIRST holds S and dS as [key, query], ready in registers as left operands, at the price of row statistics that
    spread over many registers; otherwise they are [query, key] and turned in shared memory.
    """
    key = column + tl.arange(0, BLOCK_N)
    for row in tl.range(low, high, BLOCK_M, num_stages=STAGES):
        q = load_tile(q_desc, q_head, batch, head, first, row, queries, stride_qt, BLOCK_M, WIDTH, PADDED, TMA, VARLEN)
        query = row + tl.arange(0, BLOCK_M)
        top = tl.load(top_row + query, mask=query < queries, other=0.0)
        spread = tl.load(spread_row + query, mask=query < queries, other=float("inf"))  # past the end: probability 0
        delta = tl.load(delta_row + query, mask=query < queries, other=0.0)
        dout = load_tile(
            dout_desc, dout_head, batch, head, first, row, queries, stride_dt, BLOCK_M, WIDTH, PADDED, TMA, VARLEN
        )
        if KEYS_FIRST:
            scores = product(k, tl.trans(q), None, PRECISION)
            if SOFTCAP:
                scores = tanh(scores * inner)
            probs = probabilities(scores, top[None, :], spread[None, :], unit_log2)
            probs = _hide(probs, query[None, :], key[:, None], row, whole_low, whole_high, past, window, CAUSAL, WINDOW)
            dv = product(probs.to(dout.dtype), dout, dv, PRECISION)
            dprobs = product(v, tl.trans(dout), None, PRECISION)
            dscores = probs * (dprobs - delta[None, :])
        else:
            scores = product(q, tl.trans(k), None, PRECISION)
            if SOFTCAP:
                scores = tanh(scores * inner)
            probs = probabilities(scores, top[:, None], spread[:, None], unit_log2)
            probs = _hide(probs, query[:, None], key[None, :], row, whole_low, whole_high, past, window, CAUSAL, WINDOW)
            dv = product(tl.trans(probs.to(dout.dtype)), dout, dv, PRECISION)
            dprobs = product(dout, tl.trans(v), None, PRECISION)
            dscores = probs * (dprobs - delta[:, None])
        if SOFTCAP:
            dscores = dscores * (1.0 - scores * scores)
        rounded = dscores.to(q.dtype)
        if KEYS_FIRST:  # noqa: SIM108 - decides which code is compiled
            dk = product(rounded, q, dk, PRECISION)
        else:
            dk = product(tl.trans(rounded), q, dk, PRECISION)
        if ADD != "split":
            if KEYS_FIRST:
                rounded = tl.trans(rounded)
            dq = product(rounded, k, None, PRECISION)
            add_tile(
                sum_desc, sum_head, dq, batch, head, first, row, queries, stride_sum,
                BLOCK_M, WIDTH, PADDED, ADD == "descriptor", VARLEN,
            )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=_NO_SPECIAL)
def key_kernel(
    q_desc, dout_desc, sum_desc, q_ptr, k_ptr, v_ptr, dout_ptr, top_ptr, spread_ptr, delta_ptr, sum_ptr, dk_ptr, dv_ptr,
    query_starts, key_starts,
    stride_qb, stride_qt, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_db, stride_dt, stride_dn, stride_sb, stride_st, stride_sn, stride_gb, stride_gs, stride_gn,
    sequences, queries, keys, heads, section, longest, window, unit, inner, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, VARLEN: tl.constexpr,
    ADD: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, KEYS_FIRST: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one key/value head; `heads` counts those. See the module."""
    block, which = program_of(tl.program_id(0), (longest + BLOCK_N - 1) // BLOCK_N, sequences * heads, section, False)
    sequence = which // heads
    kv_head = which % heads
    q_first, q_length = span(query_starts, sequence, queries, VARLEN)
    k_first, k_length = span(key_starts, sequence, keys, VARLEN)
    column = block * BLOCK_N
    if column >= k_length:
        return
    batch = sequence
    if VARLEN:
        batch = sequence * 0
    k_head = (
        k_ptr + batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kn + k_first.to(tl.int64) * stride_ks
    )
    v_head = (
        v_ptr + batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vn + k_first.to(tl.int64) * stride_vs
    )
    k = load_tile(k_head, k_head, 0, 0, 0, column, k_length, stride_ks, BLOCK_N, WIDTH, PADDED, False, False)
    v = load_tile(v_head, v_head, 0, 0, 0, column, k_length, stride_vs, BLOCK_N, WIDTH, PADDED, False, False)
    past = k_length - q_length
    end = tl.minimum(column + BLOCK_N, k_length)
    low, whole_low, whole_high, high = query_range(column, end, q_length, past, window, BLOCK_M, CAUSAL, WINDOW)
    unit_log2 = unit * 1.4426950408889634
    dk = tl.zeros([BLOCK_N, PADDED], tl.float32)
    dv = tl.zeros([BLOCK_N, PADDED], tl.float32)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        at = batch.to(tl.int64)
        q_head = q_ptr + at * stride_qb + head.to(tl.int64) * stride_qn + q_first.to(tl.int64) * stride_qt
        dout_head = dout_ptr + at * stride_db + head.to(tl.int64) * stride_dn + q_first.to(tl.int64) * stride_dt
        sum_head = sum_ptr + at * stride_sb + head.to(tl.int64) * stride_sn + q_first.to(tl.int64) * stride_st
        lane = (at * heads * GROUP + head) * queries + q_first
        top_row, spread_row, delta_row = top_ptr + lane, spread_ptr + lane, delta_ptr + lane
        dk, dv = _stream_queries(
            dk, dv, k, v, low, whole_low, whole_high, high, column, q_length, past, window, unit_log2, inner,
            q_desc, q_head, stride_qt, dout_desc, dout_head, stride_dt, top_row, spread_row, delta_row,
            sum_desc, sum_head, stride_st, batch, head, q_first,
            CAUSAL, WINDOW, SOFTCAP, VARLEN, ADD, WIDTH, PADDED, BLOCK_M, BLOCK_N, STAGES, KEYS_FIRST, TMA, PRECISION,
        )  # fmt: skip
    place = batch.to(tl.int64) * stride_gb + kv_head.to(tl.int64) * stride_gn + k_first.to(tl.int64) * stride_gs
    store_tile(dk_ptr + place, dk * scale, column, k_length, stride_gs, BLOCK_N, WIDTH, PADDED)
    store_tile(dv_ptr + place, dv, column, k_length, stride_gs, BLOCK_N, WIDTH, PADDED)


@triton.jit
def _stream_keys(
    dq, q, dout, top, spread, delta, low, whole_low, whole_high, high, row, keys, past, window, unit_log2, inner,
    k_desc, k_head, stride_ks, v_desc, v_head, stride_vs, batch, kv_head, first,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, VARLEN: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of keys [low, high) to dQ. Keys past the end are zero rows: whatever dS is there adds nothing."""
    query = row + tl.arange(0, BLOCK_M)
    for column in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        k = load_tile(
            k_desc, k_head, batch, kv_head, first, column, keys, stride_ks, BLOCK_N, WIDTH, PADDED, TMA, VARLEN
        )
        v = load_tile(
            v_desc, v_head, batch, kv_head, first, column, keys, stride_vs, BLOCK_N, WIDTH, PADDED, TMA, VARLEN
        )
        scores = product(q, tl.trans(k), None, PRECISION)
        if SOFTCAP:
            scores = tanh(scores * inner)
        probs = probabilities(scores, top[:, None], spread[:, None], unit_log2)
        key = column + tl.arange(0, BLOCK_N)
        probs = _hide(probs, query[:, None], key[None, :], column, whole_low, whole_high, past, window, CAUSAL, WINDOW)
        dprobs = product(dout, tl.trans(v), None, PRECISION)
        dscores = probs * (dprobs - delta[:, None])
        if SOFTCAP:
            dscores = dscores * (1.0 - scores * scores)
        dq = product(dscores.to(k.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=_NO_SPECIAL)
def query_kernel(
    k_desc, v_desc, q_ptr, k_ptr, v_ptr, dout_ptr, top_ptr, spread_ptr, delta_ptr, dq_ptr, query_starts, key_starts,
    stride_qb, stride_qt, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_db, stride_dt, stride_dn, stride_gb, stride_gt, stride_gn,
    sequences, queries, keys, heads, section, longest, window, unit, inner, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, VARLEN: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head. See the module."""
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
    at = batch.to(tl.int64)
    q_head = q_ptr + at * stride_qb + head.to(tl.int64) * stride_qn + q_first.to(tl.int64) * stride_qt
    dout_head = dout_ptr + at * stride_db + head.to(tl.int64) * stride_dn + q_first.to(tl.int64) * stride_dt
    dq_head = dq_ptr + at * stride_gb + head.to(tl.int64) * stride_gn + q_first.to(tl.int64) * stride_gt
    k_head = k_ptr + at * stride_kb + kv_head.to(tl.int64) * stride_kn + k_first.to(tl.int64) * stride_ks
    v_head = v_ptr + at * stride_vb + kv_head.to(tl.int64) * stride_vn + k_first.to(tl.int64) * stride_vs
    q = load_tile(q_head, q_head, 0, 0, 0, row, q_length, stride_qt, BLOCK_M, WIDTH, PADDED, False, False)
    dout = load_tile(dout_head, dout_head, 0, 0, 0, row, q_length, stride_dt, BLOCK_M, WIDTH, PADDED, False, False)
    query = row + tl.arange(0, BLOCK_M)
    top = tl.load(top_ptr + lane + query, mask=query < q_length, other=0.0)
    spread = tl.load(spread_ptr + lane + query, mask=query < q_length, other=float("inf"))
    delta = tl.load(delta_ptr + lane + query, mask=query < q_length, other=0.0)
    past = k_length - q_length
    end = tl.minimum(row + BLOCK_M, q_length)
    low, whole_low, whole_high, high = key_range(row, end, k_length, past, window, BLOCK_N, CAUSAL, WINDOW)
    unit_log2 = unit * 1.4426950408889634
    dq = tl.zeros([BLOCK_M, PADDED], tl.float32)
    dq = _stream_keys(
        dq, q, dout, top, spread, delta, low, whole_low, whole_high, high, row, k_length, past, window, unit_log2, inner,
        k_desc, k_head, stride_ks, v_desc, v_head, stride_vs, batch, kv_head, k_first,
        CAUSAL, WINDOW, SOFTCAP, VARLEN, WIDTH, PADDED, BLOCK_M, BLOCK_N, STAGES, TMA, PRECISION,
    )  # fmt: skip
    store_tile(dq_head, dq * scale, row, q_length, stride_gt, BLOCK_M, WIDTH, PADDED)
