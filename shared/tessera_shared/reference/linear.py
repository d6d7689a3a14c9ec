"""Matrix product with weights stored `(out, in)`."""

import numpy as np

from tessera_shared.numerics import FLOAT64, Numerics
from tessera_shared.reference.rounding import round_to


def linear(
    x_BTD: np.ndarray, weight_FD: np.ndarray, bias_F: np.ndarray | None = None, *, numerics: Numerics = FLOAT64
) -> np.ndarray:
    """y = x W^T, rounded to the compute dtype; then the bias is added there and the sum rounds again.

    Leading dimensions are free. The halves take the rounding from x's dtype; here `numerics` says it.
    """
    y_BTF = round_to(x_BTD @ weight_FD.T, numerics.compute)
    return y_BTF if bias_F is None else round_to(y_BTF + bias_F, numerics.compute)
