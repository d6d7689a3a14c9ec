"""Limits of the kernels' rule, with their derivation; none is typed in a test.

A kernel K, the plain implementation P in the same dtype, and the truth R in float64 see the same inputs. K may commit
twice the error of P, in its largest and in its mean error, plus a floor for what P escapes by luck (an output of one
number may be exact in P):

    |K - R| <= 2 |P - R| + 2 u M + lambda sqrt(n) u32 max(M, T) + tiny

u is the output dtype's unit roundoff and M the output's magnitude: one rounding of the result, one of an operand of the
last product (probabilities, activations, gradients handed on). n terms accumulate in float32 with roundings of random
sign (Higham and Mary 2019, as `budget.LAMBDA`). M is the largest |R| for the largest error and the mean |R| for the mean
error; where terms cancel, it is their size. T is the size of what float32 adds up, where an op gives it: a sum of half
products of 1e9 each may leave 1e3, all of it rounding, in K and in P, each by its own order. `tiny` is the smallest number
of the dtype that no mode flushes to zero. Within a limit of the dtype's largest number an infinity is no error either.
The factor 2 and the floor are FlashAttention's rule (its test suite) with a derived floor instead of a typed one.
"""

import math

import torch

from tessera_parity.budget import LAMBDA

FACTOR = 2.0
"""Times the plain implementation's own error."""

REPEATS = 200
"""Runs whose outputs must be the same bits on a GPU."""


def roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2.0


def finer(dtype: torch.dtype) -> float:
    """Return float32's roundoff over that of `dtype`: what an error of float32 counts for beside one of `dtype`."""
    return roundoff(torch.float32) / roundoff(dtype)


def tiny(dtype: torch.dtype) -> float:
    """Return what may be lost to underflow: float16 keeps its subnormals everywhere, float32 and bfloat16 may not."""
    facts = torch.finfo(dtype)
    return facts.smallest_normal * facts.eps if dtype == torch.float16 else facts.smallest_normal


def noise_floor(dtype: torch.dtype, *, magnitude: float, length: int, terms: float = 0.0) -> float:
    """Return the error that is legal whatever the plain implementation commits, for sums of `length` terms that come to
    `terms` without their signs."""
    sums = LAMBDA * math.sqrt(max(1, length)) * roundoff(torch.float32)
    return 2.0 * roundoff(dtype) * magnitude + sums * max(magnitude, terms) + tiny(dtype)


def kernel_limit(plain_error: float, dtype: torch.dtype, *, magnitude: float, length: int, terms: float = 0.0) -> float:
    """Return how far a kernel's output may lie from float64."""
    return FACTOR * plain_error + noise_floor(dtype, magnitude=magnitude, length=length, terms=terms)
