"""Cross-entropy of a linear head from hidden states, where the logits of the whole batch never exist.

    z = h W^T, or cap tanh(h W^T / cap);   loss = sum over counted rows of log(sum e^z) - z[label] + z_loss log(sum e^z)^2
    dz = softmax(z) - onehot(label) + 2 z_loss log(sum e^z) softmax(z);   d h = dz W;   d W = dz^T h
    (z_loss: PaLM, arXiv 2204.02311, section 5. Gradients in the forward: Liger-Kernel, arXiv 2410.10989, section 3.2.)

    mode "chunked", 6 X V D operations              mode "no_logits", 8 X V D operations
    +--------------- V ---------------+             +-- V --+-------+-------+
    | rows of a chunk: powers of each | own         |       |       |       |   1. logits of a stripe, online sums [X]
    | tile, float16, and its sums     | product     |   X   | stripe|       |
    | one program a row: slopes over  |             |       |       |       |   2. logits again, slopes, both products: d
    | its powers, in their memory     |             +-------+-------+       |      head of the stripe is finished at once
    +---------------------------------+                                            (`_cross_entropy_tiles`)

    HBM        powers, then slopes (2 bytes an id) of one chunk, 12 bytes a row and tile of sums; d hidden; d head
    registers  a tile of logits in the product's epilogue (`_logit_tiles`), the only place where they exist
    shared     what the products load ahead

What TMA does not read (float32, odd strides, Ampere) and small calls take the library's product instead: `logit_rows` rows
of float32 logits at a time, which one program a row walks forward for its sums and backward for its slopes, so that the
second walk begins with what L2 still holds (`_cross_entropy_rows`); or all rows of a stripe's float32 logits.
The label's term stays out of the sum: a loss of 1e-3 has as many digits as one of 10. z[label] is a dot product of
its own, and what the matrix product lacks of it says what the others lack (`_row_math.without_shortfall`).
`accumulate` is the dtype in which d head is summed over chunks. Memory beyond the gradients is `chunk_bytes`, the pieces
of one chunk's d hidden in float32 and, where d head is returned in half precision but summed in float32, that sum (4 V D):
none stands beside a float32 gradient (`grad_dtype` of a leaf), it is the sum. Without logits, `chunk_bytes` and the float32
sum of d hidden (2 X D beyond it in bfloat16).
Reference: `tessera_kernels.reference.linear_cross_entropy`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from typing import Any

import torch
import triton
from torch import Tensor

from tessera_kernels.checks import expect_triton_device
from tessera_kernels.triton import _cross_entropy_rows as kernels
from tessera_kernels.triton import _logit_tiles as tiles
from tessera_kernels.triton._cross_entropy_tiles import STATE_BYTES, RowData, in_tiles
from tessera_kernels.triton._gradient_sums import GradientSums, head_sum_dtype, product, slopes_within, unit_of
from tessera_kernels.triton._label_logits import label_logits
from tessera_kernels.triton._launch import graph_op, on_device
from tessera_kernels.triton._linear_loss import (
    LinearLoss,
    check_labels,
    check_options,
    check_pair,
    check_vocab,
    fake_result,
    readable,
)
from tessera_kernels.triton._loss_plans import (
    LossConfig,
    choose_splits,
    padded_columns,
    pieces,
    plan_chunks,
    plan_columns,
    plan_rows,
)

CHUNK_BYTES = {"chunked": 544 * 2**20, "no_logits": 127 * 2**18}
"""Bytes for logits and slopes by default. At a vocabulary of 128,256 and 8,192 rows: 4 chunks, 0.5 GiB; or 17 stripes, with the
float32 sum of d hidden a little less than 64 MiB."""

CONFIGS: tuple[LossConfig, ...] = (
    LossConfig(product=2),
    LossConfig(product=2, stages=3),
    LossConfig(block=8192, num_warps=16, stages=1, product=1),
    LossConfig(block=8192, num_warps=16, stages=2, product=1),
    LossConfig(block=8192, num_warps=32, stages=1, product=1),
    LossConfig(block=4096, num_warps=8, stages=1, product=1),
    LossConfig(block=2048, num_warps=4, stages=1, product=1),
)
"""Both products, and shapes of the row kernel behind the library's, that the GPU lane runs and the sweep times."""


def choose_config(columns: int) -> LossConfig:
    """Return the row kernel's shape for rows of so many logits at a time. The number of rows plays no part."""
    block = min(8192, max(16, triton.next_power_of_2(columns)))
    return LossConfig(block=block, num_warps=max(1, min(16, block // 512)), stages=1)


def linear_cross_entropy(
    hidden_XD: Tensor,
    head_VD: Tensor,
    labels_X: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    mode: str = "chunked",
    accumulate: str = "float32",
    config: LossConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss (float32) and the number of labels that are not `ignore_index` (int32), both 0-dim.

    Hidden states `[X, D]` and head `[V, D]` in one of bfloat16, float16, float32; labels int64 or int32. Ids at or above
    `vocab_size` have probability 0. A label outside the vocabulary makes loss and gradient NaN: nothing waits for the
    device to look. Gradients are computed here and multiplied in the backward, which runs once (`retain_graph` and a
    second backward raise). The gradient of an input that needs none is not computed. `KernelError` says what does not
    fit.
    """
    _check(hidden_XD, head_VD, labels_X, mode, accumulate, chunk_bytes)
    vocab = check_vocab(vocab_size, head_VD.shape[0])
    if hidden_XD.shape[0] == 0:
        return (hidden_XD.sum() + 0.0 * head_VD.sum()).float(), labels_X.new_zeros((), dtype=torch.int32)
    loss, num_tokens = _Loss.apply(
        readable(hidden_XD), head_VD, labels_X.contiguous(), ignore_index, float(z_loss), float(softcap or 0.0), vocab,
        chunk_bytes or CHUNK_BYTES[mode], mode, accumulate, list(config or ()),
    )  # fmt: skip
    return loss, num_tokens


def _check(
    hidden_XD: Tensor, head_VD: Tensor, labels_X: Tensor, mode: str, accumulate: str, chunk_bytes: int | None
) -> None:
    expect_triton_device("hidden_XD", hidden_XD)
    check_pair("hidden_XD", hidden_XD, "head_VD", head_VD)
    check_labels(labels_X, hidden_XD)
    check_options(mode, accumulate, hidden_XD.dtype, chunk_bytes)


class _Loss(LinearLoss):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        ignore_index: int,
        z_loss: float,
        softcap: float,
        vocab: int,
        chunk_bytes: int,
        mode: str,
        accumulate: str,
        config: list[int],
    ) -> tuple[Tensor, Tensor]:
        for_hidden, for_head = ctx.needs_input_grad[:2]
        result = _run(
            hidden, head, labels, for_hidden, for_head, ignore_index, z_loss, softcap, vocab, chunk_bytes, mode,
            accumulate, config,
        )  # fmt: skip
        return _Loss.keep(ctx, hidden, head, result)


def _fake_run(
    hidden: Tensor, head: Tensor, labels: Tensor, for_hidden: bool, for_head: bool, ignore_index: int, z_loss: float,
    softcap: float, vocab: int, chunk_bytes: int, mode: str, accumulate: str, config: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    del ignore_index, z_loss, softcap, vocab, chunk_bytes, config  # none of them changes a shape
    summed = head_sum_dtype(head, mode, accumulate)
    return fake_result(hidden, head, labels, for_hidden=for_hidden, for_head=for_head, head_dtype=summed)


@graph_op("linear_cross_entropy", fake=_fake_run)
def _run(
    hidden: Tensor, head: Tensor, labels: Tensor, for_hidden: bool, for_head: bool, ignore_index: int, z_loss: float,
    softcap: float, vocab: int, chunk_bytes: int, mode: str, accumulate: str, config: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss sum, the number of labels, the gradients' unit, and both gradients in that unit (or empty)."""
    num_tokens = (labels != ignore_index).sum(dtype=torch.int32)
    unit = unit_of(num_tokens, hidden.dtype)
    summed = head_sum_dtype(head, mode, accumulate)
    tiled = mode == "no_logits"
    sums = GradientSums(
        hidden, head, vocab, for_hidden=for_hidden, for_head=for_head, head_dtype=summed, tiled=tiled
    )  # fmt: skip
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    walk = _in_tiles if tiled else _in_chunks
    with on_device(hidden):
        rows_of = (labels, label_logits(hidden, head[:vocab], labels), losses, unit)
        walk(hidden, head[:vocab], rows_of, sums, for_hidden or for_head, (ignore_index, z_loss, softcap), chunk_bytes,
             LossConfig(*config))  # fmt: skip
    return losses.sum(dtype=torch.float64).float(), num_tokens, unit, sums.take_hidden(), sums.head_VD


def _options(cut: LossConfig, columns: int, softcap: float) -> dict[str, Any]:
    shape = cut if cut.block else choose_config(columns)
    return {"CAPPED": softcap != 0.0, "BLOCK": shape.block, "STAGES": shape.stages or 1, "num_warps": shape.num_warps}


def _in_chunks(
    hidden: Tensor, head: Tensor, rows_of: RowData, sums: GradientSums, write: bool, convention: tuple[int, float, float],
    budget: int, cut: LossConfig,
) -> None:  # fmt: skip
    if _wants_powers(cut, hidden, head) and tiles.reads(hidden, head):
        _in_chunks_of_powers(hidden, head, rows_of, sums, write, convention, budget, cut)
        return
    (num_rows, width), vocab = hidden.shape, head.shape[0]
    labels, exact, losses, unit = rows_of
    plan = plan_chunks(num_rows, vocab, models=1, slope_bytes=hidden.element_size() * write, budget=budget)
    rows, logit_rows = cut.rows or plan.rows, cut.logit_rows or plan.logit_rows
    splits = cut.hidden_splits or choose_splits(min(rows, num_rows), width, vocab)
    padded, options = padded_columns(vocab), _options(cut, vocab, convention[2])
    logits = torch.empty(min(logit_rows, num_rows), padded, dtype=torch.float32, device=hidden.device)
    slopes = hidden.new_empty(min(rows, num_rows) if write else 1, padded)
    for chunk in pieces(num_rows, rows):
        states = hidden[chunk]
        for part in pieces(len(states), logit_rows):
            count = part.stop - part.start
            product(states[part], head.T, logits[:count, :vocab])
            place = chunk.start + part.start
            kernels.row_kernel[(count,)](
                logits, slopes[part] if write else slopes, labels[place:], exact[place:], losses[place:], unit, vocab,
                padded, *convention, SHORT=hidden.dtype != torch.float32, WRITE=write, **options,
            )  # fmt: skip
        if write:
            sums.add_rows(slopes[: len(states), :vocab], states, chunk, splits)


def _wants_powers(cut: LossConfig, hidden: Tensor, head: Tensor) -> bool:
    """Was the product with sums in its epilogue asked for, or has it whole tiles (of 128 rows by 256 ids) to do?"""
    return cut.product == 2 or (cut.product == 0 and not cut.logit_rows and len(hidden) >= 64 and len(head) >= 1024)


def _in_chunks_of_powers(
    hidden: Tensor, head: Tensor, rows_of: RowData, sums: GradientSums, write: bool, convention: tuple[int, float, float],
    budget: int, cut: LossConfig,
) -> None:  # fmt: skip
    (num_rows, width), vocab = hidden.shape, head.shape[0]
    labels, exact, losses, unit = rows_of
    padded = padded_columns(vocab)
    row_bytes = tiles.partial_bytes(vocab) + hidden.element_size() * padded * write
    rows = min(cut.rows or plan_rows(num_rows, row_bytes, budget), num_rows)
    splits = cut.hidden_splits or choose_splits(rows, width, vocab)
    slopes = hidden.new_empty(rows if write else 1, padded)
    for chunk in pieces(num_rows, rows):
        states = hidden[chunk]
        of_rows = labels[chunk], exact[chunk], losses[chunk], unit
        stages = cut.stages if cut.product == 2 else 0
        tiles.multiply_and_finish(states, head, slopes[: len(states)], of_rows, convention, write, stages)
        if write:
            sums.add_rows(slopes[: len(states), :vocab], states, chunk, splits)


def _in_tiles(
    hidden: Tensor, head: Tensor, rows_of: RowData, sums: GradientSums, write: bool, convention: tuple[int, float, float],
    budget: int, cut: LossConfig,
) -> None:  # fmt: skip
    if _wants_powers(cut, hidden, head) and tiles.reads(hidden, head):
        in_tiles(hidden, head, rows_of, sums, write, convention, budget)
        return
    (num_rows, _), vocab = hidden.shape, head.shape[0]
    labels, exact, losses, unit = rows_of
    columns = plan_columns(num_rows, vocab, id_bytes=4, state=STATE_BYTES, budget=budget)
    options = _options(cut, columns, convention[2])
    logits = torch.empty(num_rows, columns, dtype=torch.float32, device=hidden.device)
    slopes = slopes_within(logits, hidden.dtype, at_end=True)
    state = torch.empty(4, num_rows, dtype=torch.float32, device=hidden.device)
    for ids in pieces(vocab, columns):
        width = ids.stop - ids.start
        product(hidden, head[ids].T, logits[:, :width])
        kernels.tile_sums[(num_rows,)](
            logits, labels, state, ids.start, width, columns, num_rows, convention[2], **options
        )
    flags = {"CAPPED": options["CAPPED"], "SHORT": hidden.dtype != torch.float32, "num_warps": 4, "ROWS": 128}
    kernels.tile_losses[(triton.cdiv(num_rows, 128),)](
        state, labels, exact, losses, vocab, num_rows, *convention, **flags
    )
    for ids in pieces(vocab, columns) if write else ():
        width = ids.stop - ids.start
        product(hidden, head[ids].T, logits[:, :width])
        kernels.tile_slopes[(num_rows,)](
            logits, slopes, slopes.stride(0), labels, exact, losses, state, unit, ids.start, width, columns, num_rows,
            *convention, **options,
        )  # fmt: skip
        sums.add_columns(slopes[:, :width], hidden, ids)
