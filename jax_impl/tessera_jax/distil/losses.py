"""What training minimizes: cross-entropy, divergences between student and teacher, and distances of hidden states.

p is the teacher, q the student, both softmax(logits / tau). `docs/training.md`, section 3, has every formula with its
source and its conventions. Sums are returned beside what to divide them by, so that micro-batches and ranks can be
added first.
"""

import jax
import jax.numpy as jnp
from jax import Array

from tessera_jax.distil._terms import Rule, divergence
from tessera_jax.model.dtypes import dtype_of
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


def log_softmax(logits_BTV: Array, *, numerics: Numerics) -> Array:
    """Return log(e^z / sum e^z) in the policy's loss dtype."""
    return jax.nn.log_softmax(logits_BTV.astype(dtype_of(numerics.loss)), axis=-1)


def cross_entropy(
    logits_BTV: Array,
    labels_BT: Array,
    *,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    numerics: Numerics,
) -> tuple[Array, Array]:
    """Return the sum of -log q(label) + z_loss (log Z)^2 over the labels that count, and their number (int32).

    The second term keeps the normalizer Z near one (PaLM, arXiv 2204.02311, section 5). A label outside the
    vocabulary that is not `ignore_index` makes the loss NaN.
    """
    loss_BT, counts_BT = _token_cross_entropy(logits_BTV, labels_BT, ignore_index, z_loss, numerics)
    return loss_BT.sum(), counts_BT.sum(dtype=jnp.int32)


def forward_kl(student_BTV: Array, teacher_BTV: Array, *, temperature: float, numerics: Numerics) -> Array:
    """Return sum p log(p/q) of each position (Hinton et al. 2015, arXiv 1503.02531), without the factor tau^2."""
    return _divergence(student_BTV, teacher_BTV, Rule(Divergence.FORWARD_KL, temperature), numerics)


def reverse_kl(student_BTV: Array, teacher_BTV: Array, *, temperature: float, numerics: Numerics) -> Array:
    """Return sum q log(q/p) of each position (MiniLLM, arXiv 2306.08543), without the factor tau^2."""
    return _divergence(student_BTV, teacher_BTV, Rule(Divergence.REVERSE_KL, temperature), numerics)


def soft_cross_entropy(student_BTV: Array, teacher_BTV: Array, *, temperature: float, numerics: Numerics) -> Array:
    """Return -sum p log q of each position: forward KL plus the teacher's entropy, with the same student gradient."""
    return _divergence(student_BTV, teacher_BTV, Rule(Divergence.SOFT_CROSS_ENTROPY, temperature), numerics)


def total_variation(student_BTV: Array, teacher_BTV: Array, *, temperature: float, numerics: Numerics) -> Array:
    """Return 1/2 sum |p - q| of each position, 0 to 1; where p = q an id contributes no gradient."""
    return _divergence(student_BTV, teacher_BTV, Rule(Divergence.TOTAL_VARIATION, temperature), numerics)


def generalized_jsd(
    student_BTV: Array,
    teacher_BTV: Array,
    *,
    beta: float,
    temperature: float,
    numerics: Numerics,
    detach_mixture: bool = False,
) -> Array:
    """Return beta KL(p|m) + (1-beta) KL(q|m), m = beta p + (1-beta) q (GKD, arXiv 2306.13649).

    beta = 0 is KL(p|q) and beta = 1 is KL(q|p) by definition; the interior vanishes towards both. m minimizes the
    expression, so detaching it changes no gradient.
    """
    check_weight("beta", beta)
    rule = Rule(Divergence.GENERALIZED_JSD, temperature, beta, detach_mixture)
    return _divergence(student_BTV, teacher_BTV, rule, numerics)


def skew_kl(
    student_BTV: Array,
    teacher_BTV: Array,
    *,
    alpha: float,
    temperature: float,
    numerics: Numerics,
    detach_mixture: bool = False,
) -> Array:
    """Return KL(p | alpha p + (1-alpha) q) (DistiLLM, arXiv 2402.03898).

    With `detach_mixture` no gradient reaches the student: q stands nowhere else.
    """
    check_weight("alpha", alpha)
    rule = Rule(Divergence.SKEW_KL, temperature, alpha, detach_mixture)
    return _divergence(student_BTV, teacher_BTV, rule, numerics)


def skew_reverse_kl(
    student_BTV: Array,
    teacher_BTV: Array,
    *,
    alpha: float,
    temperature: float,
    numerics: Numerics,
    detach_mixture: bool = False,
) -> Array:
    """Return KL(q | (1-alpha) p + alpha q) (DistiLLM, arXiv 2402.03898)."""
    check_weight("alpha", alpha)
    rule = Rule(Divergence.SKEW_REVERSE_KL, temperature, alpha, detach_mixture)
    return _divergence(student_BTV, teacher_BTV, rule, numerics)


def top_k_kl(
    student_BTV: Array, teacher_BTV: Array, *, k: int, form: TopKForm, temperature: float, numerics: Numerics
) -> Array:
    """Return forward KL restricted to the teacher's k likeliest ids (ties: lowest id first) in one of its forms.

    At k = V every form is the full divergence. The truncated form may be negative.
    """
    check_top_k(k, teacher_BTV.shape[-1])
    rule = Rule(Divergence.FORWARD_KL, temperature, k=k, form=form)
    return _divergence(student_BTV, teacher_BTV, rule, numerics)


def distillation_loss(
    student_BTV: Array,
    teacher_BTV: Array,
    labels_BT: Array,
    *,
    options: DistilOptions,
    numerics: Numerics,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Array, Array]:
    """Return the summed (1 - h) s D + h CE over the positions that count, and the denominator (int32).

    D is the divergence at temperature tau, s is tau^2 or 1, h the hard weight, CE the cross-entropy at tau = 1. Ids at
    or above `real_vocab_size` have probability 0 on both sides. The denominator counts positions, or rows with any.
    """
    return _distillation(student_BTV, teacher_BTV, labels_BT, options, 0.0, numerics, ignore_index)


def training_loss(
    student_BTV: Array, teacher_BTV: Array | None, labels_BT: Array, *, objective: Objective, numerics: Numerics
) -> tuple[Array, Array]:
    """Return the objective's loss sum and denominator: cross-entropy without a teacher, distillation with one."""
    check_objective(objective, has_teacher=teacher_BTV is not None)
    if objective.distil is None or teacher_BTV is None:
        return cross_entropy(student_BTV, labels_BT, z_loss=objective.z_loss, numerics=numerics)
    return _distillation(
        student_BTV, teacher_BTV, labels_BT, objective.distil, objective.z_loss, numerics, IGNORE_INDEX
    )


def hidden_mse(
    student_BTD: Array,
    teacher_BTF: Array,
    projection_FD: Array | None,
    labels_BT: Array,
    *,
    numerics: Numerics,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Array, Array]:
    """Return the sum over positions of mean((W h - t)^2), the mean over the teacher's width, and their number (int32).

    h are the student's hidden states, t the teacher's, W the projection or None (FitNets, arXiv 1412.6550).
    """
    mapped_BTF, teacher_BTF = _projected(student_BTD, teacher_BTF, projection_FD, numerics)
    counts_BT = labels_BT != ignore_index
    loss_BT = jnp.square(mapped_BTF - teacher_BTF).mean(-1)
    return jnp.where(counts_BT, loss_BT, 0.0).sum(), counts_BT.sum(dtype=jnp.int32)


def hidden_cosine(
    student_BTD: Array,
    teacher_BTF: Array,
    projection_FD: Array | None,
    labels_BT: Array,
    *,
    numerics: Numerics,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Array, Array]:
    """Return the sum over positions of 1 - cos(W h, t), and their number (int32) (DistilBERT, arXiv 1910.01108).

    Computed as half the squared distance of the unit vectors. A vector of length 0 has cosine 0 with every other: loss
    1, gradient 0.
    """
    mapped_BTF, teacher_BTF = _projected(student_BTD, teacher_BTF, projection_FD, numerics)
    counts_BT = labels_BT != ignore_index
    (mapped_unit, mapped_zero), (teacher_unit, teacher_zero) = _unit(mapped_BTF), _unit(teacher_BTF)
    half_BT = 0.5 * jnp.square(mapped_unit - teacher_unit).sum(-1)
    loss_BT = jnp.where(mapped_zero | teacher_zero, 1.0, half_BT)
    return jnp.where(counts_BT, loss_BT, 0.0).sum(), counts_BT.sum(dtype=jnp.int32)


def _divergence(student_BTV: Array, teacher_BTV: Array, rule: Rule, numerics: Numerics) -> Array:
    check_logit_sizes(student_BTV.shape[-1], teacher_BTV.shape[-1])
    dtype = dtype_of(numerics.loss)
    return divergence(student_BTV.astype(dtype), teacher_BTV.astype(dtype), rule)


def _token_cross_entropy(
    logits_BTV: Array, labels_BT: Array, ignore_index: int, z_loss: float, numerics: Numerics
) -> tuple[Array, Array]:
    logits_BTV = logits_BTV.astype(dtype_of(numerics.loss))
    counts_BT = labels_BT != ignore_index
    safe_BT = jnp.where(counts_BT, labels_BT, 0)
    # A negative index would wrap around to another id; this one gives NaN.
    safe_BT = jnp.where(safe_BT < 0, logits_BTV.shape[-1], safe_BT)
    normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT1 = jnp.take_along_axis(logits_BTV, safe_BT[..., None], axis=-1, mode="fill", fill_value=jnp.nan)
    loss_BT = normalizer_BT - picked_BT1[..., 0]
    if z_loss:
        loss_BT = loss_BT + z_loss * jnp.square(normalizer_BT)
    return jnp.where(counts_BT, loss_BT, 0.0), counts_BT


def _distillation(
    student_BTV: Array,
    teacher_BTV: Array,
    labels_BT: Array,
    options: DistilOptions,
    z_loss: float,
    numerics: Numerics,
    ignore_index: int,
) -> tuple[Array, Array]:
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
    return jnp.where(counts_BT, loss_BT, 0.0).sum(), units.sum(dtype=jnp.int32)


def _rule(options: DistilOptions, vocab_size: int) -> Rule:
    weight = options.beta if options.divergence is Divergence.GENERALIZED_JSD else options.alpha
    k = 0 if options.top_k is None else min(options.top_k, vocab_size)
    return Rule(options.divergence, options.temperature, weight, options.detach_mixture, k, options.top_k_form)


def _projected(
    student_BTD: Array, teacher_BTF: Array, projection_FD: Array | None, numerics: Numerics
) -> tuple[Array, Array]:
    dtype = dtype_of(numerics.loss)
    mapped_BTF = student_BTD.astype(dtype)
    if projection_FD is not None:
        mapped_BTF = jnp.einsum(
            "...d,fd->...f", mapped_BTF, projection_FD.astype(dtype), precision=jax.lax.Precision.HIGHEST
        )
    check_hidden_sizes(mapped_BTF.shape[-1], teacher_BTF.shape[-1])
    return mapped_BTF, teacher_BTF.astype(dtype)


def _unit(x_BTD: Array) -> tuple[Array, Array]:
    """Return each vector at length 1 (zero vectors as they are), and which are zero, without a root of 0 on the way."""
    square_BT1 = jnp.square(x_BTD).sum(-1, keepdims=True)
    zero_BT1 = square_BT1 == 0
    return x_BTD / jnp.sqrt(jnp.where(zero_BT1, 1.0, square_BT1)), zero_BT1[..., 0]
