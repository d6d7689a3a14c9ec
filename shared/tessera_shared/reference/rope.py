"""Rotary positions, half-split layout (Su et al. 2021, arXiv 2104.09864)."""

import numpy as np

from tessera_shared.numerics import FLOAT64, Numerics
from tessera_shared.reference.rounding import round_to
from tessera_shared.rope import inverse_frequencies
from tessera_shared.spec import ModelSpec


def rope_tables(positions_BT: np.ndarray, *, spec: ModelSpec, numerics: Numerics) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine and sine of position * inverse frequency, each angle twice (once per half of a head), scaled.

    Frequencies and angles round to the rope dtype, which dominates the error at large positions; tables to compute.
    """
    inverse, attention_factor = inverse_frequencies(spec)
    half = round_to(positions_BT[..., None].astype(np.float64) * round_to(inverse, numerics.rope), numerics.rope)
    angles_BTH = np.concatenate([half, half], axis=-1)
    cos_BTH, sin_BTH = np.cos(angles_BTH) * attention_factor, np.sin(angles_BTH) * attention_factor
    return round_to(cos_BTH, numerics.compute), round_to(sin_BTH, numerics.compute)


def apply_rope(
    x_BTNH: np.ndarray, cos_BTH: np.ndarray, sin_BTH: np.ndarray, *, numerics: Numerics = FLOAT64
) -> np.ndarray:
    """Turn pairs (j, j + H/2): x cos + (-second half, first half) sin; both products and the sum round."""
    half = x_BTNH.shape[-1] // 2
    rotated_BTNH = np.concatenate([-x_BTNH[..., half:], x_BTNH[..., :half]], axis=-1)
    straight = round_to(x_BTNH * cos_BTH[:, :, None, :], numerics.compute)
    turned = round_to(rotated_BTNH * sin_BTH[:, :, None, :], numerics.compute)
    return round_to(straight + turned, numerics.compute)
