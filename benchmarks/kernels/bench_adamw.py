"""AdamW over one flat shard beside torch's fused AdamW on one flat tensor; with bfloat16 gradients and copy-out too."""

import functools
from collections.abc import Iterator

import torch
from harness import Function, Row, available, choose, device, measure, turn
from torch import Tensor

from tessera_kernels.triton import adamw as ours

OPTIONS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def rows() -> Iterator[Row]:
    for count in turn(choose((2**28, 2**26), (300,))):
        param, grad, first = (torch.randn(count, device=device()) * scale for scale in (1.0, 1.0, 0.1))
        second = torch.rand(count, device=device()) * 0.01
        times = measure(
            {"ours": _update(param, grad, first, second, None)}
            | available({"torch fused": functools.partial(_torch, grad)})
        )
        yield Row(
            op="adamw", shape=f"{count} float32 gradients", ours=times.pop("ours"), peers=times,
            bytes_moved=28.0 * count, must={"torch fused": 1.0, "share": 0.9},
        )  # fmt: skip
        half, copy = grad.bfloat16(), torch.empty(count, device=device(), dtype=torch.bfloat16)
        times = measure({"ours": _update(param, half, first, second, copy)})
        yield Row(
            op="adamw", shape=f"{count} bfloat16 gradients and copy-out", ours=times["ours"],
            bytes_moved=28.0 * count, must={"share": 0.9},
        )  # fmt: skip


def _update(param: Tensor, grad: Tensor, first: Tensor, second: Tensor, copy: Tensor | None) -> Function:
    step, lr = torch.tensor(10, device=device()), torch.tensor(1e-4, device=device())
    return lambda: ours.adamw_flat_(param, grad, first, second, step=step, lr=lr, copy=copy, **OPTIONS)


def _torch(grad: Tensor) -> Function:
    param = torch.randn_like(grad).requires_grad_()
    param.grad = grad.clone()
    optimizer = torch.optim.AdamW(
        [param], lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True, capturable=param.is_cuda
    )
    return optimizer.step
