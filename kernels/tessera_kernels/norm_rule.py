"""What the RMSNorm kernels of every room share: which tensors fit, and autograd's view of the two functions.

A room's own part is the launch of its forward and of its backward (`Launches`):

    run_forward(x, residual or None, gain, eps, gain_after_cast, config) -> (y, x + residual or empty, rstd)
    run_backward(dy, x, gain, rstd, dtotal or None, gain_after_cast, config) -> (dx with dtotal added, dgain)

with x, residual, dy and dtotal as [rows, width], a configuration's integers or an empty list, and rstd float32 [rows].
"""

# ruff: noqa: ARG001 - a fake takes what its op takes
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera_kernels.checks import expect_dtype, expect_same_device, expect_same_dtype, expect_shape
from tessera_kernels.launching import FLOATS, as_rows

RunForward = Callable[[Tensor, Tensor | None, Tensor, float, bool, list[int]], tuple[Tensor, Tensor, Tensor]]
RunBackward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, bool, list[int]], tuple[Tensor, Tensor]]


class Launches(NamedTuple):
    """How a room runs both directions."""

    forward: RunForward
    backward: RunBackward


Cuts = tuple[Sequence[int], Sequence[int]]
"""Configurations of both directions."""


def norm(
    launches: Launches, x_XD: Tensor, gain_D: Tensor, *, eps: float, gain_after_cast: bool, config: Cuts | None = None
) -> Tensor:
    """Return `rms_norm` of a room; `config` None = what it chooses itself."""
    _check_norm(x_XD, gain_D)
    if x_XD.numel() == 0:
        return x_XD * gain_D
    cuts = [list(part) for part in config or ((), ())]
    y_XD = _Norm.apply(as_rows(x_XD), gain_D, float(eps), gain_after_cast, *cuts, *launches)
    return y_XD.view(x_XD.shape)  # type: ignore[no-any-return]


def add_norm(
    launches: Launches,
    x_XD: Tensor,
    residual_XD: Tensor,
    gain_D: Tensor,
    *,
    eps: float,
    gain_after_cast: bool,
    config: Cuts | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `add_rms_norm` of a room; `config` None = what it chooses itself."""
    _check_norm(x_XD, gain_D, residual_XD)
    if x_XD.numel() == 0:
        total_XD = x_XD + residual_XD
        return total_XD * gain_D, total_XD
    cuts = [list(part) for part in config or ((), ())]
    rows = (as_rows(x_XD), as_rows(residual_XD))
    y_XD, total_XD = _AddNorm.apply(*rows, gain_D, float(eps), gain_after_cast, *cuts, *launches)
    return y_XD.view(x_XD.shape), total_XD.view(x_XD.shape)


def _check_norm(x_XD: Tensor, gain_D: Tensor, residual_XD: Tensor | None = None) -> None:
    """Raise `KernelError` unless the gain and, where there is one, the residual fit x."""
    expect_dtype("x_XD", x_XD, *FLOATS)
    for what, other in (("gain_D", gain_D), ("residual_XD", residual_XD)):
        if other is not None:
            expect_same_device({"x_XD": x_XD, what: other})
            expect_same_dtype({"x_XD": x_XD, what: other})
    expect_shape("gain_D", gain_D, x_XD.shape[-1:], "there is one gain for each column of x_XD")
    if residual_XD is not None:
        expect_shape("residual_XD", residual_XD, x_XD.shape, "it is added to x_XD")


class _Norm(torch.autograd.Function):
    """Autograd's view of `norm`: x [X, D] and gain -> y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, eps: float, after_cast: bool, forward: list[int], backward: list[int],
        run_forward: RunForward, run_backward: RunBackward,
    ) -> Tensor:  # fmt: skip
        """Normalize; the backward takes 1 / root of the mean square from here."""
        y, _, rstd = run_forward(x, None, gain, eps, after_cast, forward)
        ctx.save_for_backward(x, gain, rstd)
        ctx.after_cast, ctx.config, ctx.run = after_cast, backward, run_backward
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and the gain."""
        x, gain, rstd = ctx.saved_tensors
        dx, dgain = ctx.run(dy, x, gain, rstd, None, ctx.after_cast, ctx.config)
        return dx, dgain, *(None,) * (len(ctx.needs_input_grad) - 2)


class _AddNorm(torch.autograd.Function):
    """Autograd's view of `add_norm`: x and residual [X, D] and gain -> y and the sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, gain: Tensor, eps: float, after_cast: bool, forward: list[int],
        backward: list[int], run_forward: RunForward, run_backward: RunBackward,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Add and normalize; an output that nobody uses has no gradient, and none is made up."""
        y, total, rstd = run_forward(x, residual, gain, eps, after_cast, forward)
        ctx.save_for_backward(total, gain, rstd)
        ctx.after_cast, ctx.config, ctx.run = after_cast, backward, run_backward
        ctx.set_materialize_grads(False)
        return y, total

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
