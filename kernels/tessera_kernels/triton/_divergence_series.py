"""Power series of a divergence's term and slope around equal distributions, by exact recurrences on the host.

Every divergence of student q and teacher p is sum q F(r) with r = log(p / q), and its gradient by the student's logits
is q G(r) - q sum(q G(r)), over the temperature. F begins with r^2 and G with r: near convergence, where r is small,
written-out formulas cancel, and these coefficients do not. With e = e^r and L_w = log(1 - w + w e):

    forward_kl       F = e r - e + 1                       G = -(e - 1)
    reverse_kl       F = e - 1 - r                         G = -r
    skew_kl          F = e rho - (1 - a)(e - 1)            G = -(1 - a)(e^rho - 1)        rho = r - L_a
    skew_reverse_kl  F = rho + (1 - a)(e - 1)              G = rho - a (e^rho - 1)        rho = -L_(1-a)
    generalized_jsd  F = b e (r - L_b) - (1 - b) L_b       G = -(1 - b) L_b

L_w is singular at distance >= pi from 0, so the terms shrink by 0.16 or faster up to |r| = 0.5.
"""

import functools

DIVERGENCES = ("forward_kl", "reverse_kl", "skew_kl", "skew_reverse_kl", "generalized_jsd")
"""Numbered in this order in the kernels."""

ORDER = 9
"""Highest power that is kept: the next one of F is below 5e-7 of the sum at |r| = 0.5."""

Series = list[float]


@functools.cache
def coefficients(divergence: str, weight: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (F's coefficients of r^2 to r^9, G's of r^1 to r^8)."""
    term, slope = _term_and_slope(divergence, weight)
    return tuple(term[2:]), tuple(slope[1:ORDER])


def _term_and_slope(divergence: str, weight: float) -> tuple[Series, Series]:
    r = [0.0, 1.0] + [0.0] * (ORDER - 1)
    grown = _exp(r)
    less_one = [0.0, *grown[1:]]
    if divergence == "forward_kl":
        return _sum((1.0, _times(grown, r)), (-1.0, less_one)), _sum((-1.0, less_one))
    if divergence == "reverse_kl":
        return _sum((1.0, less_one), (-1.0, r)), _sum((-1.0, r))
    if divergence == "skew_kl":
        ratio = _sum((1.0, r), (-1.0, _log_mixture(grown, weight)))
        term = _sum((1.0, _times(grown, ratio)), (weight - 1.0, less_one))
        return term, _sum((weight - 1.0, [0.0, *_exp(ratio)[1:]]))
    if divergence == "skew_reverse_kl":
        ratio = _sum((-1.0, _log_mixture(grown, 1.0 - weight)))
        return _sum((1.0, ratio), (1.0 - weight, less_one)), _sum((1.0, ratio), (-weight, [0.0, *_exp(ratio)[1:]]))
    mixture = _log_mixture(grown, weight)
    teacher = _times(grown, _sum((1.0, r), (-1.0, mixture)))
    return _sum((weight, teacher), (weight - 1.0, mixture)), _sum((weight - 1.0, mixture))


def _sum(*terms: tuple[float, Series]) -> Series:
    return [sum(factor * series[n] for factor, series in terms) for n in range(ORDER + 1)]


def _times(a: Series, b: Series) -> Series:
    return [sum(a[k] * b[n - k] for k in range(n + 1)) for n in range(ORDER + 1)]


def _exp(a: Series) -> Series:
    """e^a for a[0] = 0, from (e^a)' = a' e^a."""
    grown = [1.0]
    for n in range(1, ORDER + 1):
        grown.append(sum(k * a[k] * grown[n - k] for k in range(1, n + 1)) / n)
    return grown


def _log_mixture(grown: Series, weight: float) -> Series:
    """log(1 - w + w e^r), from A (log A)' = A'."""
    mixture = [1.0] + [weight * g for g in grown[1:]]
    log = [0.0]
    for n in range(1, ORDER + 1):
        log.append(mixture[n] - sum(k * log[k] * mixture[n - k] for k in range(1, n)) / n)
    return log
