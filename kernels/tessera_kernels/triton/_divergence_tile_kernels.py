"""Triton kernels of the KL divergences without logits; the picture, the passes and the launches are in `_divergence_tiles`.

A tile's epilogue takes its accumulator a quarter of the columns at a time: what is read of the teacher and written of the
slopes is then a quarter of a tile in registers and shared memory. The state's numbers are listed at `STATE` there.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from tessera_kernels.triton import _logit_tiles as tiles
from tessera_kernels.triton._divergence_math import (
    REVERSE,
    label_slopes,
    log_ratio_of_sums,
    mixed_loss,
    probabilities,
    slope_sum_of_kl,
    term_and_slope,
)
from tessera_kernels.triton._row_math import LOG2_E, LOWEST, exp, without_shortfall


@triton.jit
def _sums_of_both(s, theirs, row, column, left, top, ids, own, inv_tau, HARD: tl.constexpr, COLD: tl.constexpr):
    """Return a quarter's sum e^u; the label's logit or 0, and without it sum e^s and s e^s; the teacher's maximum and sum,
    and sum e^u x log2 e as it is with that maximum."""
    scale = inv_tau * LOG2_E
    e, logit, rest, moment = tiles.powers_of_quarter(s, top, ids, own, inv_tau, HARD, COLD)
    t = tl.where(ids < left, theirs.load([row, column]), LOWEST)
    their_top = tl.max(t, 1)
    their_mass = tl.sum(tl.exp2((t - their_top[:, None]) * scale), 1)
    mean = tl.sum(e * (((t - s) - (their_top - top)[:, None]) * scale), 1)
    return tl.sum(e, 1), logit, rest, moment, their_top, their_mass, mean


@triton.jit
def _joined(a_top, a_mass, a_mean, a_own, b_top, b_mass, b_mean, b_own, scale):
    """Join two parts of a row's tile: the teacher's maxima and sums, and the means, to the student's sums `own`."""
    top = tl.maximum(a_top, b_top)
    a_fall, b_fall = (a_top - top) * scale, (b_top - top) * scale
    mass = tl.exp2(a_fall) * a_mass + tl.exp2(b_fall) * b_mass
    return top, mass, (a_mean + a_fall * a_own) + (b_mean + b_fall * b_own), a_own + b_own


@triton.jit(do_not_specialize=["num_rows"])
def sum_tiles(
    hidden, head, theirs, labels, partials, found, num_rows, vocab, width, inv_tau, HARD: tl.constexpr,
    COLD: tl.constexpr, LIFT: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Write a stripe's partials, both models', and with HARD the labels' logits. Labels count from the stripe's first id."""
    blocks_x, blocks_v = tl.cdiv(num_rows, BLOCK_X), tl.cdiv(vocab, BLOCK_V)
    quarter: tl.constexpr = BLOCK_V // 4
    for tile in tl.range(tl.program_id(0), blocks_x * blocks_v, tl.num_programs(0)):
        row, block = tiles.place_of(tile, blocks_x, blocks_v, BLOCK_X, GROUP)
        column = block * BLOCK_V
        total = tiles.product_tile(hidden, head, row, column, width, LIFT, BLOCK_X, BLOCK_V, BLOCK_D)
        rows, left = row + tl.arange(0, BLOCK_X), vocab - column
        inside, place, step = rows < num_rows, partials + block * num_rows + rows, blocks_v * num_rows
        own = tl.full([BLOCK_X, 1], -1, tl.int32)
        if HARD:
            here, own = tiles.labels_within(labels, rows, inside, column, BLOCK_V)
        total = tl.where(tl.arange(0, BLOCK_V)[None, :] < left, total, LOWEST)
        top = tl.max(total, 1)
        a, b, c, d = tiles.quarters(total, BLOCK_X, BLOCK_V)
        ids = tl.arange(0, quarter)[None, :]
        a_mass, a_logit, a_rest, a_moment, a_top, a_theirs, a_mean = _sums_of_both(
            a, theirs, row, column, left, top, ids, own, inv_tau, HARD, COLD
        )
        b_mass, b_logit, b_rest, b_moment, b_top, b_theirs, b_mean = _sums_of_both(
            b, theirs, row, column + quarter, left, top, ids + quarter, own, inv_tau, HARD, COLD
        )
        c_mass, c_logit, c_rest, c_moment, c_top, c_theirs, c_mean = _sums_of_both(
            c, theirs, row, column + 2 * quarter, left, top, ids + 2 * quarter, own, inv_tau, HARD, COLD
        )
        d_mass, d_logit, d_rest, d_moment, d_top, d_theirs, d_mean = _sums_of_both(
            d, theirs, row, column + 3 * quarter, left, top, ids + 3 * quarter, own, inv_tau, HARD, COLD
        )
        tl.store(place, top, mask=inside)
        tl.store(place + step, (a_mass + b_mass) + (c_mass + d_mass), mask=inside)
        if HARD:
            tl.store(found + rows, (a_logit + b_logit) + (c_logit + d_logit), mask=here & inside)
            tl.store(place + 2 * step, (a_rest + b_rest) + (c_rest + d_rest), mask=inside)
            tl.store(place + 3 * step, (a_moment + b_moment) + (c_moment + d_moment), mask=inside)
        scale = inv_tau * LOG2_E
        e_top, e_theirs, e_mean, e_mass = _joined(
            a_top, a_theirs, a_mean, a_mass, b_top, b_theirs, b_mean, b_mass, scale
        )
        f_top, f_theirs, f_mean, f_mass = _joined(
            c_top, c_theirs, c_mean, c_mass, d_top, d_theirs, d_mean, d_mass, scale
        )
        their_top, their_mass, mean, _ = _joined(
            e_top, e_theirs, e_mean, e_mass, f_top, f_theirs, f_mean, f_mass, scale
        )
        tl.store(place + 4 * step, mean, mask=inside)
        tl.store(place + 5 * step, their_top, mask=inside)
        tl.store(place + 6 * step, their_mass, mask=inside)


@triton.jit
def fold_tiles(
    partials, state, blocks, num_rows, begun, inv_tau, REVERSED: tl.constexpr, HARD: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Fold what ROWS rows have of a stripe's tiles into their state, STEP tiles at a time."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, step, scale = rows < num_rows, blocks * num_rows, inv_tau * LOG2_E
    carried, place = inside & (begun != 0), state + rows
    top, their_top = tl.load(place, mask=carried, other=LOWEST), tl.load(place + num_rows, mask=carried, other=LOWEST)
    mass = tl.load(place + 2 * num_rows, mask=carried, other=0.0)
    their_mass = tl.load(place + 3 * num_rows, mask=carried, other=0.0)
    mean = tl.load(place + 4 * num_rows, mask=carried, other=0.0)
    rest = tl.load(place + 5 * num_rows, mask=carried, other=0.0)
    moment = tl.load(place + 6 * num_rows, mask=carried, other=0.0)
    for start in range(0, blocks, STEP):
        tile = start + tl.arange(0, STEP)[:, None]
        there, cell = (tile < blocks) & inside[None, :], tile * num_rows + rows[None, :]
        tops = tl.load(partials + cell, mask=there, other=LOWEST)
        their_tops = tl.load(partials + 5 * step + cell, mask=there, other=LOWEST)
        masses = tl.load(partials + step + cell, mask=there, other=0.0)
        their_masses = tl.load(partials + 6 * step + cell, mask=there, other=0.0)
        before, their_before = top, their_top
        top, their_top = tl.maximum(top, tl.max(tops, 0)), tl.maximum(their_top, tl.max(their_tops, 0))
        rise, rises = before - top, tops - top[None, :]
        their_rise, their_rises = their_before - their_top, their_tops - their_top[None, :]
        past, fall = tl.exp2(rise * scale), tl.exp2(rises * scale)
        if REVERSED:
            means = tl.load(partials + 4 * step + cell, mask=there, other=0.0)
            mean = past * (mean + (their_rise - rise) * scale * mass)
            mean += tl.sum(fall * (means + (their_rises - rises) * scale * masses), 0)
        mass = past * mass + tl.sum(fall * masses, 0)
        their_mass = tl.exp2(their_rise * scale) * their_mass + tl.sum(tl.exp2(their_rises * scale) * their_masses, 0)
        if HARD:
            cold_past, cold_fall = exp(rise), exp(rises)
            rest = cold_past * rest + tl.sum(cold_fall * tl.load(partials + 2 * step + cell, mask=there, other=0.0), 0)
            moment = cold_past * moment + tl.sum(
                cold_fall * tl.load(partials + 3 * step + cell, mask=there, other=0.0), 0
            )
    tl.store(place, top, mask=inside)
    tl.store(place + num_rows, their_top, mask=inside)
    tl.store(place + 2 * num_rows, mass, mask=inside)
    tl.store(place + 3 * num_rows, their_mass, mask=inside)
    tl.store(place + 4 * num_rows, mean, mask=inside)
    tl.store(place + 5 * num_rows, rest, mask=inside)
    tl.store(place + 6 * num_rows, moment, mask=inside)


@triton.jit
def finish_state(
    state, labels, exact, losses, unit, vocab, num_rows, ignore_index, inv_tau, soft_weight, label_weight, z_loss,
    KIND: tl.constexpr, HARD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Turn the sums of ROWS rows into what their slopes need, and write the labels' share of their losses.

    A row that does not count is left with shares of 0.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, place = rows < num_rows, state + rows
    label = tl.load(labels + rows, mask=inside, other=0)
    top = tl.load(place, mask=inside, other=0.0)
    mass = tl.load(place + 2 * num_rows, mask=inside, other=1.0)
    their_mass = tl.load(place + 3 * num_rows, mask=inside, other=1.0)
    mean = tl.load(place + 4 * num_rows, mask=inside, other=0.0)
    rest, own, known = mass * 0.0, mass * 0.0, mass == mass
    if HARD:
        own = tl.load(exact + rows, mask=inside, other=0.0)
        moment = tl.load(place + 6 * num_rows, mask=inside, other=0.0)
        found = tl.load(place + 7 * num_rows, mask=inside, other=0.0)
        rest = without_shortfall(tl.load(place + 5 * num_rows, mask=inside, other=0.0), moment, own, found, True)
        known = (label >= 0) & (label < vocab)
    counts = label != ignore_index
    scale = tl.where((not HARD) | known, tl.load(unit), float("nan"))
    moved = their_mass - mass
    hard_factor, hard_own = label_slopes(top, rest, own, scale * label_weight, z_loss)
    tl.store(place + 2 * num_rows, tl.where(counts, 1.0 / mass, 0.0), mask=inside)
    tl.store(place + 3 * num_rows, tl.where(counts, 1.0 / their_mass, 0.0), mask=inside)
    tl.store(place + 4 * num_rows, log_ratio_of_sums(mass, moved), mask=inside)
    tl.store(place + 5 * num_rows, scale * soft_weight * inv_tau, mask=inside)
    tl.store(place + 6 * num_rows, slope_sum_of_kl(mass, moved, mean, KIND), mask=inside)
    tl.store(place + 7 * num_rows, hard_factor, mask=inside)
    tl.store(place + 8 * num_rows, hard_own, mask=inside)
    loss = mixed_loss(mass * 0.0, soft_weight, label_weight, z_loss, top, rest, own, label, vocab, HARD)
    tl.store(losses + rows, tl.where(counts, loss, 0.0), mask=inside)


@triton.jit
def _quarter_slopes(
    s, theirs, slopes, row, column, ids, own, left, top, their_top, share, their_share, shift, soft, slope_sum, hard_factor,
    hard_own, inv_tau, weight, f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8,
    KIND: tl.constexpr, HARD: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Write a quarter's slopes when WRITE; return the rows' sums q F(r)."""
    t, counts = theirs.load([row, column]), share[:, None] != 0.0
    p, q, r = probabilities(
        s, t, top[:, None], their_top[:, None], share[:, None], their_share[:, None], shift[:, None], inv_tau
    )
    term, slope = term_and_slope(p, q, r, weight, f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8, KIND)
    if WRITE:
        slope = soft[:, None] * (q * (slope - slope_sum[:, None]) if KIND == REVERSE else slope)
        if HARD:
            slope += tl.where(ids == own, hard_own[:, None], exp(s - top[:, None]) * hard_factor[:, None])
        slopes.store([row, column], tl.where(counts, slope, 0.0).to(slopes.dtype))
    return tl.sum(tl.where(counts & (ids < left), term, 0.0), 1)


@triton.jit(do_not_specialize=["num_rows"])
def slope_tiles(
    hidden, head, theirs, slopes, terms, labels, state, num_rows, vocab, width, inv_tau, weight,
    f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8,
    KIND: tl.constexpr, HARD: tl.constexpr, WRITE: tl.constexpr, LIFT: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write a stripe's slopes and add each tile's part of the rows' divergences to `terms` [tiles, rows]."""
    blocks_x, blocks_v = tl.cdiv(num_rows, BLOCK_X), tl.cdiv(vocab, BLOCK_V)
    quarter: tl.constexpr = BLOCK_V // 4
    for tile in tl.range(tl.program_id(0), blocks_x * blocks_v, tl.num_programs(0)):
        row, block = tiles.place_of(tile, blocks_x, blocks_v, BLOCK_X, GROUP)
        column = block * BLOCK_V
        total = tiles.product_tile(hidden, head, row, column, width, LIFT, BLOCK_X, BLOCK_V, BLOCK_D)
        rows = row + tl.arange(0, BLOCK_X)
        inside, place, left = rows < num_rows, state + rows, vocab - column
        top, their_top = tl.load(place, mask=inside, other=0.0), tl.load(place + num_rows, mask=inside, other=0.0)
        share = tl.load(place + 2 * num_rows, mask=inside, other=0.0)
        their_share = tl.load(place + 3 * num_rows, mask=inside, other=0.0)
        shift = tl.load(place + 4 * num_rows, mask=inside, other=0.0)
        soft, slope_sum = tl.load(place + 5 * num_rows, mask=inside, other=0.0), shift
        if KIND == REVERSE:
            slope_sum = tl.load(place + 6 * num_rows, mask=inside, other=0.0)
        own, hard_factor, hard_own = tl.full([BLOCK_X, 1], -1, tl.int32), shift, shift
        if HARD:
            _, own = tiles.labels_within(labels, rows, inside, column, BLOCK_V)
            hard_factor = tl.load(place + 7 * num_rows, mask=inside, other=0.0)
            hard_own = tl.load(place + 8 * num_rows, mask=inside, other=0.0)
        a, b, c, d = tiles.quarters(total, BLOCK_X, BLOCK_V)
        ids = tl.arange(0, quarter)[None, :]
        term_a = _quarter_slopes(
            a, theirs, slopes, row, column, ids, own, left, top, their_top, share, their_share, shift, soft, slope_sum,
            hard_factor, hard_own, inv_tau, weight, f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8,
            KIND, HARD, WRITE,
        )  # fmt: skip
        term_b = _quarter_slopes(
            b, theirs, slopes, row, column + quarter, ids + quarter, own, left, top, their_top, share, their_share, shift, soft,
            slope_sum, hard_factor, hard_own, inv_tau, weight, f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8,
            KIND, HARD, WRITE,
        )  # fmt: skip
        term_c = _quarter_slopes(
            c, theirs, slopes, row, column + 2 * quarter, ids + 2 * quarter, own, left, top, their_top, share, their_share,
            shift, soft, slope_sum, hard_factor, hard_own, inv_tau, weight,
            f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8, KIND, HARD, WRITE,
        )  # fmt: skip
        term_d = _quarter_slopes(
            d, theirs, slopes, row, column + 3 * quarter, ids + 3 * quarter, own, left, top, their_top, share, their_share,
            shift, soft, slope_sum, hard_factor, hard_own, inv_tau, weight,
            f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8, KIND, HARD, WRITE,
        )  # fmt: skip
        sums = terms + block * num_rows + rows
        before = tl.load(sums, mask=inside, other=0.0)
        tl.store(sums, before + ((term_a + term_b) + (term_c + term_d)), mask=inside)
