"""Product of two E4M3 matrices: c[r, f] = sum_d scale_a[r, d] a[r, d] scale_b[f, d] b[f, d].

    scaling "tensor" | "row": the scales leave the sum and multiply the result.
    scaling "block": 1 x 128 scales for a, 128 x 128 for b (DeepSeek-AI 2024, arXiv 2412.19437, section 3.3): each 128
    products are summed by the tensor cores, scaled, and added to a float32 sum.

    accumulation "accurate": partial sums leave the tensor cores' narrow accumulator (13 fraction bits) for float32 every
    128 products. "fast": they stay for the whole sum, as most libraries have it. Block scales are accurate either way.

            b, BLOCK_F rows                  HBM        a, b (both with inputs contiguous), scales, c
           +--------+                        shared     STAGES tiles of a and of b in flight (TMA where strides and
    BLOCK  | tile   |  inputs, 128 a step               alignment allow it, else pointers), the tile of c on its way out
     _X    |  of c  |                        registers  the accumulator (and a second one when accurate)
           +--------+
    Persistent: one program a multiprocessor walks over the tiles, GROUP_X row blocks at a time so that b's tiles stay in
    the L2 cache. Sums run in one order: same inputs and configuration, same bits, whatever the other rows hold.

Reference: `tessera_kernels.reference.fp8_matmul`.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tessera_kernels.checks import (
    expect_between,
    expect_choice,
    expect_dtype,
    expect_rank,
    expect_same_device,
    expect_shape,
    expect_triton_device,
)
from tessera_kernels.fp8_scaling import BLOCK, SCALINGS, quantize_fp8
from tessera_kernels.triton._launch import FLOATS, as_rows, graph_op, num_sms, on_device

__all__ = ["ACCUMULATIONS", "CONFIGS", "Config", "choose_config", "fp8_matmul", "quantize_fp8"]

ACCUMULATIONS = ("accurate", "fast")
TENSOR, ROW, BLOCKS = range(3)
_TENSOR, _ROW, _BLOCKS = tl.constexpr(TENSOR), tl.constexpr(ROW), tl.constexpr(BLOCKS)
_PROMOTE = tl.constexpr(128)
GROUP_X = 8
"""Row blocks that share b's tiles in the L2 cache."""

TWICE = 64 * 32
"""Sums a warp may hold where each 128 products have sums of their own beside the whole ones: 64 and 64 a thread."""


@triton.jit
def _load(source, row, k, rows, width, stride, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """Return a tile [ROWS, BLOCK_K] of E4M3 with zeros outside the matrix."""
    if TMA:
        tile = source.load([row, k])
    else:
        r = row + tl.arange(0, ROWS)[:, None]
        column = k + tl.arange(0, BLOCK_K)[None, :]
        tile = tl.load(source + r.to(tl.int64) * stride + column, mask=(r < rows) & (column < width), other=0.0)
    return tile


@triton.jit
def _store(out, tile, r, f, rows, num_outputs, TMA_OUT: tl.constexpr):
    if TMA_OUT:
        out.store([r, f], tile)
    else:
        row = r + tl.arange(0, tile.shape[0])[:, None]
        column = f + tl.arange(0, tile.shape[1])[None, :]
        tl.store(out + row.to(tl.int64) * num_outputs + column, tile, mask=(row < rows) & (column < num_outputs))


@triton.jit
def _scales(scale_a, scale_b, r, f, rows, num_outputs, sa_row, sb_row, SCALING: tl.constexpr):
    """What the sums of rows `r` and outputs `f` are multiplied by at the end; ones under block scales."""
    if SCALING == _TENSOR:
        by_row, by_output = tl.load(scale_a), tl.load(scale_b)
    elif SCALING == _ROW:
        by_row = tl.load(scale_a + r * sa_row, mask=r < rows, other=0.0)
        by_output = tl.load(scale_b + f * sb_row, mask=f < num_outputs, other=0.0)
    else:
        by_row, by_output = 1.0, 1.0
    return by_row, by_output


@triton.jit
def _fp8_kernel(
    a, b, out, scale_a, scale_b, rows, num_outputs, width, a_stride, b_stride, sa_row, sa_col, sb_row, sb_col,
    BLOCK_X: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, SCALING: tl.constexpr, FAST: tl.constexpr,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, TMA: tl.constexpr, TMA_OUT: tl.constexpr, HALVES: tl.constexpr,
    FLATTEN: tl.constexpr, STAGES: tl.constexpr, GROUP_X: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    blocks_x, blocks_f = tl.cdiv(rows, BLOCK_X), tl.cdiv(num_outputs, BLOCK_F)
    steps = tl.cdiv(width, BLOCK_K)
    for tile in tl.range(tl.program_id(0), blocks_x * blocks_f, tl.num_programs(0), flatten=FLATTEN):
        block_x, block_f = tl.swizzle2d(tile // blocks_f, tile % blocks_f, blocks_x, blocks_f, GROUP_X)
        row, output = block_x * BLOCK_X, block_f * BLOCK_F
        r, f = row + tl.arange(0, BLOCK_X), output + tl.arange(0, BLOCK_F)
        acc = tl.zeros((BLOCK_X, BLOCK_F), tl.float32)
        if not FLATTEN:  # before the sum: nobody waits for a scale after it. Flattened, they would be carried along
            by_row, by_output = _scales(scale_a, scale_b, r, f, rows, num_outputs, sa_row, sb_row, SCALING)
        for step in tl.range(0, steps, num_stages=STAGES):
            k = step * BLOCK_K
            a_tile = _load(a, row, k, rows, width, a_stride, BLOCK_X, BLOCK_K, TMA)
            b_tile = _load(b, output, k, num_outputs, width, b_stride, BLOCK_F, BLOCK_K, TMA)
            if SCALING == _BLOCKS:
                part = tl.dot(a_tile, b_tile.T)
                sa = tl.load(scale_a + (r // A_ROWS) * sa_row + step * sa_col, mask=r < rows, other=0.0)
                if B_ROWS == BLOCK_F:
                    sa *= tl.load(scale_b + block_f * sb_row + step * sb_col)
                    acc += part * sa[:, None]
                else:
                    sb = tl.load(scale_b + (f // B_ROWS) * sb_row + step * sb_col, mask=f < num_outputs, other=0.0)
                    acc += part * sa[:, None] * sb[None, :]
            elif FAST:
                acc = tl.dot(a_tile, b_tile.T, acc)
            else:
                acc = tl.dot(a_tile, b_tile.T, acc, max_num_imprecise_acc=_PROMOTE)
        if FLATTEN:
            by_row, by_output = _scales(scale_a, scale_b, r, f, rows, num_outputs, sa_row, sb_row, SCALING)
        if SCALING == _TENSOR:
            acc *= by_row * by_output
        if SCALING == _ROW:
            acc *= by_row[:, None]
            acc *= by_output[None, :]
        if HALVES:  # half the tile at a time: half the shared memory on the way out, one more stage in flight
            left, right = acc.reshape(BLOCK_X, 2, BLOCK_F // 2).permute(0, 2, 1).split()
            _store(out, left.to(OUT), row, output, rows, num_outputs, TMA_OUT)
            _store(out, right.to(OUT), row, output + BLOCK_F // 2, rows, num_outputs, TMA_OUT)
        else:
            _store(out, acc.to(OUT), row, output, rows, num_outputs, TMA_OUT)


@dataclass(frozen=True)
class Config:
    """Tile sizes and how the tiles travel."""

    block_x: int = 128  # rows of c of one tile
    block_f: int = 128  # columns of c of one tile
    num_warps: int = 8
    num_stages: int = 4  # tiles of 128 inputs in flight
    tma: bool = True  # through the tensor memory accelerator, where strides and alignment allow it
    halves: bool = False  # the tile of c leaves in two halves
    flatten: bool = False  # the next tile's loads start during this one's way out


CONFIGS: tuple[Config, ...] = (
    Config(128, 256, 8, 3, True, False, False),
    Config(128, 256, 8, 3, True, True, False),
    Config(128, 256, 8, 4, True, True, False),
    Config(128, 256, 8, 3, True, True, True),
    Config(256, 128, 8, 3, True, False, False),
    Config(256, 128, 8, 4, True, True, False),
    Config(128, 256, 8, 3, False, False, False),
    Config(128, 128, 8, 4, True, False, False),
    Config(128, 128, 8, 4, True, False, True),
    Config(128, 128, 4, 4, True, False, False),
    Config(128, 128, 8, 4, False, False, False),
    Config(64, 128, 4, 4, True, False, False),
    Config(64, 128, 4, 4, False, False, False),
    Config(64, 256, 4, 4, True, True, False),
)
"""Every configuration that `choose_config` can give, and those it was chosen from."""


def choose_config(rows: int, num_outputs: int, width: int, scaling: str, accumulation: str) -> Config:
    """Return the configuration for a shape: a pure function, so that graphs and repeats see the same kernel."""
    del width
    tiles = math.ceil(rows / 128) * math.ceil(num_outputs / 256)
    if rows <= 64:
        return Config(64, 128, 4, 4)
    if scaling == "block" or accumulation == "accurate" or tiles < 132:
        return Config(128, 128, 8, 4)
    return Config(256, 128, 8, 4, True, True, False)  # 1.12x of (128, 256, 8, 3), an H200's sweep of 2026-11-21


def fp8_matmul(
    a_XD: Tensor,
    b_FD: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    scaling: str = "tensor",
    accumulation: str = "accurate",
    out_dtype: torch.dtype = torch.bfloat16,
    config: Config | None = None,
) -> Tensor:
    """Return c_XF = (scale_a a)(scale_b b)^T in `out_dtype`; a and b are float8_e4m3fn, scales as `quantize_fp8` gives them.

    Rows that are not contiguous are copied; empty operands give zeros or an empty c. No gradient: codes have none. Raises `KernelError`
    for shapes, dtypes, devices and scale shapes that do not go together.
    """
    expect_choice("scaling", scaling, SCALINGS)
    expect_choice("accumulation", accumulation, ACCUMULATIONS)
    for what, tensor in (("a_XD", a_XD), ("b_FD", b_FD)):
        expect_rank(what, tensor, 2)
        expect_dtype(what, tensor, torch.float8_e4m3fn)
    expect_shape("b_FD", b_FD, (None, a_XD.shape[1]), "a_XD has that many inputs")
    for what, scales, matrix in (("scale_a", scale_a, a_XD), ("scale_b", scale_b, b_FD)):
        expect_dtype(what, scales, torch.float32)
        expect_shape(what, scales, _scale_shape(scales, matrix, scaling), f"scaling={scaling!r} needs it")
    expect_same_device({"a_XD": a_XD, "b_FD": b_FD, "scale_a": scale_a, "scale_b": scale_b})
    expect_triton_device("fp8_matmul", a_XD)
    if out_dtype not in FLOATS:
        expect_choice("out_dtype", out_dtype, FLOATS)
    chosen = config or choose_config(a_XD.shape[0], b_FD.shape[0], a_XD.shape[1], scaling, accumulation)
    if scaling == "block" or accumulation == "accurate":
        expect_between(
            "block_x * block_f", chosen.block_x * chosen.block_f, 1, TWICE * chosen.num_warps,
            "each 128 products need sums of their own in registers beside the whole ones",
        )  # fmt: skip
    settings = [int(value) for value in astuple(chosen)]
    return _launch(a_XD, b_FD, scale_a, scale_b, SCALINGS.index(scaling), accumulation == "fast", out_dtype, settings)


def _scale_shape(scales: Tensor, matrix: Tensor, scaling: str) -> tuple[int, ...]:
    """Return the shape that the scales of `matrix` must have; blocks are 1 or 128 rows high."""
    if scaling == "tensor":
        return ()
    if scaling == "row":
        return (matrix.shape[0],)
    tall = math.ceil(matrix.shape[0] / BLOCK)
    is_tall = scales.ndim == 2 and scales.shape[0] == tall
    return (tall if is_tall else matrix.shape[0], math.ceil(matrix.shape[1] / BLOCK))


def _empty_result(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, scaling: int, fast: bool,
                  out_dtype: torch.dtype, settings: Sequence[int]) -> Tensor:  # fmt: skip
    del scale_a, scale_b, scaling, fast, settings
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@graph_op("fp8_matmul", fake=_empty_result)
def _launch(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, scaling: int, fast: bool,
            out_dtype: torch.dtype, settings: Sequence[int]) -> Tensor:  # fmt: skip
    block_x, block_f, num_warps, num_stages, tma, halves, flatten = settings
    rows, width, outputs = *a.shape, b.shape[0]
    if rows == 0 or outputs == 0 or width == 0:
        return torch.zeros((rows, outputs), dtype=out_dtype, device=a.device)
    out = a.new_empty((rows, outputs), dtype=out_dtype)
    a, b = as_rows(a), as_rows(b)
    by_tma = bool(tma) and _describable(a) and _describable(b)
    out_by_tma = by_tma and _describable(out) and out.element_size() == 2  # float32 would not fit beside four stages
    operands: list[Any] = [a, b, out]
    if by_tma:
        operands[:2] = _describe(a, (block_x, BLOCK)), _describe(b, (block_f, BLOCK))
    if out_by_tma:
        operands[2] = _describe(out, (block_x, block_f // 2 if halves else block_f))
    tiles = triton.cdiv(rows, block_x) * triton.cdiv(outputs, block_f)
    strides = [*_strides(scale_a), *_strides(scale_b)]
    with on_device(a):
        _fp8_kernel[(min(tiles, num_sms(a.device)),)](
            *operands, scale_a, scale_b, rows, outputs, width, a.stride(0), b.stride(0), *strides, BLOCK_X=block_x,
            BLOCK_F=block_f, BLOCK_K=BLOCK, SCALING=scaling, FAST=fast, A_ROWS=_block_rows(scale_a, rows),
            B_ROWS=_block_rows(scale_b, outputs), TMA=by_tma, TMA_OUT=out_by_tma, HALVES=bool(halves),
            FLATTEN=bool(flatten), STAGES=num_stages, GROUP_X=GROUP_X, OUT=_TRITON_DTYPES[out_dtype],
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return out


_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _block_rows(scales: Tensor, rows: int) -> int:
    return BLOCK if scales.ndim == 2 and scales.shape[0] != rows else 1


def _strides(scales: Tensor) -> tuple[int, int]:
    row, column, *_ = (*scales.stride(), 0, 0)
    return row, column


def _describable(matrix: Tensor) -> bool:
    """Can the tensor memory accelerator read it? Address and rows in multiples of 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.stride(1) == 1


def _describe(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))
