"""Linear distillation by KL without logits: two passes over the vocabulary, whose products keep the student's to themselves.

    first    both models' logits of a stripe of ids -> each row's maxima and sums, tile by tile, folded into its state
    then     what is the same for all of a row's ids: maxima, normalizers, sum q G, what slopes are multiplied by
    second   the teacher's logits of a stripe, float32 -> the student's, and in their product's epilogue the row's part of
             the divergence, and slopes -> d hidden (a sum over stripes), d head (finished)

                 stripe ->                     HBM        hidden states and heads by TMA; the teacher's logits and the slopes
          +-------+-------+- ...                          [rows, stripe], 6 bytes an id; sums, 16 to 28 bytes a row and tile
        X | tile  | tile  |  128 x 256 or 128  shared     STAGES tiles of both operands; a quarter of a tile of either
          +-------+-------+                    registers  the float32 accumulator; a quarter of the teacher's tile

Forward KL writes no logits in its first pass. Reverse KL needs sum q r there, and so the teacher's. The care for digits is
that of `_divergence_rows`: sums of tiles give both normalizers, and of log p - log q what the loss feels the square of.
Reference: `reference.linear_distillation`.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tessera_kernels.checks import is_interpreting
from tessera_kernels.triton import _divergence_tile_kernels as kernels
from tessera_kernels.triton import _logit_tiles as tiles
from tessera_kernels.triton._divergence_math import REVERSE
from tessera_kernels.triton._gradient_sums import GradientSums, product
from tessera_kernels.triton._launch import num_programs
from tessera_kernels.triton._loss_plans import padded_columns, pieces, plan_columns, plan_stripes

STATE = 9
"""Numbers of a row that pass from stripe to stripe. First: both maxima, both sums at the temperature, sum e^u x, of the
cross-entropy's sum and moment without the label, and its logit as the products have it. Then: both maxima, both shares of
the maxima, the shift of r, what the divergence's slopes are multiplied by, sum q G, and the two slopes of the label's loss."""

STATE_BYTES = 4 * STATE + 16
"""What a row takes beside its stripe: that, its label's logit, its loss, its label's place."""

PARTIALS = 7
"""Numbers of a row and tile: maximum, sum, the cross-entropy's sum and moment, sum e^u x; the teacher's maximum and sum."""

COLUMNS = 128
"""Of a tile whose epilogue reads the teacher's logits: it is long, and a second program of a multiprocessor multiplies
meanwhile. Tiles that read nothing of the teacher are those of `_logit_tiles`."""

Model = tuple[Tensor, Tensor]
"""Hidden states [X, D] and head [V, D]."""


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
    terms_bytes = 4 * triton.cdiv(min(widest, vocab), COLUMNS)
    columns = plan_columns(num_rows, vocab, id_bytes=cell, state=STATE_BYTES + terms_bytes, budget=budget)
    state = torch.zeros(STATE, num_rows, dtype=torch.float32, device=hidden.device)
    _first_pass(student, teacher, labels, state, sums, inv_tau, budget, options)
    kernels.finish_state[(triton.cdiv(num_rows, 32),)](
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
    tile_columns = COLUMNS if is_reverse else tiles.BLOCK_V
    columns = max(1, (budget - STATE_BYTES * num_rows) // (4 * PARTIALS * num_rows)) * tile_columns
    theirs = hidden  # of which forward KL reads nothing
    if is_reverse:
        columns, theirs = _room_of_logits(num_rows, vocab, columns, sums, budget)
    for ids in pieces(vocab, columns):
        width = ids.stop - ids.start
        blocks = triton.cdiv(width, tile_columns)
        partials = torch.empty(PARTIALS, blocks, num_rows, dtype=torch.float32, device=hidden.device)
        own_ids = labels - ids.start if is_hard else labels
        if is_reverse:
            product(teacher[0], teacher[1][ids].T, theirs[:, :width])
            grid, flags = _launch(num_rows, width, hidden)
            kernels.sum_tiles[(grid,)](
                *tiles.operands(hidden, head[ids], COLUMNS), _quarters_of(theirs[:, :width]), own_ids, partials,
                state[7], num_rows, width, hidden.shape[1], inv_tau, HARD=is_hard, COLD=options["COLD"], **flags,
            )  # fmt: skip
        else:
            of_labels = (own_ids, state[7]) if is_hard else None
            tiles.sums_of_model((hidden, head[ids]), partials, inv_tau, of_labels)
            tiles.sums_of_model((teacher[0], teacher[1][ids]), partials[5:], inv_tau)
        kernels.fold_tiles[(triton.cdiv(num_rows, 32),)](
            partials, state, blocks, num_rows, ids.start, inv_tau, REVERSED=is_reverse, HARD=is_hard, STEP=8, ROWS=32,
            num_warps=4,
        )  # fmt: skip
        del partials  # the next stripe's take its memory


def _room_of_logits(num_rows: int, vocab: int, most: int, sums: GradientSums, budget: int) -> tuple[int, Tensor]:
    """Return how many ids, `most` of them at the most, a stripe of the teacher's logits has, and where it lies.

    That is in d head, of which nothing is written yet, where more ids fit there than into the budget beside their sums.
    """
    sums_bytes, room = 4 * PARTIALS, sums.room_behind(0)
    id_bytes = 4 + triton.cdiv(sums_bytes, COLUMNS)
    own = plan_columns(num_rows, vocab, id_bytes=id_bytes, state=STATE_BYTES + sums_bytes, budget=budget)
    own = own // COLUMNS * COLUMNS or own
    free = min(room.nbytes // (4 * num_rows), most) // COLUMNS * COLUMNS
    columns = max(own, free)
    line = min(columns, padded_columns(vocab))
    if free < columns:
        room = torch.empty(2 * num_rows * line, dtype=torch.bfloat16, device=room.device)
    return columns, room[: 2 * num_rows * line].view(torch.float32).view(num_rows, line)


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
    terms = torch.zeros(triton.cdiv(most, COLUMNS), num_rows, dtype=torch.float32, device=hidden.device)
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
        grid, flags = _launch(num_rows, width, hidden)
        kernels.slope_tiles[(grid,)](
            *tiles.operands(hidden, head[ids], COLUMNS), _quarters_of(theirs), _quarters_of(slopes),
            terms, labels - ids.start if kinds["HARD"] else labels, state, num_rows, width, hidden.shape[1], *numbers,
            WRITE=write, **kinds, **flags,
        )  # fmt: skip
        if write:
            sums.add_columns(slopes, hidden, ids)
    losses.add_(terms.sum(0), alpha=soft_weight)


def _launch(rows: int, columns: int, like: Tensor) -> tuple[int, dict[str, Any]]:
    """Return the grid and the options of a product whose epilogue reads the teacher's logits."""
    blocks = triton.cdiv(rows, tiles.BLOCK_X) * triton.cdiv(columns, COLUMNS)
    flags = tiles.SHAPE | {"BLOCK_V": COLUMNS, "LIFT": is_interpreting(), "num_stages": 3, "num_warps": 4}
    return num_programs(blocks, 2, like.device), flags


def _quarters_of(matrix: Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [tiles.BLOCK_X, COLUMNS // 4])
