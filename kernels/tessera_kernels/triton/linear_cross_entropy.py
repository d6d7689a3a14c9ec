"""Cross-entropy of a linear head from hidden states, where the logits of the whole batch never exist.

    z = h W^T, or cap tanh(h W^T / cap);   loss = sum over counted rows of log(sum e^z) - z[label] + z_loss log(sum e^z)^2
    dz = softmax(z) - onehot(label) + 2 z_loss log(sum e^z) softmax(z);   d h = dz W;   d W = dz^T h
    (z_loss: PaLM, arXiv 2204.02311, section 5. Gradients in the forward: Liger-Kernel, arXiv 2410.10989, section 3.2.)

    mode "chunked", 6 X V D operations              mode "no_logits", 8 X V D operations
    +--------------- V ---------------+             +-- V --+-------+-------+
    | logit_rows, float32             | cuBLAS      |       |       |       |   1. logits of a tile, online sums [X]
    | one program a row: ->  top, sum |             |   X   | tile  |       |
    |                    <-  slopes   | -> bf16     |       |       |       |   2. logits again, slopes, both products:
    +---------------------------------+             +-------+-------+-------+      d head of the tile is finished at once

    HBM        logits float32 and slopes (the input dtype) of one chunk or tile; d hidden float32 [X, D]; d head
    registers  one tile of a row; its running maximum and sums
    shared     what the loop prefetches; the reduction across warps

The row is walked forward for its sums and backward for its slopes, so that the second walk begins with what L2 still
holds. The label's term stays out of the sum: a loss of 1e-3 has as many digits as one of 10. `accumulate` is the dtype
in which d head is summed over chunks. Memory beyond the gradients is all but d hidden and d head in the dtypes in which
they are returned: `chunk_bytes`, 2 X D for d hidden in float32, and, where d head is returned in half precision but
summed in float32, that sum (4 V D). No sum stands beside a float32 gradient (`grad_dtype` of a leaf): it is the sum.
Reference: `tessera_kernels.reference.linear_cross_entropy`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera_kernels.checks import expect_triton_device
from tessera_kernels.triton._launch import graph_op, on_device
from tessera_kernels.triton._linear_loss import (
    GradientSums,
    LinearLoss,
    LossConfig,
    check_labels,
    check_options,
    check_pair,
    check_vocab,
    fake_result,
    head_sum_dtype,
    padded_columns,
    pieces,
    plan_chunks,
    plan_columns,
    product,
    readable,
    unit_of,
)
from tessera_kernels.triton._row_math import LOWEST, label_loss, tanh, write_zeros

CHUNK_BYTES = {"chunked": 544 * 2**20, "no_logits": 64 * 2**20}
"""Bytes for logits and slopes by default. At a vocabulary of 128,256: 5 chunks of 8,192 rows, 0.52 GiB."""

CONFIGS: tuple[LossConfig, ...] = (
    LossConfig(block=2048, num_warps=4, stages=1),
    LossConfig(block=4096, num_warps=8, stages=1),
    LossConfig(block=4096, num_warps=8, stages=3),
    LossConfig(block=8192, num_warps=16, stages=1),
    LossConfig(block=8192, num_warps=16, stages=2),
    LossConfig(block=8192, num_warps=32, stages=1),
)
"""Shapes of the row kernel that the GPU lane runs and the sweep times."""


def choose_config(vocab: int) -> LossConfig:
    """Return the row kernel's shape for a vocabulary. The number of rows plays no part."""
    block = min(8192, max(16, triton.next_power_of_2(vocab)))
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
    sums = GradientSums(hidden, head, vocab, for_hidden=for_hidden, for_head=for_head, head_dtype=summed)
    cut = LossConfig(*config)
    shape = cut if cut.block else choose_config(vocab)
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    options = {
        "softcap": softcap, "CAPPED": softcap != 0.0, "BLOCK": shape.block, "STAGES": shape.stages or 1,
        "num_warps": shape.num_warps,
    }  # fmt: skip
    walk = _in_chunks if mode == "chunked" else _in_tiles
    with on_device(hidden):
        walk(hidden, head[:vocab], labels, unit, losses, sums, for_hidden or for_head, (ignore_index, z_loss), chunk_bytes,
             cut, options)  # fmt: skip
    return losses.sum(dtype=torch.float64).float(), num_tokens, unit, sums.hidden_XD, sums.head_VD


def _in_chunks(
    hidden: Tensor, head: Tensor, labels: Tensor, unit: Tensor, losses: Tensor, sums: GradientSums, write: bool,
    convention: tuple[int, float], budget: int, cut: LossConfig, options: dict[str, Any],
) -> None:  # fmt: skip
    (num_rows, _), vocab = hidden.shape, head.shape[0]
    plan = plan_chunks(num_rows, vocab, models=1, slope_bytes=hidden.element_size() * write, budget=budget)
    rows, logit_rows = cut.rows or plan.rows, cut.logit_rows or plan.logit_rows
    padded = padded_columns(vocab)
    logits = torch.empty(min(logit_rows, num_rows), padded, dtype=torch.float32, device=hidden.device)
    slopes = hidden.new_empty(min(rows, num_rows) if write else 1, padded)
    for chunk in pieces(num_rows, rows):
        states = hidden[chunk]
        for part in pieces(len(states), logit_rows):
            count = part.stop - part.start
            product(states[part], head.T, logits[:count, :vocab])
            place = chunk.start + part.start
            _row_kernel[(count,)](
                logits, slopes[part] if write else slopes, labels[place:], losses[place:], unit, vocab, padded,
                *convention, WRITE=write, **options,
            )  # fmt: skip
        if write:
            sums.add_rows(slopes[: len(states), :vocab], states, chunk, cut.hidden_splits)


def _in_tiles(
    hidden: Tensor, head: Tensor, labels: Tensor, unit: Tensor, losses: Tensor, sums: GradientSums, write: bool,
    convention: tuple[int, float], budget: int, cut: LossConfig, options: dict[str, Any],
) -> None:  # fmt: skip
    del cut
    (num_rows, _), vocab = hidden.shape, head.shape[0]
    columns = plan_columns(num_rows, vocab, models=1, slope_bytes=hidden.element_size() * write, budget=budget)
    logits = torch.empty(num_rows, columns, dtype=torch.float32, device=hidden.device)
    slopes = hidden.new_empty(num_rows if write else 1, columns)
    state = torch.empty(3, num_rows, dtype=torch.float32, device=hidden.device)
    for ids in pieces(vocab, columns):
        width = ids.stop - ids.start
        product(hidden, head[ids].T, logits[:, :width])
        _tile_sums[(num_rows,)](logits, labels, state, ids.start, width, columns, num_rows, **options)
    flags = {"num_warps": options["num_warps"], "ROWS": 32}
    _tile_losses[(triton.cdiv(num_rows, 32),)](state, labels, losses, vocab, num_rows, *convention, **flags)
    for ids in pieces(vocab, columns) if write else ():
        width = ids.stop - ids.start
        product(hidden, head[ids].T, logits[:, :width])
        _tile_slopes[(num_rows,)](
            logits, slopes, labels, state, unit, ids.start, width, columns, vocab, num_rows, *convention, **options
        )
        sums.add_columns(slopes[:, :width], hidden, ids)


@triton.jit
def _capped(z, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        return softcap * tanh(z / softcap)
    return z


@triton.jit
def _sums(
    row, first_id, width, padded, label, top, rest, label_logit, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Carry (maximum, sum of e^(z - maximum) without the label, the label's logit) over one more stretch of a row."""
    lanes = tl.arange(0, BLOCK)
    rests = tl.where(lanes == 0, rest, 0.0)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        columns = start + lanes
        z = tl.where(columns < width, tl.load(row + columns, mask=columns < padded, other=0.0), 0.0)
        z = tl.where(columns < width, _capped(z, softcap, CAPPED), -float("inf"))
        is_label = first_id + columns == label
        new_top = tl.maximum(top, tl.max(z, 0))
        rests = rests * tl.exp(top - new_top) + tl.where(is_label, 0.0, tl.exp(z - new_top))
        top = new_top
    here = (label >= first_id) & (label < first_id + width)
    found = _capped(tl.load(row + label - first_id, mask=here, other=0.0), softcap, CAPPED)
    return top, tl.sum(rests, 0), tl.where(here, found, label_logit)


@triton.jit
def _write_slopes(
    row, slopes, first_id, width, padded, label, top, rest, label_logit, scale, z_loss, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk a stretch of a row from its end to its beginning and write scale * dz, rounded to the slopes' dtype."""
    _, total = label_loss(top, rest, label_logit)
    normalizer = top + tl.log(total)
    steps = (padded + BLOCK - 1) // BLOCK
    for step in tl.range(0, steps, num_stages=STAGES):
        columns = (steps - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        z = tl.where(columns < width, tl.load(row + columns, mask=columns < padded, other=0.0), 0.0)
        z = tl.where(columns < width, _capped(z, softcap, CAPPED), top)
        p = tl.exp(z - top) / total
        slope = tl.where(first_id + columns == label, -rest / total, p) + 2.0 * z_loss * normalizer * p
        if CAPPED:
            slope *= (1.0 - z / softcap) * (1.0 + z / softcap)
        slope = tl.where(columns < width, slope * scale, 0.0)
        tl.store(slopes + columns, slope.to(slopes.dtype.element_ty), mask=columns < padded)


@triton.jit
def _row_loss(top, rest, label_logit, label, vocab, z_loss):
    """Return the row's loss; NaN when the label is no id."""
    loss, total = label_loss(top, rest, label_logit)
    normalizer = top + tl.log(total)
    known = (label >= 0) & (label < vocab)
    return tl.where(known, loss + z_loss * normalizer * normalizer, float("nan"))


@triton.jit
def _row_kernel(
    logits, slopes, labels, losses, unit, vocab, padded, ignore_index, z_loss, softcap,
    CAPPED: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row: its loss and, with WRITE, its slopes."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    z, dz = logits + row * padded, slopes + row * padded
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if WRITE:
            write_zeros(dz, padded, BLOCK)
    else:
        zero = tl.full((), 0.0, tl.float32)
        top, rest, label_logit = _sums(
            z, 0, vocab, padded, label, zero + LOWEST, zero, zero, softcap, CAPPED, BLOCK, STAGES
        )
        loss = _row_loss(top, rest, label_logit, label, vocab, z_loss)
        tl.store(losses + row, loss)
        if WRITE:
            scale = tl.where(loss == loss, tl.load(unit), float("nan"))
            _write_slopes(
                z, dz, 0, vocab, padded, label, top, rest, label_logit, scale, z_loss, softcap, CAPPED, BLOCK, STAGES
            )


@triton.jit
def _tile_sums(
    logits, labels, state, first_id, width, padded, num_rows, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Carry one row's sums over one tile of the vocabulary; the first tile starts them."""
    row = tl.program_id(0).to(tl.int64)
    begun = first_id > 0
    top = tl.load(state + row, mask=begun, other=LOWEST)
    rest = tl.load(state + num_rows + row, mask=begun, other=0.0)
    found = tl.load(state + 2 * num_rows + row, mask=begun, other=0.0)
    label = tl.load(labels + row)
    top, rest, found = _sums(
        logits + row * padded, first_id, width, padded, label, top, rest, found, softcap, CAPPED, BLOCK, STAGES
    )
    tl.store(state + row, top)
    tl.store(state + num_rows + row, rest)
    tl.store(state + 2 * num_rows + row, found)


@triton.jit
def _tile_losses(state, labels, losses, vocab, num_rows, ignore_index, z_loss, ROWS: tl.constexpr):
    """Turn the finished sums of ROWS rows into their losses."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    top = tl.load(state + rows, mask=inside, other=0.0)
    rest = tl.load(state + num_rows + rows, mask=inside, other=0.0)
    found = tl.load(state + 2 * num_rows + rows, mask=inside, other=0.0)
    label = tl.load(labels + rows, mask=inside, other=0)
    loss = _row_loss(top, rest, found, label, vocab, z_loss)
    tl.store(losses + rows, tl.where(label == ignore_index, 0.0, loss), mask=inside)


@triton.jit
def _tile_slopes(
    logits, slopes, labels, state, unit, first_id, width, padded, vocab, num_rows, ignore_index, z_loss, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row's slopes in one tile of the vocabulary, from the finished sums."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    dz = slopes + row * padded
    if label == ignore_index:
        write_zeros(dz, padded, BLOCK)
    else:
        top = tl.load(state + row)
        rest = tl.load(state + num_rows + row)
        found = tl.load(state + 2 * num_rows + row)
        loss = _row_loss(top, rest, found, label, vocab, z_loss)
        scale = tl.where(loss == loss, tl.load(unit), float("nan"))
        _write_slopes(
            logits + row * padded, dz, first_id, width, padded, label, top, rest, found, scale, z_loss, softcap,
            CAPPED, BLOCK, STAGES,
        )  # fmt: skip
