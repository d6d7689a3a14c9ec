"""Root-mean-square normalization (Zhang & Sennrich 2019, arXiv 1910.07467)."""

import numpy as np

from tessera_shared.numerics import Numerics
from tessera_shared.reference.rounding import round_to


def rms_norm(x_BTD: np.ndarray, gain_D: np.ndarray, *, eps: float, numerics: Numerics) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis; the gain multiplies after or before the cast to compute."""
    mean_square_BT1 = np.mean(x_BTD * x_BTD, axis=-1, keepdims=True)
    unit_BTD = x_BTD / np.sqrt(mean_square_BT1 + eps)
    if numerics.norm_gain_after_cast:
        unit_BTD = round_to(unit_BTD, numerics.compute)
    return round_to(unit_BTD * gain_D, numerics.compute)
