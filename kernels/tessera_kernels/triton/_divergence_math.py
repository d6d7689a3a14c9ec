"""Arithmetic of the divergences for an id, and of a row's losses and label from sums: what row and tile kernels share.

    r = log p - log q, teacher p and student q;  divergence = sum q F(r),  d divergence / d s = q (G(r) - sum q G) / tau

Near r = 0, F and G are series (`_divergence_series`): their closed forms are differences of numbers that are alike there.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from tessera_kernels.triton._row_math import LOG2_E, exp, label_loss, log, log1p

FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
SKEW = tl.constexpr(2)
SKEW_REVERSE = tl.constexpr(3)
SERIES_BELOW = tl.constexpr(0.5)


@triton.jit
def log_ratio_of_sums(mass, moved):
    """log(sum e^v / sum e^u) from sum e^u and the sum of the differences."""
    change = moved / mass
    near = change > -0.5
    return tl.where(near, log1p(tl.where(near, change, 0.0)), tl.log(mass + moved) - tl.log(mass))


@triton.jit
def _log_mixture(r, weight):
    """log(1 - w + w e^r) for |r| away from 0: the larger power is taken out, for w = 0 or 1 the only one. Those are exact."""
    above = ((r > 0.0) & (weight > 0.0)) | (weight >= 1.0)
    large = tl.where(above, weight, 1.0 - weight)
    return tl.where(above, r, 0.0) + log(large + (1.0 - large) * exp(-tl.abs(r)))


@triton.jit
def term_and_slope(p, q, r, weight, f2, f3, f4, f5, f6, f7, f8, f9, g1, g2, g3, g4, g5, g6, g7, g8, KIND: tl.constexpr):
    """Return q F(r) and G(r) of each id, q G(r) of forward KL. What is left unused costs nothing: the compiler drops it."""
    near = tl.abs(r) < SERIES_BELOW
    tail = g2 + r * (g3 + r * (g4 + r * (g5 + r * (g6 + r * (g7 + r * g8)))))
    g = g1 + r * tail
    f = f2 + r * (f3 + r * (f4 + r * (f5 + r * (f6 + r * (f7 + r * (f8 + r * f9))))))
    if KIND == FORWARD:
        f = 1.0 + tail * (1.0 - r)  # of G's series alone: F = (e^r - 1) (r - 1) + r, and G = 1 - e^r
        term, slope = p * r - p + q, q - p
    elif KIND == REVERSE:
        term, slope = p - q - q * r, -r
    elif KIND == SKEW:
        ratio = r - _log_mixture(r, weight)
        term, slope = p * ratio - (1.0 - weight) * (p - q), (weight - 1.0) * (exp(ratio) - 1.0)
    elif KIND == SKEW_REVERSE:
        ratio = -_log_mixture(r, 1.0 - weight)
        term, slope = q * ratio + (1.0 - weight) * (p - q), ratio - weight * (exp(ratio) - 1.0)
    else:
        mixture = _log_mixture(r, weight)
        term, slope = weight * p * (r - mixture) - (1.0 - weight) * q * mixture, (weight - 1.0) * mixture
    if KIND != REVERSE:  # whose slope is its series
        slope = tl.where(near, q * (r * g) if KIND == FORWARD else r * g, slope)
    return tl.where(near, q * (r * r * f), term), slope


@triton.jit
def probabilities(s, t, s_top, t_top, s_share, t_share, shift, inv_tau):
    """Return teacher p, student q, and r = log p - log q. The shares are those of the two maxima."""
    scale = inv_tau * LOG2_E
    p = tl.exp2((t - t_top) * scale) * t_share
    q = tl.exp2((s - s_top) * scale) * s_share
    return p, q, ((t - s) - (t_top - s_top)) * inv_tau - shift


@triton.jit
def label_slopes(top, rest, label_logit, hard_scale, z_loss):
    """Return what e^(s - top) is multiplied by in the slopes of the cross-entropy, and the label's own slope."""
    _, total = label_loss(top, rest, label_logit)
    share = 2.0 * z_loss * (top + tl.log(total))
    return hard_scale * (1.0 + share) / total, hard_scale * (share * exp(label_logit - top) - rest) / total


@triton.jit
def mixed_loss(divergence, soft_weight, label_weight, z_loss, top, rest, label_logit, label, vocab, HARD: tl.constexpr):
    """Return soft_weight D + label_weight CE; NaN when a label that is used is no id."""
    loss = soft_weight * divergence
    if HARD:
        hard, total = label_loss(top, rest, label_logit)
        normalizer = top + tl.log(total)
        loss += label_weight * (hard + z_loss * normalizer * normalizer)
        loss = tl.where((label >= 0) & (label < vocab), loss, float("nan"))
    return loss


@triton.jit
def slope_sum_of_kl(mass, moved, mean, KIND: tl.constexpr):
    """sum q G(r) from the online sums: 0 for forward KL, -sum q r for reverse KL."""
    if KIND == REVERSE:
        return log_ratio_of_sums(mass, moved) - mean / mass / LOG2_E
    return mass * 0.0
