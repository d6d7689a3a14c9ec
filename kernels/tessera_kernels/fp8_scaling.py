"""Numbers in E4M3 (1 sign, 4 exponent, 3 fraction bits; largest 448) with float32 scales: x ~ scale * code.

scale = max |x| / 448 over the numbers that share it, code = x / scale in float32, rounded to nearest even. Who shares:

    "tensor"   all numbers                       scales []
    "row"      the numbers of a row              scales [X]
    "block"    `block_rows` rows x 128 columns   scales [ceil(X / block_rows), ceil(D / 128)]; 1 x 128 for activations,
               128 x 128 for weights; stored so that one column of scales is contiguous, which is how a tile reads them

A normal number comes back within scale * 2^-4 |code| (half a step of its binade), a subnormal one within scale * 2^-10.
Numbers that are all zero get scale 1. NaN and infinities turn the numbers that share their scale into NaN, without asking
the device: this runs between kernels at every step. `check_finite=True` asks, and refuses; for weights, once.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from tessera_kernels.checks import expect_between, expect_choice, expect_dtype, expect_rank
from tessera_shared.errors import KernelError

SCALINGS = ("tensor", "row", "block")
BLOCK = 128
LARGEST = 448.0
"""The largest finite number of E4M3."""


def quantize_fp8(
    x_XD: Tensor, *, scaling: str = "tensor", block_rows: int = 1, check_finite: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (codes float8_e4m3fn [X, D], scales float32) of `x_XD` (float16, bfloat16 or float32).

    Raises `KernelError` for other dtypes and ranks, and with `check_finite` (which waits for the device) for NaN or inf.
    """
    expect_rank("x_XD", x_XD, 2)
    expect_dtype("x_XD", x_XD, torch.bfloat16, torch.float16, torch.float32)
    expect_choice("scaling", scaling, SCALINGS)
    expect_between("block_rows", block_rows, 1, BLOCK, "a block is 1 or 128 rows of 128 columns")
    if check_finite:
        _expect_finite(x_XD)
    x = x_XD.float()
    scales = _scales(largest_magnitudes(x, scaling, block_rows))
    codes = (x / spread_scales(scales, x.shape, scaling)).to(torch.float8_e4m3fn)
    if scaling == "block":
        scales = scales.t().contiguous().t()
    return codes, scales


def largest_magnitudes(x_XD: Tensor, scaling: str, block_rows: int = 1) -> Tensor:
    """Return max |x| over the numbers that share a scale; 0 where there are none."""
    rows, width = x_XD.shape
    if x_XD.numel() == 0:
        blocks = (math.ceil(rows / block_rows), math.ceil(width / BLOCK))
        return x_XD.new_zeros({"tensor": (), "row": (rows,), "block": blocks}[scaling])
    if scaling == "tensor":
        return x_XD.abs().amax()
    if scaling == "row":
        return x_XD.abs().amax(1)
    padded = pad(x_XD.abs(), (0, -width % BLOCK, 0, -rows % block_rows))
    return padded.view(-(-rows // block_rows), block_rows, -1, BLOCK).amax((1, 3))


def spread_scales(scales: Tensor, shape: torch.Size | tuple[int, ...], scaling: str) -> Tensor:
    """Return scales broadcastable against a tensor of `shape` = [X, D]."""
    if scaling == "tensor":
        return scales
    if scaling == "row":
        return scales[:, None]
    rows, width = shape
    block_rows = 1 if scales.shape[0] == rows else BLOCK
    return scales.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :width]


def _scales(largest: Tensor) -> Tensor:
    """Return largest / 448, 1 for 0; never so small that the quotient overflows."""
    scales = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).smallest_normal)
    return torch.where(largest == 0.0, torch.ones_like(scales), scales)


def _expect_finite(x_XD: Tensor) -> None:
    wrong = ~torch.isfinite(x_XD)
    if bool(wrong.any()):
        row, column = (int(place) for place in wrong.nonzero()[0])
        raise KernelError(
            f"x_XD[{row}, {column}] = {float(x_XD[row, column])}: expected finite numbers, because a scale comes from the "
            f"largest one ({int(wrong.sum())} are not finite); try the checkpoint before the one that diverged, or "
            "check_finite=False to let NaN through"
        )
