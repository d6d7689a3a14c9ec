"""The Triton kernel of `sample`; the equation, the picture and the launch are there.

A bracket is (low, up, above_up, above_low): keys low to up, and the ranks or masses of what lies above it and of that with
the bracket itself (`_sample_numbers`). Where to look is guessed from a sample in float32: a wrong guess costs a pass, and
nothing else. What lies there is listed (`_sample_lists`).
"""

import triton
import triton.language as tl

from tessera_kernels.triton._sample_lists import (
    MOST_SLOTS,
    collect,
    cut,
    narrowed,
    nth_listed,
    only_entry,
    reached_pivots,
)
from tessera_kernels.triton._sample_numbers import (
    HIGHEST,
    INFINITE,
    LEAST,
    LOWEST,
    image_of,
    mass_of,
    number_of,
    read_row,
    scan,
)

STEEPEST = tl.constexpr(1e37)
"""Bound of log2(e) / temperature: an infinite one would make a NaN of the largest logit's distance from itself, 0."""

GUESSES = tl.constexpr(3)
"""Lists that an edge may ask for by a guess; then comes the search that always ends."""

DEVIATIONS, SPARE = tl.constexpr(4.0), tl.constexpr(8)
"""Width of a guess on each side: standard deviations of the sampled mass, and places in the sample beyond them."""

EACH_T, EACH_K, EACH_P, EACH_M = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)
"""Bits that say which parameters are given for each row: arguments, so that one compilation serves all uses."""


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
def _sampled(row, length, DROP: tl.constexpr, SAMPLE: tl.constexpr):
    """Return SAMPLE evenly spaced images, the largest first."""
    step = tl.arange(0, SAMPLE).to(tl.int64)
    return tl.sort(image_of(read_row(row, (step * length // SAMPLE).to(tl.int32), length), DROP), descending=True)


@triton.jit
def _guess(sample_ptr, by_rank, share, low, up, top, rate, room, num_ids, DROP: tl.constexpr, SAMPLE: tl.constexpr):
    """Return the part (low, up) of a bracket in which `share` of its rank or mass seems to be reached.

    The share of the sample that lies above x has the variance ((1 - share)^2 sum of w^2 above + share^2 sum of w^2 below)
    / (sum of w)^2. Places of the sample are taken that stand for three quarters of the room, or fewer, around the middle.
    """
    most = (room.to(tl.int64) * (SAMPLE * 3 // 4) // num_ids).to(tl.int32)
    place = tl.arange(0, SAMPLE)
    sample = tl.load(sample_ptr + place)
    known = (sample >= low) & (sample <= up)
    weight = tl.where(by_rank, 1.0, tl.exp2((number_of(sample, DROP) - top) * rate))
    weight = tl.where(known, weight, 0.0)
    sums = tl.cumsum(weight, 0)
    aim = share * tl.sum(weight, 0)
    over = sums <= aim
    lever = weight * tl.where(over, 1.0 - share, share)
    margin = DEVIATIONS * tl.sqrt(tl.sum(lever * lever, 0))
    first = tl.sum((sample > up).to(tl.int32), 0)
    last = first + tl.sum(known.to(tl.int32), 0)
    middle = tl.minimum(tl.sum(over.to(tl.int32), 0), last)
    begin = tl.sum((sums <= aim - margin).to(tl.int32), 0) - SPARE
    end = tl.sum((sums - weight < aim + margin).to(tl.int32), 0) + SPARE
    begin = tl.maximum(tl.maximum(begin, middle - most // 2), first)
    end = tl.maximum(tl.minimum(tl.minimum(end, begin + most), last), begin)
    upper = tl.max(tl.where(place == begin - 1, sample, LEAST), 0)
    lower = tl.max(tl.where(place == end, sample, LEAST), 0)
    finite = (LOWEST >> DROP) + 1  # what is -inf has no mass, and a row may have more of them than fit
    least_key = tl.maximum(tl.where(end < last, lower, low), finite)
    most_key = tl.maximum(tl.where(begin > first, upper, up), finite)
    one = tl.max(tl.where(place == begin, sample, LEAST), 0)
    equals = (end - begin > SPARE) & (one == tl.max(tl.where(place == end - 1, sample, LEAST), 0)) & (one >= finite)
    return tl.where(equals, one, least_key), tl.where(equals, one, most_key)


@triton.jit
def _nth(row, length, key, n, DROP: tl.constexpr, TILE: tl.constexpr):
    """A pass over a row: the n-th id, from 0, whose image is `key`."""
    seen = tl.full([], 0, tl.int64)
    answer = 0
    for start in range(0, length, TILE):
        places = start + tl.arange(0, TILE)
        equal = (places < length) & (image_of(read_row(row, places, length), DROP) == key)
        hit = equal & (seen + tl.cumsum(equal.to(tl.int32), 0) - 1 == n)
        answer += tl.sum(tl.where(hit, places, 0), 0)
        seen += tl.sum(equal.to(tl.int32), 0)
    return answer


@triton.jit
def _parameter(pointer, value, row, given):
    """Return a row's own parameter where there is one for each, else the one of all rows."""
    return tl.load(pointer + row, mask=given != 0, other=value)


@triton.jit
def _is_drawn(heat, best, DROP: tl.constexpr):
    """Say whether a row is drawn from at all; if not, the first in order is its answer."""
    return (heat != 0.0) & (best > LOWEST >> DROP) & (best < INFINITE >> DROP)


@triton.jit(
    do_not_specialize=("num_ids", "stride_row", "temperature", "top_k", "top_p", "min_p", "each"),
    do_not_specialize_on_alignment=(
        "logits_ptr", "uniforms_ptr", "out_ptr", "passes_ptr", "known_ptr", "list_ptr", "temperature_ptr", "top_k_ptr",
        "top_p_ptr", "min_p_ptr",
    ),
)  # fmt: skip
def sample_kernel(
    logits_ptr, uniforms_ptr, out_ptr, passes_ptr, known_ptr, list_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, temperature, top_k, top_p, min_p, num_ids, stride_row, each,
    DROP: tl.constexpr, ONE: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
    PIVOTS: tl.constexpr, LIST_PIVOTS: tl.constexpr, LIST_DEPTH: tl.constexpr, SAMPLE: tl.constexpr, SCAN_DEPTH: tl.constexpr,
):  # fmt: skip
    """One program draws one row's id; it also says how often the row was read.

    The sample passes through memory: in the layout of its sort, registers of a tensor are spread as no pass wants them.
    `collect` and `_guess` are called in one place, for the first list as for later ones: each copy costs seconds of compiling.
    """
    tl.static_assert(SLOTS <= MOST_SLOTS)
    number = tl.program_id(0)
    row = logits_ptr + number.to(tl.int64) * stride_row
    list_ptr += number.to(tl.int64) * (2 * SLOTS * LANES)
    known_ptr += number.to(tl.int64) * SAMPLE
    heat = _parameter(temperature_ptr, temperature, number, each & EACH_T)
    best, first, floor = scan(row, num_ids, DROP, SCAN_DEPTH, LANES)
    tl.store(out_ptr + number, first)  # of rows that are not drawn from
    tl.store(passes_ptr + number, 1)
    if _is_drawn(heat, best, DROP):
        tl.store(known_ptr + tl.arange(0, SAMPLE), _sampled(row, num_ids, DROP, SAMPLE))
        tl.debug_barrier()
        first_k = _parameter(top_k_ptr, top_k, number, each & EACH_K).to(tl.int64)
        share = _parameter(top_p_ptr, top_p, number, each & EACH_P).to(tl.float64)
        least = _parameter(min_p_ptr, min_p, number, each & EACH_M)
        uniform = tl.load(uniforms_ptr + number).to(tl.float64)
        top = number_of(best, DROP)
        rate = tl.minimum(1.4426950408889634 / heat, STEEPEST)
        lowest = tl.full([], LOWEST >> DROP, tl.int32)
        none = tl.full([], 0, tl.int64)
        everyone = num_ids.to(tl.int64)
        room = tl.full([], SLOTS * LANES // 2, tl.int32)  # lanes are not filled evenly
        limited = (first_k > 0) & (first_k < num_ids)
        small = limited & (first_k <= LANES)  # what is at least the floor holds that many for certain

        # the share of all ranks or of all mass at which the first edge seems to lie
        weight = tl.exp2((number_of(tl.load(known_ptr + tl.arange(0, SAMPLE)), DROP) - top) * rate)
        chance = tl.sum(tl.where(weight >= least, weight, 0.0), 0) / tl.maximum(tl.sum(weight, 0), 1e-30)
        chance = tl.where(share < 1.0, share.to(tl.float32), chance * uniform.to(tl.float32))
        chance = tl.where(limited, first_k.to(tl.float32) / num_ids.to(tl.float32), chance)

        answer = 0
        passes = 1
        held = tl.zeros([LANES], tl.int32)
        fits = 0  # whether all of the bracket is in the list
        low, rank_low, mass_low = lowest, everyone, none + 1  # its mass is not known yet
        up, rank_up, mass_up = best, none, none
        total, likely, kept = none, none, none
        for query in range(-1, 3):  # the first list; the edge of top-k by rank; that of top-p by mass; the draw by mass
            by_rank = (query == 0) | ((query < 0) & limited)
            target = none
            active = query < 0
            if query == 0:
                kept = total
                target = first_k
                active = limited & ((target <= rank_low) | (mass_low < total))  # else all that has mass is kept
            elif query == 1:
                exact = share * kept.to(tl.float64)
                target = exact.to(tl.int64)
                target = tl.maximum(target + (target.to(tl.float64) < exact).to(tl.int64), 1)
                active = (share < 1.0) & (target < kept)
            elif query == 2:
                kept = tl.minimum(kept, tl.maximum(likely, ONE))  # the first is kept whatever min-p says
                target = tl.minimum((uniform * kept.to(tl.float64)).to(tl.int64) + 1, kept)
                active = target > 0
            if active:
                if query >= 0:  # what the list says of where the target lies
                    if target <= tl.where(by_rank, rank_up, mass_up):
                        low, rank_low, mass_low = up + 1, rank_up, mass_up
                        up, rank_up, mass_up = best, none, none
                        fits = 0
                    elif target > tl.where(by_rank, rank_low, mass_low):
                        up, rank_up, mass_up = low - 1, rank_low, mass_low
                        low, rank_low, mass_low = lowest, everyone, total
                        fits = 0
                guesses = 0
                while (fits == 0) & (low < up) & ((query >= 0) | (guesses == 0)):
                    crowded = (rank_low - rank_up > room) & (num_ids > SLOTS * LANES)
                    if crowded & (guesses >= GUESSES):
                        pivots = cut(low, up, PIVOTS)
                        full = (num_ids - tl.arange(0, LANES) + LANES - 1) // LANES
                        counts, masses = reached_pivots(
                            row, full, pivots, top, rate, False, DROP, ONE, PIVOTS, LIST_DEPTH, LANES
                        )
                        low, up, rank_up, mass_up, rank_low, mass_low = _inside(
                            target, by_rank, pivots, counts, masses, low, up, rank_up, mass_up, rank_low, mass_low
                        )
                    else:
                        least_key = tl.maximum(low, lowest + 1)
                        most_key = up
                        if (query < 0) & small:
                            least_key = tl.maximum(floor, least_key)
                        elif crowded:
                            above_up = tl.where(by_rank, rank_up, mass_up)
                            above_low = tl.where(by_rank, rank_low, mass_low)
                            part = (target - above_up).to(tl.float32) / (above_low - above_up).to(tl.float32)
                            part = tl.where(query < 0, chance, part)
                            least_key, most_key = _guess(
                                known_ptr, by_rank, part, low, up, top, rate, room, num_ids, DROP, SAMPLE
                            )
                        held, above, heavier, reached, total, likely = collect(
                            row, num_ids, least_key, most_key, top, rate, least, list_ptr,
                            DROP, ONE, DEPTH, LANES, SLOTS,
                        )  # fmt: skip
                        count = tl.sum(held, 0)
                        if (query >= 0) & (target <= tl.where(by_rank, above, heavier)):
                            low, rank_low, mass_low = most_key + 1, above, heavier
                        elif (query >= 0) & (target > tl.where(by_rank, above + count, reached)):
                            up, rank_up, mass_up = least_key - 1, above + count, reached
                        else:
                            low, rank_low, mass_low = least_key, above + count, reached
                            up, rank_up, mass_up = most_key, above, heavier
                            fits = (tl.max(held, 0) <= SLOTS).to(tl.int32)
                            if fits == 0:
                                room = tl.minimum(room, count // 2)
                        guesses += 1
                    passes += 1

            if active & (query >= 0):
                at = low
                end = up
                ranks = rank_up
                heavier = mass_up
                ranks_low = rank_low
                heavier_low = mass_low
                near_ptr = list_ptr  # the list, or what is left of it
                near_held = held
                near_rank = rank_up
                near_mass = mass_up
                while (at < end) & (ranks_low - ranks > 1):
                    pivots = cut(at, end, LIST_PIVOTS)
                    counts, masses = reached_pivots(
                        near_ptr, near_held, pivots, top, rate, True, DROP, ONE, LIST_PIVOTS, LIST_DEPTH, LANES
                    )
                    at, end, ranks, heavier, ranks_low, heavier_low = _inside(
                        target, by_rank, pivots, counts + near_rank, masses + near_mass,
                        at, end, ranks, heavier, ranks_low, heavier_low,
                    )  # fmt: skip
                    if tl.max(near_held, 0) > 2 * LIST_DEPTH:
                        narrow_ptr = list_ptr + SLOTS * LANES
                        near_held = narrowed(near_ptr, narrow_ptr, near_held, at, end, DROP, DEPTH, LANES)
                        near_ptr, near_rank, near_mass = narrow_ptr, ranks, heavier
                if (fits != 0) & (ranks_low - ranks == 1):
                    at, answer = only_entry(near_ptr, near_held, at, end, DROP, LANES)

                # the target lies among the ids whose image is `at`
                one = mass_of(number_of(at, DROP), top, rate, ONE)[1]
                if query == 0:
                    kept = heavier + (target - ranks) * one
                elif query == 1:
                    kept = heavier + (target - heavier + one - 1) // one * one
                elif (fits == 0) | (ranks_low - ranks > 1):
                    n = (target - heavier - 1) // one
                    if fits != 0:
                        answer = nth_listed(near_ptr, near_held, num_ids, at, n, DROP, LIST_PIVOTS, LANES)
                    else:
                        answer = _nth(row, num_ids, at, n, DROP, DEPTH * LANES)
                        passes += 1
        tl.store(out_ptr + number, answer)
        tl.store(passes_ptr + number, passes)
