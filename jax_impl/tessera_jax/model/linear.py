"""Matrix product with weights stored `(out, in)`."""

import jax
import jax.numpy as jnp
from jax import Array


def linear(x_BTD: Array, weight_FD: Array, bias_F: Array | None = None) -> Array:
    """y = x W^T accumulated in at least float32 and rounded to x's dtype; then the bias is added there.

    Leading dimensions are free. HIGHEST keeps float32 products out of TF32.
    """
    y_BTF = jnp.einsum("...d,fd->...f", x_BTD, weight_FD, precision=jax.lax.Precision.HIGHEST)
    return y_BTF if bias_F is None else y_BTF + bias_F
