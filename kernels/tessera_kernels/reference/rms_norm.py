"""RMSNorm written out plainly: the reference of `tessera_kernels.triton.rms_norm`.

y = x / sqrt(mean(x^2) + eps) * gain over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467). Statistics in at least
float32; with `gain_after_cast` the unit row rounds to x's dtype before the gain multiplies, else after.
"""

import torch
from torch import Tensor


def rms_norm(
    x_XD: Tensor, gain_D: Tensor, *, eps: float, gain_after_cast: bool = False, config: object = None
) -> Tensor:
    """Return the normed rows in x's dtype. `config` is taken so that the signature is the kernel's."""
    del config
    up = torch.promote_types(x_XD.dtype, torch.float32)
    lifted_XD = x_XD.to(up)
    unit_XD = lifted_XD * torch.rsqrt(lifted_XD.square().mean(-1, keepdim=True) + eps)
    if gain_after_cast:
        return unit_XD.to(x_XD.dtype) * gain_D
    return (unit_XD * gain_D.to(up)).to(x_XD.dtype)


def add_rms_norm(
    x_XD: Tensor,
    residual_XD: Tensor,
    gain_D: Tensor,
    *,
    eps: float,
    gain_after_cast: bool = False,
    config: object = None,
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual); the sum rounds to its dtype before it is normed."""
    del config
    total_XD = x_XD + residual_XD
    return rms_norm(total_XD, gain_D, eps=eps, gain_after_cast=gain_after_cast), total_XD
