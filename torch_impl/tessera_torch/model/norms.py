"""Root-mean-square normalization (Zhang & Sennrich 2019, arXiv 1910.07467)."""

import torch
from torch import Tensor

from tessera_shared.numerics import Numerics
from tessera_torch.model.dtypes import dtype_of


def rms_norm(x_BTD: Tensor, gain_D: Tensor, *, eps: float, numerics: Numerics) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis; the gain multiplies after or before the cast to compute."""
    up, compute = dtype_of(numerics.norm), dtype_of(numerics.compute)
    lifted_BTD = x_BTD.to(up)
    unit_BTD = lifted_BTD * torch.rsqrt(lifted_BTD.square().mean(-1, keepdim=True) + eps)
    if numerics.norm_gain_after_cast:
        return unit_BTD.to(compute) * gain_D
    return (unit_BTD * gain_D.to(up)).to(compute)
