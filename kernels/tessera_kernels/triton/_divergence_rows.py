"""Row kernels of the linear distillation loss: online sums over both models' logits, then loss and slopes.

A row is walked two times, or three when the slopes need a sum that needs both normalizers (skew, JSD); once less when
the product has taken the sums of the first walk (`sums_of_tiles`; reverse KL then needs its sum as skew and JSD do):

    forward   s, t -> maxima, sum e^u, sum (e^v - e^u), [sum e^u x], cross-entropy sums      u, v = (s, t - maximum) / tau
    last      s, t -> slopes, and sum q F(r)                                                 r = log p - log q

    backward  s, t -> G(r) in float16, sum q F(r), sum q G(r)                                instead of the last one, where
    scaling   s, G -> slopes, q (G - sum q G), over G                                        three are needed

Sums of tiles give log(sum e^v / sum e^u) within some 1e-7. The loss feels its square, for sum q F'(r) vanishes with r;
slopes lose that part of r. Walks over both logits keep more: log p - log q is x - log(sum e^v / sum e^u), with x = ((t -
s) - (difference of the maxima)) / tau. Near convergence both parts come from small numbers: t - s is exact, and the
quotient of the sums is 1 + sum (e^v - e^u) / sum e^u, where each difference is e^u (e^x - 1). F and G:
`_divergence_math`. Powers are of two, u, v and x times log2 e: an id then takes about 30 instructions a walk, which HBM
hides. Only a row's last tile, cut off by the vocabulary's end, is masked.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from tessera_kernels.triton._divergence_math import (
    FORWARD,
    REVERSE,
    label_slopes,
    log_ratio_of_sums,
    mixed_loss,
    probabilities,
    slope_sum_of_kl,
    term_and_slope,
)
from tessera_kernels.triton._row_math import (
    LOG2_E,
    LOWEST,
    exp,
    found_logit,
    powers_of_two,
    read_logits,
    without_shortfall,
    write_slopes_of,
    write_zeros,
)

THREE_WALKS = tl.constexpr(2)
"""Divergences from this number on walk a row three times."""
MOST_KEPT = tl.constexpr(65504.0)
"""The largest number of float16. G(r) leaves it, if at all, where q is less than 1e-300."""


@triton.jit
def _tile_sums(
    student, teacher, columns, width, padded, own_id, s_top, t_top, masses, moves, means, rests, moments, inv_tau,
    KIND: tl.constexpr, HARD: tl.constexpr, COLD: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Carry the sums over one tile; they fade only where it has a new maximum, which few tiles have."""
    s, t = (
        read_logits(student, columns, width, padded, LOWEST, LAST),
        read_logits(teacher, columns, width, padded, LOWEST, LAST),
    )
    s_new, t_new = tl.maximum(s_top, tl.max(s, 0)), tl.maximum(t_top, tl.max(t, 0))
    scale = inv_tau * LOG2_E
    if (s_new > s_top) | (t_new > t_top):
        turn = ((t_top - t_new) - (s_top - s_new)) * scale
        s_fall, change = powers_of_two((s_top - s_new) * scale, (t_top - t_new) * scale, turn)
        moves = tl.exp2((t_top - t_new) * scale) * moves + change * masses
        if KIND == REVERSE:
            means = s_fall * (means + tl.where(masses == 0.0, 0.0, turn * masses))
        masses = s_fall * masses
        if HARD:
            cold_fall = exp(s_top - s_new) if COLD else s_fall
            rests, moments = cold_fall * rests, cold_fall * moments
    x = ((t - s) - (t_new - s_new)) * scale
    e, difference = powers_of_two((s - s_new) * scale, (t - t_new) * scale, x)
    masses += e
    moves += difference
    if KIND == REVERSE:
        means += e * x
    if HARD:
        cold = exp(s - s_new) if COLD else e
        cold = tl.where(columns == own_id, 0.0, cold)
        rests += cold
        moments += tl.where(cold > 0.0, cold * s, 0.0)
    return s_new, t_new, masses, moves, means, rests, moments


@triton.jit
def row_sums(
    student, teacher, first_id, width, padded, label, s_top, t_top, mass, moved, mean, rest, moment, inv_tau,
    KIND: tl.constexpr, HARD: tl.constexpr, COLD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Carry a row's sums over one more stretch of the vocabulary.

    mass = sum e^u, moved = sum (e^v - e^u), mean = sum e^u x log2 e (reverse KL), rest = sum of e^(s - maximum) without
    the label (HARD; COLD = the temperature is not one), moment = the same sum of s e^(s - maximum).
    """
    lanes = tl.arange(0, BLOCK)
    first = lanes == 0
    masses, moves = tl.where(first, mass, 0.0), tl.where(first, moved, 0.0)
    means, rests, moments = tl.where(first, mean, 0.0), tl.where(first, rest, 0.0), tl.where(first, moment, 0.0)
    whole, own_id = width // BLOCK * BLOCK, (label - first_id).to(tl.int32)
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        s_top, t_top, masses, moves, means, rests, moments = _tile_sums(
            student, teacher, start + lanes, width, padded, own_id, s_top, t_top, masses, moves, means, rests,
            moments, inv_tau, KIND, HARD, COLD, False,
        )  # fmt: skip
    if whole < width:
        s_top, t_top, masses, moves, means, rests, moments = _tile_sums(
            student, teacher, whole + lanes, width, padded, own_id, s_top, t_top, masses, moves, means, rests,
            moments, inv_tau, KIND, HARD, COLD, True,
        )  # fmt: skip
    return s_top, t_top, tl.sum(masses, 0), tl.sum(moves, 0), tl.sum(means, 0), tl.sum(rests, 0), tl.sum(moments, 0)


@triton.jit
def sums_of_tiles(partials, row, blocks, num_rows, inv_tau, HARD: tl.constexpr, TILES: tl.constexpr):
    """Return a row's maximum and sums from those of its tiles (`_logit_tiles`). TILES = a power of two that holds all."""
    tiles, step = tl.arange(0, TILES), blocks * num_rows
    there, place = tiles < blocks, partials + row + tiles * num_rows
    tops = tl.load(place, mask=there, other=LOWEST)
    top = tl.max(tops, 0)
    mass = tl.sum(exp((tops - top) * inv_tau) * tl.load(place + step, mask=there, other=0.0), 0)
    rest, moment = mass * 0.0, mass * 0.0
    if HARD:
        fall = exp(tops - top)
        rest = tl.sum(fall * tl.load(place + 2 * step, mask=there, other=0.0), 0)
        moment = tl.sum(fall * tl.load(place + 3 * step, mask=there, other=0.0), 0)
    return top, mass, rest, moment


@triton.jit
def _ratio_tile(
    student, teacher, ratios, columns, width, padded, s_top, t_top, s_share, t_share, shift, inv_tau, weight, lift,
    f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8,
    KIND: tl.constexpr, WRITE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Keep lift G(r) of one tile when WRITE; return q F(r), and q times what is kept."""
    s, t = (
        read_logits(student, columns, width, padded, LOWEST, LAST),
        read_logits(teacher, columns, width, padded, LOWEST, LAST),
    )
    p, q, r = probabilities(s, t, s_top, t_top, s_share, t_share, shift, inv_tau)
    term, slope = term_and_slope(p, q, r, weight, f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8, KIND)
    kept = tl.clamp(slope * lift, -MOST_KEPT, MOST_KEPT, tl.PropagateNan.ALL).to(ratios.dtype.element_ty)
    if WRITE:
        if LAST:
            tl.store(ratios + columns, kept, mask=columns < padded)
        else:
            tl.store(ratios + columns, kept)
    return term, q * kept.to(tl.float32)


@triton.jit
def ratio_walk(
    student, teacher, ratios, width, padded, s_top, t_top, mass, moved, inv_tau, weight, lift,
    f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8,
    KIND: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk a row backward; keep lift G(r) when WRITE; return sum q F(r), and the sum of q times what is kept.

    The sum is over what was rounded: of one id that has nearly all of q, G and the sum then round alike.
    """
    shift, s_share, t_share = log_ratio_of_sums(mass, moved), 1.0 / mass, 1.0 / (mass + moved)
    terms, slopes = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    whole = width // BLOCK
    if whole * BLOCK < width:
        terms, slopes = _ratio_tile(
            student, teacher, ratios, whole * BLOCK + tl.arange(0, BLOCK), width, padded, s_top, t_top, s_share, t_share,
            shift, inv_tau, weight, lift, f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8, KIND, WRITE, True,
        )  # fmt: skip
    for step in tl.range(0, whole, num_stages=STAGES):
        term, slope = _ratio_tile(
            student, teacher, ratios, (whole - 1 - step) * BLOCK + tl.arange(0, BLOCK), width, padded, s_top, t_top, s_share,
            t_share, shift, inv_tau, weight, lift,
            f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8, KIND, WRITE, False,
        )  # fmt: skip
        terms += term
        slopes += slope
    return tl.sum(terms, 0), tl.sum(slopes, 0)


@triton.jit
def _scaled_tile(
    student, ratios, slopes, columns, width, padded, own_id, s_top, per_ratio, offset, hard_factor, hard_own, inv_tau,
    HARD: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    s = read_logits(student, columns, width, padded, LOWEST, LAST)
    kept = tl.load(ratios + columns, mask=columns < padded, other=0.0) if LAST else tl.load(ratios + columns)
    slope = tl.exp2((s - s_top) * (inv_tau * LOG2_E)) * (kept.to(tl.float32) * per_ratio - offset)
    if HARD:
        slope += tl.where(columns == own_id, hard_own, exp(s - s_top) * hard_factor)
    write_slopes_of(slopes, columns, slope, width, padded, LAST)


@triton.jit
def scaling_walk(
    student, ratios, slopes, width, padded, label, s_top, mass, rest, label_logit, kept_sum, lift, soft_scale, hard_scale,
    z_loss, inv_tau, HARD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk a row forward; write slopes (see `last_walk`) over what `ratio_walk` kept of them."""
    hard_factor, hard_own = label_slopes(s_top, rest, label_logit, hard_scale, z_loss)
    own_id, lanes, whole = label.to(tl.int32), tl.arange(0, BLOCK), width // BLOCK
    per_ratio = soft_scale / mass / lift
    for step in tl.range(0, whole, num_stages=STAGES):
        _scaled_tile(
            student, ratios, slopes, step * BLOCK + lanes, width, padded, own_id, s_top, per_ratio, per_ratio * kept_sum,
            hard_factor, hard_own, inv_tau, HARD, False,
        )  # fmt: skip
    for step in range(whole, (padded + BLOCK - 1) // BLOCK):
        _scaled_tile(
            student, ratios, slopes, step * BLOCK + lanes, width, padded, own_id, s_top, per_ratio, per_ratio * kept_sum,
            hard_factor, hard_own, inv_tau, HARD, True,
        )  # fmt: skip


@triton.jit
def _last_tile(
    student, teacher, slopes, columns, width, padded, own_id, s_top, t_top, s_share, t_share, shift, slope_sum,
    soft_scale, hard_factor, hard_own, inv_tau, weight,
    f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8,
    KIND: tl.constexpr, HARD: tl.constexpr, WRITE: tl.constexpr, IN_PLACE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Write one tile's slopes when WRITE; return q F(r) of its ids."""
    s, t = (
        read_logits(student, columns, width, padded, LOWEST, LAST),
        read_logits(teacher, columns, width, padded, LOWEST, LAST),
    )
    p, q, r = probabilities(s, t, s_top, t_top, s_share, t_share, shift, inv_tau)
    term, slope = term_and_slope(p, q, r, weight, f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8, KIND)
    if WRITE:
        slope = soft_scale * (slope if KIND == FORWARD else q * (slope - slope_sum))
        if HARD:
            slope += tl.where(columns == own_id, hard_own, exp(s - s_top) * hard_factor)
        if IN_PLACE:
            tl.debug_barrier()
        write_slopes_of(slopes, columns, slope, width, padded, LAST)
    return term


@triton.jit
def last_walk(
    student, teacher, slopes, first_id, width, padded, label, s_top, t_top, mass, moved, rest, label_logit,
    slope_sum, soft_scale, hard_scale, z_loss, inv_tau, weight,
    f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8,
    KIND: tl.constexpr, HARD: tl.constexpr, WRITE: tl.constexpr, BACKWARD: tl.constexpr, IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk a stretch of a row, backward when BACKWARD; write its slopes when WRITE; return its sum q F(r).

    slopes = soft_scale (q G - q slope_sum) + hard_scale (softmax(s) - onehot, with the z-loss). IN_PLACE: they lie over
    logits of the student that the walk has behind it, or has just read.
    """
    shift, s_share, t_share = log_ratio_of_sums(mass, moved), 1.0 / mass, 1.0 / (mass + moved)
    hard_factor, hard_own = label_slopes(s_top, rest, label_logit, hard_scale, z_loss)
    own_id = (label - first_id).to(tl.int32)
    lanes, terms = tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32)
    whole, steps = width // BLOCK, (padded + BLOCK - 1) // BLOCK
    for step in range(steps - whole if BACKWARD else 0):
        columns = (steps - 1 - step) * BLOCK + lanes
        terms += _last_tile(
            student, teacher, slopes, columns, width, padded, own_id, s_top, t_top, s_share, t_share, shift, slope_sum,
            soft_scale, hard_factor, hard_own, inv_tau, weight,
            f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8, KIND, HARD, WRITE, IN_PLACE, True,
        )  # fmt: skip
    for step in tl.range(0, whole, num_stages=STAGES):
        columns = (whole - 1 - step if BACKWARD else step) * BLOCK + lanes
        terms += _last_tile(
            student, teacher, slopes, columns, width, padded, own_id, s_top, t_top, s_share, t_share, shift, slope_sum,
            soft_scale, hard_factor, hard_own, inv_tau, weight,
            f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8, KIND, HARD, WRITE, IN_PLACE, False,
        )  # fmt: skip
    for step in range(steps if BACKWARD else whole, steps):
        columns = step * BLOCK + lanes
        terms += _last_tile(
            student, teacher, slopes, columns, width, padded, own_id, s_top, t_top, s_share, t_share, shift, slope_sum,
            soft_scale, hard_factor, hard_own, inv_tau, weight,
            f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8, KIND, HARD, WRITE, IN_PLACE, True,
        )  # fmt: skip
    return tl.sum(terms, 0)


@triton.jit
def row_kernel(
    student, teacher, slopes, ratios, labels, exact, losses, unit, partials, blocks, num_rows, vocab, padded, lift,
    ignore_index, inv_tau, weight, soft_weight, label_weight, z_loss,
    f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8,
    KIND: tl.constexpr, HARD: tl.constexpr, COLD: tl.constexpr, SHORT: tl.constexpr, WRITE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One row of both models: its loss and, with WRITE, the student's slopes. TILES: 0, or its tiles have been summed."""
    RATIOS: tl.constexpr = KIND >= THREE_WALKS or (TILES > 0 and KIND == REVERSE)
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    s, t, dz = student + row * padded, teacher + row * padded, slopes + row * padded
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if WRITE:
            write_zeros(dz, padded, BLOCK)
    else:
        zero = tl.full((), 0.0, tl.float32)
        if TILES:
            s_top, mass, rest, moment = sums_of_tiles(partials, row, blocks, num_rows, inv_tau, HARD, TILES)
            behind = partials + 4 * blocks * num_rows
            t_top, moved, _, _ = sums_of_tiles(behind, row, blocks, num_rows, inv_tau, False, TILES)
            moved, mean = moved - mass, zero
        else:
            s_top, t_top, mass, moved, mean, rest, moment = row_sums(
                s, t, 0, vocab, padded, label, zero + LOWEST, zero + LOWEST, zero, zero, zero, zero, zero, inv_tau,
                KIND, HARD, COLD, BLOCK, STAGES,
            )  # fmt: skip
        own = zero
        if HARD:
            own = tl.load(exact + row)
            rest = without_shortfall(rest, moment, own, found_logit(s, 0, vocab, label, zero), SHORT)
        known = (not HARD) | ((label >= 0) & (label < vocab))
        scale = tl.where(known, tl.load(unit), float("nan"))
        if RATIOS:
            kept = ratios + row * padded
            divergence, slope_sum = ratio_walk(
                s, t, kept, vocab, padded, s_top, t_top, mass, moved, inv_tau, weight, lift,
                f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8, KIND, WRITE, BLOCK, STAGES,
            )  # fmt: skip
            if WRITE:
                tl.debug_barrier()
                scaling_walk(
                    s, kept, dz, vocab, padded, label, s_top, mass, rest, own, slope_sum, lift,
                    scale * soft_weight * inv_tau, scale * label_weight, z_loss, inv_tau, HARD, BLOCK, STAGES,
                )  # fmt: skip
        else:
            divergence = last_walk(
                s, t, dz, 0, vocab, padded, label, s_top, t_top, mass, moved, rest, own,
                slope_sum_of_kl(mass, moved, mean, KIND), scale * soft_weight * inv_tau, scale * label_weight, z_loss,
                inv_tau, weight, f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8,
                KIND, HARD, WRITE, True, False, BLOCK, STAGES,
            )  # fmt: skip
        loss = mixed_loss(divergence, soft_weight, label_weight, z_loss, s_top, rest, own, label, vocab, HARD)
        tl.store(losses + row, loss)


@triton.jit
def tile_sums(
    student, teacher, labels, state, first_id, width, padded, num_rows, inv_tau,
    KIND: tl.constexpr, HARD: tl.constexpr, COLD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Carry one row's sums over one tile of the vocabulary; the first tile starts them."""
    row = tl.program_id(0).to(tl.int64)
    begun = first_id > 0
    place = state + row
    s_top, t_top = tl.load(place, mask=begun, other=LOWEST), tl.load(place + num_rows, mask=begun, other=LOWEST)
    mass = tl.load(place + 2 * num_rows, mask=begun, other=0.0)
    moved = tl.load(place + 3 * num_rows, mask=begun, other=0.0)
    mean = tl.load(place + 4 * num_rows, mask=begun, other=0.0)
    rest = tl.load(place + 5 * num_rows, mask=begun, other=0.0)
    moment = tl.load(place + 6 * num_rows, mask=begun, other=0.0)
    found = tl.load(place + 7 * num_rows, mask=begun, other=0.0)
    label = tl.load(labels + row)
    s_top, t_top, mass, moved, mean, rest, moment = row_sums(
        student + row * padded, teacher + row * padded, first_id, width, padded, label, s_top, t_top,
        mass, moved, mean, rest, moment, inv_tau, KIND, HARD, COLD, BLOCK, STAGES,
    )  # fmt: skip
    if HARD:
        found = found_logit(student + row * padded, first_id, width, label, found)
    tl.store(place, s_top)
    tl.store(place + num_rows, t_top)
    tl.store(place + 2 * num_rows, mass)
    tl.store(place + 3 * num_rows, moved)
    tl.store(place + 4 * num_rows, mean)
    tl.store(place + 5 * num_rows, rest)
    tl.store(place + 6 * num_rows, moment)
    tl.store(place + 7 * num_rows, found)


@triton.jit
def tile_slopes(
    student, teacher, slopes, slope_stride, labels, exact, losses, state, unit, first_id, width, padded, vocab, num_rows,
    ignore_index, inv_tau, weight, soft_weight, label_weight, z_loss,
    f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8,
    KIND: tl.constexpr, HARD: tl.constexpr, SHORT: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row's share of the loss and its slopes in one tile of the vocabulary, from the finished sums."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    dz, place = slopes + row * slope_stride, state + row
    loss = tl.load(losses + row, mask=first_id > 0, other=0.0)
    if label == ignore_index:
        if WRITE:
            write_zeros(dz, padded, BLOCK)
    else:
        s_top, t_top = tl.load(place), tl.load(place + num_rows)
        mass, moved, mean = (
            tl.load(place + 2 * num_rows), tl.load(place + 3 * num_rows), tl.load(place + 4 * num_rows)
        )  # fmt: skip
        rest, own = tl.load(place + 5 * num_rows), 0.0
        if HARD:
            own = tl.load(exact + row)
            found = tl.load(place + 7 * num_rows)
            rest = without_shortfall(rest, tl.load(place + 6 * num_rows), own, found, SHORT)
        known = (not HARD) | ((label >= 0) & (label < vocab))
        scale = tl.where(known, tl.load(unit), float("nan"))
        divergence = last_walk(
            student + row * padded, teacher + row * padded, dz, first_id, width, padded, label, s_top, t_top, mass,
            moved, rest, own, slope_sum_of_kl(mass, moved, mean, KIND), scale * soft_weight * inv_tau,
            scale * label_weight, z_loss, inv_tau, weight,
            f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8, KIND, HARD, WRITE, False, True, BLOCK, STAGES,
        )  # fmt: skip
        share = mixed_loss(divergence, soft_weight, label_weight, z_loss, s_top, rest, own, label, vocab, HARD)
        loss += share if first_id == 0 else soft_weight * divergence
    tl.store(losses + row, loss)
