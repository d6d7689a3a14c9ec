"""Triton kernels of `quant_matmul`; the equation, the picture and the launches are there.

Every product kernel walks over tiles of 128 inputs with loads that the pipeliner turns into asynchronous copies (steps are
32-bit words for that reason). Outputs past the end read the last one and are not stored, so codes need no mask.
"""

import triton
import triton.language as tl

from tessera_kernels.quant_weight import HALF, TILE
from tessera_kernels.triton._unpack import bytes_as, nibbles, times

CHANNEL, LATE, EARLY = 0, 1, 2
"""Scales multiply the result | float32 partial sums | the weights."""

_CHANNEL, _EARLY = tl.constexpr(CHANNEL), tl.constexpr(EARLY)
_TILE, _HALF = tl.constexpr(TILE), tl.constexpr(HALF)
_NO_SPECIAL = ("rows", "last_group", "tiles", "tiles_per_split", "count")  # not worth a compilation for being 1 or 16 n


@triton.jit
def _step(steps, tile, high: tl.constexpr, f, num_outputs, last_group, GROUP: tl.constexpr):
    """Return scales (float32) and zero points (int32) of a half tile; the padding of the last tile takes the last group's."""
    group = tl.minimum((tile * _TILE + high * _HALF) // GROUP, last_group)
    word = tl.load(steps + group * num_outputs + f)
    return (word & -0x10000).to(tl.float32, bitcast=True), word & 0xFFFF


@triton.jit
def _steps(steps, tile, f, num_outputs, last_group, GROUP: tl.constexpr, WIDE: tl.constexpr):
    """Return scales and zero points of both halves of a tile, broadcastable against them; 1 and 0 for whole rows."""
    low_scale, low_zero = tl.full(f.shape, 1.0, tl.float32), tl.full(f.shape, 0, tl.int32)
    if GROUP:
        low_scale, low_zero = _step(steps, tile, 0, f, num_outputs, last_group, GROUP)
    high_scale, high_zero = low_scale, low_zero
    if GROUP % 128:  # the two halves of a tile lie in different groups
        high_scale, high_zero = _step(steps, tile, 1, f, num_outputs, last_group, GROUP)
    if WIDE:
        low_scale, low_zero, high_scale, high_zero = (
            low_scale[:, None], low_zero[:, None], high_scale[:, None], high_zero[:, None],
        )  # fmt: skip
    else:
        low_scale, low_zero, high_scale, high_zero = (
            low_scale[None, :], low_zero[None, :], high_scale[None, :], high_zero[None, :],
        )  # fmt: skip
    return low_scale, low_zero, high_scale, high_zero


@triton.jit
def _halves(codes, tile, f, num_outputs, low_zero, high_zero, BITS: tl.constexpr, WIDE: tl.constexpr,
            dtype: tl.constexpr, TRICK: tl.constexpr):  # fmt: skip
    """Return the two halves of a tile as integers in `dtype`, [BLOCK_F, 64] if WIDE, else [64, BLOCK_F]."""
    j = tl.arange(0, _HALF)
    ROW: tl.constexpr = _TILE * BITS // 8
    start = codes + tl.cast(tile, tl.int64) * num_outputs * ROW
    place = f[:, None] * ROW + j[None, :] if WIDE else f[None, :] * ROW + j[:, None]
    if BITS == 8:
        low = bytes_as(tl.load(start + place), dtype, TRICK)
        high = bytes_as(tl.load(start + place + _HALF), dtype, TRICK)
    else:
        low, high = nibbles(tl.load(start + place), low_zero, high_zero, dtype, TRICK)
    return low, high


@triton.jit
def _x_tile(x, r, k, rows, width, stride, WIDE: tl.constexpr, EVEN: tl.constexpr):
    """Return rows r and inputs k of x with zeros outside: [k, r] if WIDE, else [r, k]."""
    row, column = (r[None, :], k[:, None]) if WIDE else (r[:, None], k[None, :])
    seen = row < rows
    if not EVEN:
        seen = seen & (column < width)
    return tl.load(x + row * stride + column, mask=seen, other=0.0)


@triton.jit
def _dot(weight, x, acc, WIDE: tl.constexpr, LIFT: tl.constexpr):
    if LIFT:  # the interpreter multiplies bfloat16 as integers
        weight, x = weight.to(tl.float32), x.to(tl.float32)
    left, right = (weight, x) if WIDE else (x, weight)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit(do_not_specialize=_NO_SPECIAL[:4])
def tile_kernel(
    x, codes, steps, out, rows, width, num_outputs, last_group, tiles, tiles_per_split, x_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_X: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, TRICK: tl.constexpr, LIFT: tl.constexpr,
    STAGES: tl.constexpr, GROUP_X: tl.constexpr,
):  # fmt: skip
    blocks_x, blocks_f = tl.cdiv(rows, BLOCK_X), tl.cdiv(num_outputs, BLOCK_F)
    block_x, block_f = tl.swizzle2d(
        tl.program_id(0) // blocks_f, tl.program_id(0) % blocks_f, blocks_x, blocks_f, GROUP_X
    )
    split = tl.program_id(1)
    own_f = block_f * BLOCK_F + tl.arange(0, BLOCK_F)
    f = tl.minimum(own_f, num_outputs - 1)  # outputs past the end read the last one and are not stored
    r = block_x.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    acc = tl.zeros((BLOCK_F, BLOCK_X) if WIDE else (BLOCK_X, BLOCK_F), tl.float32)
    nothing = tl.zeros((BLOCK_F, BLOCK_X) if WIDE else (BLOCK_X, BLOCK_F), tl.float32)
    dtype: tl.constexpr = x.dtype.element_ty
    first = split * tiles_per_split
    for tile in tl.range(first, tl.minimum(first + tiles_per_split, tiles), num_stages=STAGES):
        k = tile * _TILE + tl.arange(0, _HALF)
        low_x = _x_tile(x, r, k, rows, width, x_stride, WIDE, EVEN)
        high_x = _x_tile(x, r, k + _HALF, rows, width, x_stride, WIDE, EVEN)
        low_scale, low_zero, high_scale, high_zero = _steps(steps, tile, f, num_outputs, last_group, GROUP, WIDE)
        low, high = _halves(codes, tile, f, num_outputs, low_zero, high_zero, BITS, WIDE, dtype, TRICK)
        if SCALE == _CHANNEL:
            acc = _dot(low, low_x, acc, WIDE, LIFT)
            acc = _dot(high, high_x, acc, WIDE, LIFT)
        elif SCALE == _EARLY:
            acc = _dot(times(low, low_scale, dtype, TRICK), low_x, acc, WIDE, LIFT)
            acc = _dot(times(high, high_scale, dtype, TRICK), high_x, acc, WIDE, LIFT)
        elif GROUP % 128:
            acc += _dot(low, low_x, nothing, WIDE, LIFT) * low_scale
            acc += _dot(high, high_x, nothing, WIDE, LIFT) * high_scale
        else:
            acc += _dot(high, high_x, _dot(low, low_x, nothing, WIDE, LIFT), WIDE, LIFT) * low_scale
    if SCALE == _CHANNEL:
        whole = tl.load(steps + f)
        acc *= whole[:, None] if WIDE else whole[None, :]
    if WIDE:
        acc = tl.trans(acc)
    start = out + split.to(tl.int64) * rows * num_outputs
    seen = (r[:, None] < rows) & (own_f[None, :] < num_outputs)
    tl.store(start + r[:, None] * num_outputs + own_f[None, :], acc.to(out.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=_NO_SPECIAL[:4])
def vector_kernel(
    x, codes, steps, out, rows, width, num_outputs, last_group, tiles, tiles_per_split, x_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, BLOCK_F: tl.constexpr,
    TRICK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row of x: products and sums on the ordinary lanes, inputs of a half tile side by side across them."""
    row, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    own_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    f = tl.minimum(own_f, num_outputs - 1)
    acc = tl.zeros((BLOCK_F, _HALF), tl.float32)
    number: tl.constexpr = tl.bfloat16 if TRICK else tl.float32
    first = split * tiles_per_split
    for tile in tl.range(first, tl.minimum(first + tiles_per_split, tiles), num_stages=STAGES):
        k = tile * _TILE + tl.arange(0, _HALF)
        low_x = tl.load(x + row * x_stride + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
        high_x = tl.load(x + row * x_stride + k + _HALF, mask=k + _HALF < width, other=0.0).to(tl.float32)[None, :]
        low_scale, low_zero, high_scale, high_zero = _steps(steps, tile, f, num_outputs, last_group, GROUP, True)
        low, high = _halves(codes, tile, f, num_outputs, low_zero, high_zero, BITS, True, number, TRICK)
        low, high = low.to(tl.float32) * low_x, high.to(tl.float32) * high_x
        if SCALE == _CHANNEL:
            acc += low + high
        else:
            acc += low * low_scale + high * high_scale
    total = tl.sum(acc, 1)
    if SCALE == _CHANNEL:
        total *= tl.load(steps + f)
    start = out + (split.to(tl.int64) * rows + row) * num_outputs
    tl.store(start + own_f, total.to(out.dtype.element_ty), mask=own_f < num_outputs)


@triton.jit(do_not_specialize=_NO_SPECIAL[4:])
def add_splits_kernel(parts, out, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum of the partial sums, first to last."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts + place, mask=place < count, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + (place + split * tl.cast(count, tl.int64)), mask=place < count, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < count)


@triton.jit
def dequantize_kernel(
    codes, steps, out, width, num_outputs, last_group, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    tile, own_f = tl.program_id(0), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    f = tl.minimum(own_f, num_outputs - 1)
    low_scale, low_zero, high_scale, high_zero = _steps(steps, tile, f, num_outputs, last_group, GROUP, True)
    low, high = _halves(codes, tile, f, num_outputs, low_zero, high_zero, BITS, True, tl.float32, False)
    if GROUP == 0:
        low_scale = tl.load(steps + f)[:, None]
        high_scale = low_scale
    k = (tile * _TILE + tl.arange(0, _HALF))[None, :]
    start = out + own_f.to(tl.int64)[:, None] * width
    seen = own_f[:, None] < num_outputs
    tl.store(start + k, (low * low_scale).to(out.dtype.element_ty), mask=seen & (k < width))
    tl.store(start + k + _HALF, (high * high_scale).to(out.dtype.element_ty), mask=seen & (k + _HALF < width))
