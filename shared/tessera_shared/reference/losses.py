"""What training minimizes, in float64 from the equations. p is the teacher, q the student, both softmax(logits / tau).

Complex-safe: decisions look at real parts, and stopping a gradient means taking the real part. Logits are rounded to
the policy's loss dtype when they come in and a result when it leaves. The two halves keep digits near p = q by other
means than here, where the log ratio and e^x - 1 - x are the only places that need care (`docs/training.md`, section 3).
"""

import numpy as np

from tessera_shared.numerics import Numerics
from tessera_shared.objective_checks import (
    check_distil,
    check_hidden_sizes,
    check_logit_sizes,
    check_objective,
    check_top_k,
    check_weight,
)
from tessera_shared.objectives import (
    IGNORE_INDEX,
    Denominator,
    DistilOptions,
    Divergence,
    Objective,
    TemperatureScale,
    TopKForm,
)
from tessera_shared.reference.rounding import round_to


def log_softmax(logits_BTV: np.ndarray, *, numerics: Numerics) -> np.ndarray:
    """Return z - log sum e^z."""
    return round_to(_log_softmax(round_to(logits_BTV, numerics.loss)), numerics.loss)


def cross_entropy(
    logits_BTV: np.ndarray,
    labels_BT: np.ndarray,
    *,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    numerics: Numerics,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of -log q(label) + z_loss (log Z)^2 over the labels that count, and their number."""
    loss_BT = _token_cross_entropy(round_to(logits_BTV, numerics.loss), labels_BT, ignore_index, z_loss)
    return _counted(loss_BT, labels_BT, ignore_index, numerics)


def forward_kl(
    student_BTV: np.ndarray, teacher_BTV: np.ndarray, *, temperature: float, numerics: Numerics
) -> np.ndarray:
    """Return sum p log(p/q)."""
    p, q, log_ratio = _sides(student_BTV, teacher_BTV, temperature, numerics)
    return round_to(_kl(p, q, log_ratio), numerics.loss)


def reverse_kl(
    student_BTV: np.ndarray, teacher_BTV: np.ndarray, *, temperature: float, numerics: Numerics
) -> np.ndarray:
    """Return sum q log(q/p)."""
    p, q, log_ratio = _sides(student_BTV, teacher_BTV, temperature, numerics)
    return round_to(_kl(q, p, -log_ratio), numerics.loss)


def soft_cross_entropy(
    student_BTV: np.ndarray, teacher_BTV: np.ndarray, *, temperature: float, numerics: Numerics
) -> np.ndarray:
    """Return -sum p log q."""
    p, _, _ = _sides(student_BTV, teacher_BTV, temperature, numerics)
    log_q = _log_softmax(round_to(student_BTV, numerics.loss) / temperature)
    return round_to(-(p * log_q).sum(-1), numerics.loss)


def total_variation(
    student_BTV: np.ndarray, teacher_BTV: np.ndarray, *, temperature: float, numerics: Numerics
) -> np.ndarray:
    """Return 1/2 sum |p - q|, where |x| = x sign(x) has slope 0 at 0."""
    p, q, log_ratio = _sides(student_BTV, teacher_BTV, temperature, numerics)
    return round_to(0.5 * ((p - q) * np.sign(log_ratio.real)).sum(-1), numerics.loss)


def generalized_jsd(
    student_BTV: np.ndarray,
    teacher_BTV: np.ndarray,
    *,
    beta: float,
    temperature: float,
    numerics: Numerics,
    detach_mixture: bool = False,
) -> np.ndarray:
    """Return beta KL(p|m) + (1-beta) KL(q|m), m = beta p + (1-beta) q; KL(p|q) at beta = 0, KL(q|p) at beta = 1."""
    check_weight("beta", beta)
    if beta == 0.0:
        return forward_kl(student_BTV, teacher_BTV, temperature=temperature, numerics=numerics)
    if beta == 1.0:
        return reverse_kl(student_BTV, teacher_BTV, temperature=temperature, numerics=numerics)
    p, q, log_ratio = _sides(student_BTV, teacher_BTV, temperature, numerics)
    mixed_q, drift = _in_mixture(q, detach_mixture)
    to_mixed = log_ratio + drift
    mixture = beta * p + (1.0 - beta) * mixed_q
    of_p = _kl(p, mixture, -_log_mixture(-to_mixed, 1.0 - beta))
    of_q = _kl(q, mixture, drift - _log_mixture(to_mixed, beta))
    return round_to(beta * of_p + (1.0 - beta) * of_q, numerics.loss)


def skew_kl(
    student_BTV: np.ndarray,
    teacher_BTV: np.ndarray,
    *,
    alpha: float,
    temperature: float,
    numerics: Numerics,
    detach_mixture: bool = False,
) -> np.ndarray:
    """Return KL(p | alpha p + (1-alpha) q)."""
    check_weight("alpha", alpha)
    p, q, log_ratio = _sides(student_BTV, teacher_BTV, temperature, numerics)
    mixed_q, drift = _in_mixture(q, detach_mixture)
    mixture = alpha * p + (1.0 - alpha) * mixed_q
    return round_to(_kl(p, mixture, -_log_mixture(-(log_ratio + drift), 1.0 - alpha)), numerics.loss)


def skew_reverse_kl(
    student_BTV: np.ndarray,
    teacher_BTV: np.ndarray,
    *,
    alpha: float,
    temperature: float,
    numerics: Numerics,
    detach_mixture: bool = False,
) -> np.ndarray:
    """Return KL(q | (1-alpha) p + alpha q)."""
    check_weight("alpha", alpha)
    p, q, log_ratio = _sides(student_BTV, teacher_BTV, temperature, numerics)
    mixed_q, drift = _in_mixture(q, detach_mixture)
    mixture = (1.0 - alpha) * p + alpha * mixed_q
    return round_to(_kl(q, mixture, drift - _log_mixture(log_ratio + drift, 1.0 - alpha)), numerics.loss)


def top_k_kl(
    student_BTV: np.ndarray,
    teacher_BTV: np.ndarray,
    *,
    k: int,
    form: TopKForm,
    temperature: float,
    numerics: Numerics,
) -> np.ndarray:
    """Return forward KL restricted to the teacher's k likeliest ids (ties: lowest id first).

    With P, Q the masses kept: both renormalized KL(p~|q~); truncated sum_K p log(p/q); teacher renormalized
    sum_K p~ log(p~/q); tail: truncated + (1-P) log((1-P)/(1-Q)).
    """
    check_top_k(k, teacher_BTV.shape[-1])
    ranked = np.argsort(-teacher_BTV.real, axis=-1, kind="stable")
    student, teacher = (np.take_along_axis(side, ranked, axis=-1) for side in (student_BTV, teacher_BTV))
    p, q, log_ratio = _sides(student, teacher, temperature, numerics)
    p_kept, q_kept, ratio_kept = _sides(student[..., :k], teacher[..., :k], temperature, numerics)
    truncated = (p * log_ratio)[..., :k].sum(-1)
    match form:
        case TopKForm.FULL:
            loss_BT = _kl(p, q, log_ratio)
        case TopKForm.BOTH_RENORMALIZED:
            loss_BT = _kl(p_kept, q_kept, ratio_kept)
        case TopKForm.TRUNCATED:
            loss_BT = truncated
        case TopKForm.TEACHER_RENORMALIZED:
            log_q = _log_softmax(round_to(student, numerics.loss) / temperature)
            loss_BT = _kl(p_kept, q_kept, ratio_kept) - _log_sum(log_q[..., :k])[..., 0]
        case TopKForm.TAIL:
            loss_BT = truncated + _tail(student, teacher, k, temperature, numerics)
    return round_to(loss_BT, numerics.loss)


def distillation_loss(
    student_BTV: np.ndarray,
    teacher_BTV: np.ndarray,
    labels_BT: np.ndarray,
    *,
    options: DistilOptions,
    numerics: Numerics,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the summed (1 - h) s D + h CE over the positions that count, and the denominator."""
    return _distillation(student_BTV, teacher_BTV, labels_BT, options, 0.0, numerics, ignore_index)


def training_loss(
    student_BTV: np.ndarray,
    teacher_BTV: np.ndarray | None,
    labels_BT: np.ndarray,
    *,
    objective: Objective,
    numerics: Numerics,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the objective's loss sum and denominator: cross-entropy without a teacher, distillation with one."""
    check_objective(objective, has_teacher=teacher_BTV is not None)
    if objective.distil is None or teacher_BTV is None:
        return cross_entropy(student_BTV, labels_BT, z_loss=objective.z_loss, numerics=numerics)
    return _distillation(
        student_BTV, teacher_BTV, labels_BT, objective.distil, objective.z_loss, numerics, IGNORE_INDEX
    )


def hidden_mse(
    student_BTD: np.ndarray,
    teacher_BTF: np.ndarray,
    projection_FD: np.ndarray | None,
    labels_BT: np.ndarray,
    *,
    numerics: Numerics,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum over positions of mean((W h - t)^2), and their number."""
    mapped_BTF, teacher_BTF = _projected(student_BTD, teacher_BTF, projection_FD, numerics)
    difference_BTF = mapped_BTF - teacher_BTF
    return _counted((difference_BTF * difference_BTF).mean(-1), labels_BT, ignore_index, numerics)


def hidden_cosine(
    student_BTD: np.ndarray,
    teacher_BTF: np.ndarray,
    projection_FD: np.ndarray | None,
    labels_BT: np.ndarray,
    *,
    numerics: Numerics,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum over positions of 1 - cos(W h, t), and their number; the cosine of a zero vector is 0."""
    mapped_BTF, teacher_BTF = _projected(student_BTD, teacher_BTF, projection_FD, numerics)
    squares_BT = (mapped_BTF * mapped_BTF).sum(-1) * (teacher_BTF * teacher_BTF).sum(-1)
    zero_BT = squares_BT.real == 0.0
    cosine_BT = (mapped_BTF * teacher_BTF).sum(-1) / np.sqrt(np.where(zero_BT, 1.0, squares_BT))
    return _counted(1.0 - np.where(zero_BT, 0.0, cosine_BT), labels_BT, ignore_index, numerics)


def _log_sum(z: np.ndarray) -> np.ndarray:
    """Return log sum e^z over the last axis, which stays with length 1."""
    top = z.real.max(-1, keepdims=True)
    log_sum: np.ndarray = top + np.log(np.exp(z - top).sum(-1, keepdims=True))
    return log_sum


def _log_softmax(z: np.ndarray) -> np.ndarray:
    log_probability: np.ndarray = z - _log_sum(z)
    return log_probability


def _sides(
    student: np.ndarray, teacher: np.ndarray, temperature: float, numerics: Numerics
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return p, q and log p - log q, the last from the logits' difference where both sides are close."""
    check_logit_sizes(student.shape[-1], teacher.shape[-1])
    student, teacher = round_to(student, numerics.loss), round_to(teacher, numerics.loss)
    log_p, log_q = _log_softmax(teacher / temperature), _log_softmax(student / temperature)
    p, q = np.exp(log_p), np.exp(log_q)
    gap = (teacher - student) / temperature
    gap = gap - (q.real * gap.real).sum(-1, keepdims=True)  # a real number a row: log p - log q does not feel it
    close = np.abs(gap.real).max(-1, keepdims=True) < 1.0
    gap = np.where(close, gap, 0.0)
    log_ratio = np.where(close, gap - np.log1p((q * np.expm1(gap)).sum(-1, keepdims=True)), log_p - log_q)
    return p, q, log_ratio


def _kl(a: np.ndarray, b: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    """Return sum a log(a/b) - a + b, the divergence as a sum of non-negative terms."""
    tiny = log_ratio.real < -300.0  # there the term is b
    r = np.where(tiny, 0.0, log_ratio)
    terms: np.ndarray = np.where(tiny, b, a * _exp_beyond_line(-r)).sum(-1)
    return terms


def _exp_beyond_line(x: np.ndarray) -> np.ndarray:
    """Return e^x - 1 - x >= 0 without cancellation, by halving: g(x) = expm1(x/2)^2 + 2 g(x/2)."""
    halvings = 24
    y = x / 2.0**halvings
    total = 2.0**halvings * (y * y / 2.0) * (1.0 + y / 3.0 * (1.0 + y / 4.0 * (1.0 + y / 5.0)))
    for i in range(1, halvings + 1):
        half = np.expm1(x / 2.0**i)
        total = total + 2.0 ** (i - 1) * half * half
    return total


def _in_mixture(q: np.ndarray, detach: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return q as it stands in a mixture, and log q minus its logarithm there: 0 but for a stopped derivative."""
    if not detach:
        return q, np.zeros(q.shape)
    return q.real, 1j * (q.imag / np.where(q.real == 0.0, 1.0, q.real)) if np.iscomplexobj(q) else np.zeros(q.shape)


def _log_mixture(log_ratio: np.ndarray, weight: float) -> np.ndarray:
    """Return log((1 - w) + w e^x)."""
    if weight in (0.0, 1.0):
        return weight * log_ratio
    close = np.abs(log_ratio.real) < 1.0
    near = np.log1p(weight * np.expm1(np.where(close, log_ratio, 0.0)))
    top = np.maximum(log_ratio.real, 0.0)
    return np.where(close, near, top + np.log((1.0 - weight) * np.exp(-top) + weight * np.exp(log_ratio - top)))


def _tail(student: np.ndarray, teacher: np.ndarray, k: int, temperature: float, numerics: Numerics) -> np.ndarray:
    """Return (1-P) log((1-P)/(1-Q)) for ids ranked by the teacher; nothing is left at k = V."""
    if k == teacher.shape[-1]:
        return np.zeros(teacher.shape[:-1])
    log_p = _log_softmax(round_to(teacher, numerics.loss) / temperature)
    log_q = _log_softmax(round_to(student, numerics.loss) / temperature)
    log_tail_p, log_tail_q = _log_sum(log_p[..., k:])[..., 0], _log_sum(log_q[..., k:])[..., 0]
    term_BT: np.ndarray = np.exp(log_tail_p) * (log_tail_p - log_tail_q)
    return term_BT


def _token_cross_entropy(logits_BTV: np.ndarray, labels_BT: np.ndarray, ignore_index: int, z_loss: float) -> np.ndarray:
    safe_BT1 = np.where(labels_BT != ignore_index, labels_BT, 0)[..., None]
    normalizer_BT = _log_sum(logits_BTV)[..., 0]
    picked_BT = np.take_along_axis(logits_BTV, safe_BT1, axis=-1)[..., 0]
    loss_BT: np.ndarray = normalizer_BT - picked_BT + z_loss * normalizer_BT * normalizer_BT
    return loss_BT


def _counted(
    loss_BT: np.ndarray, labels_BT: np.ndarray, ignore_index: int, numerics: Numerics
) -> tuple[np.ndarray, np.ndarray]:
    counts_BT = labels_BT != ignore_index
    return round_to(np.where(counts_BT, loss_BT, 0.0).sum(), numerics.loss), counts_BT.sum()


def _divergence(student: np.ndarray, teacher: np.ndarray, options: DistilOptions, numerics: Numerics) -> np.ndarray:
    tau, detach = options.temperature, options.detach_mixture
    if options.top_k is not None:
        k = min(options.top_k, teacher.shape[-1])
        return top_k_kl(student, teacher, k=k, form=options.top_k_form, temperature=tau, numerics=numerics)
    match options.divergence:
        case Divergence.FORWARD_KL:
            return forward_kl(student, teacher, temperature=tau, numerics=numerics)
        case Divergence.REVERSE_KL:
            return reverse_kl(student, teacher, temperature=tau, numerics=numerics)
        case Divergence.SOFT_CROSS_ENTROPY:
            return soft_cross_entropy(student, teacher, temperature=tau, numerics=numerics)
        case Divergence.TOTAL_VARIATION:
            return total_variation(student, teacher, temperature=tau, numerics=numerics)
        case Divergence.GENERALIZED_JSD:
            return generalized_jsd(
                student, teacher, beta=options.beta, temperature=tau, numerics=numerics, detach_mixture=detach
            )
        case Divergence.SKEW_KL:
            return skew_kl(
                student, teacher, alpha=options.alpha, temperature=tau, numerics=numerics, detach_mixture=detach
            )
        case Divergence.SKEW_REVERSE_KL:
            return skew_reverse_kl(
                student, teacher, alpha=options.alpha, temperature=tau, numerics=numerics, detach_mixture=detach
            )


def _distillation(
    student_BTV: np.ndarray,
    teacher_BTV: np.ndarray,
    labels_BT: np.ndarray,
    options: DistilOptions,
    z_loss: float,
    numerics: Numerics,
    ignore_index: int,
) -> tuple[np.ndarray, np.ndarray]:
    check_distil(options, student_BTV.shape[-1], teacher_BTV.shape[-1])
    student_BTV, teacher_BTV = (side[..., : options.real_vocab_size] for side in (student_BTV, teacher_BTV))
    loss_BT = _divergence(student_BTV, teacher_BTV, options, numerics)
    if options.temperature_scale is TemperatureScale.SQUARED:
        loss_BT = options.temperature**2 * loss_BT
    if options.hard_weight:
        hard_BT = _token_cross_entropy(round_to(student_BTV, numerics.loss), labels_BT, ignore_index, z_loss)
        loss_BT = (1.0 - options.hard_weight) * loss_BT + options.hard_weight * hard_BT
    loss_sum, num_tokens = _counted(loss_BT, labels_BT, ignore_index, numerics)
    if options.denominator is Denominator.ROWS:
        return loss_sum, (labels_BT != ignore_index).any(-1).sum()
    return loss_sum, num_tokens


def _projected(
    student_BTD: np.ndarray, teacher_BTF: np.ndarray, projection_FD: np.ndarray | None, numerics: Numerics
) -> tuple[np.ndarray, np.ndarray]:
    mapped_BTF = round_to(student_BTD, numerics.loss)
    if projection_FD is not None:
        mapped_BTF = np.einsum("...d,fd->...f", mapped_BTF, round_to(projection_FD, numerics.loss))
    check_hidden_sizes(mapped_BTF.shape[-1], teacher_BTF.shape[-1])
    return mapped_BTF, round_to(teacher_BTF, numerics.loss)
