"""Divergences of two softmax distributions, with their gradients, that keep their digits when the two almost agree.

A loss near convergence is a small number made of large ones: log p and log q each carry an error of about 1e-6 in
float32, their difference may be 1e-4. So nothing here subtracts two logarithms or two probabilities. The log ratio
comes from the difference of the logits (exact, Sterbenz), a divergence sums the non-negative terms a log(a/b) - a + b,
and every gradient is written out from that same ratio instead of being left to differentiation. Formulas:
`docs/training.md`, section 3.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from tessera_shared.objectives import Divergence, TopKForm

_SERIES_BELOW = 0.25  # |r| under which e^-r - 1 + r would cancel and is summed as a series
_SUM_LENGTH = 128  # ids that are added one after another
_EXPONENT_CAP = 40.0  # e^40 times the smallest float32 still vanishes beside one


class Rule(NamedTuple):
    """Which divergence, with the numbers that shape it."""

    divergence: Divergence
    temperature: float
    weight: float = 0.0  # beta of the generalized JSD, alpha of the skewed divergences
    detach_mixture: bool = False
    k: int = 0
    form: TopKForm = TopKForm.FULL


class Parts(NamedTuple):
    """A divergence of each position, and its gradients with respect to student and teacher logits."""

    loss_BT: Array
    student_BTV: Array
    teacher_BTV: Array


class _Ratio(NamedTuple):
    p: Array  # teacher probabilities over the kept ids, exactly 0 elsewhere
    q: Array  # student probabilities, likewise
    log: Array  # log p - log q
    shift: Array  # log(sum e^teacher) - log(sum e^student) over the kept ids


def divergence(student_BTV: Array, teacher_BTV: Array, rule: Rule) -> Array:
    """Return the divergence of each position, `[B, T]`, differentiable by either side's logits."""
    loss_BT: Array = _divergence(rule, student_BTV, teacher_BTV)
    return loss_BT


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _divergence(rule: Rule, student: Array, teacher: Array) -> Array:
    return divergence_parts(student, teacher, rule).loss_BT


def _divergence_jvp(rule: Rule, primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    parts = divergence_parts(*primals, rule)
    moved = jnp.zeros_like(parts.loss_BT)
    for slope, tangent in zip((parts.student_BTV, parts.teacher_BTV), tangents, strict=True):
        if not isinstance(tangent, SymbolicZero):
            moved = moved + _sum(slope * tangent)[..., 0]
    return parts.loss_BT, moved


_divergence.defjvp(_divergence_jvp, symbolic_zeros=True)


def divergence_parts(student_BTV: Array, teacher_BTV: Array, rule: Rule) -> Parts:
    """Return value and gradients of one rule; p is the teacher, q the student."""
    if rule.divergence is Divergence.FORWARD_KL and rule.form is not TopKForm.FULL:
        return _top_k_parts(student_BTV, teacher_BTV, rule)
    whole = _ratio(student_BTV, teacher_BTV, rule.temperature, None)
    p, q, log_ratio = whole.p, whole.q, whole.log
    match rule.divergence:
        case Divergence.FORWARD_KL:
            loss, pu, qw = _skewed(p, q, log_ratio, 0.0)
        case Divergence.REVERSE_KL:
            loss, qw, pu = _skewed(q, p, -log_ratio, 0.0)
        case Divergence.SKEW_KL:
            loss, pu, qw = _skewed(p, q, log_ratio, rule.weight)
            qw = jnp.zeros_like(qw) if rule.detach_mixture else qw
        case Divergence.SKEW_REVERSE_KL:
            loss, qw, pu = _skewed(q, p, -log_ratio, rule.weight, detach_own=rule.detach_mixture)
        case Divergence.GENERALIZED_JSD:
            loss, pu, qw = _mixed(p, q, log_ratio, rule.weight)
        case Divergence.SOFT_CROSS_ENTROPY:
            log_q = jax.nn.log_softmax(student_BTV / rule.temperature, axis=-1)
            loss, pu, qw = -(p * log_q), -(p * log_q), -_times_expm1(q, log_ratio, p)
        case Divergence.TOTAL_VARIATION:
            difference, side = _difference(p, q, log_ratio), jnp.sign(log_ratio)
            loss, pu, qw = 0.5 * jnp.abs(difference), 0.5 * p * side, -0.5 * q * side
    return Parts(_sum(loss)[..., 0], _to_logits(q, qw, rule.temperature), _to_logits(p, pu, rule.temperature))


def top_k_mask(logits_BTV: Array, k: int) -> Array:
    """Return where the k largest logits are, `[B, T, V]` bool; among equals the lowest id comes first."""
    last_BT1 = jax.lax.top_k(logits_BTV, k)[0][..., -1:]
    above, equal = logits_BTV > last_BT1, logits_BTV == last_BT1
    room_BT1 = k - above.sum(-1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (equal.cumsum(-1, dtype=jnp.int32) <= room_BT1))


def _sum(x: Array) -> Array:
    """Return the sum over ids, which stay as an axis of length 1, in two stages.

    XLA's CPU loops may add a whole vocabulary to one accumulator, where small terms get lost (1e-6 of a loss over 32k
    ids). The barrier keeps the stages apart: the compiler would merge two sums in a row.
    """
    short = -x.shape[-1] % _SUM_LENGTH
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    stages = padded.reshape(*x.shape[:-1], -1, _SUM_LENGTH).sum(-1)
    apart: Array = jax.lax.optimization_barrier(stages)  # type: ignore[no-untyped-call]
    return apart.sum(-1, keepdims=True)


def _to_logits(a: Array, a_times_slope: Array, temperature: float) -> Array:
    """Carry a gradient by probabilities back through the softmax: a (u - sum a u) / tau."""
    return (a_times_slope - a * _sum(a_times_slope)) / temperature


def _probabilities(logits: Array, temperature: float, keep: Array | None) -> tuple[Array, Array]:
    """Return softmax(logits / tau) over the kept ids and its log normalizer; no kept id gives zeros."""
    if keep is None:
        scaled = (logits - logits.max(-1, keepdims=True)) / temperature
        top = logits.max(-1, keepdims=True) / temperature
    else:
        floor = jnp.finfo(logits.dtype).min
        top = jnp.where(keep, logits, floor).max(-1, keepdims=True)
        scaled = jnp.where(keep, (logits - top) / temperature, -jnp.inf)
        top = top / temperature
    powers = jnp.exp(scaled)
    total = _sum(powers)
    total = jnp.where(total == 0, 1, total)
    return powers / total, top + jnp.log(total)


def _ratio(student: Array, teacher: Array, temperature: float, keep: Array | None) -> _Ratio:
    """Return both distributions over the kept ids and log p - log q from the logits' difference.

    log p - log q = d - log(sum q e^d) with d = (teacher - student) / tau. Shifting d by its value at the student's
    likeliest id leaves a sum of small terms for log1p; where the two differ much, the normalizers' difference is as
    good, and safe.
    """
    p, p_normalizer = _probabilities(teacher, temperature, keep)
    q, q_normalizer = _probabilities(student, temperature, keep)
    d = (teacher - student) / temperature
    anchor = jnp.take_along_axis(d, q.argmax(-1, keepdims=True), axis=-1)
    d = d - anchor if keep is None else jnp.where(keep, d - anchor, 0.0)
    rest = _log_mean(q, d, p_normalizer - q_normalizer - anchor)
    return _Ratio(p, q, d - rest, anchor + rest)


def _log_mean(q: Array, x: Array, far: Array) -> Array:
    """Return log(sum q e^x) for probabilities q, by log1p of a small sum, or `far` where it is not small."""
    moved = _sum(q * jnp.expm1(jnp.minimum(x, _EXPONENT_CAP)))
    near = (jnp.abs(moved) <= 0.5) & (x.max(-1, keepdims=True) <= _EXPONENT_CAP)
    return jnp.where(near, jnp.log1p(jnp.where(near, moved, 0.0)), far)


def _terms(a: Array, b: Array, r: Array) -> Array:
    """Return a log(a/b) - a + b >= 0, given r = log(a/b); finite for every finite r."""
    near = jnp.abs(r) < _SERIES_BELOW
    y = jnp.where(near, -r, 0.0)
    series = jnp.ones_like(y)
    for n in range(13 if y.dtype == jnp.float64 else 8, 2, -1):
        series = 1.0 + y / n * series
    above, below = jnp.maximum(r, 0.0), jnp.minimum(r, 0.0)
    far = jnp.where(r > 0, a * (above + jnp.expm1(-above)), b * (below * jnp.exp(below) - jnp.expm1(below)))
    return jnp.where(near, a * (0.5 * y * y * series), far)


def _times_expm1(a: Array, r: Array, b: Array) -> Array:
    """Return a (e^r - 1) where b = a e^r is known: b - a where nothing cancels and the power might overflow."""
    return jnp.where(r < 1.0, a * jnp.expm1(jnp.minimum(r, 1.0)), b - a)


def _difference(p: Array, q: Array, log_ratio: Array) -> Array:
    """Return p - q from the log ratio."""
    return jnp.where(
        log_ratio > 0, -p * jnp.expm1(-jnp.maximum(log_ratio, 0.0)), q * jnp.expm1(jnp.minimum(log_ratio, 0.0))
    )


def _log_mixture(log_ratio: Array, weight: float) -> Array:
    """Return log((1 - w) + w e^x), the log of a mixture relative to its first part."""
    low = jnp.log1p(weight * jnp.expm1(jnp.minimum(log_ratio, 30.0)))
    high = jnp.maximum(log_ratio, 30.0)
    return jnp.where(log_ratio <= 30.0, low, high + jnp.log(weight + (1.0 - weight) * jnp.exp(-high)))


def _skewed(
    a: Array, b: Array, log_ratio: Array, alpha: float, *, detach_own: bool = False
) -> tuple[Array, Array, Array]:
    """Return KL(a | alpha a + (1 - alpha) b) by term, a times its slope by a, and b times its slope by b.

    Slopes are up to a constant, which `_to_logits` does not feel.
    """
    if alpha == 1.0:
        return jnp.zeros_like(a), jnp.zeros_like(a), jnp.zeros_like(b)
    mixture = b if alpha == 0.0 else alpha * a + (1.0 - alpha) * b
    r = log_ratio if alpha == 0.0 else -_log_mixture(-log_ratio, 1.0 - alpha)
    own = a * r if detach_own else a * r - alpha * (a * jnp.expm1(jnp.minimum(r, 80.0)))
    other = -(1.0 - alpha) * _times_expm1(b, r, a * jnp.exp(jnp.minimum(r - log_ratio, 0.0)))
    return _terms(a, mixture, r), own, other


def _mixed(p: Array, q: Array, log_ratio: Array, beta: float) -> tuple[Array, Array, Array]:
    """Return what `_skewed` returns for the generalized JSD.

    The slopes through the mixture add up to a constant, so detaching it changes nothing.
    """
    if beta == 0.0:
        return _skewed(p, q, log_ratio, 0.0)
    if beta == 1.0:
        loss, qw, pu = _skewed(q, p, -log_ratio, 0.0)
        return loss, pu, qw
    mixture = beta * p + (1.0 - beta) * q
    p_ratio, q_ratio = -_log_mixture(-log_ratio, 1.0 - beta), -_log_mixture(log_ratio, beta)
    loss = beta * _terms(p, mixture, p_ratio) + (1.0 - beta) * _terms(q, mixture, q_ratio)
    return loss, beta * (p * p_ratio), (1.0 - beta) * (q * q_ratio)


def _top_k_parts(student: Array, teacher: Array, rule: Rule) -> Parts:
    keep, tau = top_k_mask(teacher, rule.k), rule.temperature
    kept, whole = _ratio(student, teacher, tau, keep), _ratio(student, teacher, tau, None)
    p, q, log_ratio = whole.p, whole.q, whole.log
    if rule.form is TopKForm.BOTH_RENORMALIZED:
        p, q = kept.p, kept.q
        loss, pu, qw = _skewed(p, q, kept.log, 0.0)
        return Parts(_sum(loss)[..., 0], _to_logits(q, qw, tau), _to_logits(p, pu, tau))
    if rule.form is TopKForm.TEACHER_RENORMALIZED:
        p = kept.p
        log_ratio = kept.log - _log_kept_mass(student, q, keep, tau)
    loss = _sum(jnp.where(keep, _terms(p, q, log_ratio), 0.0))[..., 0]
    pu = jnp.where(keep, p * log_ratio, 0.0)
    qw = jnp.where(keep, -_times_expm1(q, log_ratio, p), q)
    if rule.form is TopKForm.TEACHER_RENORMALIZED:
        loss = loss + _sum(jnp.where(keep, 0.0, q))[..., 0]
    elif rule.form is TopKForm.TRUNCATED:
        loss = loss - _sum(jnp.where(keep, 0.0, _difference(p, q, log_ratio)))[..., 0]
        pu = jnp.where(keep, pu, -p)
    else:
        tail = _ratio(student, teacher, tau, ~keep)
        tail_ratio = _log_mean(tail.q, jnp.where(keep, 0.0, log_ratio), tail.shift - whole.shift)
        tail_p, tail_q = (_sum(jnp.where(keep, 0.0, side)) for side in (p, q))
        loss = loss + _terms(tail_p, tail_q, tail_ratio)[..., 0]
        pu = jnp.where(keep, pu, p * tail_ratio)
        qw = jnp.where(keep, qw, -_times_expm1(q, tail_ratio, tail.q * tail_p))
    return Parts(loss, _to_logits(q, qw, tau), _to_logits(p, pu, tau))


def _log_kept_mass(student: Array, q: Array, keep: Array, temperature: float) -> Array:
    """Return log of the student's mass on the kept ids, `[B, T, 1]`: exactly 0 where all are kept."""
    tail = _sum(jnp.where(keep, 0.0, q))
    by_logits = _probabilities(student, temperature, keep)[1] - _probabilities(student, temperature, None)[1]
    return jnp.where(tail < 0.5, jnp.log1p(-jnp.minimum(tail, 0.5)), by_logits)
