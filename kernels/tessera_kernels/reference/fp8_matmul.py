"""Product of two E4M3 matrices with scales, written out plainly: the reference of `tessera_kernels.triton.fp8_matmul`.

c[r, f] = sum_d scale_a[r, d] a[r, d] scale_b[f, d] b[f, d]. On float64 inputs this is the truth. On E4M3 inputs it is
what Hopper's tensor cores do in a plain loop: an accumulator of 13 fraction bits takes 32 products at a time and drops
what does not fit (Zhang et al. 2024, arXiv 2411.10958, section 4.4; DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2).
"fast" keeps it for the whole sum; "accurate" adds it to a float32 sum every 128 products; block scales always do.

What does not fit is dropped of each product before the 32 are added: all are aligned to the largest of them and the sum so
far. A long sum of equal products loses by that many times what it would if sums were cut (1.2 % over 1,021 products on an
H200), so "fast" is written that way; in the 128 products of "accurate" there is little to lose, and sums are cut, which is
many times quicker.
"""

import torch
from torch import Tensor

from tessera_kernels.fp8_scaling import BLOCK, quantize_fp8, spread_scales

__all__ = ["fp8_matmul", "quantize_fp8"]

STEP = 32
"""Products that one tensor core instruction adds."""

FRACTION_BITS = 13
"""Fraction bits that its accumulator keeps."""


def fp8_matmul(
    a_XD: Tensor,
    b_FD: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    scaling: str = "tensor",
    accumulation: str = "accurate",
    out_dtype: torch.dtype = torch.bfloat16,
    config: object = None,
) -> Tensor:
    """Return c_XF in `out_dtype` (float64 for float64 inputs); `config` is taken so that the signature is the kernel's."""
    del config
    if a_XD.dtype == torch.float64:
        a, b = (x * spread_scales(s, x.shape, scaling) for x, s in ((a_XD, scale_a), (b_FD, scale_b)))
        return a @ b.t()
    a, b = a_XD.float(), b_FD.float()
    total = torch.zeros((a.shape[0], b.shape[0]), device=a.device)
    window, add = BLOCK, _narrow_sum
    if accumulation == "fast" and scaling != "block":
        window, add = max(1, a.shape[1]), _aligned_sum
    for first in range(0, a.shape[1], window):
        part = add(a[:, first : first + window], b[:, first : first + window])
        total = total + (part * _block_scales(scale_a, scale_b, first, total.shape) if scaling == "block" else part)
    if scaling == "tensor":
        total = total * (scale_a * scale_b)
    elif scaling == "row":
        total = total * scale_a[:, None] * scale_b[None, :]
    return total.to(out_dtype)


def _narrow_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T summed by an accumulator of `FRACTION_BITS`, `STEP` products at a time."""
    total = torch.zeros((a.shape[0], b.shape[0]), device=a.device)
    for first in range(0, a.shape[1], STEP):
        total = total + a[:, first : first + STEP] @ b[:, first : first + STEP].t()
        total = (total.view(torch.int32) & -(1 << (23 - FRACTION_BITS))).view(torch.float32)
    return total


def _aligned_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T, each product and the sum so far cut to the fraction bits that the largest of a step leaves them."""
    total = torch.zeros((a.shape[0], b.shape[0], 1), device=a.device)
    for first in range(0, a.shape[1], STEP):
        products = a[:, None, first : first + STEP] * b[None, :, first : first + STEP]
        terms = torch.cat((total, products), dim=2)
        _, exponent = torch.frexp(terms.abs().amax(2, keepdim=True))  # the largest is below 2^exponent
        last_bit = torch.ldexp(torch.ones_like(total), exponent - 1 - FRACTION_BITS)
        total = (terms / last_bit).trunc().sum(2, keepdim=True) * last_bit
    return total[..., 0]


def _block_scales(scale_a: Tensor, scale_b: Tensor, first: int, shape: torch.Size) -> Tensor:
    column = first // BLOCK
    rows, outputs = shape
    a, b = scale_a[:, column], scale_b[:, column]
    a = a if a.shape[0] == rows else a.repeat_interleave(BLOCK)[:rows]
    b = b if b.shape[0] == outputs else b.repeat_interleave(BLOCK)[:outputs]
    return a[:, None] * b[None, :]
