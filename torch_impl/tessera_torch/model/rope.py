"""Rotary positions, half-split layout (Su et al. 2021, arXiv 2104.09864)."""

import torch
from torch import Tensor

from tessera_shared.numerics import Numerics
from tessera_shared.rope import frequency_list
from tessera_shared.spec import ModelSpec
from tessera_torch.model.dtypes import dtype_of


def rope_tables(positions_BT: Tensor, *, spec: ModelSpec, numerics: Numerics) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of position * inverse frequency, each angle twice (once per half of a head), scaled.

    Angles are products in the rope dtype; the tables [B, T, H] are cast to compute.
    """
    up, compute = dtype_of(numerics.rope), dtype_of(numerics.compute)
    frequencies, attention_factor = frequency_list(spec)
    inverse_H2 = torch.tensor(frequencies, dtype=up, device=positions_BT.device)
    angles = positions_BT[..., None].to(up) * inverse_H2
    angles_BTH = torch.cat([angles, angles], dim=-1)
    return (angles_BTH.cos() * attention_factor).to(compute), (angles_BTH.sin() * attention_factor).to(compute)


def apply_rope(x_BTNH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """Turn pairs (j, j + H/2): x cos + (-second half, first half) sin; both products and the sum round."""
    first, second = x_BTNH.chunk(2, dim=-1)
    rotated_BTNH = torch.cat([-second, first], dim=-1)
    return x_BTNH * cos_BTH[:, :, None, :] + rotated_BTNH * sin_BTH[:, :, None, :]
