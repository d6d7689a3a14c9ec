"""RMSNorm as a Hopper GPU has it fastest: the forward in Triton, the backward in CUDA C++ (docs/kernels.md, section 4).

Both rooms save and take the same tensors (`norm_rule`). Reference: `tessera_kernels.reference.rms_norm`.
"""

# mypy: disable-error-code="no-untyped-call"

from typing import Any

from torch import Tensor

from tessera_kernels.checks import expect_triton_device
from tessera_kernels.cuda.rms_norm import run_backward
from tessera_kernels.launching import as_rows
from tessera_kernels.norm_rule import AddNorm, Norm, check_norm
from tessera_kernels.triton.rms_norm import run_forward


def rms_norm(x_XD: Tensor, gain_D: Tensor, *, eps: float, gain_after_cast: bool = False) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * gain over the last axis: see `tessera_kernels.triton.rms_norm.rms_norm`."""
    expect_triton_device("x_XD", x_XD)
    check_norm(x_XD, gain_D)
    if x_XD.numel() == 0:
        return x_XD * gain_D
    y_XD = _Norm.apply(as_rows(x_XD), gain_D, float(eps), gain_after_cast)
    return y_XD.view(x_XD.shape)  # type: ignore[no-any-return]


def add_rms_norm(
    x_XD: Tensor, residual_XD: Tensor, gain_D: Tensor, *, eps: float, gain_after_cast: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual) in one pass. Both inputs have one shape and dtype."""
    expect_triton_device("x_XD", x_XD)
    check_norm(x_XD, gain_D, residual_XD)
    if x_XD.numel() == 0:
        total_XD = x_XD + residual_XD
        return total_XD * gain_D, total_XD
    y_XD, total_XD = _AddNorm.apply(as_rows(x_XD), as_rows(residual_XD), gain_D, float(eps), gain_after_cast)
    return y_XD.view(x_XD.shape), total_XD.view(x_XD.shape)


class _Norm(Norm):
    """Autograd's view of `rms_norm`: x [X, D] and gain -> y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, after_cast: bool) -> Tensor:
        y, _, rstd = run_forward(x, None, gain, eps, after_cast, [])
        Norm.keep(ctx, x, gain, rstd, after_cast, [], run_backward)
        return y


class _AddNorm(AddNorm):
    """Autograd's view of `add_rms_norm`: x and residual [X, D] and gain -> y and the sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, gain: Tensor, eps: float, after_cast: bool
    ) -> tuple[Tensor, Tensor]:
        y, total, rstd = run_forward(x, residual, gain, eps, after_cast, [])
        AddNorm.keep(ctx, total, gain, rstd, after_cast, [], run_backward)
        return y, total
