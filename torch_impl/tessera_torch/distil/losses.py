"""What training minimizes: cross-entropy, divergences between student and teacher, and distances of hidden states.

p is the teacher, q the student, both softmax(logits / tau). `docs/training.md`, section 3, has every formula with its
source and its conventions. Sums are returned beside what to divide them by, so that micro-batches and ranks can be
added first.
"""

import torch
from torch import Tensor

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
from tessera_torch.distil._terms import Rule, divergence
from tessera_torch.model.dtypes import dtype_of


def log_softmax(logits_BTV: Tensor, *, numerics: Numerics) -> Tensor:
    """Return log(e^z / sum e^z) in the policy's loss dtype."""
    return torch.log_softmax(logits_BTV.to(dtype_of(numerics.loss)), dim=-1)


def cross_entropy(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    numerics: Numerics,
) -> tuple[Tensor, Tensor]:
    """Return the sum of -log q(label) + z_loss (log Z)^2 over the labels that count, and their number (int32).

    The second term keeps the normalizer Z near one (PaLM, arXiv 2204.02311, section 5). A label outside the
    vocabulary that is not `ignore_index` raises IndexError on the CPU.
    """
    loss_BT, counts_BT = _token_cross_entropy(logits_BTV, labels_BT, ignore_index, z_loss, numerics)
    return loss_BT.sum(), counts_BT.sum(dtype=torch.int32)


def forward_kl(student_BTV: Tensor, teacher_BTV: Tensor, *, temperature: float, numerics: Numerics) -> Tensor:
    """Return sum p log(p/q) of each position (Hinton et al. 2015, arXiv 1503.02531), without the factor tau^2."""
    return _divergence(student_BTV, teacher_BTV, Rule(Divergence.FORWARD_KL, temperature), numerics)


def reverse_kl(student_BTV: Tensor, teacher_BTV: Tensor, *, temperature: float, numerics: Numerics) -> Tensor:
    """Return sum q log(q/p) of each position (MiniLLM, arXiv 2306.08543), without the factor tau^2."""
    return _divergence(student_BTV, teacher_BTV, Rule(Divergence.REVERSE_KL, temperature), numerics)


def soft_cross_entropy(student_BTV: Tensor, teacher_BTV: Tensor, *, temperature: float, numerics: Numerics) -> Tensor:
    """Return -sum p log q of each position: forward KL plus the teacher's entropy, with the same student gradient."""
    return _divergence(student_BTV, teacher_BTV, Rule(Divergence.SOFT_CROSS_ENTROPY, temperature), numerics)


def total_variation(student_BTV: Tensor, teacher_BTV: Tensor, *, temperature: float, numerics: Numerics) -> Tensor:
    """Return 1/2 sum |p - q| of each position, 0 to 1; where p = q an id contributes no gradient."""
    return _divergence(student_BTV, teacher_BTV, Rule(Divergence.TOTAL_VARIATION, temperature), numerics)


def generalized_jsd(
    student_BTV: Tensor,
    teacher_BTV: Tensor,
    *,
    beta: float,
    temperature: float,
    numerics: Numerics,
    detach_mixture: bool = False,
) -> Tensor:
    """Return beta KL(p|m) + (1-beta) KL(q|m), m = beta p + (1-beta) q (GKD, arXiv 2306.13649).

    beta = 0 is KL(p|q) and beta = 1 is KL(q|p) by definition; the interior vanishes towards both. m minimizes the
    expression, so detaching it changes no gradient.
    """
    check_weight("beta", beta)
    rule = Rule(Divergence.GENERALIZED_JSD, temperature, beta, detach_mixture)
    return _divergence(student_BTV, teacher_BTV, rule, numerics)


def skew_kl(
    student_BTV: Tensor,
    teacher_BTV: Tensor,
    *,
    alpha: float,
    temperature: float,
    numerics: Numerics,
    detach_mixture: bool = False,
) -> Tensor:
    """Return KL(p | alpha p + (1-alpha) q) (DistiLLM, arXiv 2402.03898).

    With `detach_mixture` no gradient reaches the student: q stands nowhere else.
    """
    check_weight("alpha", alpha)
    rule = Rule(Divergence.SKEW_KL, temperature, alpha, detach_mixture)
    return _divergence(student_BTV, teacher_BTV, rule, numerics)


def skew_reverse_kl(
    student_BTV: Tensor,
    teacher_BTV: Tensor,
    *,
    alpha: float,
    temperature: float,
    numerics: Numerics,
    detach_mixture: bool = False,
) -> Tensor:
    """Return KL(q | (1-alpha) p + alpha q) (DistiLLM, arXiv 2402.03898)."""
    check_weight("alpha", alpha)
    rule = Rule(Divergence.SKEW_REVERSE_KL, temperature, alpha, detach_mixture)
    return _divergence(student_BTV, teacher_BTV, rule, numerics)


def top_k_kl(
    student_BTV: Tensor, teacher_BTV: Tensor, *, k: int, form: TopKForm, temperature: float, numerics: Numerics
) -> Tensor:
    """Return forward KL restricted to the teacher's k likeliest ids (ties: lowest id first) in one of its forms.

    At k = V every form is the full divergence. The truncated form may be negative.
    """
    check_top_k(k, teacher_BTV.shape[-1])
    rule = Rule(Divergence.FORWARD_KL, temperature, k=k, form=form)
    return _divergence(student_BTV, teacher_BTV, rule, numerics)


def distillation_loss(
    student_BTV: Tensor,
    teacher_BTV: Tensor,
    labels_BT: Tensor,
    *,
    options: DistilOptions,
    numerics: Numerics,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """Return the summed (1 - h) s D + h CE over the positions that count, and the denominator (int32).

    D is the divergence at temperature tau, s is tau^2 or 1, h the hard weight, CE the cross-entropy at tau = 1. Ids at
    or above `real_vocab_size` have probability 0 on both sides. The denominator counts positions, or rows with any.
    """
    return _distillation(student_BTV, teacher_BTV, labels_BT, options, 0.0, numerics, ignore_index)


def training_loss(
    student_BTV: Tensor, teacher_BTV: Tensor | None, labels_BT: Tensor, *, objective: Objective, numerics: Numerics
) -> tuple[Tensor, Tensor]:
    """Return the objective's loss sum and denominator: cross-entropy without a teacher, distillation with one."""
    check_objective(objective, has_teacher=teacher_BTV is not None)
    if objective.distil is None or teacher_BTV is None:
        return cross_entropy(student_BTV, labels_BT, z_loss=objective.z_loss, numerics=numerics)
    return _distillation(
        student_BTV, teacher_BTV, labels_BT, objective.distil, objective.z_loss, numerics, IGNORE_INDEX
    )


def hidden_mse(
    student_BTD: Tensor,
    teacher_BTF: Tensor,
    projection_FD: Tensor | None,
    labels_BT: Tensor,
    *,
    numerics: Numerics,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """Return the sum over positions of mean((W h - t)^2), the mean over the teacher's width, and their number (int32).

    h are the student's hidden states, t the teacher's, W the projection or None (FitNets, arXiv 1412.6550).
    """
    mapped_BTF, teacher_BTF = _projected(student_BTD, teacher_BTF, projection_FD, numerics)
    counts_BT = labels_BT != ignore_index
    loss_BT = (mapped_BTF - teacher_BTF).square().mean(-1)
    return torch.where(counts_BT, loss_BT, 0.0).sum(), counts_BT.sum(dtype=torch.int32)


def hidden_cosine(
    student_BTD: Tensor,
    teacher_BTF: Tensor,
    projection_FD: Tensor | None,
    labels_BT: Tensor,
    *,
    numerics: Numerics,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """Return the sum over positions of 1 - cos(W h, t), and their number (int32) (DistilBERT, arXiv 1910.01108).

    Computed as half the squared distance of the unit vectors. A vector of length 0 has cosine 0 with every other: loss
    1, gradient 0.
    """
    mapped_BTF, teacher_BTF = _projected(student_BTD, teacher_BTF, projection_FD, numerics)
    counts_BT = labels_BT != ignore_index
    (mapped_unit, mapped_zero), (teacher_unit, teacher_zero) = _unit(mapped_BTF), _unit(teacher_BTF)
    half_BT = 0.5 * (mapped_unit - teacher_unit).square().sum(-1)
    loss_BT = torch.where(mapped_zero | teacher_zero, 1.0, half_BT)
    return torch.where(counts_BT, loss_BT, 0.0).sum(), counts_BT.sum(dtype=torch.int32)


def _divergence(student_BTV: Tensor, teacher_BTV: Tensor, rule: Rule, numerics: Numerics) -> Tensor:
    check_logit_sizes(student_BTV.shape[-1], teacher_BTV.shape[-1])
    dtype = dtype_of(numerics.loss)
    return divergence(student_BTV.to(dtype), teacher_BTV.to(dtype), rule)


def _token_cross_entropy(
    logits_BTV: Tensor, labels_BT: Tensor, ignore_index: int, z_loss: float, numerics: Numerics
) -> tuple[Tensor, Tensor]:
    logits_BTV = logits_BTV.to(dtype_of(numerics.loss))
    counts_BT = labels_BT != ignore_index
    safe_BT1 = torch.where(counts_BT, labels_BT, 0).long().unsqueeze(-1)
    normalizer_BT = torch.logsumexp(logits_BTV, dim=-1)
    loss_BT = normalizer_BT - logits_BTV.gather(-1, safe_BT1).squeeze(-1)
    if z_loss:
        loss_BT = loss_BT + z_loss * normalizer_BT.square()
    return torch.where(counts_BT, loss_BT, 0.0), counts_BT


def _distillation(
    student_BTV: Tensor,
    teacher_BTV: Tensor,
    labels_BT: Tensor,
    options: DistilOptions,
    z_loss: float,
    numerics: Numerics,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    check_distil(options, student_BTV.shape[-1], teacher_BTV.shape[-1])
    if options.real_vocab_size is not None:
        student_BTV = student_BTV[..., : options.real_vocab_size]
        teacher_BTV = teacher_BTV[..., : options.real_vocab_size]
    counts_BT = labels_BT != ignore_index
    loss_BT = _divergence(student_BTV, teacher_BTV, _rule(options, teacher_BTV.shape[-1]), numerics)
    if options.temperature_scale is TemperatureScale.SQUARED:
        loss_BT = options.temperature**2 * loss_BT
    if options.hard_weight:
        hard_BT, _ = _token_cross_entropy(student_BTV, labels_BT, ignore_index, z_loss, numerics)
        loss_BT = (1.0 - options.hard_weight) * loss_BT + options.hard_weight * hard_BT
    units = counts_BT.any(-1) if options.denominator is Denominator.ROWS else counts_BT
    return torch.where(counts_BT, loss_BT, 0.0).sum(), units.sum(dtype=torch.int32)


def _rule(options: DistilOptions, vocab_size: int) -> Rule:
    weight = options.beta if options.divergence is Divergence.GENERALIZED_JSD else options.alpha
    k = 0 if options.top_k is None else min(options.top_k, vocab_size)
    return Rule(options.divergence, options.temperature, weight, options.detach_mixture, k, options.top_k_form)


def _projected(
    student_BTD: Tensor, teacher_BTF: Tensor, projection_FD: Tensor | None, numerics: Numerics
) -> tuple[Tensor, Tensor]:
    dtype = dtype_of(numerics.loss)
    mapped_BTF = student_BTD.to(dtype)
    if projection_FD is not None:
        mapped_BTF = torch.einsum("...d,fd->...f", mapped_BTF, projection_FD.to(dtype))
    check_hidden_sizes(mapped_BTF.shape[-1], teacher_BTF.shape[-1])
    return mapped_BTF, teacher_BTF.to(dtype)


def _unit(x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Return each vector at length 1 (zero vectors as they are), and which are zero, without a root of 0 on the way."""
    square_BT1 = x_BTD.square().sum(-1, keepdim=True)
    zero_BT1 = square_BT1 == 0
    return x_BTD / torch.where(zero_BT1, 1.0, square_BT1).sqrt(), zero_BT1.squeeze(-1)
