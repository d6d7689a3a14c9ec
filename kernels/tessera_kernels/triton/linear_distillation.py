"""Divergence between a linear student head and a linear teacher head from their hidden states; no full logits ever.

    q = softmax(h W^T / tau),  p = softmax(g U^T / tau)         h [X, D], W [V, D] student; g [X, F], U [V, F] teacher
    loss = sum over counted rows of (1 - label_weight) tau^2 D(p, q) + label_weight (cross-entropy at tau = 1)
    D: forward KL  sum p log(p/q) - p + q    (Hinton et al., 1503.02531)      JSD and its beta    (GKD, 2306.13649)
       reverse KL  sum q log(q/p) - q + p    (MiniLLM, 2306.08543)            skew and its alpha  (DistiLLM, 2402.03898)

    mode "chunked", 2 X V (3 D + F) operations       mode "no_logits" (forward and reverse KL), 2 X V (4 D + 2 F)
    +--------------- V ---------------+              +-- V --+-------+
    | student logit_rows, float32     | own          |   X   | stripe|   1. both logits of a stripe, online sums [X]
    | teacher logit_rows, float32     | product      |       |       |   2. both again, loss, slopes, both products: d
    | and the sums of each tile       |              +-------+-------+      head of the stripe is finished at once
    | one program a row: slopes       | -> bf16                             (`_divergence_tiles`)
    +---------------------------------+

    HBM        float32 logits of both models and slopes (the input dtype) of one chunk, 24 bytes a row and tile of sums;
               without logits the teacher's and slopes of one stripe
    registers  one tile of both rows; maxima and sums
    shared     what the loop prefetches; the reduction across warps

The product's epilogue takes each tile's softmax sums (`_logit_tiles`): forward KL then walks a row once, the others twice.
What TMA does not read (float32, odd strides, Ampere) and small calls take the library's product, and the row kernel one
walk more for the sums; without logits both models' of a stripe are then in memory, slopes over the student's. Walks
change direction, so that each begins with what L2 still holds. The conventions, and the care for digits near convergence
(no difference of two logarithms or two probabilities), are those of `tessera_torch.distil.losses`; the mixture of JSD and
skew takes part in the gradient. "no_logits" is refused for JSD and skew: their slopes need sums that need both
normalizers, which would be a third time all logits. A label's logit is a dot product of its own, as in
`linear_cross_entropy`; in the divergence, what tensor cores cut off both models' logits leaves in their difference what
it leaves in one of them near 0. Reference: `tessera_kernels.reference.linear_distillation`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from typing import Any

import torch
import triton
from torch import Tensor

from tessera_kernels.checks import expect_between, expect_choice, expect_same_device, expect_triton_device
from tessera_kernels.triton import _divergence_rows as kernels
from tessera_kernels.triton import _logit_tiles as tiles
from tessera_kernels.triton._divergence_series import DIVERGENCES, coefficients
from tessera_kernels.triton._divergence_tiles import in_tiles
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
)
from tessera_shared.errors import KernelError

CHUNK_BYTES = {"chunked": 576 * 2**20, "three walks": 452 * 2**20, "no_logits": 96 * 2**20}
"""Bytes for logits, slopes and sums by default. At a vocabulary of 128,256 and 8,192 rows: 7 chunks, 0.58 GiB with d hidden's
pieces (KL); 11 chunks, 0.48 GiB, less than a quarter of what the best peer takes (JSD, skew); 128 MiB with d hidden in float32."""

STATE_BYTES = 40
"""What a row takes beside its tile: label's logit, loss, and the eight sums that pass from tile to tile."""

CONFIGS: tuple[LossConfig, ...] = (
    LossConfig(block=4096, num_warps=16, stages=2, product=2),
    LossConfig(block=4096, num_warps=16, stages=1, product=2),
    LossConfig(block=4096, num_warps=8, stages=1, product=2),
    LossConfig(block=2048, num_warps=8, stages=1, product=2),
    LossConfig(block=2048, num_warps=8, stages=3, product=2),
    LossConfig(block=4096, num_warps=16, stages=2, product=1),
    LossConfig(block=4096, num_warps=16, stages=1, product=1),
    LossConfig(block=8192, num_warps=32, stages=1, product=1),
)
"""Shapes of the row kernel behind either product, that the GPU lane runs and the sweep times."""


def choose_config(columns: int, walks: int = 2) -> LossConfig:
    """Return the row kernel's shape for rows of so many logits at a time. The number of rows plays no part.

    A launch has about 256 rows, two for each multiprocessor: 8 or 16 warps and at most 64 registers a row let both in.
    """
    most = 2048 if walks == 3 else 4096
    block = min(most, max(16, triton.next_power_of_2(columns)))
    return LossConfig(block=block, num_warps=max(1, block // 256), stages=3 if walks == 3 else 1)


def linear_distillation(
    student_XD: Tensor,
    student_head_VD: Tensor,
    teacher_XF: Tensor,
    teacher_head_VF: Tensor,
    labels_X: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    temperature_squared: bool = True,
    beta: float = 0.5,
    alpha: float = 0.1,
    label_weight: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    mode: str = "chunked",
    accumulate: str = "float32",
    config: LossConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss (float32) and the number of labels that are not `ignore_index` (int32), both 0-dim.

    Student and teacher each in one of bfloat16, float16, float32, of their own widths; the student's hidden states and
    head get gradients, the teacher is fixed (a teacher that requires grad is refused). The divergence is multiplied by
    tau^2 unless `temperature_squared` is False; labels matter beyond `ignore_index` only when `label_weight` > 0, and
    one outside the vocabulary then makes loss and gradient NaN. Ids at or above `vocab_size` have probability 0 on both
    sides; without it both heads must have the same number of rows. Gradients are computed here and multiplied in the
    backward, which runs once. `KernelError` says what does not fit.
    """
    teacher = (teacher_XF, teacher_head_VF)
    _check(student_XD, student_head_VD, *teacher, labels_X, mode, accumulate, chunk_bytes)
    kind, weight = _kind(divergence, temperature, beta, alpha, label_weight, mode)
    vocab = _check_vocabularies(student_head_VD, teacher_head_VF, vocab_size)
    if student_XD.shape[0] == 0:
        return (student_XD.sum() + 0.0 * student_head_VD.sum()).float(), labels_X.new_zeros((), dtype=torch.int32)
    scale = temperature**2 if temperature_squared else 1.0
    loss, num_tokens = _Loss.apply(
        readable(student_XD), student_head_VD, readable(teacher_XF), teacher_head_VF, labels_X.contiguous(), kind,
        [1.0 / temperature, float(weight), (1.0 - label_weight) * scale, float(label_weight), float(z_loss)],
        ignore_index, vocab, chunk_bytes or CHUNK_BYTES["three walks" if _walks(kind) == 3 else mode], mode, accumulate,
        list(config or ()),
    )  # fmt: skip
    return loss, num_tokens


def _check(
    student_XD: Tensor, student_head_VD: Tensor, teacher_XF: Tensor, teacher_head_VF: Tensor, labels_X: Tensor,
    mode: str, accumulate: str, chunk_bytes: int | None,
) -> None:  # fmt: skip
    expect_triton_device("student_XD", student_XD)
    check_pair("student_XD", student_XD, "student_head_VD", student_head_VD)
    check_pair("teacher_XF", teacher_XF, "teacher_head_VF", teacher_head_VF)
    expect_same_device({"student_XD": student_XD, "teacher_XF": teacher_XF})
    check_labels(labels_X, student_XD)
    check_options(mode, accumulate, student_XD.dtype, chunk_bytes)
    if teacher_XF.shape[0] != student_XD.shape[0]:
        raise KernelError(
            f"teacher_XF.shape = {list(teacher_XF.shape)}: expected [{student_XD.shape[0]}, any], because student_XD has that "
            "many rows and each is compared with the teacher's at the same position; try the hidden states of the same tokens"
        )
    for name, tensor in (("teacher_XF", teacher_XF), ("teacher_head_VF", teacher_head_VF)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise KernelError(
                f"{name}.requires_grad = True: expected False, because only the student gets gradients here; "
                f"try {name}.detach()"
            )


def _check_vocabularies(student_head_VD: Tensor, teacher_head_VF: Tensor, vocab_size: int | None) -> int:
    student, teacher = student_head_VD.shape[0], teacher_head_VF.shape[0]
    if vocab_size is None and student != teacher:
        raise KernelError(
            f"student_head_VD.shape[0] = {student}, teacher_head_VF.shape[0] = {teacher}: expected the same, because the "
            f"distributions are compared id by id; try vocab_size={min(student, teacher)} if the longer one is padding"
        )
    return check_vocab(vocab_size, min(student, teacher))


def _kind(
    divergence: str, temperature: float, beta: float, alpha: float, label_weight: float, mode: str
) -> tuple[str, float]:
    """Return the divergence to compute, its limits replaced by what they are by definition, and its weight."""
    expect_choice("divergence", divergence, DIVERGENCES)
    for name, value in (("beta", beta), ("alpha", alpha), ("label_weight", label_weight)):
        expect_between(name, value, 0.0, 1.0, "it is a mixing weight")
    if not 0.0 < temperature < float("inf"):
        raise KernelError(
            f"temperature = {temperature}: expected a positive number, because logits are divided by it; try 1.0"
        )
    kind, weight = divergence, beta if divergence == "generalized_jsd" else alpha
    if divergence == "generalized_jsd" and beta in (0.0, 1.0):
        kind = "reverse_kl" if beta else "forward_kl"
    if divergence.startswith("skew") and alpha == 0.0:
        kind = "forward_kl" if divergence == "skew_kl" else "reverse_kl"
    if mode == "no_logits" and _walks(kind) == 3:
        raise KernelError(
            f"mode = 'no_logits' with divergence = {divergence!r}: expected forward_kl or reverse_kl, because the others' "
            "gradients need a sum that needs both normalizers, a third pass over all logits; try mode='chunked' with a small "
            "chunk_bytes"
        )
    return kind, weight if kind == divergence else 0.0


class _Loss(LinearLoss):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor,
        kind: str, numbers: list[float], ignore_index: int, vocab: int, chunk_bytes: int, mode: str, accumulate: str,
        config: list[int],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        for_hidden, for_head = ctx.needs_input_grad[:2]
        result = _run(
            student, student_head, teacher, teacher_head, labels, for_hidden, for_head, kind, numbers, ignore_index,
            vocab, chunk_bytes, mode, accumulate, config,
        )  # fmt: skip
        return _Loss.keep(ctx, student, student_head, result)


def _fake_run(
    student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor, for_hidden: bool,
    for_head: bool, kind: str, numbers: list[float], ignore_index: int, vocab: int, chunk_bytes: int, mode: str,
    accumulate: str, config: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    del teacher, teacher_head, kind, numbers, ignore_index, vocab, chunk_bytes, config  # none of them changes a shape
    summed = head_sum_dtype(student_head, mode, accumulate)
    return fake_result(student, student_head, labels, for_hidden=for_hidden, for_head=for_head, head_dtype=summed)


@graph_op("linear_distillation", fake=_fake_run)
def _run(
    student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor, for_hidden: bool,
    for_head: bool, kind: str, numbers: list[float], ignore_index: int, vocab: int, chunk_bytes: int, mode: str,
    accumulate: str, config: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss sum, the number of labels, the gradients' unit, and both gradients in that unit (or empty)."""
    num_tokens = (labels != ignore_index).sum(dtype=torch.int32)
    unit = unit_of(num_tokens, student.dtype)
    summed = head_sum_dtype(student_head, mode, accumulate)
    tiled = mode == "no_logits"
    sums = GradientSums(
        student, student_head, vocab, for_hidden=for_hidden, for_head=for_head, head_dtype=summed, tiled=tiled
    )  # fmt: skip
    inverse, weight, _, label_weight, _ = numbers
    hard, (terms, slopes) = label_weight > 0.0, coefficients(kind, weight)
    short = student.dtype != torch.float32
    options = {"KIND": DIVERGENCES.index(kind), "HARD": hard, "COLD": inverse != 1.0, "SHORT": short}
    losses = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
    walk = _in_tiles if tiled else _in_chunks
    with on_device(student):
        exact = label_logits(student, student_head[:vocab], labels) if hard else losses
        walk(
            (student, student_head[:vocab]), (teacher, teacher_head[:vocab]), (labels, exact, losses, unit), sums,
            for_hidden or for_head, (ignore_index, *numbers, *terms, *slopes), chunk_bytes, LossConfig(*config), options,
        )  # fmt: skip
    return losses.sum(dtype=torch.float64).float(), num_tokens, unit, sums.take_hidden(), sums.head_VD


IN_CUDA = 3
"""`LossConfig.product` of `tessera_kernels.cuda.linear_distillation`."""

RowData = tuple[Tensor, Tensor, Tensor, Tensor]
"""Labels, their logits (anything where no label counts), losses (written), and the gradients' unit."""


def _walks(kind: str) -> int:
    """Return how often a row is walked. The others' slopes need a sum that needs both normalizers."""
    return 2 if kind in ("forward_kl", "reverse_kl") else 3


def _shape(cut: LossConfig, columns: int, walks: int) -> dict[str, int]:
    shape = cut if cut.block else choose_config(columns, walks)
    return {"BLOCK": shape.block, "STAGES": shape.stages or 1, "num_warps": shape.num_warps}


def _in_chunks(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], rows_of: RowData, sums: GradientSums, write: bool,
    numbers: tuple[float, ...], budget: int, cut: LossConfig, options: dict[str, Any],
) -> None:  # fmt: skip
    (hidden, head), (labels, exact, losses, unit) = student, rows_of
    (num_rows, width), vocab = hidden.shape, head.shape[0]
    plan = plan_chunks(num_rows, vocab, models=2, slope_bytes=hidden.element_size() * write, budget=budget)
    rows, logit_rows = cut.rows or plan.rows, cut.logit_rows or plan.logit_rows
    splits = cut.hidden_splits or choose_splits(min(rows, num_rows), width, vocab)
    padded, shape = padded_columns(vocab), _shape(cut, vocab, _walks(DIVERGENCES[options["KIND"]]))
    lift = _lift(DIVERGENCES[options["KIND"]], numbers[2])
    logits = torch.empty(2, min(logit_rows, num_rows), padded, dtype=torch.float32, device=hidden.device)
    slopes = hidden.new_empty(min(rows, num_rows) if write else 1, padded)
    summed = _wants_sums(cut, hidden, head) and tiles.reads(*student, *teacher)
    multiply_both = tiles.multiply_both
    if summed and cut.product == IN_CUDA:
        from tessera_kernels.cuda.linear_distillation import multiply_both  # needs cuda-bindings

    blocks, partials = triton.cdiv(vocab, tiles.BLOCK_V), losses
    for chunk in pieces(num_rows, rows):
        states = hidden[chunk]
        for part in pieces(len(states), logit_rows):
            count, place = part.stop - part.start, chunk.start + part.start
            models = (states[part], head), (teacher[0][place : place + count], teacher[1])
            if summed:
                partials = multiply_both(*models, logits[:, :count], labels[place:], numbers[1], options["HARD"])
            else:
                _both_logits(*models, logits[:, :count], slice(0, vocab))
            to = slopes[part] if write else slopes
            kernels.row_kernel[(count,)](
                logits[0], logits[1], to, to if to.dtype == torch.float32 else to.view(torch.float16), labels[place:],
                exact[place:], losses[place:], unit, partials, blocks, count, vocab, padded, lift, *numbers, WRITE=write,
                TILES=triton.next_power_of_2(blocks) * summed, **shape, **options,
            )  # fmt: skip
        if write:
            sums.add_rows(slopes[: len(states), :vocab], states, chunk, splits)


def _lift(kind: str, weight: float) -> float:
    """Return what slopes over q are multiplied by to make good use of float16; those of skew KL go to (1 - alpha) / alpha."""
    return min(16.0, 65504.0 * weight) if kind == "skew_kl" else 16.0


def _wants_sums(cut: LossConfig, hidden: Tensor, head: Tensor) -> bool:
    """Was the product with sums in its epilogue asked for, or has it whole tiles (of 128 rows by 256 ids) to do?"""
    return cut.product in (2, IN_CUDA) or (cut.product == 0 and len(hidden) >= 64 and len(head) >= 1024)


def _in_tiles(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], rows_of: RowData, sums: GradientSums, write: bool,
    numbers: tuple[float, ...], budget: int, cut: LossConfig, options: dict[str, Any],
) -> None:  # fmt: skip
    (hidden, head), (labels, exact, losses, unit) = student, rows_of
    if _wants_sums(cut, hidden, head) and tiles.reads(*student, *teacher):
        in_tiles(student, teacher, rows_of, sums, write, numbers, budget, options)
        return
    (num_rows, _), vocab = hidden.shape, head.shape[0]
    columns = plan_columns(num_rows, vocab, id_bytes=8, state=STATE_BYTES, budget=budget)
    options = options | _shape(cut, columns, 2)
    in_sums = {name: value for name, value in options.items() if name != "SHORT"}
    logits = torch.empty(2, num_rows, columns, dtype=torch.float32, device=hidden.device)
    slopes = slopes_within(logits[0], hidden.dtype, at_end=False)
    state = torch.empty(8, num_rows, dtype=torch.float32, device=hidden.device)
    for ids in pieces(vocab, columns):
        width = _both_logits(student, teacher, logits, ids)
        kernels.tile_sums[(num_rows,)](
            logits[0], logits[1], labels, state, ids.start, width, columns, num_rows, numbers[1], **in_sums
        )
    last = {name: value for name, value in options.items() if name != "COLD"}
    for ids in pieces(vocab, columns):
        width = _both_logits(student, teacher, logits, ids)
        kernels.tile_slopes[(num_rows,)](
            logits[0], logits[1], slopes, slopes.stride(0), labels, exact, losses, state, unit, ids.start, width, columns,
            vocab, num_rows, *numbers, WRITE=write, **last,
        )  # fmt: skip
        if write:
            sums.add_columns(slopes[:, :width], hidden, ids)


def _both_logits(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], logits: Tensor, ids: slice) -> int:
    width = int(ids.stop - ids.start)
    for (hidden, head), out in zip((student, teacher), logits, strict=True):
        product(hidden, head[ids].T, out[:, :width])
    return width
