"""How the losses of a linear head are cut up under a byte budget: chunks of rows, or stripes of ids."""

from collections.abc import Iterator
from typing import NamedTuple

import triton

from tessera_shared.errors import KernelError

COLUMN_MULTIPLE = 64
"""Rows of logits and slopes start at multiples of this many elements: 128 bytes at least, as TMA and wide loads want."""


class LossConfig(NamedTuple):
    """How one call is cut up; 0 = chosen from the shapes. Integers only: it travels through a custom op's schema."""

    rows: int = 0  # rows whose slopes are kept for one pair of gradient products
    logit_rows: int = 0  # rows whose float32 logits exist at a time
    hidden_splits: int = 0  # pieces that the vocabulary is cut into for d hidden, multiplied side by side, then added
    block: int = 0  # columns of a tile of the row kernel
    num_warps: int = 0
    stages: int = 0  # depth of the row kernel's prefetch; 1 = none
    product: int = (
        0  # 1 = the library's, 2 = that of `_logit_tiles`, which takes softmax sums in its epilogue, 3 = CUDA C++'s
    )


MOST_LOGIT_ROWS = 512
"""Rows of a product with the head from which on reading the head is no longer what takes the time."""

LOGITS_SHARE = 60
"""Percent of a budget that float32 logits may take. A product of 128 rows reads the head for half the work of one of 256,
which costs more than what few large chunks save: reading and writing d head once for each."""

TILE, TILES_AT_ONCE = (128, 256), 132
"""What a library's product gives one multiprocessor of a Hopper at a time, and how many of those there are."""


class Chunks(NamedTuple):
    """The cut that `plan_chunks` found."""

    rows: int
    logit_rows: int


def padded_columns(columns: int) -> int:
    """Return the length of a row of logits or slopes in memory."""
    return _up(columns, COLUMN_MULTIPLE)


def plan_chunks(num_rows: int, vocab: int, *, models: int, slope_bytes: int, budget: int) -> Chunks:
    """Return the fewest gradient chunks, all of about the same size, that fit into `budget` bytes.

    A chunk takes `rows` x `slope_bytes` (0 without gradients) and `logit_rows` x 4 for each of `models`, per column of
    the vocabulary. Raises `KernelError` when not even one row fits.
    """
    units = budget // padded_columns(vocab)
    for quantum in (128, 16, 1):
        whole = units // (4 * models + slope_bytes)  # rows that fit with their slopes
        logit_rows = _down(min(LOGITS_SHARE * units // (400 * models), whole, MOST_LOGIT_ROWS), quantum) or quantum
        room = units - 4 * models * logit_rows
        most = _down(room // slope_bytes, quantum) if slope_bytes else _down(units // (4 * models), quantum)
        most = _down(most, logit_rows) if quantum > 16 else most  # no piece that is not full
        if most < logit_rows or room < 0:
            continue
        rows = min(most, _up(triton.cdiv(num_rows, triton.cdiv(num_rows, most)), quantum))
        if not slope_bytes:
            return Chunks(rows, rows)
        widest = _down((units - slope_bytes * rows) // (4 * models), quantum)
        pieces = triton.cdiv(rows, max(1, min(widest, rows)))
        return Chunks(rows, _up(triton.cdiv(rows, pieces), quantum))
    least = padded_columns(vocab) * (4 * models + slope_bytes)
    raise KernelError(
        f"chunk_bytes = {budget}: expected at least {least}, because one row of {vocab} logits with its slopes takes that; "
        f"try chunk_bytes={256 * least}"
    )


def plan_rows(num_rows: int, row_bytes: int, budget: int) -> int:
    """Return how many rows a chunk has when each takes `row_bytes`: the fewest chunks, all of about the same size."""
    most = budget // row_bytes
    if most == 0:
        raise KernelError(
            f"chunk_bytes = {budget}: expected at least {row_bytes}, because one row's slopes and sums take that; "
            f"try chunk_bytes={256 * row_bytes}"
        )
    quantum = 128 if most >= 128 else 1
    return min(_down(most, quantum), _up(triton.cdiv(num_rows, triton.cdiv(num_rows, _down(most, quantum))), quantum))


def plan_columns(num_rows: int, vocab: int, *, id_bytes: int, state: int, budget: int) -> int:
    """Return how many columns of the vocabulary one stripe of the no-logits mode has, for all rows at once.

    `id_bytes` is what a row's id takes (4 for each model's logits, in whose place slopes are written; or slopes alone),
    `state` what a row takes beside them.
    """
    per_column = id_bytes * num_rows
    room = (budget - state * num_rows) // per_column
    columns = min(_down(room, COLUMN_MULTIPLE if room < COARSE_COLUMNS else 16), padded_columns(vocab))
    if columns <= 0:
        least = per_column * COLUMN_MULTIPLE + state * num_rows
        raise KernelError(
            f"chunk_bytes = {budget}: expected at least {least}, because a stripe has {num_rows} rows and {COLUMN_MULTIPLE} "
            f"columns; try chunk_bytes={8 * least}"
        )
    return columns


COARSE_COLUMNS = 512
"""From so many columns on a tile takes every 16 that fit, 64 bytes: of a power of two less a little, 64 would leave more."""


class Stripe(NamedTuple):
    """Some ids of the vocabulary, for all rows at once."""

    ids: slice
    in_head: bool  # what is computed of them lies in d head's rows behind them, which nobody has written yet


def plan_stripes(vocab: int, columns: int, *, id_bytes: int, row_bytes: int) -> Iterator[Stripe]:
    """Yield stripes that cover the vocabulary: of `columns` ids, or of more where d head's rows behind them have room.

    An id takes `id_bytes` for all rows together, a row of d head `row_bytes` (0 without d head): a stripe lies in the rows
    behind it when it is at most row_bytes / (id_bytes + row_bytes) of what is left. Few stripes are worth having, because
    each reads and writes d hidden.
    """
    start = 0
    while start < vocab:
        free = _down((vocab - start) * row_bytes // (id_bytes + row_bytes), STRIPE_MULTIPLE)
        in_head = free > columns
        stop = start + free if in_head else min(start + columns, vocab)
        yield Stripe(slice(start, stop), in_head)
        start = stop


STRIPE_MULTIPLE = 256
"""Stripes within d head have as many ids times this, whole tiles of the products with the head."""


def choose_splits(rows: int, width: int, vocab: int) -> int:
    """Return into how many pieces to cut a product over the whole vocabulary, so that its tiles fill the device."""
    tiles = -(-rows // TILE[0]) * -(-width // TILE[1])

    def busy(splits: int) -> float:
        return tiles * splits / _up(tiles * splits, TILES_AT_ONCE)

    splits = [count for count in (1, 2, 3, 4, 6, 8) if vocab % count == 0]
    return max(splits, key=lambda count: busy(count) - 0.02 * count)


def pieces(total: int, size: int) -> Iterator[slice]:
    """Yield consecutive slices of at most `size` that cover range(total)."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _down(number: int, multiple: int) -> int:
    return number // multiple * multiple


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
