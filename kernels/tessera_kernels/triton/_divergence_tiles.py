"""Linear distillation by KL without logits: two passes over the vocabulary, whose products keep the student's to themselves.

    first    both models' logits of a stripe of ids -> each row's maxima and sums, tile by tile, folded into its state
    then     what is the same for all of a row's ids: maxima, normalizers, sum q G, what slopes are multiplied by
    second   the teacher's logits of a stripe, float32 -> the student's, and in their product's epilogue the row's part of
             the divergence, and slopes -> d hidden (a sum over stripes), d head (finished)

                 stripe ->                     HBM        hidden states and heads by TMA; the teacher's logits and the slopes
          +-------+-------+- ...                          [rows, stripe], 6 bytes an id; sums, 16 to 28 bytes a row and tile
        X | tile  | tile  |  128 x 256         shared     STAGES tiles of both operands; a quarter of a tile of either
          +-------+-------+                    registers  the float32 accumulator; a quarter of the teacher's tile

Forward KL writes no logits in its first pass. Reverse KL needs sum q r there, and so the teacher's. The care for digits is
that of `_divergence_rows`: sums of tiles give both normalizers, and of log p - log q what the loss feels the square of.
Reference: `reference.linear_distillation`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tessera_kernels.checks import is_interpreting
from tessera_kernels.triton import _logit_tiles as tiles
from tessera_kernels.triton._divergence_rows import (
    REVERSE,
    label_slopes,
    log_ratio_of_sums,
    mixed_loss,
    probabilities,
    slope_sum_of_kl,
    term_and_slope,
)
from tessera_kernels.triton._gradient_sums import GradientSums, product
from tessera_kernels.triton._launch import num_programs
from tessera_kernels.triton._loss_plans import padded_columns, pieces, plan_columns, plan_stripes
from tessera_kernels.triton._row_math import LOG2_E, LOWEST, exp, without_shortfall

STATE = 9
"""Numbers of a row that pass from stripe to stripe. First: both maxima, both sums at the temperature, sum e^u x, of the
cross-entropy's sum and moment without the label, and its logit as the products have it. Then: both maxima, both shares of
the maxima, the shift of r, what the divergence's slopes are multiplied by, sum q G, and the two slopes of the label's loss."""

STATE_BYTES = 4 * STATE + 16
"""What a row takes beside its stripe: that, its label's logit, its loss, its label's place."""

PARTIALS = 7
"""Numbers of a row and tile: maximum, sum, the cross-entropy's sum and moment, sum e^u x; the teacher's maximum and sum."""


class Cut(NamedTuple):
    """How a product is cut up."""

    columns: int
    stages: int
    num_warps: int
    programs: int  # on a multiprocessor

    def launch(self, rows: int, columns: int, like: Tensor) -> tuple[int, dict[str, Any]]:
        """Return the grid and the options of a launch."""
        blocks = triton.cdiv(rows, tiles.BLOCK_X) * triton.cdiv(columns, self.columns)
        flags = {"LIFT": is_interpreting(), "num_stages": self.stages, "num_warps": self.num_warps}
        return num_programs(blocks, self.programs, like.device), flags | tiles.SHAPE | {"BLOCK_V": self.columns}


ALONE = Cut(columns=tiles.BLOCK_V, stages=tiles.STAGES, num_warps=8, programs=1)
"""Where nothing of the teacher's is read."""

READING = Cut(columns=128, stages=3, num_warps=4, programs=2)
"""Where the epilogue reads the teacher's logits: it is long, and the other program multiplies meanwhile."""

Model = tuple[Tensor, Tensor]
"""Hidden states [X, D] and head [V, D]."""


@triton.jit
def _quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    first, second = tiles.halves(tile, ROWS, COLUMNS)
    a, b = tiles.halves(first, ROWS, COLUMNS // 2)
    c, d = tiles.halves(second, ROWS, COLUMNS // 2)
    return a, b, c, d


@triton.jit
def _quarter_sums(
    s, theirs, row, column, left, top, ids, own, inv_tau, REVERSED: tl.constexpr, HARD: tl.constexpr, COLD: tl.constexpr
):
    """Return a quarter's sums: e^u; of the cross-entropy without the label e^s and s e^s; and for reverse KL the teacher's
    maximum and sum, and e^u x log2 e as it is with that maximum."""
    below, scale = s - top[:, None], inv_tau * LOG2_E
    e = tl.exp2(below * scale)
    rest, moment, their_top, their_mass, mean = top, top, top, top, top
    if HARD:
        cold = tl.where(ids == own, 0.0, exp(below) if COLD else e)
        rest, moment = tl.sum(cold, 1), tl.sum(cold * s, 1)
    if REVERSED:
        t = tl.where(ids < left, theirs.load([row, column]), LOWEST)
        their_top = tl.max(t, 1)
        their_mass = tl.sum(tl.exp2((t - their_top[:, None]) * scale), 1)
        mean = tl.sum(e * (((t - s) - (their_top - top)[:, None]) * scale), 1)
    return tl.sum(e, 1), rest, moment, their_top, their_mass, mean


@triton.jit
def _joined(a_top, a_mass, a_mean, a_own, b_top, b_mass, b_mean, b_own, scale):
    """Join two parts of a row's tile: the teacher's maxima and sums, and the means, to the student's sums `own`."""
    top = tl.maximum(a_top, b_top)
    a_fall, b_fall = (a_top - top) * scale, (b_top - top) * scale
    mass = tl.exp2(a_fall) * a_mass + tl.exp2(b_fall) * b_mass
    return top, mass, (a_mean + a_fall * a_own) + (b_mean + b_fall * b_own), a_own + b_own


@triton.jit(do_not_specialize=["num_rows"])
def _sum_tiles(
    hidden, head, theirs, labels, partials, found, num_rows, vocab, width, inv_tau, REVERSED: tl.constexpr, HARD: tl.constexpr,
    COLD: tl.constexpr, LIFT: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Write a stripe's partials, those of the teacher only with REVERSED, and with HARD the labels' logits.

    Labels count from the stripe's first id.
    """
    blocks_x, blocks_v = tl.cdiv(num_rows, BLOCK_X), tl.cdiv(vocab, BLOCK_V)
    quarter: tl.constexpr = BLOCK_V // 4
    for tile in tl.range(tl.program_id(0), blocks_x * blocks_v, tl.num_programs(0), flatten=FLATTEN):
        row, block = tiles.place_of(tile, blocks_x, blocks_v, BLOCK_X, GROUP)
        column = block * BLOCK_V
        total = tiles.product_tile(hidden, head, row, column, width, LIFT, BLOCK_X, BLOCK_V, BLOCK_D)
        rows, all_ids, left = row + tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_V)[None, :], vocab - column
        inside, place, step = rows < num_rows, partials + block * num_rows + rows, blocks_v * num_rows
        own = tl.full([BLOCK_X, 1], -1, tl.int32)
        if HARD:
            label = tl.load(labels + rows, mask=inside, other=-1)
            here = (label >= column) & (label < column + BLOCK_V) & (label < vocab)
            own = tl.where(here, label - column, -1).to(tl.int32)[:, None]
            tl.store(found + rows, tl.sum(tl.where(all_ids == own, total, 0.0), 1), mask=here & inside)
        total = tl.where(all_ids < left, total, LOWEST)
        top = tl.max(total, 1)
        a, b, c, d = _quarters(total, BLOCK_X, BLOCK_V)
        ids = tl.arange(0, quarter)[None, :]
        a_mass, a_rest, a_moment, a_top, a_theirs, a_mean = _quarter_sums(
            a, theirs, row, column, left, top, ids, own, inv_tau, REVERSED, HARD, COLD
        )
        b_mass, b_rest, b_moment, b_top, b_theirs, b_mean = _quarter_sums(
            b, theirs, row, column + quarter, left, top, ids + quarter, own, inv_tau, REVERSED, HARD, COLD
        )
        c_mass, c_rest, c_moment, c_top, c_theirs, c_mean = _quarter_sums(
            c, theirs, row, column + 2 * quarter, left, top, ids + 2 * quarter, own, inv_tau, REVERSED, HARD, COLD
        )
        d_mass, d_rest, d_moment, d_top, d_theirs, d_mean = _quarter_sums(
            d, theirs, row, column + 3 * quarter, left, top, ids + 3 * quarter, own, inv_tau, REVERSED, HARD, COLD
        )
        tl.store(place, top, mask=inside)
        tl.store(place + step, (a_mass + b_mass) + (c_mass + d_mass), mask=inside)
        if HARD:
            tl.store(place + 2 * step, (a_rest + b_rest) + (c_rest + d_rest), mask=inside)
            tl.store(place + 3 * step, (a_moment + b_moment) + (c_moment + d_moment), mask=inside)
        if REVERSED:
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
def _fold_tiles(
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
def _finish_state(
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
def _slope_tiles(
    hidden, head, theirs, slopes, terms, labels, state, num_rows, vocab, width, inv_tau, weight,
    f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8,
    KIND: tl.constexpr, HARD: tl.constexpr, WRITE: tl.constexpr, LIFT: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Write a stripe's slopes and add each tile's part of the rows' divergences to `terms` [tiles, rows]."""
    blocks_x, blocks_v = tl.cdiv(num_rows, BLOCK_X), tl.cdiv(vocab, BLOCK_V)
    quarter: tl.constexpr = BLOCK_V // 4
    for tile in tl.range(tl.program_id(0), blocks_x * blocks_v, tl.num_programs(0), flatten=FLATTEN):
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
            label = tl.load(labels + rows, mask=inside, other=-1)
            here = (label >= column) & (label < column + BLOCK_V)
            own = tl.where(here, label - column, -1).to(tl.int32)[:, None]
            hard_factor = tl.load(place + 7 * num_rows, mask=inside, other=0.0)
            hard_own = tl.load(place + 8 * num_rows, mask=inside, other=0.0)
        a, b, c, d = _quarters(total, BLOCK_X, BLOCK_V)
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


def in_tiles(
    student: Model, teacher: Model, rows_of: tuple[Tensor, Tensor, Tensor, Tensor], sums: GradientSums, write: bool,
    numbers: tuple[float, ...], budget: int, options: dict[str, Any],
) -> None:  # fmt: skip
    """Write the losses of all rows and, with `write`, add their slopes' products to `sums`, within `budget` bytes.

    `rows_of` are labels, their logits (anything where no label counts), losses (written) and the gradients' unit; `numbers`
    are (ignore_index, 1 / temperature, weight, soft and label weight, z_loss, coefficients); `options` the kernels' KIND,
    HARD and COLD. Operands must be such that `_logit_tiles.reads` them.
    """
    (hidden, head), (labels, exact, losses, unit) = student, rows_of
    num_rows, vocab = len(hidden), len(head)
    ignore_index, inv_tau, weight, soft_weight, label_weight, z_loss, *series = numbers
    kinds = {"KIND": options["KIND"], "HARD": options["HARD"]}
    cell = 4 + hidden.element_size() * write
    row_bytes = sums.room_behind(vocab - 1).nbytes
    widest = max(budget // (cell * num_rows), vocab * row_bytes // (cell * num_rows + row_bytes))
    terms_bytes = 4 * triton.cdiv(min(widest, vocab), READING.columns)
    columns = plan_columns(num_rows, vocab, id_bytes=cell, state=STATE_BYTES + terms_bytes, budget=budget)
    state = torch.zeros(STATE, num_rows, dtype=torch.float32, device=hidden.device)
    _first_pass(student, teacher, labels, state, sums, inv_tau, budget, options)
    _finish_state[(triton.cdiv(num_rows, 32),)](
        state, labels, exact, losses, unit, vocab, num_rows, ignore_index, inv_tau, soft_weight, label_weight, z_loss,
        ROWS=32, num_warps=4, **kinds,
    )  # fmt: skip
    _second_pass(
        student, teacher, (labels, losses, state), sums, write, (inv_tau, weight, *series), soft_weight, columns, kinds
    )


def _first_pass(
    student: Model, teacher: Model, labels: Tensor, state: Tensor, sums: GradientSums, inv_tau: float, budget: int,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Fold both models' sums over the vocabulary into the state."""
    (hidden, head), num_rows, vocab = student, len(student[0]), len(student[1])
    is_reverse, is_hard = options["KIND"] == REVERSE.value, options["HARD"]
    cut, partial_bytes = READING if is_reverse else ALONE, 4 * PARTIALS
    columns = max(1, (budget - STATE_BYTES * num_rows) // (partial_bytes * num_rows)) * cut.columns
    theirs = hidden
    if is_reverse:
        id_bytes = 4 + triton.cdiv(partial_bytes, cut.columns)
        most = plan_columns(num_rows, vocab, id_bytes=id_bytes, state=STATE_BYTES + partial_bytes, budget=budget)
        room = sums.room_behind(0)
        free = min(room.nbytes // (4 * num_rows), columns) // cut.columns * cut.columns
        columns = max(most // cut.columns * cut.columns or most, free)
        line = min(columns, padded_columns(vocab))
        place = (
            room if free == columns else torch.empty(2 * num_rows * line, dtype=torch.bfloat16, device=hidden.device)
        )
        theirs = place[: 2 * num_rows * line].view(torch.float32).view(num_rows, line)
    for ids in pieces(vocab, columns):
        width = ids.stop - ids.start
        blocks = triton.cdiv(width, cut.columns)
        partials = torch.empty(PARTIALS, blocks, num_rows, dtype=torch.float32, device=hidden.device)
        if is_reverse:
            product(teacher[0], teacher[1][ids].T, theirs[:, :width])
        else:
            tiles.sums_of_model((teacher[0], teacher[1][ids]), partials[5:], inv_tau)
        grid, flags = cut.launch(num_rows, width, hidden)
        _sum_tiles[(grid,)](
            *tiles.operands(hidden, head[ids], cut.columns),
            _quarters_of(theirs[:, :width]) if is_reverse else partials, labels - ids.start if is_hard else labels,
            partials, state[7], num_rows, width, hidden.shape[1], inv_tau, REVERSED=is_reverse, HARD=is_hard,
            COLD=options["COLD"], FLATTEN=not is_reverse, **flags,
        )  # fmt: skip
        _fold_tiles[(triton.cdiv(num_rows, 32),)](
            partials, state, blocks, num_rows, ids.start, inv_tau, REVERSED=is_reverse, HARD=is_hard, STEP=8, ROWS=32,
            num_warps=4,
        )  # fmt: skip
        del partials  # the next stripe's take its memory


def _second_pass(
    student: Model, teacher: Model, rows_of: tuple[Tensor, Tensor, Tensor], sums: GradientSums, write: bool,
    numbers: tuple[float, ...], soft_weight: float, columns: int, kinds: dict[str, Any],
) -> None:  # fmt: skip
    """Add the divergences to the losses and, with `write`, the products of each stripe's slopes to `sums`."""
    (hidden, head), (labels, losses, state) = student, rows_of
    num_rows, vocab = len(hidden), len(head)
    id_bytes, row_bytes = num_rows * (4 + hidden.element_size() * write), sums.room_behind(vocab - 1).nbytes
    own = torch.empty(columns * id_bytes, dtype=torch.uint8, device=hidden.device)
    stripes = list(plan_stripes(vocab, columns, id_bytes=id_bytes, row_bytes=row_bytes))
    most = max(stripe.ids.stop - stripe.ids.start for stripe in stripes)
    terms = torch.zeros(triton.cdiv(most, READING.columns), num_rows, dtype=torch.float32, device=hidden.device)
    for ids, in_head in stripes:
        width = ids.stop - ids.start
        line = width if in_head else columns
        room = sums.room_behind(ids.stop).view(torch.uint8) if in_head else own
        cut = 4 * num_rows * line
        theirs = room[:cut].view(torch.float32).view(num_rows, line)[:, :width]
        slopes = theirs  # of which nothing is written without a need for gradients
        if write:
            slopes = room[cut : id_bytes * line].view(hidden.dtype).view(num_rows, line)[:, :width]
        product(teacher[0], teacher[1][ids].T, theirs)
        grid, flags = READING.launch(num_rows, width, hidden)
        _slope_tiles[(grid,)](
            *tiles.operands(hidden, head[ids], READING.columns), _quarters_of(theirs), _quarters_of(slopes),
            terms, labels - ids.start if kinds["HARD"] else labels, state, num_rows, width, hidden.shape[1], *numbers,
            WRITE=write, FLATTEN=False, **kinds, **flags,
        )  # fmt: skip
        if write:
            sums.add_columns(slopes, hidden, ids)
    losses.add_(terms.sum(0), alpha=soft_weight)


def _quarters_of(matrix: Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [tiles.BLOCK_X, READING.columns // 4])
