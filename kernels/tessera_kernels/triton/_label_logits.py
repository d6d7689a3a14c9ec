"""The logit of each row's label from a dot product of its own, for the losses of a linear head.

Tensor cores cut off what does not fit while they add up: a logit near 14 comes out short by 3e-5, one near 0 is not, and
that is 3e-5 of a loss near convergence. So a row's label has a dot product of its own here.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor


def label_logits(hidden_XD: Tensor, head_VD: Tensor, labels_X: Tensor) -> Tensor:
    """Return each row's product with its label's row of the head, float32 [X]: summed in float64, rounded once.

    A label that is no id gives the product with id 0, which nobody may look at.
    """
    dots = torch.empty(len(hidden_XD), dtype=torch.float32, device=hidden_XD.device)
    block = min(2048, triton.next_power_of_2(hidden_XD.shape[1]))
    _label_dots[(len(hidden_XD),)](
        hidden_XD, head_VD, labels_X, dots, *head_VD.shape, *hidden_XD.stride(), *head_VD.stride(), BLOCK=block,
        num_warps=max(1, min(4, block // 512)),
    )  # fmt: skip
    return dots


@triton.jit
def _label_dots(
    hidden, head, labels, dots, vocab, width, stride_hx, stride_hd, stride_vx, stride_vd, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row).to(tl.int64)
    known = (label >= 0) & (label < vocab)
    states, weights = hidden + row * stride_hx, head + tl.where(known, label, 0) * stride_vx
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        a = tl.load(states + columns.to(tl.int64) * stride_hd, mask=columns < width, other=0.0)
        b = tl.load(weights + columns.to(tl.int64) * stride_vd, mask=columns < width, other=0.0)
        if a.dtype == tl.float32:
            total += a.to(tl.float64) * b.to(tl.float64)
        else:  # two numbers of 11 bits at most: float32 holds their product
            total += (a.to(tl.float32) * b.to(tl.float32)).to(tl.float64)
    tl.store(dots + row, tl.sum(total, 0).to(tl.float32))
