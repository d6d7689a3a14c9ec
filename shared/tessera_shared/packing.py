"""Documents to training batches: a stream of tokens cut into windows, their order a pure function of (seed, step).

Nothing here remembers where it was: the batch of step 1,000,000 is computed as directly as that of step 0, so a run
resumes anywhere, in either half, at any number of micro-batches.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tessera_shared.batch import Batch
from tessera_shared.errors import DataError
from tessera_shared.objectives import IGNORE_INDEX
from tessera_shared.randomness import random_bits, stream_key

_FEISTEL_ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStream:
    """Documents end to end. Document i is `token_ids_X[starts[i] : starts[i + 1]]`; none is empty."""

    token_ids_X: np.ndarray  # int32
    starts: np.ndarray  # int64, ascending from 0; without the end

    def __post_init__(self) -> None:
        if not self.token_ids_X.size:
            raise DataError(
                "corpus: no tokens: expected at least one, because batches are cut from them; try more text"
            )

    def num_windows(self, length: int) -> int:
        """Return the number of windows of `length` tokens; the last one may be shorter."""
        if length < 1:
            raise DataError(f"length = {length}: expected >= 1, because a row holds tokens; try 256")
        return -(-self.token_ids_X.size // length)


def join_documents(documents: Iterable[list[int]], *, end_id: int | None = None) -> TokenStream:
    """Join documents into a stream, each closed by `end_id` where there is one; empty documents are left out."""
    closing = [] if end_id is None else [end_id]
    parts = [np.array(ids + closing, dtype=np.int32) for ids in documents if ids]
    starts = np.cumsum([0] + [part.size for part in parts], dtype=np.int64)[:-1]
    return TokenStream(token_ids_X=np.concatenate([*parts, np.empty(0, np.int32)]), starts=starts)


def batch_at(stream: TokenStream, step: int, *, rows: int, length: int, seed: int) -> Batch:
    """Return the batch of one step: `rows` windows of `length` tokens.

    Samples are numbered from 0 through all epochs, step s has numbers s * rows .. (s + 1) * rows - 1. Number n is
    window pi(n mod W) of the W windows, where pi is the permutation of epoch n div W (`shuffled`). A batch may span
    two epochs.
    """
    if step < 0 or rows < 1:
        raise DataError(f"step = {step}, rows = {rows}: expected step >= 0 and rows >= 1; try step=0, rows=1")
    num_windows = stream.num_windows(length)
    places = [divmod(number, num_windows) for number in range(step * rows, (step + 1) * rows)]
    keys = {epoch: round_keys(stream_key(seed, f"samples/{epoch}")) for epoch in {epoch for epoch, _ in places}}
    windows_B = np.array([shuffled(index, num_windows, keys[epoch]) for epoch, index in places], dtype=np.int64)
    return cut_windows(stream, windows_B, length)


def batches_in_order(stream: TokenStream, *, rows: int, length: int, limit: int | None = None) -> Iterator[Batch]:
    """Yield every window once, in order, in batches of equal shape; padding rows fill the last. For held-out loss.

    With `limit`, that many batches of windows spread evenly over the stream, from its first window on.
    """
    num_windows = stream.num_windows(length)
    chosen = np.arange(num_windows, dtype=np.int64)
    if limit is not None and limit * rows < num_windows:
        chosen = np.arange(limit * rows, dtype=np.int64) * num_windows // (limit * rows)
    for first in range(0, chosen.size, rows):
        windows_B = np.full(rows, num_windows, dtype=np.int64)  # one past the last: all padding
        part = chosen[first : first + rows]
        windows_B[: part.size] = part
        yield cut_windows(stream, windows_B, length)


def cut_windows(stream: TokenStream, windows_B: np.ndarray, length: int) -> Batch:
    """Return windows as rows. Window w is tokens w * length .. (w + 1) * length - 1 of the stream.

    Segments number the documents of a row from 0 and positions restart in each; a document that goes on from the window
    before starts at position 0. A label is the next token of the same document, also where it lies in the next window,
    so that in one epoch every token but each document's first is a label exactly once. Past the stream's end: id 0,
    label ignored, position -1, segment -1.
    """
    total = stream.token_ids_X.size
    places_BT = windows_B[:, None] * length + np.arange(length)
    real_BT = places_BT < total
    safe_BT = np.minimum(places_BT, total - 1)
    documents_BT = np.searchsorted(stream.starts, safe_BT, side="right") - 1
    first_places_BT = np.maximum(stream.starts[documents_BT], safe_BT[:, :1])
    ends = np.append(stream.starts[1:], total)
    has_next_BT = real_BT & (places_BT + 1 < ends[documents_BT])
    next_ids_BT = stream.token_ids_X[np.minimum(places_BT + 1, total - 1)]
    return Batch(
        token_ids_BT=np.where(real_BT, stream.token_ids_X[safe_BT], 0).astype(np.int32),
        labels_BT=np.where(has_next_BT, next_ids_BT, IGNORE_INDEX).astype(np.int32),
        positions_BT=np.where(real_BT, safe_BT - first_places_BT, -1).astype(np.int32),
        segments_BT=np.where(real_BT, documents_BT - documents_BT[:, :1], -1).astype(np.int32),
    )


def split_rows(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into micro-batches of equal numbers of rows. DataError where they do not divide."""
    rows = batch.token_ids_BT.shape[0]
    if parts < 1 or rows % parts:
        raise DataError(
            f"accumulation = {parts}: expected a divisor of the batch's {rows} rows, because micro-batches are of one "
            f"size; try {next(size for size in range(max(1, min(parts, rows)), 0, -1) if rows % size == 0)}"
        )
    size = rows // parts
    return [Batch(*(field[first : first + size] for field in batch)) for first in range(0, rows, size)]


def round_keys(key_2: np.ndarray) -> tuple[int, ...]:
    """Return the eight 32-bit keys with which `shuffled` permutes: the first four blocks of a stream."""
    return tuple(int(word) for word in random_bits(key_2, 0, _FEISTEL_ROUNDS // 2).reshape(-1))


def shuffled(index: int, size: int, keys: tuple[int, ...]) -> int:
    """Return pi(index) for the keys' permutation of 0 .. size - 1, without making the permutation.

    A Feistel network over the smallest even number of bits that holds `size` (Luby & Rackoff 1988), with MurmurHash3's
    32-bit finalizer of (half ^ key) as round function; where it leaves the range it is applied again (Black & Rogaway
    2002, cycle walking), fewer than four times on average.
    """
    if not 0 <= index < size:
        raise DataError(f"index = {index}: expected 0 to {size - 1}, because that is what is permuted; try index=0")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    place = _feistel(index, half_bits, keys)
    while place >= size:
        place = _feistel(place, half_bits, keys)
    return place


def _feistel(place: int, half_bits: int, keys: tuple[int, ...]) -> int:
    mask = (1 << half_bits) - 1
    left, right = place >> half_bits, place & mask
    for key in keys:
        left, right = right, left ^ (_finalized(right ^ key) & mask)
    return left << half_bits | right


def _finalized(word: int) -> int:
    """MurmurHash3's fmix32."""
    word = ((word ^ word >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    word = ((word ^ word >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return word ^ word >> 16
