"""Triton kernels of `paged_attention`; the equation, the picture and the launches are there.

A program walks over its keys BLOCK_N at a time. Pages are looked up one tile ahead and carried, so that the pipeliner sees
plain loads of K and V and keeps num_stages of them in flight; the look-up of a tile would otherwise cost it a stage. For the
same reason the loop is a plain `range`: with a number of stages of its own it would stage the look-up too, and nothing else.
"""

import triton
import triton.language as tl

from tessera_kernels.triton._attention_tiles import key_range, product, span, tanh

_NO_SPECIAL = (
    "rows", "num_pages", "table_width", "heads", "kv_heads", "blocks", "splits", "split_tiles", "window", "unit", "inner",
    "stride_tb",
)  # fmt: skip

MERGED_AT_ONCE = 16
"""Splits that a merging program reads in one step; their sum is one fixed tree, whatever the number of splits."""

_CHUNK = tl.constexpr(MERGED_AT_ONCE)


@triton.jit
def _look_up(table, column, high, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the page of a tile where one page holds it, else of each of its keys; one past the last is never looked up."""
    if PAGE % BLOCK_N == 0:
        page = tl.load(table + column // PAGE, mask=column < high, other=0)
    else:
        key = column + tl.arange(0, BLOCK_N)
        page = tl.load(table + key // PAGE, mask=key < high, other=0)
    return page


@triton.jit
def _load_keys(
    head, page, column, high, stride_page, stride_slot,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Load BLOCK_N keys (or values) of one head, [BLOCK_N, PADDED], zeros from key `high` on and past the width."""
    n = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, PADDED)
    if PAGE % BLOCK_N == 0:
        start = head + page.to(tl.int64) * stride_page + (column % PAGE) * stride_slot
        places = start + n[:, None] * stride_slot + columns[None, :]
    else:
        place = page.to(tl.int64) * stride_page + ((column + n) % PAGE) * stride_slot
        places = head + place[:, None] + columns[None, :]
    inside = (column + n < high)[:, None]
    if WIDTH != PADDED:
        inside = inside & (columns < WIDTH)[None, :]
    return tl.load(places, mask=inside, other=0.0)


@triton.jit
def _hide(
    scores, row, column, length, past, window, whole_low, whole_high,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Put -inf where a row does not see the key, in tiles at an edge; rows are (query, head of the group)."""
    if (column < whole_low) | (column >= whole_high):
        key = column + tl.arange(0, BLOCK_N)[None, :]
        query = (row + tl.arange(0, BLOCK_M)[:, None]) // GROUP
        ahead = key - query - past
        seen = (ahead <= 0) & (key < length)
        if WINDOW:
            seen = seen & (ahead > -window)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit(do_not_specialize=_NO_SPECIAL)
def split_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, starts_ptr, out_ptr, tops_ptr, totals_ptr,
    stride_qx, stride_qn, stride_kp, stride_kz, stride_kk, stride_vp, stride_vz, stride_vk, stride_tb,
    rows, num_pages, table_width, heads, kv_heads, blocks, splits, split_tiles, window, unit, inner,
    GROUP: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, VARLEN: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one key/value head of one sequence, over one split of its keys.

    SPLIT: unscaled sums, maximum and total of each row go to out [split, x, n, h], tops and totals [split, x, n]; else the
    answer goes to out [x, n, h].
    """
    if FAR:  # the last slot of a page, or head of a query, begins further on than 32 bits count
        stride_qn = tl.cast(stride_qn, tl.int64)
        stride_kz, stride_vz = tl.cast(stride_kz, tl.int64), tl.cast(stride_vz, tl.int64)
    which = tl.program_id(0)
    kv_head = which % kv_heads  # heads of one token lie side by side, and so run at one time
    which = which // kv_heads
    split = which % splits
    which = which // splits
    block = blocks - 1 - which % blocks  # later queries see more keys
    sequence = which // blocks
    if VARLEN:
        first, queries = span(starts_ptr, sequence, rows, True)
    else:
        first = sequence
        queries = sequence * 0 + 1
    row = block * BLOCK_M
    if row >= queries * GROUP:
        return
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + sequence), 0), table_width * PAGE)
    past = length - queries
    end = tl.minimum((row + BLOCK_M + GROUP - 1) // GROUP, queries)
    low, whole_low, whole_high, high = key_range(row // GROUP, end, length, past, window, BLOCK_N, True, WINDOW)
    if SPLIT:
        tiles = (tl.maximum(high - low, 0) + BLOCK_N - 1) // BLOCK_N
        if split_tiles == 0:
            split_tiles = (tiles + splits - 1) // splits
        low += split * split_tiles * BLOCK_N
        high = tl.minimum(high, low + split_tiles * BLOCK_N)

    r = row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, PADDED)
    own = r < queries * GROUP
    x = (first + r // GROUP).to(tl.int64)
    head = kv_head * GROUP + r % GROUP
    inside = own[:, None] & (columns < WIDTH)[None, :]
    q = tl.load(q_ptr + (x * stride_qx + head * stride_qn)[:, None] + columns[None, :], mask=inside, other=0.0)

    table = table_ptr + sequence.to(tl.int64) * stride_tb
    k_head = k_ptr + kv_head.to(tl.int64) * stride_kk
    v_head = v_ptr + kv_head.to(tl.int64) * stride_vk
    unit_log2 = unit * 1.4426950408889634
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    LATE: tl.constexpr = BLOCK_M * BLOCK_N <= 2048  # few rows: sums over keys are taken once, after the loop
    total = tl.zeros([BLOCK_M, BLOCK_N] if LATE else [BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, PADDED], tl.float32)
    if low < high:  # no way around the loop: see `flash_attention_forward._attend`
        page = _look_up(table, low, high, PAGE, BLOCK_N)
        for column in range(low, high, BLOCK_N):
            page = tl.minimum(tl.maximum(page, 0), num_pages - 1)  # a wrong table must not fault
            k = _load_keys(k_head, page, column, high, stride_kp, stride_kz, PAGE, WIDTH, PADDED, BLOCK_N)
            v = _load_keys(v_head, page, column, high, stride_vp, stride_vz, PAGE, WIDTH, PADDED, BLOCK_N)
            page = _look_up(table, column + BLOCK_N, high, PAGE, BLOCK_N)
            scores = product(q, tl.trans(k), None, PRECISION)
            if SOFTCAP:
                scores = tanh(scores * inner)
            scores = _hide(
                scores, row, column, length, past, window, whole_low, whole_high, GROUP, WINDOW, BLOCK_M, BLOCK_N
            )
            new_top = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            probs = tl.exp2((scores - base[:, None]) * unit_log2)  # difference first: scores may be near 1e10
            fade = tl.exp2((top - base) * unit_log2)
            top = new_top
            if LATE:  # noqa: SIM108 - the compiler keeps one branch
                total = total * fade[:, None] + probs
            else:
                total = total * fade + tl.sum(probs, 1)
            mixed = product(probs.to(v.dtype), v, mixed * fade[:, None], PRECISION)
    if LATE:
        total = tl.sum(total, 1)

    place = x * heads + head
    if SPLIT:
        place += split.to(tl.int64) * rows * heads
        tl.store(tops_ptr + place, top, mask=own)
        tl.store(totals_ptr + place, total, mask=own)
        inside = inside & (low < high)  # an empty split is merged as nothing: its sums are not read
    else:
        mixed = (mixed + 0.0) / tl.where(total == 0.0, 1.0, total)[:, None]  # no -0: the merge gives none
    places = out_ptr + place[:, None] * WIDTH + columns[None, :]
    tl.store(places, mixed.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("lanes", "splits", "unit"))
def merge_kernel(
    parts_ptr, tops_ptr, totals_ptr, out_ptr, lanes, splits, unit,
    SPLITS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr = _CHUNK,
):  # fmt: skip
    """out [lanes, WIDTH] = sum over splits of weight * part over sum of weight * total, in the order of the splits.

    SPLITS is `splits` rounded up to a power of two. A split whose total is 0 saw nothing: its part was never written, nor
    was its maximum where no program came to the row.
    """
    lane = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, SPLITS)
    places = every.to(tl.int64) * lanes + lane
    saw = tl.load(totals_ptr + places, mask=every < splits, other=0.0) != 0.0
    top = tl.max(tl.load(tops_ptr + places, mask=saw, other=float("-inf")), 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    unit_log2 = unit * 1.4426950408889634
    columns = tl.arange(0, PADDED)
    mixed = tl.zeros([PADDED], tl.float32)
    total = 0.0
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)
        place = split.to(tl.int64) * lanes + lane
        own = tl.load(totals_ptr + place, mask=split < splits, other=0.0)
        own_top = tl.load(tops_ptr + place, mask=own != 0.0, other=float("-inf"))
        weight = tl.exp2((own_top - base) * unit_log2)
        seen = (own != 0.0)[:, None] & (columns < WIDTH)[None, :]
        part = tl.load(parts_ptr + place[:, None] * WIDTH + columns[None, :], mask=seen, other=0.0)
        mixed += tl.sum(part * weight[:, None], 0)
        total += tl.sum(own * weight, 0)
    out = mixed / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + lane * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=columns < WIDTH)
