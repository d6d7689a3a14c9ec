"""The list of `sample`: numbers near an edge with their ids, and passes over it or over the row.

It is a grid of SLOTS x LANES: a lane, one thread, writes its hits below each other in the order of their ids and counts them
(`held`), so that listing moves nothing between threads.
"""

import triton
import triton.language as tl

from tessera_kernels.triton._sample_numbers import HIGHEST, image_of, mass_of, number_of, read_row

NOTHING = tl.constexpr(0xFF800000)
"""An entry of the list that is -inf."""

MOST_SLOTS, COUNT_BITS, COUNT = tl.constexpr(256), tl.constexpr(53), tl.constexpr(2**53)
"""Of a lane's part of the list: so many masses up to 2^44 stay below COUNT, and so many times COUNT below 2^63."""


@triton.jit
def _entry(x, place):
    """Return an entry of the list: an id above the bits of its number."""
    return (place.to(tl.int64) << 32) | x.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def entry_number(entry):
    return entry.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def entry_id(entry):
    return (entry >> 32).to(tl.int32)


@triton.jit
def _append(
    row, start, length, least, most, top, rate, min_p, list_ptr, held, above, heavier, reached, total, likely,
    TAIL: tl.constexpr, ONE: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Take DEPTH numbers of each lane into the list and the sums. All are read first: none waits for a write."""
    lane = tl.arange(0, LANES)
    numbers = ()
    for depth in tl.static_range(DEPTH):
        place = start + depth * LANES + lane
        if TAIL:  # noqa: SIM108 - decides which code is compiled
            x = read_row(row, place, length)
        else:
            x = tl.load(row + place).to(tl.float32)
        numbers = numbers + (x,)  # type: ignore[assignment]  # noqa: RUF005 - no star in a kernel
    for depth in tl.static_range(DEPTH):
        place = start + depth * LANES + lane
        x = numbers[depth]
        weight, mass = mass_of(x, top, rate, ONE)
        over = x > most
        inside = (x >= least) & (x <= most)
        if TAIL:
            inside = inside & (place < length)
        keep = inside & (held < SLOTS)
        tl.store(list_ptr + held * LANES + lane, _entry(x, place), mask=keep)
        held += inside.to(tl.int32)
        above += over.to(tl.int32)
        heavier += tl.where(over, mass, 0)
        reached += tl.where(x >= least, mass, 0)
        total += mass
        likely += tl.where(weight >= min_p, mass, 0)
    return held, above, heavier, reached, total, likely


@triton.jit
def collect(
    row, length, low, up, top, rate, min_p, list_ptr,
    DROP: tl.constexpr, ONE: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """A pass: list the numbers whose images are low to up, and their ids, as far as each lane has room.

    Return (how many each lane met, rank and mass above `up`, the mass of what is at least `low`, the mass of the row, the mass
    of what min-p keeps).
    """
    tl.debug_barrier()  # the list before this one has been read
    TILE: tl.constexpr = DEPTH * LANES
    least = number_of(low, DROP)
    most = number_of(up, DROP)
    held = tl.zeros([LANES], tl.int32)
    above = tl.zeros([LANES], tl.int32)
    heavier = tl.zeros([LANES], tl.int64)
    reached = tl.zeros([LANES], tl.int64)
    total = tl.zeros([LANES], tl.int64)
    likely = tl.zeros([LANES], tl.int64)
    whole = length // TILE * TILE
    for start in range(0, whole, TILE):
        held, above, heavier, reached, total, likely = _append(
            row, start, length, least, most, top, rate, min_p, list_ptr, held, above, heavier, reached, total, likely,
            False, ONE, DEPTH, LANES, SLOTS,
        )  # fmt: skip
    for start in range(whole, length, LANES):
        held, above, heavier, reached, total, likely = _append(
            row, start, length, least, most, top, rate, min_p, list_ptr, held, above, heavier, reached, total, likely,
            True, ONE, 1, LANES, SLOTS,
        )  # fmt: skip
    tl.debug_barrier()
    return (
        held, tl.sum(above, 0).to(tl.int64), tl.sum(heavier, 0), tl.sum(reached, 0), tl.sum(total, 0), tl.sum(likely, 0),
    )  # fmt: skip


@triton.jit
def narrowed(
    list_ptr, narrow_ptr, held, low, up, DROP: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Copy what a list has between two images to another list, or to itself; return how many each lane has there."""
    tl.debug_barrier()
    lane = tl.arange(0, LANES)
    least = number_of(low, DROP)
    most = number_of(up, DROP)
    left = tl.zeros([LANES], tl.int32)
    for start in range(0, tl.max(held, 0), DEPTH):
        entries = ()
        for depth in tl.static_range(DEPTH):
            slot = start + depth
            entries = entries + (tl.load(list_ptr + slot * LANES + lane, mask=slot < held, other=0),)  # type: ignore[assignment]  # noqa: RUF005
        for depth in tl.static_range(DEPTH):
            x = entry_number(entries[depth])
            inside = (x >= least) & (x <= most) & (start + depth < held)
            tl.store(narrow_ptr + left * LANES + lane, entries[depth], mask=inside)
            left += inside.to(tl.int32)
    tl.debug_barrier()
    return left


@triton.jit
def only_entry(list_ptr, held, low, up, DROP: tl.constexpr, LANES: tl.constexpr):
    """Return (image, id) of the one entry of a list that has its image between these two."""
    lane = tl.arange(0, LANES)
    least = number_of(low, DROP)
    most = number_of(up, DROP)
    found = tl.full([LANES], -1, tl.int64)
    for slot in range(tl.max(held, 0)):
        entry = tl.load(list_ptr + slot * LANES + lane, mask=slot < held, other=0)
        x = entry_number(entry)
        found = tl.where((x >= least) & (x <= most) & (slot < held), entry, found)
    entry = tl.max(found, 0)
    return image_of(entry_number(entry), DROP), entry_id(entry)


@triton.jit
def reached_pivots(
    source, held, pivots, top, rate,
    LISTED: tl.constexpr, DROP: tl.constexpr, ONE: tl.constexpr, PIVOTS: tl.constexpr, DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """A pass over a row or a list: how many numbers are at least each pivot, and their mass; int64 [PIVOTS] both.

    Two dimensions (pivot, lane) from the start, a lane to a thread: nothing moves between threads until the end. The few
    numbers that a lane has in a list are counted in the bits of an int64 that their mass leaves free.
    """
    lane = tl.arange(0, LANES)[None, :]
    bound = held[None, :]
    edges = number_of(pivots, DROP)[:, None]
    counts = tl.zeros([PIVOTS, LANES], tl.int32)
    masses = tl.zeros([PIVOTS, LANES], tl.int64)
    for start in range(0, tl.max(held, 0), DEPTH):
        for depth in tl.static_range(DEPTH):
            place = (start + depth) * LANES + lane
            if LISTED:
                x = entry_number(tl.load(source + place, mask=start + depth < bound, other=NOTHING))
            else:
                x = tl.load(source + place, mask=start + depth < bound, other=float("-inf")).to(tl.float32)
            reached = x >= edges  # never by what is past the end: pivots lie above the lower end of a bracket
            mass = mass_of(x, top, rate, ONE)[1]
            if LISTED:
                mass += COUNT
            else:
                counts += reached.to(tl.int32)
            masses += tl.where(reached, mass, 0)
    if LISTED:
        counts = (masses >> COUNT_BITS).to(tl.int32)
        masses = masses & (COUNT - 1)
    return tl.sum(counts, 1).to(tl.int64), tl.sum(masses, 1)


@triton.jit
def cut(low, up, PIVOTS: tl.constexpr):
    """Return pivots that cut low to up evenly, low < up; the last of them is up."""
    span = up.to(tl.int64) - low
    return (low + (span * (tl.arange(0, PIVOTS) + 1) + PIVOTS - 1) // PIVOTS).to(tl.int32)


@triton.jit
def nth_listed(list_ptr, held, num_ids, key, n, DROP: tl.constexpr, PIVOTS: tl.constexpr, LANES: tl.constexpr):
    """Return the n-th id of a list, from 0, whose image is `key`: a search for the least id up to which there are n + 1."""
    lane = tl.arange(0, LANES)[None, :]
    bound = held[None, :]
    low = tl.full([], -1, tl.int32)  # up to it there are not enough
    up = num_ids - 1
    while up - low > 1:
        pivots = cut(low, up, PIVOTS)
        counts = tl.zeros([PIVOTS, LANES], tl.int32)
        for slot in range(tl.max(held, 0)):
            entry = tl.load(list_ptr + slot * LANES + lane, mask=slot < bound, other=0)
            equal = (slot < bound) & (image_of(entry_number(entry), DROP) == key)
            counts += (tl.where(equal, entry_id(entry), HIGHEST) <= pivots[:, None]).to(tl.int32)
        enough = tl.sum(counts, 1) > n
        low = tl.maximum(low, tl.max(tl.where(enough, -1, pivots), 0))
        up = tl.minimum(up, tl.min(tl.where(enough, pivots, HIGHEST), 0))
    return up
