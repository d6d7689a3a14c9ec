"""Rounding as an operation: the oracle computes in float64 and rounds exactly where a policy casts.

With the float64 policy every function here is the identity, and the oracle is the truth; with another policy the oracle
commits the error of an ideal legal implementation. Complex arrays pass unrounded, so that derivatives can be taken by a
complex step (Squire & Trapp 1998).
"""

import numpy as np

_BITS: dict[str, int] = {"bfloat16": 8}  # significand bits, the hidden one included
_SMALLEST_EXPONENT = -125  # frexp's exponent of the smallest normal number
_LARGEST: dict[str, float] = {"bfloat16": (2.0 - 2.0**-7) * 2.0**127}


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round float64 values once to the nearest number of `dtype`: ties to even, subnormals and overflow included."""
    if dtype == "float64" or np.iscomplexobj(x):
        return x
    x = np.asarray(x, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        if dtype == "float32":
            return x.astype(np.float32).astype(np.float64)  # the conversion of IEEE 754 is just this, and faster
        significand, exponent = np.frexp(x)
        step = np.maximum(exponent, _SMALLEST_EXPONENT) - _BITS[dtype]
        rounded = np.ldexp(np.rint(np.ldexp(significand, exponent - step)), step)
        return np.asarray(np.where(np.abs(rounded) > _LARGEST[dtype], np.copysign(np.inf, rounded), rounded))
