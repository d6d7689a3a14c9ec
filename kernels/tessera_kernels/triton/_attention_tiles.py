"""What the attention kernels share: loading a tile, which keys a row sees, which tiles need no mask, tanh, exponents.

Positions: query t of a sequence with T queries and S keys stands at key position t + S - T. Causal: it sees keys up to its
position; with a window, only those nearer than `window` (both ways when not causal).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from triton.tools.ragged_tma import to_ragged_indices


@triton.jit
def load_tile(
    descriptor, pointer, batch, head, first, row, length, stride_row,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TMA: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Load rows [row, row + ROWS) of one head, [ROWS, PADDED]; zeros past the sequence's `length` and past the width.

    `pointer` stands at the sequence's row 0 of the head; the descriptor is [batch, head, row, width], or the ragged one of
    packed rows (`describe`), where the sequence begins at row `first`.
    """
    if TMA:
        if VARLEN:
            place, last, at = to_ragged_indices(first, length, row)
            tile = descriptor.load([place, last, head, at, 0]).reshape([ROWS, PADDED])
        else:
            tile = descriptor.load([batch, head, row, 0]).reshape([ROWS, PADDED])
    else:
        rows = tl.arange(0, ROWS)
        columns = tl.arange(0, PADDED)
        places = pointer + tl.cast(row, tl.int64) * stride_row + rows[:, None] * stride_row + columns[None, :]
        inside = (row + rows < length)[:, None]
        if WIDTH != PADDED:
            inside = inside & (columns < WIDTH)[None, :]
        tile = tl.load(places, mask=inside, other=0.0)
    return tile


SPARE = 132
"""Numbers between the statistics of two packed sequences: no tile of 128 rows reaches from one into the next."""

_SPARE = tl.constexpr(SPARE)


@triton.jit
def line_start(first, sequence, VARLEN: tl.constexpr):
    """Where a sequence's statistics begin in their line: at whole 16 bytes, SPARE numbers or more after the one before."""
    if VARLEN:  # noqa: SIM108 - decides which code is compiled
        start = (first + _SPARE * sequence) // 4 * 4
    else:
        start = first
    return start


@triton.jit
def load_row(
    descriptor, pointer, line, width, start, row, length, other, ROWS: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """Load numbers [row, row + ROWS) of a sequence that begins at `start` of its line; `other` past its `length`.

    By the copy engine, what stands past the end is what the line was filled with, and zeros past the end of the line. Copied
    by threads, the numbers would go to every thread that needs one: 48 copies of four bytes in each of 256 threads, for a
    tile of 64 queries with three of them.
    """
    if TMA:
        numbers = descriptor.load([line, start + row]).reshape([ROWS])
    else:
        places = row + tl.arange(0, ROWS)
        numbers = tl.load(pointer + tl.cast(line, tl.int64) * width + start + places, mask=places < length, other=other)
    return numbers


@triton.jit
def store_tile(
    pointer, tile, row, end, stride_row, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Store rows [row, min(row + ROWS, end)) of one head in the pointer's dtype."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    places = pointer + tl.cast(row, tl.int64) * stride_row + rows[:, None] * stride_row + columns[None, :]
    inside = (row + rows < end)[:, None] & (columns < WIDTH)[None, :]
    tl.store(places, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def add_tile(
    descriptor, pointer, tile, batch, head, first, row, length, stride_row,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TMA: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Add float32 rows [row, min(row + ROWS, length)) of one head into memory, atomically, in no fixed order."""
    if TMA:
        if VARLEN:
            place, last, at = to_ragged_indices(first, length, row)
            descriptor.atomic_add([place, last, head, at, 0], tile.reshape([1, 1, 1, ROWS, PADDED]))
        else:
            descriptor.atomic_add([batch, head, row, 0], tile.reshape([1, 1, ROWS, PADDED]))
    else:
        rows = tl.arange(0, ROWS)
        columns = tl.arange(0, PADDED)
        places = pointer + tl.cast(row, tl.int64) * stride_row + rows[:, None] * stride_row + columns[None, :]
        inside = (row + rows < length)[:, None] & (columns < WIDTH)[None, :]
        tl.atomic_add(places, tile, mask=inside, sem="relaxed")


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """Return total + a b in float32. PRECISION = lift is for the interpreter, which multiplies bfloat16 as integers."""
    if PRECISION == "lift":
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        result = tl.dot(a, b, total, input_precision=PRECISION)
    return result


@triton.jit
def span(starts, sequence, rows, VARLEN: tl.constexpr):
    """First row and length of a sequence; packed starts are held inside the tensor, so that bad ones cannot fault."""
    if VARLEN:
        first = tl.minimum(tl.maximum(tl.load(starts + sequence), 0), rows)
        last = tl.minimum(tl.maximum(tl.load(starts + sequence + 1), first), rows)
        length = last - first
    else:
        first = sequence * 0
        length = rows
    return first, length


@triton.jit
def sees(query, key, past, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Return whether each query sees each key; `past` = S - T."""
    ahead = key - query - past
    if CAUSAL:
        seen = ahead <= 0
        if WINDOW:
            seen = seen & (ahead > -window)
    else:
        seen = (ahead < window) & (ahead > -window)
    return seen


@triton.jit
def key_range(
    row, end, keys, past, window, SPAN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Tiles of SPAN keys for the queries [row, end): (low, whole_low, whole_high, high); [whole_low, whole_high) needs no mask."""
    high = keys
    whole = keys
    low = keys * 0
    if CAUSAL:
        high = tl.minimum(high, end + past)
        whole = tl.minimum(whole, row + past + 1)
    elif WINDOW:
        high = tl.minimum(high, end - 1 + past + window)
        whole = tl.minimum(whole, row + past + window)
    high = tl.maximum(high, 0)
    whole_high = tl.maximum(whole, 0) // SPAN * SPAN
    whole_low = low
    if WINDOW:
        low = tl.maximum(row + past - window + 1, 0) // SPAN * SPAN
        whole_low = (tl.maximum(end + past - window, 0) + SPAN - 1) // SPAN * SPAN
        whole_low = tl.maximum(tl.minimum(whole_low, (high + SPAN - 1) // SPAN * SPAN), low)
    return low, whole_low, tl.maximum(whole_high, whole_low), high


@triton.jit
def query_range(
    column, end, queries, past, window, SPAN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Tiles of SPAN queries that see keys [column, end): (low, whole_low, whole_high, high), as in `key_range`."""
    high = queries
    whole = queries
    low = queries * 0
    whole_low = low
    if CAUSAL:
        low = tl.maximum(column - past, 0) // SPAN * SPAN
        whole_low = (tl.maximum(end - 1 - past, 0) + SPAN - 1) // SPAN * SPAN
    elif WINDOW:
        low = tl.maximum(column - past - window + 1, 0) // SPAN * SPAN
        whole_low = (tl.maximum(end - past - window, 0) + SPAN - 1) // SPAN * SPAN
    if WINDOW:
        high = tl.minimum(high, end - 1 - past + window)
        whole = tl.minimum(whole, column - past + window)
    high = tl.maximum(high, 0)
    whole_high = tl.maximum(whole, 0) // SPAN * SPAN
    whole_low = tl.maximum(tl.minimum(whole_low, (high + SPAN - 1) // SPAN * SPAN), low)
    return low, whole_low, tl.maximum(whole_high, whole_low), high


@triton.jit
def tanh(x):
    """Hyperbolic tangent to a few units in the last place: an odd polynomial near 0, where 1 - exp(-2x) cancels."""
    squared = x * x
    tail = squared * (-1 / 3 + squared * (2 / 15 + squared * (-17 / 315 + squared * (62 / 2835))))
    fading = tl.exp2(tl.abs(x) * -2.8853900817779268)
    far = (1.0 - fading) / (1.0 + fading)
    return tl.where(squared < 0.0625, x + x * tail, tl.where(x < 0.0, -far, far))


@triton.jit
def slope_of(top, unit_log2):
    """What a row's scores are multiplied by before exp2, given its largest: the unit, in units of log2.

    An exponent is s u - b by one fused multiply-add, b = top u rounded: the same rounding in every term and in their sum,
    where it cancels. From 2^24 on it is worth a factor of two and more, as is the scores' own rounding; there u gives way
    to the power of two below it, by which products are exact: the largest exponent stays 0, and nothing overflows.
    """
    power = (unit_log2.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(top) * unit_log2 < 16777216.0, unit_log2, power)


@triton.jit
def exponents_from(top, spread, unit_log2):
    """Return the base of each row in the backward, top u + log2 sum; a large one lower by a few roundings, see above."""
    base = tl.fma(top, unit_log2, spread)
    lower = base * tl.where(base < 0.0, 1.0000002384185791, 0.9999997615814209)
    return tl.where(tl.abs(base) < 16777216.0, base, lower)


@triton.jit
def probabilities(scores, base, unit_log2):
    """exp2(score u - base), never above 1: rows are given as a broadcastable `base`, see `exponents_from`.

    The bound absorbs what two orders of accumulation differ by, thousands for scores near 1e10.
    """
    exponent = tl.fma(scores, unit_log2, -base)
    return tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))
