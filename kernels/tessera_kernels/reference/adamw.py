"""AdamW over a flat shard, written out plainly: the reference of `tessera_kernels.triton.adamw`.

m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  t = step + 1;
p -= lr ((m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps) + wd p)    (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2).
"""

import torch
from torch import Tensor


@torch.no_grad()
def adamw_flat_(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    copy: Tensor | None = None,
    grad_scale: Tensor | None = None,
    config: object = None,
) -> None:
    """Update the shard and its moments in place; `step` updates were made before. The moments' dtype is computed in."""
    del config
    up, t = first.dtype, int(step) + 1
    if grad_scale is not None:
        grad = (grad.to(torch.promote_types(grad.dtype, torch.float32)) * grad_scale).to(grad.dtype)
    grad = grad.to(up)
    first.copy_(beta1 * first + (1 - beta1) * grad)
    second.copy_(beta2 * second + (1 - beta2) * grad.square())
    change = (first / (1 - beta1**t)) / ((second / (1 - beta2**t)).sqrt() + eps)
    if weight_decay:
        change = change + weight_decay * param
    param.copy_(param - lr * change)
    if copy is not None:
        copy.copy_(param)
