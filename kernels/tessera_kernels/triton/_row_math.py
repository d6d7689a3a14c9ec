"""Functions of float32 tiles that keep their digits near 0, written out: libdevice has them, the interpreter has not.

And what is left of a row's cross-entropy once its sums are known; both linear losses use it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from tessera_kernels.checks import is_interpreting
from tessera_kernels.triton._launch import write

LOWEST = tl.constexpr(-1e30)
"""Where a running maximum starts: finite, so that a difference of two of them is a number."""


LOG2_E = tl.constexpr(1.4426950408889634)

ON_DEVICE = tl.constexpr(not is_interpreting())
"""Instructions of the device can be named: not in the interpreter, which is chosen when kernels are imported."""


@triton.jit
def exp(x):
    """e^x, and 0 below 1e-38: tl.exp keeps those numbers, and takes twice the instructions for it."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def log(x):
    """log x within 3e-7, or that part of itself: one special function, where tl.log and tl.log2 are polynomials."""
    if ON_DEVICE:
        x = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        x = tl.log2(x)
    return x * 0.6931471805599453


@triton.jit
def powers_of_two(u, v, x):
    """Return (2^u, 2^v - 2^u), given x = v - u: the larger power times 1 - 2^-|x|, which keeps its digits near x = 0.

    Below |x| = 0.72, half a nat, 1 - 2^-d is a polynomial: Chebyshev's interpolation of (1 - 2^-d) / d, within 2e-9.
    """
    d = tl.abs(x)
    larger, down = tl.exp2(tl.maximum(u, v)), tl.exp2(-d)
    series = 0.0013103602755363316 - d * 0.00012459161612484766
    series = d * series - 0.009609681966568933
    series = d * series + 0.05550269398276977
    series = d * series - 0.240226419888629
    series = d * series + 0.693147179688383
    part = larger * tl.where(d < 0.7213475, d * series, 1.0 - down)
    grows = x > 0.0
    return tl.where(grows, larger * down, larger), tl.where(grows, part, -part)


@triton.jit
def log1p(x):
    """log(1 + x) by u = fl(1 + x): log(u) x / (u - 1), exact where u is 1 (Goldberg 1991, theorem 4)."""
    u = 1.0 + x
    rest = u - 1.0
    flat = rest == 0.0
    return tl.where(flat, x, tl.log(u) * (x / tl.where(flat, 1.0, rest)))


@triton.jit
def tanh(x):
    """Hyperbolic tangent, within a few units of 6e-8 of 1."""
    return 1.0 - 2.0 / (exp(2.0 * tl.where(x > 20.0, 20.0, x)) + 1.0)


@triton.jit
def label_loss(top, rest, label_logit):
    """Return (-log softmax(z)[label], sum e^(z - top)) from rest = the sum without the label.

    Near convergence the loss is the small number log(1 + rest): the label's own 1 is never added to it first.
    """
    gap = top - label_logit
    total = rest + exp(-gap)
    near = log1p(rest * exp(tl.minimum(gap, 20.0)))
    return tl.where(gap < 20.0, near, gap + tl.log(total)), total


@triton.jit
def found_logit(row, first_id, width, label, before):
    """The label's logit as the product has it, where it lies in this stretch of a row; else what was found before."""
    here = (label >= first_id) & (label < first_id + width)
    return tl.where(here, tl.load(row + label - first_id, mask=here, other=0.0), before)


@triton.jit
def without_shortfall(rest, moment, exact, found, SHORT: tl.constexpr):
    """Return the sum of e^z without the label, as it is when the products are not cut off; `moment` is the sum of z e^z.

    All products of a row fall short by about the same part of themselves, 2e-6 for 2,048 terms: by what the label's, which
    the product `found`, falls short of the `exact` one. To the first order the sum grows by that part of its moment. Not
    SHORT are products of float32 numbers, which round to either side: the label's rounding says nothing about the others'.
    """
    if SHORT:
        lack = exact - found
        usual = (found != 0.0) & (tl.abs(lack) <= 2.0**-16 * tl.abs(found))
        rest += tl.where(usual, lack / tl.where(usual, found, 1.0) * moment, 0.0)
    return rest


@triton.jit
def read_logits(row, columns, width, padded, fill, LAST: tl.constexpr):
    """Load a tile of logits; only a row's LAST has columns that nobody wrote, which read as `fill`."""
    if LAST:
        return tl.where(columns < width, tl.load(row + columns, mask=columns < padded, other=0.0), fill)
    return tl.load(row + columns)


@triton.jit
def write_slopes_of(slopes, columns, slope, width, padded, LAST: tl.constexpr):
    """Store a tile of slopes; behind the LAST id are zeros."""
    if LAST:
        slope = tl.where(columns < width, slope, 0.0)
    write(slopes + columns, slope, columns < padded, LAST)


@triton.jit
def write_zeros(slopes, padded, BLOCK: tl.constexpr):
    """Write a row of zeros, its padding included."""
    for start in range(0, padded, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(slopes + columns, tl.zeros((BLOCK,), slopes.dtype.element_ty), mask=columns < padded)
