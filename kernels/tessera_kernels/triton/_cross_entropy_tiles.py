"""Linear cross-entropy without logits: two passes over the vocabulary, whose products keep every logit to themselves.

    first    logits of a stripe of ids -> each row's maximum and sums, tile by tile, folded into its state
    then     every row's loss, and of its slopes what is the same for all ids: maximum, factor, the label's own slope
    second   logits of a stripe again -> slopes, in the epilogue -> d hidden (a sum over stripes), d head (finished)

                 stripe ->                     HBM        hidden states and head by TMA; first 12 bytes a row and tile of
          +-------+-------+- ...                          sums, then slopes [rows, stripe] in the input dtype
        X | tile  | tile  |  128 x 256         shared     STAGES tiles of both operands; half a tile of slopes on its way out
          +-------+-------+                    registers  the float32 accumulator; three numbers of each row

A first pass writes no logits, a second one 2 bytes an id, where logits in float32 between products and row kernels take 14.
Slopes lie in d head's rows behind their stripe as long as those have room: 17 stripes instead of 64 at 8,192 rows, width
2,048 and 128,256 ids, and each reads and writes d hidden. Both passes multiply tiles of one shape, so that what a maximum was
taken of comes out with the same bits again.
Reference: `reference.linear_cross_entropy`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tessera_kernels.checks import is_interpreting
from tessera_kernels.triton import _logit_tiles as tiles
from tessera_kernels.triton._cross_entropy_rows import capped, factors, row_loss, slope_of_cap
from tessera_kernels.triton._gradient_sums import GradientSums
from tessera_kernels.triton._launch import num_programs
from tessera_kernels.triton._loss_plans import pieces, plan_columns, plan_stripes
from tessera_kernels.triton._row_math import LOWEST, exp, without_shortfall

STATE_BYTES = 32
"""What a row takes beside its stripe: label's logit, loss, the four sums that pass from stripe to stripe, its label's place."""

RowData = tuple[Tensor, Tensor, Tensor, Tensor]
"""Labels, their logits, losses (written), and the gradients' unit."""


@triton.jit
def _fold_tiles(partials, state, blocks, num_rows, begun, STEP: tl.constexpr, ROWS: tl.constexpr):
    """Fold what ROWS rows have of a stripe's tiles, [maximum, sum, moment], into their state, STEP tiles at a time."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, step = rows < num_rows, blocks * num_rows
    carried = inside & (begun != 0)
    top = tl.load(state + rows, mask=carried, other=LOWEST)
    rest = tl.load(state + num_rows + rows, mask=carried, other=0.0)
    moment = tl.load(state + 2 * num_rows + rows, mask=carried, other=0.0)
    for start in range(0, blocks, STEP):
        tile = start + tl.arange(0, STEP)[:, None]
        there, place = (tile < blocks) & inside[None, :], partials + tile * num_rows + rows[None, :]
        tops = tl.load(place, mask=there, other=LOWEST)
        before, top = top, tl.maximum(top, tl.max(tops, 0))
        past, fall = exp(before - top), exp(tops - top[None, :])
        rest = past * rest + tl.sum(fall * tl.load(place + step, mask=there, other=0.0), 0)
        moment = past * moment + tl.sum(fall * tl.load(place + 2 * step, mask=there, other=0.0), 0)
    tl.store(state + rows, top, mask=inside)
    tl.store(state + num_rows + rows, rest, mask=inside)
    tl.store(state + 2 * num_rows + rows, moment, mask=inside)


@triton.jit
def _finish_state(
    state,
    labels,
    exact,
    losses,
    unit,
    vocab,
    num_rows,
    ignore_index,
    z_loss,
    softcap,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Turn the sums of ROWS rows into their losses; leave maximum, factor of the slopes and the label's slope.

    The state comes as maximum, sum, moment (all without the label) and the label's logit as the products have it.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    others = tl.load(state + rows, mask=inside, other=0.0)
    raw = tl.load(exact + rows, mask=inside, other=0.0)
    label_logit = capped(raw, softcap, CAPPED)
    top = tl.maximum(others, label_logit)
    fall = exp(others - top)
    rest = fall * tl.load(state + num_rows + rows, mask=inside, other=0.0)
    moment = fall * tl.load(state + 2 * num_rows + rows, mask=inside, other=0.0)
    found = tl.load(state + 3 * num_rows + rows, mask=inside, other=0.0)
    label = tl.load(labels + rows, mask=inside, other=0)
    rest = without_shortfall(rest, moment, raw, found, True)
    loss = row_loss(top, rest, label_logit, label, vocab, z_loss)
    scale = tl.where(loss == loss, tl.load(unit), float("nan"))
    factor, own = factors(top, rest, label_logit, scale, z_loss, softcap, CAPPED)
    counts = label != ignore_index
    tl.store(losses + rows, tl.where(counts, loss, 0.0), mask=inside)
    tl.store(state + rows, top, mask=inside)
    tl.store(state + num_rows + rows, tl.where(counts, factor, 0.0), mask=inside)
    tl.store(state + 2 * num_rows + rows, tl.where(counts, own, 0.0), mask=inside)


@triton.jit
def _slopes(raw, ids, own_id, top, factor, own, softcap, CAPPED: tl.constexpr):
    z = capped(raw, softcap, CAPPED)
    slope = exp(z - top[:, None]) * factor[:, None]
    if CAPPED:
        slope *= slope_of_cap(z, softcap)
    slope = tl.where(factor[:, None] == 0.0, 0.0, slope)  # of a row that does not count, whatever its logits are
    return tl.where(ids == own_id, own[:, None], slope)


@triton.jit(do_not_specialize=["num_rows"])
def _slope_tiles(
    hidden, head, slopes, labels, state, num_rows, vocab, width, softcap, CAPPED: tl.constexpr, LIFT: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Write the slopes of a stripe's ids from the finished state; labels count from the stripe's first id."""
    blocks_x, blocks_v = tl.cdiv(num_rows, BLOCK_X), tl.cdiv(vocab, BLOCK_V)
    half: tl.constexpr = BLOCK_V // 2
    for tile in tl.range(tl.program_id(0), blocks_x * blocks_v, tl.num_programs(0), flatten=FLATTEN):
        row, block = tiles.place_of(tile, blocks_x, blocks_v, BLOCK_X, GROUP)
        column = block * BLOCK_V
        total = tiles.product_tile(hidden, head, row, column, width, LIFT, BLOCK_X, BLOCK_V, BLOCK_D)
        first, second = tiles.halves(total, BLOCK_X, BLOCK_V)
        rows = row + tl.arange(0, BLOCK_X)
        inside = rows < num_rows
        top = tl.load(state + rows, mask=inside, other=0.0)
        factor = tl.load(state + num_rows + rows, mask=inside, other=0.0)
        own = tl.load(state + 2 * num_rows + rows, mask=inside, other=0.0)
        _, own_id = tiles.labels_within(labels, rows, inside, column, BLOCK_V)
        ids = tl.arange(0, half)[None, :]
        slopes.store([row, column], _slopes(first, ids, own_id, top, factor, own, softcap, CAPPED).to(slopes.dtype))
        slopes.store(
            [row, column + half], _slopes(second, ids + half, own_id, top, factor, own, softcap, CAPPED).to(slopes.dtype)
        )  # fmt: skip


def in_tiles(
    hidden: Tensor, head: Tensor, rows_of: RowData, sums: GradientSums, write: bool, convention: tuple[int, float, float],
    budget: int,
) -> None:  # fmt: skip
    """Write the losses of all rows and, with `write`, add their slopes' products to `sums`, within `budget` bytes.

    `convention` is (ignore_index, z_loss, softcap). Operands must be such that `_logit_tiles.reads` them.
    """
    (num_rows, _), vocab = hidden.shape, head.shape[0]
    labels, exact, losses, unit = rows_of
    columns = plan_columns(num_rows, vocab, id_bytes=hidden.element_size(), state=STATE_BYTES, budget=budget)
    state = torch.zeros(4, num_rows, dtype=torch.float32, device=hidden.device)
    flags = {"CAPPED": convention[2] != 0.0, "num_warps": 4, "ROWS": 32}
    programs = (triton.cdiv(num_rows, 32),)
    most = max(1, (budget - STATE_BYTES * num_rows) // (4 * tiles.PARTIALS * num_rows))
    for ids in pieces(vocab, most * tiles.BLOCK_V):
        partials = tiles.sums_of_stripe(hidden, head[ids], labels - ids.start, state[3], convention[2])
        _fold_tiles[programs](partials, state, partials.shape[1], num_rows, ids.start, STEP=8, ROWS=32, num_warps=4)
        del partials  # the next stripe's, and then the slopes, take its memory
    _finish_state[programs](state, labels, exact, losses, unit, vocab, num_rows, *convention, **flags)
    if write:
        _second_pass(hidden, head, labels, state, sums, columns, convention[2])


def _second_pass(
    hidden: Tensor, head: Tensor, labels: Tensor, state: Tensor, sums: GradientSums, columns: int, softcap: float
) -> None:
    """Write the slopes of one stripe after the other and add their products to `sums`."""
    num_rows, vocab = len(hidden), len(head)
    own = hidden.new_empty(num_rows * columns)
    row_bytes = sums.room_behind(vocab - 1).nbytes
    for ids, in_head in plan_stripes(vocab, columns, id_bytes=num_rows * hidden.element_size(), row_bytes=row_bytes):
        width = ids.stop - ids.start
        line = width if in_head else columns
        slopes = (sums.room_behind(ids.stop) if in_head else own)[: num_rows * line].view(num_rows, line)[:, :width]
        _write_slopes(hidden, head[ids], slopes, labels - ids.start, state, softcap)
        sums.add_columns(slopes, hidden, ids)


def _write_slopes(hidden: Tensor, head: Tensor, slopes: Tensor, labels: Tensor, state: Tensor, softcap: float) -> None:
    (num_rows, width), vocab = hidden.shape, head.shape[0]
    blocks = triton.cdiv(num_rows, tiles.BLOCK_X) * triton.cdiv(vocab, tiles.BLOCK_V)
    _slope_tiles[(num_programs(blocks, 1, hidden.device),)](
        *tiles.operands(hidden, head), TensorDescriptor.from_tensor(slopes, [tiles.BLOCK_X, tiles.BLOCK_V // 2]), labels,
        state, num_rows, vocab, width, softcap, CAPPED=softcap != 0.0, LIFT=is_interpreting(), FLATTEN=True,
        num_stages=tiles.STAGES, num_warps=8, **tiles.SHAPE,
    )  # fmt: skip
