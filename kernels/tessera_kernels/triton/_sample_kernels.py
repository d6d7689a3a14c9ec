"""The Triton kernel of `sample`; the equation, the picture and the launch are there.

Numbers are compared as signed integers in the same order (`_image`), and masses are integers too: a probability relative to
the largest is rounded once, down to a multiple of 1 / ONE, and every sum of them is exact. So the mass above a threshold does
not depend on how it was added up, brackets found in one pass hold in the next, and a search can neither stall nor miss.

A bracket is (low, up, above_up, above_low): keys low to up, and the ranks or masses of what lies above it and of that with
the bracket itself.
"""

import triton
import triton.language as tl

_LEAST, _LOWEST, _HIGHEST = -(2**31), -2139095041, 2**31 - 1
LEAST, LOWEST, HIGHEST = tl.constexpr(_LEAST), tl.constexpr(_LOWEST), tl.constexpr(_HIGHEST)
"""Images: of nothing (past the end of a row), of -inf, of NaN. Those of float32, as the next one."""

INFINITE = tl.constexpr(0x7F800000)
"""Image of +inf."""

STEEPEST = tl.constexpr(1e37)
"""Bound of log2(e) / temperature: an infinite one would make a NaN of the largest logit's distance from itself, 0."""


@triton.jit
def _image(x, DROP: tl.constexpr):
    """Return int32 in the order of the numbers, none of them a NaN; -0 as 0. DROP bits are the same in all numbers of a dtype."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 = 0
    return (bits ^ ((bits >> 31) & HIGHEST)) >> DROP


@triton.jit
def _number(key, DROP: tl.constexpr):
    """Return the number of an image."""
    whole = (key << DROP) | ((key >> 31) & ((1 << DROP) - 1))
    return (whole ^ ((whole >> 31) & HIGHEST)).to(tl.float32, bitcast=True)


@triton.jit
def _mass(x, top, rate, ONE: tl.constexpr):
    """Return e^((x - top) / temperature) as a float32 and, rounded down, as an integer multiple of 1 / ONE."""
    weight = tl.exp2((x - top) * rate)
    return weight, (weight * ONE).to(tl.int64)


@triton.jit
def _read(row, places, length):
    """Return logits as float32, -inf past the end."""
    return tl.load(row + places, mask=places < length, other=float("-inf")).to(tl.float32)


@triton.jit
def _scan(row, length, DROP: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """First pass: (largest image, lowest id that has it, least of the LANES lanes' largest images).

    At least min(LANES, length) images are not smaller than the last. Tiles are read one ahead, as in every pass here.
    """
    grid = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    best = tl.full([DEPTH, LANES], LEAST, tl.int32)
    first = tl.zeros([DEPTH, LANES], tl.int32)
    x = _read(row, grid, length)
    for start in range(0, length, DEPTH * LANES):
        ahead = _read(row, start + DEPTH * LANES + grid, length)
        key = tl.where(x != x, HIGHEST, _image(x, DROP))
        better = (key > best) & (start + grid < length)
        best = tl.where(better, key, best)
        first = tl.where(better, start + grid, first)
        x = ahead
    lanes = tl.max(best, 0)
    top = tl.max(lanes, 0)
    at = tl.min(tl.min(tl.where(best == top, first, HIGHEST), 0), 0)
    return top, at, tl.maximum(tl.min(lanes, 0), LOWEST >> DROP)


@triton.jit
def _collect(
    row, length, low, up, top, rate, min_p, keys_ptr, ids_ptr,
    MASSES: tl.constexpr, MIN_P: tl.constexpr, DROP: tl.constexpr, ONE: tl.constexpr, TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """A pass: list the images low to up and their ids, in the order of the ids, as far as there is room.

    Return (their number, the mass of the row, the mass of what min-p keeps); masses where MASSES asks.
    """
    tl.debug_barrier()  # the list before this one has been read
    places = tl.arange(0, TILE)
    found = 0
    total = tl.zeros([TILE], tl.int64)
    likely = tl.zeros([TILE], tl.int64)
    x = _read(row, places, length)
    for start in range(0, length, TILE):
        ahead = _read(row, start + TILE + places, length)
        key = _image(x, DROP)
        inside = (key >= low) & (key <= up) & (start + places < length)
        hits = inside.to(tl.int32)
        place = found + tl.cumsum(hits, 0) - hits
        inside = inside & (place < CAPACITY)
        tl.store(keys_ptr + place, key, mask=inside)
        tl.store(ids_ptr + place, start + places, mask=inside)
        found += tl.sum(hits, 0)
        if MASSES:
            weight, mass = _mass(x, top, rate, ONE)
            total += mass
            if MIN_P:
                likely += tl.where(weight >= min_p, mass, 0)
        x = ahead
    tl.debug_barrier()
    total = tl.sum(total, 0)
    return found, total, tl.sum(likely, 0) if MIN_P else total


@triton.jit
def _listed(keys_ptr, size, top, rate, DROP: tl.constexpr, ONE: tl.constexpr, TILE: tl.constexpr):
    """Return the mass of a list."""
    masses = tl.zeros([TILE], tl.int64)
    for start in range(0, size, TILE):
        places = start + tl.arange(0, TILE)
        key = tl.load(keys_ptr + places, mask=places < size, other=LOWEST >> DROP)
        masses += _mass(_number(key, DROP), top, rate, ONE)[1]
    return tl.sum(masses, 0)


@triton.jit
def _largest(keys_ptr, size, up, TILE: tl.constexpr):
    """Return the largest image of a list that is not above `up`."""
    largest = tl.full([TILE], LEAST, tl.int32)
    for start in range(0, size, TILE):
        places = start + tl.arange(0, TILE)
        key = tl.load(keys_ptr + places, mask=places < size, other=LEAST)
        largest = tl.maximum(largest, tl.where(key <= up, key, LEAST))
    return tl.max(largest, 0)


@triton.jit
def _above(
    source, length, pivots, top, rate,
    LISTED: tl.constexpr, DROP: tl.constexpr, ONE: tl.constexpr, PIVOTS: tl.constexpr, DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """A pass over a row or a list: how many images are at least each pivot, and their mass; int64 [PIVOTS] both.

    Two dimensions (pivot, lane) from the start, a lane to a thread: nothing moves between threads until the end.
    """
    lane = tl.arange(0, LANES)[None, :]
    counts = tl.zeros([PIVOTS, LANES], tl.int32)
    masses = tl.zeros([PIVOTS, LANES], tl.int64)
    for start in range(0, length, DEPTH * LANES):
        for depth in tl.static_range(DEPTH):
            places = start + depth * LANES + lane
            inside = places < length
            if LISTED:
                key = tl.load(source + places, mask=inside, other=LEAST)
                x = tl.where(inside, _number(key, DROP), float("-inf"))
            else:
                x = _read(source, places, length)
                key = tl.where(inside, _image(x, DROP), LEAST)
            mass = _mass(x, top, rate, ONE)[1]
            reached = key >= pivots[:, None]
            counts += reached.to(tl.int32)
            masses += tl.where(reached, mass, 0)
    return tl.sum(counts, 1).to(tl.int64), tl.sum(masses, 1)


@triton.jit
def _cut(low, up, PIVOTS: tl.constexpr):
    """Return pivots that cut low to up evenly, low < up; the last of them is up."""
    span = up.to(tl.int64) - low
    return (low + (span * (tl.arange(0, PIVOTS) + 1) + PIVOTS - 1) // PIVOTS).to(tl.int32)


@triton.jit
def _inside(target, by_rank, pivots, counts, masses, low, up, rank_up, mass_up, rank_low, mass_low):
    """Shrink a bracket to the part between two neighboring pivots in which the target lies."""
    reached = tl.where(by_rank, counts, masses) >= target
    return (
        tl.maximum(low, tl.max(tl.where(reached, pivots, LEAST), 0)),
        tl.minimum(up, tl.min(tl.where(reached, HIGHEST, pivots - 1), 0)),
        tl.maximum(rank_up, tl.max(tl.where(reached, 0, counts), 0)),
        tl.maximum(mass_up, tl.max(tl.where(reached, 0, masses), 0)),
        tl.minimum(rank_low, tl.min(tl.where(reached, counts, rank_low), 0)),
        tl.minimum(mass_low, tl.min(tl.where(reached, masses, mass_low), 0)),
    )


@triton.jit
def _sampled(row, length, DROP: tl.constexpr, PIVOTS: tl.constexpr, SAMPLE: tl.constexpr):
    """Return pivots that cut the row about evenly: order statistics of SAMPLE evenly spaced images."""
    step = tl.arange(0, SAMPLE).to(tl.int64)
    key = _image(_read(row, (step * length // SAMPLE).to(tl.int32), length), DROP)
    return tl.max(tl.reshape(tl.sort(key), [PIVOTS, SAMPLE // PIVOTS]), 1)


@triton.jit
def _nth(source, ids_ptr, length, key, n, LISTED: tl.constexpr, DROP: tl.constexpr, TILE: tl.constexpr):
    """A pass: the n-th id, from 0, whose image is `key`; a list is in the order of its ids."""
    seen = tl.full([], 0, tl.int64)
    answer = 0
    for start in range(0, length, TILE):
        places = start + tl.arange(0, TILE)
        inside = places < length
        if LISTED:
            equal = tl.load(source + places, mask=inside, other=LEAST) == key
        else:
            equal = inside & (_image(_read(source, places, length), DROP) == key)
        hit = equal & (seen + tl.cumsum(equal.to(tl.int32), 0) - 1 == n)
        if LISTED:
            answer += tl.sum(tl.load(ids_ptr + places, mask=hit, other=0), 0)
        else:
            answer += tl.sum(tl.where(hit, places, 0), 0)
        seen += tl.sum(equal.to(tl.int32), 0)
    return answer


@triton.jit
def _parameter(pointer, value, row, GIVEN: tl.constexpr, dtype: tl.constexpr):
    if GIVEN:  # noqa: SIM108 - decides which code is compiled
        found = tl.load(pointer + row).to(dtype)
    else:
        found = tl.full([], value, dtype)
    return found


@triton.jit(do_not_specialize=("num_ids", "stride_row", "temperature", "top_k", "top_p", "min_p"))
def sample_kernel(
    logits_ptr, uniforms_ptr, out_ptr, passes_ptr, keys_ptr, ids_ptr, coarse_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, temperature, top_k, top_p, min_p, num_ids, stride_row,
    EACH_T: tl.constexpr, EACH_K: tl.constexpr, EACH_P: tl.constexpr, EACH_M: tl.constexpr,
    MIN_P: tl.constexpr, DROP: tl.constexpr, ONE: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
    TILE: tl.constexpr, CAPACITY: tl.constexpr,
    PIVOTS: tl.constexpr, LIST_PIVOTS: tl.constexpr, LIST_DEPTH: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """One program draws one row's id; it also says how often it read the row."""
    number = tl.program_id(0)
    row = logits_ptr + number.to(tl.int64) * stride_row
    keys_ptr += number.to(tl.int64) * CAPACITY
    ids_ptr += number.to(tl.int64) * CAPACITY
    heat = _parameter(temperature_ptr, temperature, number, EACH_T, tl.float32)
    first_k = _parameter(top_k_ptr, top_k, number, EACH_K, tl.int64)
    share = _parameter(top_p_ptr, top_p, number, EACH_P, tl.float64)
    least = _parameter(min_p_ptr, min_p, number, EACH_M, tl.float32)
    uniform = tl.load(uniforms_ptr + number).to(tl.float64)

    best, answer, floor = _scan(row, num_ids, DROP, DEPTH, LANES)
    passes = 1
    if (heat != 0.0) & (best > LOWEST >> DROP) & (best < INFINITE >> DROP):  # else the first is the answer
        top = _number(best, DROP)
        rate = tl.minimum(1.4426950408889634 / heat, STEEPEST)
        # the list: all images from `low` to `up`, if there are no more than it holds
        low = floor
        up = best
        count, total, likely = _collect(
            row, num_ids, low, up, top, rate, least, keys_ptr, ids_ptr, True, MIN_P, DROP, ONE, TILE, CAPACITY
        )
        passes += 1
        rank_up = tl.full([], 0, tl.int64)
        mass_up = tl.full([], 0, tl.int64)
        rank_low = count.to(tl.int64)
        mass_low = _listed(keys_ptr, tl.minimum(count, CAPACITY), top, rate, DROP, ONE, TILE)
        coarse = coarse_ptr + number.to(tl.int64) * 3 * PIVOTS + tl.arange(0, PIVOTS)
        have_coarse = False
        kept = total
        for query in range(3):  # the edge of top-k by rank; the edge of top-p by mass; the draw by mass
            by_rank = query == 0
            if query == 0:
                target = first_k
                active = (first_k > 0) & (first_k < num_ids)
            elif query == 1:
                exact = share * kept.to(tl.float64)
                target = exact.to(tl.int64)
                target = tl.maximum(target + (target.to(tl.float64) < exact).to(tl.int64), 1)
                active = (share < 1.0) & (target < kept)
            else:
                kept = tl.minimum(kept, tl.maximum(likely, ONE))  # the first is kept whatever min-p says
                target = tl.minimum((uniform * kept.to(tl.float64)).to(tl.int64) + 1, kept)
                active = target > 0
            if active:
                above_up = tl.where(by_rank, rank_up, mass_up)
                above_low = tl.where(by_rank, rank_low, mass_low)
                if (target <= above_up) | (target > above_low) | (rank_low - rank_up > CAPACITY):
                    low = tl.full([], LOWEST >> DROP, tl.int32)
                    up = best
                    rank_up = tl.full([], 0, tl.int64)
                    mass_up = tl.full([], 0, tl.int64)
                    rank_low = num_ids.to(tl.int64)
                    mass_low = total
                    if have_coarse:
                        low, up, rank_up, mass_up, rank_low, mass_low = _inside(
                            target, by_rank, tl.load(coarse).to(tl.int32), tl.load(coarse + PIVOTS),
                            tl.load(coarse + 2 * PIVOTS), low, up, rank_up, mass_up, rank_low, mass_low,
                        )  # fmt: skip
                    while (rank_low - rank_up > CAPACITY) & (low < up):
                        pivots = _cut(low, up, PIVOTS)
                        if not have_coarse:
                            pivots = _sampled(row, num_ids, DROP, PIVOTS, SAMPLE)
                        counts, masses = _above(row, num_ids, pivots, top, rate, False, DROP, ONE, PIVOTS, DEPTH, LANES)
                        passes += 1
                        if not have_coarse:
                            tl.store(coarse, pivots.to(tl.int64))  # kept here: in registers they would cost too many
                            tl.store(coarse + PIVOTS, counts)
                            tl.store(coarse + 2 * PIVOTS, masses)
                            tl.debug_barrier()
                        have_coarse = True
                        low, up, rank_up, mass_up, rank_low, mass_low = _inside(
                            target, by_rank, pivots, counts, masses, low, up, rank_up, mass_up, rank_low, mass_low
                        )
                    if rank_low - rank_up <= CAPACITY:
                        _collect(
                            row, num_ids, low, up, top, rate, least, keys_ptr, ids_ptr, False, False, DROP, ONE, TILE, CAPACITY
                        )  # fmt: skip
                        passes += 1

                at = low
                end = up
                ranks = rank_up
                heavier = mass_up
                ranks_low = rank_low
                heavier_low = mass_low
                size = (rank_low - rank_up).to(tl.int32)
                while at < end:
                    end = _largest(keys_ptr, size, end, TILE)  # equals end the search as soon as they are alone
                    if ranks_low - ranks == 1:
                        at = end
                    if at < end:
                        pivots = _cut(at, end, LIST_PIVOTS)
                        counts, masses = _above(
                            keys_ptr, size, pivots, top, rate, True, DROP, ONE, LIST_PIVOTS, LIST_DEPTH, LANES
                        )
                        at, end, ranks, heavier, ranks_low, heavier_low = _inside(
                            target, by_rank, pivots, counts + rank_up, masses + mass_up,
                            at, end, ranks, heavier, ranks_low, heavier_low,
                        )  # fmt: skip

                # the target lies among the ids whose image is `at`
                one = _mass(_number(at, DROP), top, rate, ONE)[1]
                if query == 0:
                    kept = heavier + (target - ranks) * one
                elif query == 1:
                    kept = heavier + (target - heavier + one - 1) // one * one
                else:
                    n = (target - heavier - 1) // one
                    if rank_low - rank_up <= CAPACITY:
                        answer = _nth(keys_ptr, ids_ptr, size, at, n, True, DROP, TILE)
                    else:
                        answer = _nth(row, ids_ptr, num_ids, at, n, False, DROP, TILE)
                        passes += 1
    tl.store(out_ptr + number, answer)
    tl.store(passes_ptr + number, passes)
