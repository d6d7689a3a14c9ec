"""RMSNorm as a Hopper GPU has it fastest: the forward in Triton, the backward in CUDA C++ (docs/kernels.md, section 4).

Both rooms save and take the same tensors (`norm_rule`). Reference: `tessera_kernels.reference.rms_norm`.
"""

from torch import Tensor

from tessera_kernels.checks import expect_triton_device
from tessera_kernels.cuda.rms_norm import run_backward
from tessera_kernels.norm_rule import Launches, add_norm, norm
from tessera_kernels.triton.rms_norm import run_forward

LAUNCHES = Launches(run_forward, run_backward)
"""Triton's forward, the backward of CUDA C++."""


def rms_norm(x_XD: Tensor, gain_D: Tensor, *, eps: float, gain_after_cast: bool = False) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * gain over the last axis: see `tessera_kernels.triton.rms_norm.rms_norm`."""
    expect_triton_device("x_XD", x_XD)
    return norm(LAUNCHES, x_XD, gain_D, eps=eps, gain_after_cast=gain_after_cast)


def add_rms_norm(
    x_XD: Tensor, residual_XD: Tensor, gain_D: Tensor, *, eps: float, gain_after_cast: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual) in one pass. Both inputs have one shape and dtype."""
    expect_triton_device("x_XD", x_XD)
    return add_norm(LAUNCHES, x_XD, residual_XD, gain_D, eps=eps, gain_after_cast=gain_after_cast)
