"""The linear distillation loss with its logits in CUDA C++, for half precision on Hopper.

What the loss is, how rows are cut under a byte budget, and the row kernels between the products are those of
`tessera_kernels.triton.linear_distillation`. Here are both models' logits with their softmax sums in one launch
(`linear_logits.cu`). Numbers that the copy engine cannot read, and float32, take the library's products, as there.

Reference: `tessera_kernels.reference.linear_distillation`.
"""

import functools
import math

import torch
from torch import Tensor

from tessera_kernels.cuda._launch import Kernel, TensorMap, expect_cuda_device, launch, num_sms, tensor_map
from tessera_kernels.triton import linear_distillation as rows
from tessera_kernels.triton._loss_plans import LossConfig

BLOCK, COLUMNS, TERMS = 128, 256, 64
THREADS, STAGES = 384, 4
RING_BYTES = STAGES * (BLOCK + COLUMNS) * TERMS * 2 + 1024
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
LABELS = {torch.int64: "int64_t", torch.int32: "int"}

CONFIGS: tuple[LossConfig, ...] = (
    LossConfig(product=3),
    LossConfig(block=4096, num_warps=16, stages=2, product=3),
    LossConfig(block=2048, num_warps=8, stages=3, product=3),
)
"""Shapes of the row kernel behind these products, that the GPU lane runs and the sweep times."""

Model = tuple[Tensor, Tensor]
"""Hidden states [X, D] and head [V, D]."""


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
    """Return what `tessera_kernels.triton.linear_distillation` returns, with the same errors; chunks by these products."""
    expect_cuda_device("student_XD", student_XD)
    return rows.linear_distillation(
        student_XD, student_head_VD, teacher_XF, teacher_head_VF, labels_X, divergence=divergence, temperature=temperature,
        temperature_squared=temperature_squared, beta=beta, alpha=alpha, label_weight=label_weight, z_loss=z_loss,
        ignore_index=ignore_index, vocab_size=vocab_size, chunk_bytes=chunk_bytes, mode=mode, accumulate=accumulate,
        config=(config or CONFIGS[0])._replace(product=3),
    )  # fmt: skip


def multiply_both(student: Model, teacher: Model, logits: Tensor, labels: Tensor, inv_tau: float, hard: bool) -> Tensor:
    """Write the float32 logits [2, rows, padded] of both models; return the sums of their tiles, [6, tiles, rows].

    Four numbers of the student's, two of the teacher's: see `tessera_kernels.triton._logit_tiles.multiply_both`.
    """
    count, vocab = len(student[0]), len(student[1])
    pair = 2 if count > BLOCK else 1
    blocks_x, blocks_v = -(-count // (BLOCK * pair)), -(-vocab // COLUMNS)
    sums = torch.empty(6, blocks_v, count, dtype=torch.float32, device=logits.device)
    models = [(student, logits[0], sums[:4], hard), (teacher, logits[1], sums[4:], False)]
    models.sort(key=lambda one: -one[0][0].shape[1])  # tiles of more terms first
    maps = [one for (hidden, head), *_ in models for one in (_along(hidden, BLOCK), _along(head, COLUMNS // pair))]
    launch(
        logits_kernel(student[0].dtype, labels.dtype, pair),
        grid=(pair * min(2 * blocks_x * blocks_v, num_sms(logits.device) // pair), 1, 1),
        block=THREADS,
        shared_bytes=RING_BYTES,
        arguments=[
            *maps, *(out for _, out, _, _ in models), *(part for _, _, part, _ in models), labels,
            *(hidden.shape[1] for (hidden, _), *_ in models), *(int(counts) for *_, counts in models), count, vocab,
            logits.shape[-1], blocks_x, blocks_v, int(inv_tau != 1.0), inv_tau * math.log2(math.e),
        ],
        like=logits,
    )  # fmt: skip
    return sums


def _along(matrix: Tensor, rows_of_box: int) -> TensorMap:
    return tensor_map(matrix[None, None], (1, 1, rows_of_box, TERMS))


@functools.cache
def logits_kernel(dtype: torch.dtype, labels: torch.dtype, pair: int) -> Kernel:
    """Return the specialization of `linear_logits.cu` for 1 or 2 blocks a cluster."""
    defines = (("TYPE", NAMES[dtype]), ("LABEL", LABELS[labels]), ("STAGES", STAGES), ("PAIR", pair))
    return Kernel("linear_logits.cu", "linear_logits", defines, needs="sm_90a")


def specializations() -> list[Kernel]:
    """Return what `python -m tessera_kernels.cuda.build` compiles."""
    return [logits_kernel(dtype, labels, pair) for dtype in NAMES for labels in LABELS for pair in (1, 2)]
