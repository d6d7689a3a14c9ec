"""Functions of float32 tiles that keep their digits near 0, written out: libdevice has them, the interpreter has not.

And what is left of a row's cross-entropy once its sums are known; both linear losses use it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
"""Where a running maximum starts: finite, so that a difference of two of them is a number."""


@triton.jit
def exp(x):
    """e^x, and 0 below 1e-38: tl.exp keeps those numbers, and takes twice the instructions for it."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def expm1(x):
    """e^x - 1: nine terms of its series under 0.5 (the tenth is 5e-10 of the sum), else as written; e^88 at most."""
    near = tl.abs(x) < 0.5
    y = tl.where(near, x, 0.0)
    series = 1.0 + y * (1.0 / 9.0)
    series = 1.0 + y * series * (1.0 / 8.0)
    series = 1.0 + y * series * (1.0 / 7.0)
    series = 1.0 + y * series * (1.0 / 6.0)
    series = 1.0 + y * series * (1.0 / 5.0)
    series = 1.0 + y * series * 0.25
    series = 1.0 + y * series * (1.0 / 3.0)
    series = 1.0 + y * series * 0.5
    return tl.where(near, y * series, exp(tl.where(x > 88.0, 88.0, x)) - 1.0)


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
def without_shortfall(rest, moment, exact, found):
    """Return the sum of e^z without the label, as it is when the products are not cut off; `moment` is the sum of z e^z.

    All products of a row fall short by about the same part of themselves, 2e-6 for 2,048 terms: by what the label's, which
    the product `found`, falls short of the `exact` one. To the first order the sum grows by that part of its moment.
    """
    lack = exact - found
    usual = (found != 0.0) & (tl.abs(lack) <= 2.0**-16 * tl.abs(found))
    return rest + tl.where(usual, lack / tl.where(usual, found, 1.0) * moment, 0.0)


@triton.jit
def write_zeros(slopes, padded, BLOCK: tl.constexpr):
    """Write a row of zeros, its padding included."""
    for start in range(0, padded, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(slopes + columns, tl.zeros((BLOCK,), slopes.dtype.element_ty), mask=columns < padded)
