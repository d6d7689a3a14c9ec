"""Attention backward (Dao 2023, arXiv 2307.08691, algorithm 2; gradient through the log-sum-exp added).

    P = 2^(c u log2 e - b)                     b = m u log2 e + log2 l from the forward's m and log2 l: one pass before, with
    delta = sum_h dO O - dlse
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
b and delta come as tiles of one line, by the copy engine where it is used at all.

Reference: autograd through `tessera_kernels.reference.flash_attention`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from tessera_kernels.triton._attention_tiles import (
    add_tile,
    exponents_from,
    key_range,
    line_start,
    load_row,
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

_NO_SPECIAL = ("queries", "keys", "heads", "section", "longest", "window", "unit", "inner", "scale", "rows", "line")


@triton.jit(do_not_specialize=("queries", "heads", "lanes", "line", "unit"))
def delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, top_ptr, spread_ptr, base_ptr, delta_ptr, query_starts,
    stride_ob, stride_ot, stride_on, stride_db, stride_dt, stride_dn, queries, heads, lanes, line, unit,
    HAS_DLSE: tl.constexpr, VARLEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """base and delta of BLOCK queries of one head, in lines of `line` numbers, one for each (row of the batch, head)."""
    row = tl.program_id(0) // lanes * BLOCK
    sequence = tl.program_id(0) % lanes // heads
    head = (tl.program_id(0) % lanes % heads).to(tl.int64)
    first, length = span(query_starts, sequence, queries, VARLEN)
    if row >= length:
        return
    batch = sequence.to(tl.int64)
    if VARLEN:
        batch = batch * 0
    out_head = out_ptr + batch * stride_ob + head * stride_on + first.to(tl.int64) * stride_ot
    dout_head = dout_ptr + batch * stride_db + head * stride_dn + first.to(tl.int64) * stride_dt
    out = load_tile(out_head, out_head, 0, 0, 0, row, length, stride_ot, BLOCK, WIDTH, PADDED, False, False)
    dout = load_tile(dout_head, dout_head, 0, 0, 0, row, length, stride_dt, BLOCK, WIDTH, PADDED, False, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    rows = row + tl.arange(0, BLOCK)
    inside = rows < length
    number = batch * heads + head
    places = number * queries + first + rows
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + places, mask=inside, other=0.0)
    top = tl.load(top_ptr + places, mask=inside, other=0.0)
    spread = tl.load(spread_ptr + places, mask=inside, other=0.0)
    places = number * line + line_start(first, sequence, VARLEN) + rows
    tl.store(base_ptr + places, exponents_from(top, spread, unit * 1.4426950408889634), mask=inside)
    tl.store(delta_ptr + places, delta, mask=inside)


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
def _between(left, right, RIGHT_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """Products of all rows of `left` with all rows of `right`: [left, right], or [right, left]."""
    if RIGHT_FIRST:  # noqa: SIM108 - decides which code is compiled
        result = product(right, tl.trans(left), None, PRECISION)
    else:
        result = product(left, tl.trans(right), None, PRECISION)
    return result


@triton.jit
def _stream_queries(
    dk, dv, k, v, low, whole_low, whole_high, high, column, queries, past, window, unit_log2, inner,
    q_desc, q_head, stride_qt, dout_desc, dout_head, stride_dt, base_desc, base_ptr, delta_desc, delta_ptr, number, line, start,
    sum_desc, sum_head, stride_sum, batch, head, first,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, VARLEN: tl.constexpr, ADD: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    KEYS_FIRST: tl.constexpr, EARLY: tl.constexpr, TMA: tl.constexpr, ROWS_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of queries [low, high) of one head to dK and dV, and theirs to the sums of dQ when fused.

    KEYS_FIRST holds S and dS as [key, query], ready in registers as left operands, at the price of row statistics that
    spread over many registers; otherwise they are [query, key] and turned in shared memory. EARLY issues dP before the
    exponentials, which then run beside it, and dV after dS: two tiles of float32 at a time instead of one. Statistics of
    the queries stand from `start` on in the line with this `number`.
    """
    key = column + tl.arange(0, BLOCK_N)
    for row in tl.range(low, high, BLOCK_M, num_stages=STAGES):
        q = load_tile(q_desc, q_head, batch, head, first, row, queries, stride_qt, BLOCK_M, WIDTH, PADDED, TMA, VARLEN)
        query = row + tl.arange(0, BLOCK_M)
        base = load_row(  # past the end: probability 0, or a finite one of rows that are zeros
            base_desc, base_ptr, number, line, start, row, queries, float("inf"), BLOCK_M, ROWS_TMA
        )
        dout = load_tile(
            dout_desc, dout_head, batch, head, first, row, queries, stride_dt, BLOCK_M, WIDTH, PADDED, TMA, VARLEN
        )
        scores = _between(q, k, KEYS_FIRST, PRECISION)
        if EARLY:
            dprobs = _between(dout, v, KEYS_FIRST, PRECISION)
        if SOFTCAP:
            scores = tanh(scores * inner)
        if KEYS_FIRST:
            probs = probabilities(scores, base[None, :], unit_log2)
            probs = _hide(probs, query[None, :], key[:, None], row, whole_low, whole_high, past, window, CAUSAL, WINDOW)
        else:
            probs = probabilities(scores, base[:, None], unit_log2)
            probs = _hide(probs, query[:, None], key[None, :], row, whole_low, whole_high, past, window, CAUSAL, WINDOW)
        weights = probs.to(dout.dtype)
        if not EARLY:
            dv = product(weights if KEYS_FIRST else tl.trans(weights), dout, dv, PRECISION)
            dprobs = _between(dout, v, KEYS_FIRST, PRECISION)
        delta = load_row(delta_desc, delta_ptr, number, line, start, row, queries, 0.0, BLOCK_M, ROWS_TMA)
        dscores = probs * (dprobs - (delta[None, :] if KEYS_FIRST else delta[:, None]))
        if SOFTCAP:
            dscores = dscores * (1.0 - scores * scores)
        rounded = dscores.to(q.dtype)
        if EARLY:
            dv = product(weights if KEYS_FIRST else tl.trans(weights), dout, dv, PRECISION)
        dk = product(rounded if KEYS_FIRST else tl.trans(rounded), q, dk, PRECISION)
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
    q_desc, dout_desc, k_desc, v_desc, base_desc, delta_desc, sum_desc, q_ptr, k_ptr, v_ptr, dout_ptr, base_ptr, delta_ptr,
    sum_ptr, dk_ptr, dv_ptr, query_starts, key_starts,
    stride_qb, stride_qt, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_db, stride_dt, stride_dn, stride_sb, stride_st, stride_sn, stride_gb, stride_gs, stride_gn,
    line, sequences, queries, keys, heads, section, longest, window, unit, inner, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, VARLEN: tl.constexpr,
    ADD: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, KEYS_FIRST: tl.constexpr, EARLY: tl.constexpr, TMA: tl.constexpr, ROWS_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
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
    k = load_tile(
        k_desc, k_head, batch, kv_head, k_first, column, k_length, stride_ks, BLOCK_N, WIDTH, PADDED, TMA, VARLEN
    )
    v = load_tile(
        v_desc, v_head, batch, kv_head, k_first, column, k_length, stride_vs, BLOCK_N, WIDTH, PADDED, TMA, VARLEN
    )
    past = k_length - q_length
    end = tl.minimum(column + BLOCK_N, k_length)
    low, whole_low, whole_high, high = query_range(column, end, q_length, past, window, BLOCK_M, CAUSAL, WINDOW)
    unit_log2 = unit * 1.4426950408889634
    dk = tl.zeros([BLOCK_N, PADDED], tl.float32)
    dv = tl.zeros([BLOCK_N, PADDED], tl.float32)
    if low < high:  # no way around the loop: see `flash_attention_forward._attend`
        for member in tl.range(0, GROUP):
            head = kv_head * GROUP + member
            at = batch.to(tl.int64)
            q_head = q_ptr + at * stride_qb + head.to(tl.int64) * stride_qn + q_first.to(tl.int64) * stride_qt
            dout_head = dout_ptr + at * stride_db + head.to(tl.int64) * stride_dn + q_first.to(tl.int64) * stride_dt
            sum_head = sum_ptr + at * stride_sb + head.to(tl.int64) * stride_sn + q_first.to(tl.int64) * stride_st
            number = batch * heads * GROUP + head
            dk, dv = _stream_queries(
                dk, dv, k, v, low, whole_low, whole_high, high, column, q_length, past, window, unit_log2, inner,
                q_desc, q_head, stride_qt, dout_desc, dout_head, stride_dt,
                base_desc, base_ptr, delta_desc, delta_ptr, number, line, line_start(q_first, sequence, VARLEN),
                sum_desc, sum_head, stride_st, batch, head, q_first,
                CAUSAL, WINDOW, SOFTCAP, VARLEN, ADD, WIDTH, PADDED, BLOCK_M, BLOCK_N, STAGES, KEYS_FIRST, EARLY, TMA,
                ROWS_TMA, PRECISION,
            )  # fmt: skip
    place = batch.to(tl.int64) * stride_gb + kv_head.to(tl.int64) * stride_gn + k_first.to(tl.int64) * stride_gs
    store_tile(dk_ptr + place, dk * scale, column, k_length, stride_gs, BLOCK_N, WIDTH, PADDED)
    store_tile(dv_ptr + place, dv, column, k_length, stride_gs, BLOCK_N, WIDTH, PADDED)


@triton.jit
def _stream_keys(
    dq, q, dout, base, delta, low, whole_low, whole_high, high, row, keys, past, window, unit_log2, inner,
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
        dprobs = product(dout, tl.trans(v), None, PRECISION)
        if SOFTCAP:
            scores = tanh(scores * inner)
        probs = probabilities(scores, base[:, None], unit_log2)
        key = column + tl.arange(0, BLOCK_N)
        probs = _hide(probs, query[:, None], key[None, :], column, whole_low, whole_high, past, window, CAUSAL, WINDOW)
        dscores = probs * (dprobs - delta[:, None])
        if SOFTCAP:
            dscores = dscores * (1.0 - scores * scores)
        dq = product(dscores.to(k.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=_NO_SPECIAL)
def query_kernel(
    q_desc, dout_desc, k_desc, v_desc, q_ptr, k_ptr, v_ptr, dout_ptr, base_ptr, delta_ptr, dq_ptr, query_starts, key_starts,
    stride_qb, stride_qt, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_db, stride_dt, stride_dn, stride_gb, stride_gt, stride_gn,
    line, sequences, queries, keys, heads, section, longest, window, unit, inner, scale,
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
    if VARLEN:
        batch = sequence * 0
    at = batch.to(tl.int64)
    place = (at * heads + head) * line + line_start(q_first, sequence, VARLEN)
    q_head = q_ptr + at * stride_qb + head.to(tl.int64) * stride_qn + q_first.to(tl.int64) * stride_qt
    dout_head = dout_ptr + at * stride_db + head.to(tl.int64) * stride_dn + q_first.to(tl.int64) * stride_dt
    dq_head = dq_ptr + at * stride_gb + head.to(tl.int64) * stride_gn + q_first.to(tl.int64) * stride_gt
    k_head = k_ptr + at * stride_kb + kv_head.to(tl.int64) * stride_kn + k_first.to(tl.int64) * stride_ks
    v_head = v_ptr + at * stride_vb + kv_head.to(tl.int64) * stride_vn + k_first.to(tl.int64) * stride_vs
    q = load_tile(q_desc, q_head, batch, head, q_first, row, q_length, stride_qt, BLOCK_M, WIDTH, PADDED, TMA, VARLEN)
    dout = load_tile(
        dout_desc, dout_head, batch, head, q_first, row, q_length, stride_dt, BLOCK_M, WIDTH, PADDED, TMA, VARLEN
    )
    query = row + tl.arange(0, BLOCK_M)
    base = tl.load(base_ptr + place + query, mask=query < q_length, other=float("inf"))
    delta = tl.load(delta_ptr + place + query, mask=query < q_length, other=0.0)
    past = k_length - q_length
    end = tl.minimum(row + BLOCK_M, q_length)
    low, whole_low, whole_high, high = key_range(row, end, k_length, past, window, BLOCK_N, CAUSAL, WINDOW)
    unit_log2 = unit * 1.4426950408889634
    dq = tl.zeros([BLOCK_M, PADDED], tl.float32)
    if low < high:
        dq = _stream_keys(
            dq, q, dout, base, delta, low, whole_low, whole_high, high, row, k_length, past, window, unit_log2, inner,
            k_desc, k_head, stride_ks, v_desc, v_head, stride_vs, batch, kv_head, k_first,
            CAUSAL, WINDOW, SOFTCAP, VARLEN, WIDTH, PADDED, BLOCK_M, BLOCK_N, STAGES, TMA, PRECISION,
        )  # fmt: skip
    store_tile(dq_head, dq * scale, row, q_length, stride_gt, BLOCK_M, WIDTH, PADDED)
