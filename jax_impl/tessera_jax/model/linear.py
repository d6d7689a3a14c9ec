"""Matrix product with weights stored `(out, in)`."""

import jax
import jax.numpy as jnp
from jax import Array


def linear(x_BTD: Array, weight_FD: Array, bias_F: Array | None = None) -> Array:
    """y = x W^T accumulated in at least float32 and rounded to x's dtype; then the bias is added there.

    Leading dimensions are free. HIGHEST keeps float32 products out of TF32.
    """
    y_BTF = jnp.einsum("...d,fd->...f", x_BTD, weight_FD, precision=jax.lax.Precision.HIGHEST)
    if bias_F is None:
        return y_BTF
    up = jnp.promote_types(
        bias_F.dtype, jnp.float32
    )  # the gradient of the bias is a sum over positions: never in bfloat16
    bias_BTF = jnp.broadcast_to(bias_F.astype(up), y_BTF.shape).astype(y_BTF.dtype)
    return y_BTF + bias_BTF
