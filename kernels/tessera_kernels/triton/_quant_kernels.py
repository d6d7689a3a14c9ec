"""Triton kernels of `quant_matmul`; the equation, the picture and the launches are there.

Every product kernel walks over tiles of 128 inputs with loads that the pipeliner turns into asynchronous copies (steps are
32-bit words for that reason). Outputs past the end read the last one and are not stored, so codes need no mask.
"""

import triton
import triton.language as tl

from tessera_kernels.quant_weight import HALF, TILE, WORD_BITS
from tessera_kernels.triton._unpack import SHRUNK, nibbles, signed_bytes, times

CHANNEL, LATE, EARLY = 0, 1, 2
"""Scales multiply the result | float32 partial sums | the weights."""

_CHANNEL, _LATE, _EARLY = tl.constexpr(CHANNEL), tl.constexpr(LATE), tl.constexpr(EARLY)
_TILE, _HALF, _QUARTER = tl.constexpr(TILE), tl.constexpr(HALF), tl.constexpr(HALF // 2)
_WORD_BITS, _SHRUNK = tl.constexpr(WORD_BITS), tl.constexpr(float(SHRUNK))
_NO_SPECIAL = ("rows", "last_group", "tiles", "tiles_per_split", "count")  # not worth a compilation for being 1 or 16 n


@triton.jit
def _step(steps, tile, high: tl.constexpr, f, num_outputs, last_group, GROUP: tl.constexpr):
    """Return scales (float32) and zero points (int32) of a half tile; the padding of the last tile takes the last group's."""
    group = tl.minimum((tile * _TILE + high * _HALF) // GROUP, last_group)
    word = tl.load(steps + group * num_outputs + f)
    return (word & -0x10000).to(tl.float32, bitcast=True), word & 0xFFFF


@triton.jit
def _steps(steps, tile, f, num_outputs, last_group, GROUP: tl.constexpr, SHRINK: tl.constexpr, WIDE: tl.constexpr):
    """Return scales (times `SHRINK`) and zero points of both halves of a tile, broadcastable; 1 and 0 for whole rows."""
    low_scale, low_zero = tl.full(f.shape, 1.0, tl.float32), tl.full(f.shape, 0, tl.int32)
    if GROUP:
        low_scale, low_zero = _step(steps, tile, 0, f, num_outputs, last_group, GROUP)
    high_scale, high_zero = low_scale, low_zero
    if GROUP % 128:  # the two halves of a tile lie in different groups
        high_scale, high_zero = _step(steps, tile, 1, f, num_outputs, last_group, GROUP)
    if GROUP:
        low_scale, high_scale = low_scale * SHRINK, high_scale * SHRINK
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
def _words(codes, tile, f, num_outputs, BITS: tl.constexpr, WIDE: tl.constexpr):
    """Return the packed words of a tile, [BLOCK_F, words] if WIDE, else [words, BLOCK_F]."""
    WORDS: tl.constexpr = _TILE * BITS // _WORD_BITS
    j = tl.arange(0, WORDS)
    start = codes + tl.cast(tile, tl.int64) * num_outputs * WORDS
    return tl.load(start + (f[:, None] * WORDS + j[None, :] if WIDE else f[None, :] * WORDS + j[:, None]))


@triton.jit
def _halves(words, low_zero, high_zero, BITS: tl.constexpr, WIDE: tl.constexpr, dtype: tl.constexpr,
            TRICK: tl.constexpr):  # fmt: skip
    """Return the two halves of a tile as integers in `dtype`, [BLOCK_F, 64] if WIDE, else [64, BLOCK_F]."""
    if BITS == 8:
        low, high = signed_bytes(words, dtype, TRICK)
    else:
        a, b, c, d = nibbles(words, low_zero, high_zero, dtype, TRICK)
        low, high = _side_by_side(a, b, WIDE), _side_by_side(c, d, WIDE)
    return low, high


@triton.jit
def _side_by_side(a, b, WIDE: tl.constexpr):
    """Return the inputs of a, then those of b: every thread keeps the numbers it has."""
    pair = tl.join(a, b)
    if WIDE:
        whole = tl.reshape(tl.permute(pair, 0, 2, 1), a.shape[0], 2 * a.shape[1])
    else:
        whole = tl.reshape(tl.permute(pair, 2, 0, 1), 2 * a.shape[0], a.shape[1])
    return whole


@triton.jit
def _x_tile(x, x_tiles, r, first_r, first_k, rows, width, stride, INPUTS: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
            X_TMA: tl.constexpr):  # fmt: skip
    """Return rows r of x and inputs first_k to first_k + INPUTS, zeros outside: [inputs, r] if WIDE, else [r, inputs].

    X_TMA: the copy engine reads them, which leaves registers and instructions to the weights.
    """
    if X_TMA:
        tile = tl.trans(x_tiles.load([first_r, first_k]))
    else:
        k = first_k + tl.arange(0, INPUTS)
        row, column = (r[None, :], k[:, None]) if WIDE else (r[:, None], k[None, :])
        seen = row < rows
        if not EVEN:
            seen = seen & (column < width)
        tile = tl.load(x + row * stride + column, mask=seen, other=0.0)
    return tile


@triton.jit
def _dot(weight, x, acc, WIDE: tl.constexpr, LIFT: tl.constexpr):
    if LIFT:  # the interpreter multiplies bfloat16 as integers
        weight, x = weight.to(tl.float32), x.to(tl.float32)
    left, right = (weight, x) if WIDE else (x, weight)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def _settled(acc, LIFT: tl.constexpr):
    """Return acc through no instruction at all: a use of it, which makes the compiler wait for the product in this turn.

    A product left under way into the next turn reads its weights from registers that the next turn fills: ptxas then waits
    after every single instruction of it (C7515), or does not see it and the numbers are wrong.
    """
    if not LIFT:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit(do_not_specialize=_NO_SPECIAL[:4])
def tile_kernel(
    x, codes, steps, out, rows, width, num_outputs, last_group, tiles, tiles_per_split, x_stride, x_tiles,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_X: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, TRICK: tl.constexpr, LIFT: tl.constexpr,
    STAGES: tl.constexpr, PER_TURN: tl.constexpr, GROUP_X: tl.constexpr, EARLY_ADD: tl.constexpr, WHOLE: tl.constexpr,
    X_TMA: tl.constexpr,
):  # fmt: skip
    if EARLY_ADD:
        tl.extra.cuda.gdc_launch_dependents()
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
    first_r = (block_x * BLOCK_X).to(tl.int32)
    SHRINK: tl.constexpr = _SHRUNK if BITS == 8 and TRICK else 1.0
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    for tile in tl.range(first, last, num_stages=STAGES, loop_unroll_factor=PER_TURN):
        low_scale, low_zero, high_scale, high_zero = _steps(
            steps, tile, f, num_outputs, last_group, GROUP, SHRINK, WIDE
        )
        words = _words(codes, tile, f, num_outputs, BITS, WIDE)
        sum_from = acc if SCALE != _LATE else nothing
        if BITS == 4 and not WIDE:  # pieces of 32: a joined one would have the registers of mma in the wrong order
            k = tile * _TILE
            x_a = _x_tile(x, x_tiles, r, first_r, k, rows, width, x_stride, _QUARTER, WIDE, EVEN, X_TMA)
            x_b = _x_tile(x, x_tiles, r, first_r, k + _QUARTER, rows, width, x_stride, _QUARTER, WIDE, EVEN, X_TMA)
            x_c = _x_tile(x, x_tiles, r, first_r, k + 2 * _QUARTER, rows, width, x_stride, _QUARTER, WIDE, EVEN, X_TMA)
            x_d = _x_tile(x, x_tiles, r, first_r, k + 3 * _QUARTER, rows, width, x_stride, _QUARTER, WIDE, EVEN, X_TMA)
            a, b, c, d = nibbles(words, low_zero, high_zero, dtype, TRICK)
            low_sum = _dot(b, x_b, _dot(a, x_a, sum_from, WIDE, LIFT), WIDE, LIFT)
            high_sum = _dot(c, x_c, nothing if GROUP % 128 else low_sum, WIDE, LIFT)
            high_sum = _dot(d, x_d, high_sum, WIDE, LIFT)
        elif WHOLE:  # one product a turn, so one wait
            whole_x = _x_tile(x, x_tiles, r, first_r, tile * _TILE, rows, width, x_stride, _TILE, WIDE, EVEN, X_TMA)
            low, high = _halves(words, low_zero, high_zero, BITS, WIDE, dtype, TRICK)
            high_sum = _dot(_side_by_side(low, high, WIDE), whole_x, sum_from, WIDE, LIFT)
        else:  # two: while the first runs, the weights of the second are unpacked
            k = tile * _TILE
            low_x = _x_tile(x, x_tiles, r, first_r, k, rows, width, x_stride, _HALF, WIDE, EVEN, X_TMA)
            high_x = _x_tile(x, x_tiles, r, first_r, k + _HALF, rows, width, x_stride, _HALF, WIDE, EVEN, X_TMA)
            low, high = _halves(words, low_zero, high_zero, BITS, WIDE, dtype, TRICK)
            if SCALE == _EARLY:
                low, high = times(low, low_scale, dtype, TRICK), times(high, high_scale, dtype, TRICK)
            low_sum = _dot(low, low_x, sum_from, WIDE, LIFT)
            high_sum = _dot(high, high_x, nothing if SCALE == _LATE and GROUP % 128 else low_sum, WIDE, LIFT)
        if SCALE != _LATE:
            acc = _settled(high_sum, LIFT)
        elif GROUP % 128:
            acc += low_sum * low_scale + high_sum * high_scale
        else:
            acc += high_sum * low_scale
    if SCALE == _CHANNEL:
        whole = tl.load(steps + f) * SHRINK
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
    TRICK: tl.constexpr, STAGES: tl.constexpr, EARLY_ADD: tl.constexpr,
):  # fmt: skip
    """One row of x: products and sums on the ordinary lanes, inputs of a half tile side by side across them."""
    if EARLY_ADD:
        tl.extra.cuda.gdc_launch_dependents()
    row, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    own_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    f = tl.minimum(own_f, num_outputs - 1)
    acc = tl.zeros((BLOCK_F, _HALF), tl.float32)
    number: tl.constexpr = tl.bfloat16 if TRICK else tl.float32
    SHRINK: tl.constexpr = _SHRUNK if BITS == 8 and TRICK else 1.0
    first = split * tiles_per_split
    for tile in tl.range(first, tl.minimum(first + tiles_per_split, tiles), num_stages=STAGES):
        k = tile * _TILE + tl.arange(0, _HALF)
        low_x = tl.load(x + row * x_stride + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
        high_x = tl.load(x + row * x_stride + k + _HALF, mask=k + _HALF < width, other=0.0).to(tl.float32)[None, :]
        low_scale, low_zero, high_scale, high_zero = _steps(
            steps, tile, f, num_outputs, last_group, GROUP, SHRINK, True
        )
        words = _words(codes, tile, f, num_outputs, BITS, True)
        low, high = _halves(words, low_zero, high_zero, BITS, True, number, TRICK)
        low, high = low.to(tl.float32) * low_x, high.to(tl.float32) * high_x
        if SCALE == _CHANNEL:
            acc += low + high
        else:
            acc += low * low_scale + high * high_scale
    total = tl.sum(acc, 1)
    if SCALE == _CHANNEL:
        total *= tl.load(steps + f) * SHRINK
    start = out + (split.to(tl.int64) * rows + row) * num_outputs
    tl.store(start + own_f, total.to(out.dtype.element_ty), mask=own_f < num_outputs)


@triton.jit(do_not_specialize=_NO_SPECIAL[4:])
def add_splits_kernel(parts, out, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY_ADD: tl.constexpr):
    """out = sum of the partial sums, first to last. `EARLY_ADD`: launched while the products run, waits for them here."""
    if EARLY_ADD:
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts + place, mask=place < count, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + (place + split * tl.cast(count, tl.int64)), mask=place < count, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < count)


@triton.jit
def dequantize_kernel(
    codes, steps, out, width, num_outputs, last_group, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_F: tl.constexpr,
    TRICK: tl.constexpr,
):  # fmt: skip
    number: tl.constexpr = tl.bfloat16 if TRICK else tl.float32
    SHRINK: tl.constexpr = _SHRUNK if BITS == 8 and TRICK else 1.0
    tile, own_f = tl.program_id(0), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    f = tl.minimum(own_f, num_outputs - 1)
    low_scale, low_zero, high_scale, high_zero = _steps(steps, tile, f, num_outputs, last_group, GROUP, SHRINK, True)
    words = _words(codes, tile, f, num_outputs, BITS, True)
    low, high = _halves(words, low_zero, high_zero, BITS, True, number, TRICK)
    if GROUP == 0:
        low_scale = (tl.load(steps + f) * SHRINK)[:, None]
        high_scale = low_scale
    k = (tile * _TILE + tl.arange(0, _HALF))[None, :]
    start = out + own_f.to(tl.int64)[:, None] * width
    seen = own_f[:, None] < num_outputs
    tl.store(start + k, (low.to(tl.float32) * low_scale).to(out.dtype.element_ty), mask=seen & (k < width))
    high = (high.to(tl.float32) * high_scale).to(out.dtype.element_ty)
    tl.store(start + k + _HALF, high, mask=seen & (k + _HALF < width))
