"""Divergences of two softmax distributions, with their gradients, that keep their digits when the two almost agree.

A loss near convergence is a small number made of large ones: log p and log q each carry an error of about 1e-6 in
float32, their difference may be 1e-4. So nothing here subtracts two logarithms or two probabilities. The log ratio
comes from the difference of the logits (exact, Sterbenz), a divergence sums the non-negative terms a log(a/b) - a + b,
and every gradient is written out from that same ratio instead of being left to differentiation. Formulas:
`docs/training.md`, section 3.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tessera_shared.objectives import Divergence, TopKForm

_SERIES_BELOW = 0.25  # |r| under which e^-r - 1 + r would cancel and is summed as a series
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

    loss_BT: Tensor
    student_BTV: Tensor
    teacher_BTV: Tensor


class _Ratio(NamedTuple):
    p: Tensor  # teacher probabilities over the kept ids, exactly 0 elsewhere
    q: Tensor  # student probabilities, likewise
    log: Tensor  # log p - log q
    shift: Tensor  # log(sum e^teacher) - log(sum e^student) over the kept ids


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, student: Tensor, teacher: Tensor, rule: Rule) -> Tensor:
        parts = divergence_parts(student, teacher, rule)
        needs_student, needs_teacher, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        student_slope = parts.student_BTV if needs_student else None
        teacher_slope = parts.teacher_BTV if needs_teacher else None
        ctx.save_for_backward(student_slope, teacher_slope)  # type: ignore[arg-type]
        return parts.loss_BT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        student, teacher = ctx.saved_tensors  # type: ignore[attr-defined]
        scale = grad.unsqueeze(-1)
        return (None if student is None else scale * student), (None if teacher is None else scale * teacher), None


def divergence(student_BTV: Tensor, teacher_BTV: Tensor, rule: Rule) -> Tensor:
    """Return the divergence of each position, `[B, T]`, differentiable once by either side's logits."""
    loss_BT: Tensor = _Divergence.apply(student_BTV, teacher_BTV, rule)  # type: ignore[no-untyped-call]
    return loss_BT


def divergence_parts(student_BTV: Tensor, teacher_BTV: Tensor, rule: Rule) -> Parts:
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
            qw = torch.zeros_like(qw) if rule.detach_mixture else qw
        case Divergence.SKEW_REVERSE_KL:
            loss, qw, pu = _skewed(q, p, -log_ratio, rule.weight, detach_own=rule.detach_mixture)
        case Divergence.GENERALIZED_JSD:
            loss, pu, qw = _mixed(p, q, log_ratio, rule.weight)
        case Divergence.SOFT_CROSS_ENTROPY:
            log_q = torch.log_softmax(student_BTV / rule.temperature, dim=-1)
            loss, pu, qw = -(p * log_q), -(p * log_q), -_times_expm1(q, log_ratio, p)
        case Divergence.TOTAL_VARIATION:
            difference, side = _difference(p, q, log_ratio), torch.sign(log_ratio)
            loss, pu, qw = 0.5 * difference.abs(), 0.5 * p * side, -0.5 * q * side
    return Parts(loss.sum(-1), _to_logits(q, qw, rule.temperature), _to_logits(p, pu, rule.temperature))


def top_k_mask(logits_BTV: Tensor, k: int) -> Tensor:
    """Return where the k largest logits are, `[B, T, V]` bool; among equals the lowest id comes first."""
    last_BT1 = torch.topk(logits_BTV, k, dim=-1).values[..., -1:]
    above, equal = logits_BTV > last_BT1, logits_BTV == last_BT1
    room_BT1 = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room_BT1))


def _to_logits(a: Tensor, a_times_slope: Tensor, temperature: float) -> Tensor:
    """Carry a gradient by probabilities back through the softmax: a (u - sum a u) / tau."""
    return (a_times_slope - a * a_times_slope.sum(-1, keepdim=True)) / temperature


def _probabilities(logits: Tensor, temperature: float, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return softmax(logits / tau) over the kept ids and its log normalizer; no kept id gives zeros."""
    if keep is None:
        scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
        top = logits.amax(-1, keepdim=True) / temperature
    else:
        floor = torch.finfo(logits.dtype).min
        top = torch.where(keep, logits, floor).amax(-1, keepdim=True)
        scaled = torch.where(keep, (logits - top) / temperature, -torch.inf)
        top = top / temperature
    powers = torch.exp(scaled)
    total = powers.sum(-1, keepdim=True)
    total = torch.where(total == 0, 1, total)
    return powers / total, top + torch.log(total)


def _ratio(student: Tensor, teacher: Tensor, temperature: float, keep: Tensor | None) -> _Ratio:
    """Return both distributions over the kept ids and log p - log q from the logits' difference.

    log p - log q = d - log(sum q e^d) with d = (teacher - student) / tau. Shifting d by its value at the student's
    likeliest id leaves a sum of small terms for log1p; where the two differ much, the normalizers' difference is as
    good, and safe.
    """
    p, p_normalizer = _probabilities(teacher, temperature, keep)
    q, q_normalizer = _probabilities(student, temperature, keep)
    d = (teacher - student) / temperature
    anchor = d.gather(-1, q.argmax(-1, keepdim=True))
    d = d - anchor if keep is None else torch.where(keep, d - anchor, 0.0)
    rest = _log_mean(q, d, p_normalizer - q_normalizer - anchor)
    return _Ratio(p, q, d - rest, anchor + rest)


def _log_mean(q: Tensor, x: Tensor, far: Tensor) -> Tensor:
    """Return log(sum q e^x) for probabilities q, by log1p of a small sum, or `far` where it is not small."""
    moved = (q * torch.expm1(x.clamp(max=_EXPONENT_CAP))).sum(-1, keepdim=True)
    near = (moved.abs() <= 0.5) & (x.amax(-1, keepdim=True) <= _EXPONENT_CAP)
    return torch.where(near, torch.log1p(torch.where(near, moved, 0.0)), far)


def _terms(a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """Return a log(a/b) - a + b >= 0, given r = log(a/b); finite for every finite r."""
    near = r.abs() < _SERIES_BELOW
    y = torch.where(near, -r, 0.0)
    series = torch.ones_like(y)
    for n in range(13 if y.dtype == torch.float64 else 8, 2, -1):
        series = 1.0 + y / n * series
    above, below = r.clamp(min=0.0), r.clamp(max=0.0)
    far = torch.where(r > 0, a * (above + torch.expm1(-above)), b * (below * torch.exp(below) - torch.expm1(below)))
    return torch.where(near, a * (0.5 * y * y * series), far)


def _times_expm1(a: Tensor, r: Tensor, b: Tensor) -> Tensor:
    """Return a (e^r - 1) where b = a e^r is known: b - a where nothing cancels and the power might overflow."""
    return torch.where(r < 1.0, a * torch.expm1(r.clamp(max=1.0)), b - a)


def _difference(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """Return p - q from the log ratio."""
    return torch.where(
        log_ratio > 0, -p * torch.expm1(-log_ratio.clamp(min=0.0)), q * torch.expm1(log_ratio.clamp(max=0.0))
    )


def _log_mixture(log_ratio: Tensor, weight: float) -> Tensor:
    """Return log((1 - w) + w e^x), the log of a mixture relative to its first part."""
    low = torch.log1p(weight * torch.expm1(log_ratio.clamp(max=30.0)))
    high = log_ratio.clamp(min=30.0)
    return torch.where(log_ratio <= 30.0, low, high + torch.log(weight + (1.0 - weight) * torch.exp(-high)))


def _skewed(
    a: Tensor, b: Tensor, log_ratio: Tensor, alpha: float, *, detach_own: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(a | alpha a + (1 - alpha) b) by term, a times its slope by a, and b times its slope by b.

    Slopes are up to a constant, which `_to_logits` does not feel.
    """
    if alpha == 1.0:
        return torch.zeros_like(a), torch.zeros_like(a), torch.zeros_like(b)
    mixture = b if alpha == 0.0 else alpha * a + (1.0 - alpha) * b
    r = log_ratio if alpha == 0.0 else -_log_mixture(-log_ratio, 1.0 - alpha)
    own = a * r if detach_own else a * r - alpha * (a * torch.expm1(r.clamp(max=80.0)))
    other = -(1.0 - alpha) * _times_expm1(b, r, a * torch.exp((r - log_ratio).clamp(max=0.0)))
    return _terms(a, mixture, r), own, other


def _mixed(p: Tensor, q: Tensor, log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
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


def _top_k_parts(student: Tensor, teacher: Tensor, rule: Rule) -> Parts:
    keep, tau = top_k_mask(teacher, rule.k), rule.temperature
    kept, whole = _ratio(student, teacher, tau, keep), _ratio(student, teacher, tau, None)
    p, q, log_ratio = whole.p, whole.q, whole.log
    if rule.form is TopKForm.BOTH_RENORMALIZED:
        p, q = kept.p, kept.q
        loss, pu, qw = _skewed(p, q, kept.log, 0.0)
        return Parts(loss.sum(-1), _to_logits(q, qw, tau), _to_logits(p, pu, tau))
    if rule.form is TopKForm.TEACHER_RENORMALIZED:
        p = kept.p
        log_ratio = kept.log - _log_kept_mass(student, q, keep, tau)
    loss = torch.where(keep, _terms(p, q, log_ratio), 0.0).sum(-1)
    pu = torch.where(keep, p * log_ratio, 0.0)
    qw = torch.where(keep, -_times_expm1(q, log_ratio, p), q)
    if rule.form is TopKForm.TEACHER_RENORMALIZED:
        loss = loss + torch.where(keep, 0.0, q).sum(-1)
    elif rule.form is TopKForm.TRUNCATED:
        loss = loss - torch.where(keep, 0.0, _difference(p, q, log_ratio)).sum(-1)
        pu = torch.where(keep, pu, -p)
    else:
        tail = _ratio(student, teacher, tau, ~keep)
        tail_ratio = _log_mean(tail.q, torch.where(keep, 0.0, log_ratio), tail.shift - whole.shift)
        tail_p, tail_q = (torch.where(keep, 0.0, side).sum(-1, keepdim=True) for side in (p, q))
        loss = loss + _terms(tail_p, tail_q, tail_ratio).squeeze(-1)
        pu = torch.where(keep, pu, p * tail_ratio)
        qw = torch.where(keep, qw, -_times_expm1(q, tail_ratio, tail.q * tail_p))
    return Parts(loss, _to_logits(q, qw, tau), _to_logits(p, pu, tau))


def _log_kept_mass(student: Tensor, q: Tensor, keep: Tensor, temperature: float) -> Tensor:
    """Return log of the student's mass on the kept ids, `[B, T, 1]`: exactly 0 where all are kept."""
    tail = torch.where(keep, 0.0, q).sum(-1, keepdim=True)
    by_logits = _probabilities(student, temperature, keep)[1] - _probabilities(student, temperature, None)[1]
    return torch.where(tail < 0.5, torch.log1p(-tail.clamp(max=0.5)), by_logits)
