"""Products with a linear head whose epilogue takes each tile's softmax sums: of logits that never reach memory, or float32.

               V ->                         HBM        hidden states and head by TMA; powers [rows, V], float16; for each row
        +-------+-------+                              and tile the maximum, sum e^(z - maximum), sum z e^(z - maximum)
      X | tile  | tile  |  128 x 256        shared     STAGES tiles of both operands, 64 deep; half a tile of powers on its
        +-------+-------+                              way out
        | tile  | tile  |                   registers  the float32 accumulator, 128 x 256
        +-------+-------+                   tiles go in columns of GROUP row blocks: a chunk of rows stays in L2, the head
                                            is read once for each chunk

Powers are e^(z - maximum of the row's tile), times the slope of a softcap. `finish_rows` multiplies them by what is the
same for a whole tile and writes slopes in their place: 4 bytes of traffic an id beyond the product, where logits in float32
take 14. In float16 a power keeps 11 bits down to 6e-5 of its tile's largest and 3e-8 of it below: less than the slope loses
when it rounds. The label is left out of maximum, sums and powers, because near convergence it alone is large and its slope
is small: it comes from a dot product of its own (`_label_logits`). Reference: `reference.linear_cross_entropy`.

Distillation compares two models' logits, which near convergence takes float32: `summed_logit_tiles` writes them, a quarter
of a tile at a time, and of a row and tile the maximum, sum e^((z - maximum) / tau), and for the mixture with labels sum
e^(z - maximum) and sum z e^(z - maximum) without the label. Reference: `reference.linear_distillation`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tessera_kernels.checks import is_interpreting
from tessera_kernels.triton._cross_entropy_rows import capped, factors, row_loss, slope_of_cap
from tessera_kernels.triton._launch import num_programs
from tessera_kernels.triton._row_math import LOG2_E, LOWEST, exp, without_shortfall, write_zeros

BLOCK_X, BLOCK_V, BLOCK_D = 128, 256, 64
GROUP, STAGES = 16, 4
SHAPE = {"BLOCK_X": BLOCK_X, "BLOCK_V": BLOCK_V, "BLOCK_D": BLOCK_D, "GROUP": GROUP}
"""How all of these products are cut: what kernels of other files pass on."""

PARTIALS = 3
"""Numbers of a row and tile: maximum, sum, moment."""


@triton.jit
def place_of(tile, blocks_x, blocks_v, BLOCK_X: tl.constexpr, GROUP: tl.constexpr):
    """Return a tile's first row and its block of the vocabulary."""
    group_size = GROUP * blocks_v
    first_block = (tile // group_size) * GROUP
    height = tl.minimum(blocks_x - first_block, GROUP)
    return (first_block + tile % group_size % height) * BLOCK_X, tile % group_size // height


@triton.jit
def product_tile(
    hidden,
    head,
    row,
    column,
    width,
    LIFT: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return one tile of hidden head^T, summed in float32."""
    total = tl.zeros([BLOCK_X, BLOCK_V], tl.float32)
    for start in tl.range(0, width, BLOCK_D):
        a, b = hidden.load([row, start]), head.load([column, start])
        if LIFT:  # the interpreter multiplies bfloat16 as integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total)
    return total


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the first and the second half of a tile's columns."""
    return tile.reshape([ROWS, 2, COLUMNS // 2]).permute(0, 2, 1).split()


@triton.jit
def quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the four quarters of a tile's columns, in order."""
    first, second = halves(tile, ROWS, COLUMNS)
    a, b = halves(first, ROWS, COLUMNS // 2)
    c, d = halves(second, ROWS, COLUMNS // 2)
    return a, b, c, d


@triton.jit
def labels_within(labels, rows, inside, column, BLOCK_V: tl.constexpr):
    """Return which rows have their label in a tile, and its column there or -1, [rows, 1]."""
    label = tl.load(labels + rows, mask=inside, other=-1)
    here = (label >= column) & (label < column + BLOCK_V)
    return here, tl.where(here, label - column, -1).to(tl.int32)[:, None]


@triton.jit
def _without_label(raw, ids, own, left):
    """Return the label's product or 0, and the products with those of the label and behind the vocabulary's end lowest."""
    is_own = ids == own
    return tl.sum(tl.where(is_own, raw, 0.0), 1), tl.where(is_own | (ids >= left), LOWEST, raw)


@triton.jit
def _softmax_logits(raw, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        there = raw > LOWEST
        return tl.where(there, capped(tl.where(there, raw, 0.0), softcap, CAPPED), LOWEST)
    return raw


@triton.jit
def _powers(raw, top, softcap, CAPPED: tl.constexpr):
    """Return what is kept of each id, and the tile's two sums."""
    z = _softmax_logits(raw, softcap, CAPPED)
    e = exp(z - top[:, None])
    kept = e * slope_of_cap(tl.where(raw > LOWEST, z, 0.0), softcap) if CAPPED else e
    return kept.to(tl.float16), tl.sum(e, 1), tl.sum(kept * raw, 1)


@triton.jit(do_not_specialize=["num_rows"])
def logit_tiles(
    hidden, head, powers, labels, partials, found, num_rows, vocab, width, softcap,
    CAPPED: tl.constexpr, WRITE: tl.constexpr, LIFT: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Write powers, partials [3, tiles, rows], and the label's logit as the product has it."""
    blocks_x, blocks_v = tl.cdiv(num_rows, BLOCK_X), tl.cdiv(vocab, BLOCK_V)
    half: tl.constexpr = BLOCK_V // 2
    for tile in tl.range(tl.program_id(0), blocks_x * blocks_v, tl.num_programs(0), flatten=FLATTEN):
        row, block = place_of(tile, blocks_x, blocks_v, BLOCK_X, GROUP)
        column = block * BLOCK_V
        total = product_tile(hidden, head, row, column, width, LIFT, BLOCK_X, BLOCK_V, BLOCK_D)
        first, second = halves(total, BLOCK_X, BLOCK_V)
        rows = row + tl.arange(0, BLOCK_X)
        inside = rows < num_rows
        here, own = labels_within(labels, rows, inside, column, BLOCK_V)
        ids = tl.arange(0, half)[None, :]
        logit, first = _without_label(first, ids, own, vocab - column)
        more, second = _without_label(second, ids + half, own, vocab - column)
        tl.store(found + rows, logit + more, mask=here & inside)
        top = tl.maximum(
            tl.max(_softmax_logits(first, softcap, CAPPED), 1), tl.max(_softmax_logits(second, softcap, CAPPED), 1)
        )
        kept, rest, moment = _powers(first, top, softcap, CAPPED)
        if WRITE:
            powers.store([row, column], kept)
        kept, more, more_moment = _powers(second, top, softcap, CAPPED)
        if WRITE:
            powers.store([row, column + half], kept)
        place = partials + block * num_rows + rows
        step = blocks_v * num_rows
        tl.store(place, top, mask=inside)
        tl.store(place + step, rest + more, mask=inside)
        tl.store(place + 2 * step, moment + more_moment, mask=inside)


@triton.jit
def finish_rows(
    powers, slopes, partials, found, labels, exact, losses, unit, vocab, padded, num_rows, ignore_index, z_loss, softcap,
    CAPPED: tl.constexpr, WRITE: tl.constexpr, TILES: tl.constexpr, BLOCK_V: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One row: its loss and, with WRITE, its slopes over its powers. TILES = a power of two that holds all tiles."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    kept, dz = powers + row * padded, slopes + row * padded
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if WRITE:
            write_zeros(dz, padded, STEP * BLOCK_V)
    else:
        blocks = tl.cdiv(vocab, BLOCK_V)
        tiles, step = tl.arange(0, TILES), blocks * num_rows
        place = partials + row + tiles * num_rows
        tops = tl.load(place, mask=tiles < blocks, other=LOWEST)
        raw = tl.load(exact + row)
        label_logit = capped(raw, softcap, CAPPED)
        top = tl.maximum(tl.max(tops, 0), label_logit)
        fall = exp(tops - top)
        rest = tl.sum(fall * tl.load(place + step, mask=tiles < blocks, other=0.0), 0)
        moment = tl.sum(fall * tl.load(place + 2 * step, mask=tiles < blocks, other=0.0), 0)
        rest = without_shortfall(rest, moment, raw, tl.load(found + row), True)
        loss = row_loss(top, rest, label_logit, label, vocab, z_loss)
        tl.store(losses + row, loss)
        if WRITE:
            scale = tl.where(loss == loss, tl.load(unit), float("nan"))
            factor, own = factors(top, rest, label_logit, scale, z_loss, softcap, CAPPED)
            for start in range(0, blocks, STEP):
                some = start + tl.arange(0, STEP)
                some_tops = tl.load(partials + row + some * num_rows, mask=some < blocks, other=LOWEST)
                columns = some[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
                e = tl.load(kept + columns, mask=columns < padded, other=0.0).to(tl.float32)
                slope = tl.where(columns == label, own, e * (exp(some_tops - top) * factor)[:, None])
                tl.store(dz + columns, slope.to(dz.dtype.element_ty), mask=columns < padded)


@triton.jit
def powers_of_quarter(raw, top, ids, own, inv_tau, HARD: tl.constexpr, COLD: tl.constexpr):
    """Return a quarter's powers at the temperature; the label's logit or 0; at temperature 1 and without it, sum and moment.

    Who calls adds the powers up, last of all: in `sum_tiles` a sum that is taken here spills.
    """
    below = raw - top[:, None]
    e = tl.exp2(below * (inv_tau * LOG2_E))
    if HARD:
        is_own = ids == own
        cold = tl.where(is_own, 0.0, exp(below) if COLD else e)
        return e, tl.sum(tl.where(is_own, raw, 0.0), 1), tl.sum(cold, 1), tl.sum(cold * raw, 1)
    return e, top, top, top


@triton.jit(do_not_specialize=["num_rows"])
def summed_logit_tiles(
    hidden, head, logits, labels, partials, found, num_rows, vocab, width, inv_tau, HARD: tl.constexpr, COLD: tl.constexpr,
    WRITE: tl.constexpr, LIFT: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """Write float32 logits a quarter of a tile at a time (WRITE), and partials [2, or with HARD 4, tiles, rows]."""
    blocks_x, blocks_v = tl.cdiv(num_rows, BLOCK_X), tl.cdiv(vocab, BLOCK_V)
    quarter: tl.constexpr = BLOCK_V // 4
    for tile in tl.range(tl.program_id(0), blocks_x * blocks_v, tl.num_programs(0), flatten=FLATTEN):
        row, block = place_of(tile, blocks_x, blocks_v, BLOCK_X, GROUP)
        column = block * BLOCK_V
        total = product_tile(hidden, head, row, column, width, LIFT, BLOCK_X, BLOCK_V, BLOCK_D)
        rows = row + tl.arange(0, BLOCK_X)
        inside = rows < num_rows
        ids, left = tl.arange(0, quarter)[None, :], vocab - column
        own = tl.full([BLOCK_X, 1], -1, tl.int32)
        if HARD:
            here, own = labels_within(labels, rows, inside, column, BLOCK_V)
        total = tl.where(tl.arange(0, BLOCK_V)[None, :] < left, total, LOWEST)
        top = tl.max(total, 1)
        a, b, c, d = quarters(total, BLOCK_X, BLOCK_V)
        if WRITE:
            logits.store([row, column], a)
        e_a, logit_a, rest_a, moment_a = powers_of_quarter(a, top, ids, own, inv_tau, HARD, COLD)
        mass_a = tl.sum(e_a, 1)
        if WRITE:
            logits.store([row, column + quarter], b)
        e_b, logit_b, rest_b, moment_b = powers_of_quarter(b, top, ids + quarter, own, inv_tau, HARD, COLD)
        mass_b = tl.sum(e_b, 1)
        if WRITE:
            logits.store([row, column + 2 * quarter], c)
        e_c, logit_c, rest_c, moment_c = powers_of_quarter(c, top, ids + 2 * quarter, own, inv_tau, HARD, COLD)
        mass_c = tl.sum(e_c, 1)
        if WRITE:
            logits.store([row, column + 3 * quarter], d)
        e_d, logit_d, rest_d, moment_d = powers_of_quarter(d, top, ids + 3 * quarter, own, inv_tau, HARD, COLD)
        mass_d = tl.sum(e_d, 1)
        place = partials + block * num_rows + rows
        step = blocks_v * num_rows
        tl.store(place, top, mask=inside)
        tl.store(place + step, (mass_a + mass_b) + (mass_c + mass_d), mask=inside)
        if HARD:
            if not WRITE:
                tl.store(found + rows, (logit_a + logit_b) + (logit_c + logit_d), mask=here & inside)
            tl.store(place + 2 * step, (rest_a + rest_b) + (rest_c + rest_d), mask=inside)
            tl.store(place + 3 * step, (moment_a + moment_b) + (moment_c + moment_d), mask=inside)


def reads(*operands: Tensor) -> bool:
    """Can the tiles of these half-precision matrices be read by TMA?"""
    return all(
        x.element_size() == 2 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
        and (x.stride(0) >= x.shape[1] or len(x) == 1)
        and (not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] >= 9)
        for x in operands
    )  # fmt: skip


def operands(hidden: Tensor, head: Tensor, columns: int = BLOCK_V) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Return both factors of a product as its tiles, of so many columns, are read."""
    return (
        TensorDescriptor.from_tensor(hidden, [BLOCK_X, BLOCK_D]),
        TensorDescriptor.from_tensor(head, [columns, BLOCK_D]),
    )


def partial_bytes(vocab: int) -> int:
    """Return what a row takes beside its powers."""
    tiles: int = triton.cdiv(vocab, BLOCK_V)
    return 4 * PARTIALS * tiles


def multiply_and_finish(
    hidden: Tensor, head: Tensor, slopes: Tensor, rows_of: tuple[Tensor, Tensor, Tensor, Tensor],
    convention: tuple[int, float, float], write: bool, stages: int,
) -> None:  # fmt: skip
    """Write the losses of some rows, and with `write` their slopes [rows, padded]."""
    labels, exact, losses, unit = rows_of
    num_rows, vocab, padded = len(hidden), len(head), slopes.shape[1]
    found = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    powers: Any = slopes.view(torch.float16)
    partials = _multiply(hidden, head, labels, found, convention[2], powers if write else None, stages)
    flags = {"CAPPED": convention[2] != 0.0, "WRITE": write, "BLOCK_V": BLOCK_V, "num_warps": 8}
    finish_rows[(num_rows,)](
        powers, slopes, partials, found, labels, exact, losses, unit, vocab, padded, num_rows, *convention,
        TILES=triton.next_power_of_2(partials.shape[1]), STEP=16, **flags,
    )  # fmt: skip


def sums_of_stripe(hidden: Tensor, head: Tensor, labels: Tensor, found: Tensor, softcap: float) -> Tensor:
    """Return what each row and tile has of sums, [3, tiles, rows]; write the labels' logits that lie here to `found`."""
    return _multiply(hidden, head, labels, found, softcap, None, 0)


def _multiply(
    hidden: Tensor, head: Tensor, labels: Tensor, found: Tensor, softcap: float, powers: Tensor | None, stages: int
) -> Tensor:
    (num_rows, width), vocab = hidden.shape, head.shape[0]
    blocks = triton.cdiv(vocab, BLOCK_V)
    partials = torch.empty(PARTIALS, blocks, num_rows, dtype=torch.float32, device=hidden.device)
    grid = num_programs(triton.cdiv(num_rows, BLOCK_X) * blocks, 1, hidden.device)
    out = found if powers is None else TensorDescriptor.from_tensor(powers, [BLOCK_X, BLOCK_V // 2])
    logit_tiles[(grid,)](
        *operands(hidden, head), out, labels, partials, found, num_rows, vocab, width, softcap, CAPPED=softcap != 0.0,
        WRITE=powers is not None, LIFT=is_interpreting(), FLATTEN=True, num_stages=stages or STAGES, num_warps=8, **SHAPE,
    )  # fmt: skip
    return partials


def multiply_both(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    logits: Tensor,
    labels: Tensor,
    inv_tau: float,
    hard: bool,
) -> Tensor:
    """Write the float32 logits [2, rows, padded] of both models' (hidden states, head).

    Return what each row and tile has of sums, [6, tiles, rows]: four numbers of the student's, two of the teacher's.
    """
    blocks = triton.cdiv(len(student[1]), BLOCK_V)
    partials = torch.empty(6, blocks, len(student[0]), dtype=torch.float32, device=logits.device)
    _multiply_model(student, logits[0], partials[:4], inv_tau, (labels, partials) if hard else None)
    _multiply_model(teacher, logits[1], partials[4:], inv_tau, None)
    return partials


def sums_of_model(
    model: tuple[Tensor, Tensor], partials: Tensor, inv_tau: float, of_labels: tuple[Tensor, Tensor] | None = None
) -> None:
    """Write what each row and tile of a model's (hidden states, head) has of sums, [2 or more, tiles, rows], and no logits.

    With `of_labels`, labels that count from the head's first row and their logits (written): [4, tiles, rows].
    """
    _multiply_model(model, None, partials, inv_tau, of_labels)


def _multiply_model(
    model: tuple[Tensor, Tensor], logits: Tensor | None, partials: Tensor, inv_tau: float,
    of_labels: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """`of_labels` are labels and where their logits go, which are written where no logits are."""
    (hidden, head), hard = model, of_labels is not None
    labels, found = of_labels or (partials, partials)
    grid = num_programs(triton.cdiv(len(hidden), BLOCK_X) * partials.shape[1], 1, hidden.device)
    out = partials if logits is None else TensorDescriptor.from_tensor(logits, [BLOCK_X, BLOCK_V // 4])
    summed_logit_tiles[(grid,)](
        *operands(hidden, head), out, labels, partials, found, len(hidden), len(head), hidden.shape[1], inv_tau, HARD=hard,
        COLD=hard and inv_tau != 1.0, WRITE=logits is not None, LIFT=is_interpreting(), FLATTEN=True, num_stages=STAGES,
        num_warps=8, **SHAPE,
    )  # fmt: skip
