"""What the RMSNorm kernels of every room share: which tensors fit, and autograd's view of the two functions.

A room's own part is the launch of its forward and of its backward:

    run_forward(x, residual or None, gain, eps, gain_after_cast, config) -> (y, x + residual or empty, rstd)
    run_backward(dy, x, gain, rstd, dtotal or None, gain_after_cast, config) -> (dx with dtotal added, dgain)
"""

# ruff: noqa: ARG001 - a fake takes what its op takes

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera_kernels.checks import expect_dtype, expect_same_device, expect_same_dtype, expect_shape
from tessera_kernels.launching import FLOATS

RunBackward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, bool, list[int]], tuple[Tensor, Tensor]]


def check_norm(x_XD: Tensor, gain_D: Tensor, residual_XD: Tensor | None = None) -> None:
    """Raise `KernelError` unless the gain and, where there is one, the residual fit x."""
    expect_dtype("x_XD", x_XD, *FLOATS)
    for what, other in (("gain_D", gain_D), ("residual_XD", residual_XD)):
        if other is not None:
            expect_same_device({"x_XD": x_XD, what: other})
            expect_same_dtype({"x_XD": x_XD, what: other})
    expect_shape("gain_D", gain_D, x_XD.shape[-1:], "there is one gain for each column of x_XD")
    if residual_XD is not None:
        expect_shape("residual_XD", residual_XD, x_XD.shape, "it is added to x_XD")


class Norm(torch.autograd.Function):
    """The backward of `rms_norm`. A room's forward takes x [X, D] and the gain first, ends with `keep` and returns y."""

    @staticmethod
    def keep(
        ctx: Any, x: Tensor, gain: Tensor, rstd: Tensor, after_cast: bool, config: list[int], run: RunBackward
    ) -> None:
        """Save what `run` makes the gradients of; x is the sum where a residual was added."""
        ctx.save_for_backward(x, gain, rstd)
        ctx.after_cast, ctx.config, ctx.run = after_cast, config, run

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and the gain."""
        x, gain, rstd = ctx.saved_tensors
        dx, dgain = ctx.run(dy, x, gain, rstd, None, ctx.after_cast, ctx.config)
        return dx, dgain, *(None,) * (len(ctx.needs_input_grad) - 2)


class AddNorm(torch.autograd.Function):
    """The backward of `add_rms_norm`. A room's forward takes x, residual [X, D] and the gain first, ends with `keep` and
    returns y and the sum."""

    @staticmethod
    def keep(
        ctx: Any, total: Tensor, gain: Tensor, rstd: Tensor, after_cast: bool, config: list[int], run: RunBackward
    ) -> None:
        """Save what `run` makes the gradients of; an output that nobody uses has no gradient, and none is made up."""
        Norm.keep(ctx, total, gain, rstd, after_cast, config, run)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the residual and the gain."""
        nothing = (None,) * (len(ctx.needs_input_grad) - 3)
        if dy is None:
            return dtotal, dtotal, None, *nothing
        total, gain, rstd = ctx.saved_tensors
        dx, dgain = ctx.run(dy, total, gain, rstd, dtotal, ctx.after_cast, ctx.config)
        return dx, dx, dgain, *nothing


def fake_forward(
    x: Tensor, residual: Tensor | None, gain: Tensor, eps: float, gain_after_cast: bool, config: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors as `run_forward` does."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y) if residual is not None else x.new_empty(0)
    return y, total, x.new_empty(x.shape[0], dtype=torch.float32)


def fake_backward(
    dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor, dtotal: Tensor | None, gain_after_cast: bool, config: list[int]
) -> tuple[Tensor, Tensor]:
    """Return empty tensors as `run_backward` does."""
    return torch.empty_like(x, memory_format=torch.contiguous_format), gain.new_empty(gain.shape)
