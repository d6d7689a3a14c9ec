"""What the losses of a linear head share on the host: autograd's view of them, and what they refuse. How rows are cut under
a byte budget stands in `_loss_plans`, the running sums of both gradients in `_gradient_sums`:

    hidden [X, D]          one gradient chunk           logits   float32, `logit_rows` at a time   (HBM, reused)
    +-----------+ rows     +--------------------+       slopes   input dtype, `rows` at a time     (HBM, reused)
    |           | ----->   | logits -> slopes   | ----> d hidden, one product for each chunk
    +-----------+          +--------------------+       d head   float32 [V, D], a running sum over chunks
         ...                logit_rows, repeated

Logits stay float32 (in bfloat16 they carry an error of 1 part in 500 of their own size, which is the whole of a loss
near convergence); slopes, the derivatives of the loss by the logits, round once to the input dtype, because tensor
cores read them. Everything runs in a fixed order without atomics: the same call gives the same bits.
"""

# mypy: disable-error-code="no-untyped-call,untyped-decorator"

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera_kernels.checks import expect_choice, expect_dtype, expect_rank, expect_same_device, expect_same_dtype
from tessera_kernels.triton._gradient_sums import finish, head_grad_dtype, hidden_sum_dtype
from tessera_kernels.triton._launch import FLOATS
from tessera_shared.errors import KernelError

MODES = ("chunked", "no_logits")
ACCUMULATE = ("float32", "head")


class LinearLoss(torch.autograd.Function):
    """Autograd's view of a loss whose forward computes both gradients. Its first two inputs are hidden states and head.

    A forward gives what its launcher returned to `keep`: (loss, num_tokens, unit, d hidden and d head in that unit).
    """

    @staticmethod
    def keep(ctx: Any, hidden_XD: Tensor, head_VD: Tensor, result: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Save for the backward and return (loss, num_tokens)."""
        loss, num_tokens, *saved = result
        ctx.save_for_backward(*saved)
        ctx.dtypes = hidden_XD.dtype, head_grad_dtype(head_VD)
        ctx.mark_non_differentiable(num_tokens)
        return loss, num_tokens

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply what is kept by the incoming derivative of the loss."""
        unit, *kept = ctx.saved_tensors
        factor = grad / unit
        needed = ctx.needs_input_grad
        grads = (
            finish(gradient, factor, dtype) if need else None
            for gradient, dtype, need in zip(kept, ctx.dtypes, needed, strict=False)
        )
        return *grads, *(None,) * (len(needed) - 2)


def fake_result(
    hidden_XD: Tensor, head_VD: Tensor, labels_X: Tensor, *, for_hidden: bool, for_head: bool, head_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return empty tensors of what a launcher returns (see `LinearLoss`)."""
    scalar = hidden_XD.new_empty((), dtype=torch.float32)
    d_head = hidden_XD.new_empty(0)
    d_hidden = hidden_XD.new_empty(hidden_XD.shape if for_hidden else 0, dtype=hidden_sum_dtype(hidden_XD))
    if for_head:
        d_head = head_VD.new_empty(head_VD.shape, dtype=head_dtype)
    return scalar, labels_X.new_empty((), dtype=torch.int32), torch.empty_like(scalar), d_hidden, d_head


def check_pair(hidden: str, hidden_XD: Tensor, head: str, head_VD: Tensor) -> None:
    """Raise unless hidden states `[X, D]` and head `[V, D]` fit each other and the products can read them in place."""
    expect_rank(hidden, hidden_XD, 2)
    expect_rank(head, head_VD, 2)
    expect_dtype(hidden, hidden_XD, *FLOATS)
    expect_same_device({hidden: hidden_XD, head: head_VD})
    expect_same_dtype({hidden: hidden_XD, head: head_VD})
    if head_VD.shape[1] != hidden_XD.shape[1]:
        raise KernelError(
            f"{head}.shape = {list(head_VD.shape)}: expected [any, {hidden_XD.shape[1]}], because {hidden} has that width; "
            "try the head that belongs to these hidden states"
        )
    if head_VD.numel() == 0:
        raise KernelError(
            f"{head}.shape = {list(head_VD.shape)}: expected a vocabulary and a width of at least 1, because a softmax over "
            "nothing has no value; try a head with rows"
        )
    if 1 not in head_VD.stride() and min(head_VD.shape) > 1:
        raise KernelError(
            f"{head}.stride() = {list(head_VD.stride())}: expected 1 in one dimension, because every chunk would copy the "
            f"whole head otherwise; try {head}.contiguous()"
        )


def check_labels(labels_X: Tensor, hidden_XD: Tensor) -> None:
    """Raise unless there is one integer label for each row."""
    expect_dtype("labels_X", labels_X, torch.int64, torch.int32)
    expect_same_device({"hidden states": hidden_XD, "labels_X": labels_X})
    if labels_X.shape != hidden_XD.shape[:1]:
        raise KernelError(
            f"labels_X.shape = {list(labels_X.shape)}: expected [{hidden_XD.shape[0]}], because each row of the hidden states "
            "has one label; try labels.reshape(-1)"
        )


def check_vocab(vocab_size: int | None, rows: int) -> int:
    """Return how many ids are real; ids at or above have probability 0 and no gradient."""
    vocab = rows if vocab_size is None else vocab_size
    if not 1 <= vocab <= rows:
        raise KernelError(
            f"vocab_size = {vocab}: expected 1 to {rows}, because the head has {rows} rows; try vocab_size=None for all of them"
        )
    return vocab


def check_options(mode: str, accumulate: str, dtype: torch.dtype, chunk_bytes: int | None) -> None:
    """Raise unless the words are known and go together."""
    expect_choice("mode", mode, MODES)
    expect_choice("accumulate", accumulate, ACCUMULATE)
    if accumulate == "head" and dtype == torch.float16:
        raise KernelError(
            "accumulate = 'head' with float16: expected 'float32', because a sum over tokens leaves float16's range; "
            "try accumulate='float32'"
        )
    if chunk_bytes is not None and chunk_bytes < 1:
        raise KernelError(
            f"chunk_bytes = {chunk_bytes}: expected at least 1, because it is a size; try None, the measured default"
        )


def readable(hidden_XD: Tensor) -> Tensor:
    """Return hidden states that a product reads in place: themselves, or a copy when neither stride is 1."""
    return hidden_XD if 1 in hidden_XD.stride() else hidden_XD.contiguous()
