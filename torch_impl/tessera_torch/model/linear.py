"""Matrix product with weights stored `(out, in)`."""

from torch import Tensor
from torch.nn import functional


def linear(x_BTD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """y = x W^T accumulated in at least float32 and rounded to x's dtype; then the bias is added there.

    Leading dimensions are free. Whether CUDA takes float32 products through TF32, and whether bfloat16 products may be
    summed in bfloat16 across splits, is the caller's `torch.backends.cuda.matmul`; parity holds only with both off.
    """
    y_BTF = functional.linear(x_BTD, weight_FD)  # a fused bias would be added before the rounding
    return y_BTF if bias_F is None else y_BTF + bias_F
