"""Product with a quantized weight written out plainly: the reference of `tessera_kernels.triton.quant_matmul`.

y_XF = x_XD w_FD^T with w = dequantize(weight) rounded to x's dtype. On float64 x this is the truth (code times scale is
exact there); on half-precision x it is what a user without the kernel runs.
"""

import torch
from torch import Tensor

from tessera_kernels.quant_weight import QuantWeight, quantize_w4, quantize_w8
from tessera_kernels.quant_weight import dequantize as _dequantize

__all__ = ["QuantWeight", "dequantize", "quant_matmul", "quantize_w4", "quantize_w8"]


def quant_matmul(x_XD: Tensor, weight: QuantWeight, *, config: object = None) -> Tensor:
    """Return y_XF in x's dtype; `config` is taken so that the signature is the kernel's."""
    del config
    return torch.matmul(x_XD, _dequantize(weight, x_XD.dtype).t())


def dequantize(weight: QuantWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the weight [F, D]: code times scale in float32 (float64 if asked for), rounded once."""
    return _dequantize(weight, dtype)
