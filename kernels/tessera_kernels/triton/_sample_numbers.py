"""Numbers of `sample` as integers, and its first pass over a row.

Numbers are put in order as signed integers (`image_of`), and masses are integers too: a probability relative to the largest is
rounded once, down to a multiple of 1 / ONE, and every sum of them is exact. So the mass above a threshold does not depend on
how it was added up, brackets found in one pass hold in the next, and a search can neither stall nor miss.
"""

import triton
import triton.language as tl

_LEAST, _LOWEST, _HIGHEST = -(2**31), -2139095041, 2**31 - 1
LEAST, LOWEST, HIGHEST = tl.constexpr(_LEAST), tl.constexpr(_LOWEST), tl.constexpr(_HIGHEST)
"""Images: of nothing (past the end of a row), of -inf, of NaN. Those of float32, as the next one."""

INFINITE = tl.constexpr(0x7F800000)
"""Image of +inf."""


@triton.jit
def image_of(x, DROP: tl.constexpr):
    """Return int32 in the order of the numbers, none of them a NaN; -0 as 0. DROP bits are the same in all numbers of a dtype."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 = 0
    return (bits ^ ((bits >> 31) & HIGHEST)) >> DROP


@triton.jit
def number_of(key, DROP: tl.constexpr):
    """Return the number of an image."""
    whole = (key << DROP) | ((key >> 31) & ((1 << DROP) - 1))
    return (whole ^ ((whole >> 31) & HIGHEST)).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(x, top, rate, ONE: tl.constexpr):
    """Return e^((x - top) / temperature) as a float32 and, rounded down, as an integer multiple of 1 / ONE."""
    weight = tl.exp2((x - top) * rate)
    return weight, (weight * ONE).to(tl.int64)


@triton.jit
def read_row(row, places, length):
    """Return logits as float32, -inf past the end."""
    return tl.load(row + places, mask=places < length, other=float("-inf")).to(tl.float32)


@triton.jit
def _better(x, places, length, best, first, DROP: tl.constexpr):
    key = tl.where(x != x, HIGHEST, image_of(x, DROP))
    better = (key > best) & (places < length)
    return tl.where(better, key, best), tl.where(better, places, first)


@triton.jit
def scan(row, length, DROP: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """First pass: (largest image, lowest id that has it, least of the LANES lanes' largest images).

    At least min(LANES, length) images are not smaller than the last. Tiles are read one ahead; only what is
    left after whole tiles is read under a mask.
    """
    TILE: tl.constexpr = DEPTH * LANES
    grid = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    best = tl.full([DEPTH, LANES], LEAST, tl.int32)
    first = tl.zeros([DEPTH, LANES], tl.int32)
    whole = length // TILE * TILE
    if whole > 0:
        x = tl.load(row + grid).to(tl.float32)
        for start in range(0, whole, TILE):
            ahead = tl.load(row + tl.minimum(start + TILE, whole - TILE) + grid).to(tl.float32)
            best, first = _better(x, start + grid, HIGHEST, best, first, DROP)
            x = ahead
    if whole < length:
        best, first = _better(read_row(row, whole + grid, length), whole + grid, length, best, first, DROP)
    lanes = tl.max(best, 0)
    top = tl.max(lanes, 0)
    at = tl.min(tl.min(tl.where(best == top, first, HIGHEST), 0), 0)
    return top, at, tl.maximum(tl.min(lanes, 0), LOWEST >> DROP)
