"""Rotary positions written out plainly, half-split layout: the reference of `tessera_kernels.triton.rope`.

x cos + (-second half, first half) sin (Su et al. 2021, arXiv 2104.09864); both products and the sum round.
"""

import torch
from torch import Tensor


def apply_rope_(
    q_BTNH: Tensor, k_BTKH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor, *, config: object = None
) -> tuple[Tensor, Tensor]:
    """Overwrite q and k with their turned values and return them. `config` is taken for the signature's sake."""
    del config
    return q_BTNH.copy_(_turned(q_BTNH, cos_BTH, sin_BTH)), k_BTKH.copy_(_turned(k_BTKH, cos_BTH, sin_BTH))


def _turned(x_BTNH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    first, second = x_BTNH.chunk(2, dim=-1)
    rotated_BTNH = torch.cat([-second, first], dim=-1)
    return x_BTNH * cos_BTH[:, :, None, :] + rotated_BTNH * sin_BTH[:, :, None, :]
