"""What is minimized, as data: divergences between teacher and student with every convention named.

Libraries that distil disagree silently on these (temperature factor, weight of the mixture, mask, denominator, form of
top-k); here each is a field, and `docs/training.md` has the formulas. p is the teacher, q the student.
"""

from dataclasses import dataclass
from enum import StrEnum

from tessera_shared.errors import SpecError

IGNORE_INDEX = -100
"""Label of a position that does not count."""


class Divergence(StrEnum):
    """The per-token divergence."""

    FORWARD_KL = "forward_kl"  # sum p (log p - log q)                                      Hinton et al. 2015
    REVERSE_KL = "reverse_kl"  # sum q (log q - log p)
    SOFT_CROSS_ENTROPY = "soft_cross_entropy"  # -sum p log q = forward KL + H(p)
    GENERALIZED_JSD = "generalized_jsd"  # beta KL(p|m) + (1-beta) KL(q|m), m = beta p + (1-beta) q  (GKD, 2306.13649)
    SKEW_KL = "skew_kl"  # KL(p | alpha p + (1-alpha) q)                                    DistiLLM, 2402.03898
    SKEW_REVERSE_KL = "skew_reverse_kl"  # KL(q | (1-alpha) p + alpha q)                    DistiLLM, 2402.03898
    TOTAL_VARIATION = "total_variation"  # 1/2 sum |p - q|


class TemperatureScale(StrEnum):
    """What multiplies the divergence at temperature tau."""

    NONE = "none"  # gradient shrinks as 1 / tau
    SQUARED = "squared"  # tau^2, Hinton's factor: gradient of the same size at every tau


class TopKForm(StrEnum):
    """How a divergence is restricted to the teacher's k likeliest tokens K (ties: lowest id first)."""

    FULL = "full"  # all of the vocabulary
    BOTH_RENORMALIZED = "both_renormalized"  # KL(p~ | q~), both renormalized over K
    TRUNCATED = "truncated"  # sum_K p (log p - log q), nothing renormalized
    TEACHER_RENORMALIZED = "teacher_renormalized"  # sum_K p~ (log p~ - log q), q over all of V
    TAIL = "tail"  # truncated + (1-P) log((1-P)/(1-Q)), P and Q the kept masses: exact at k = V


class Denominator(StrEnum):
    """What the summed loss is divided by, once, over the global batch."""

    TOKENS = "tokens"  # positions that count
    ROWS = "rows"  # rows of the batch (sequence-level mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilOptions:
    """One distillation loss with all its conventions."""

    divergence: Divergence = Divergence.FORWARD_KL
    temperature: float = 1.0  # tau divides both logits
    temperature_scale: TemperatureScale = TemperatureScale.SQUARED
    beta: float = 0.5  # generalized JSD: weight of the teacher; 0 = forward KL and 1 = reverse KL by definition
    alpha: float = 0.1  # skew: weight of the distribution's own side in the mixture
    detach_mixture: bool = False  # stop the gradient through q inside the mixture
    top_k: int | None = None  # forward KL only; None = whole vocabulary
    top_k_form: TopKForm = TopKForm.FULL
    hard_weight: float = 0.0  # loss = (1 - hard_weight) * divergence + hard_weight * cross-entropy at tau = 1
    denominator: Denominator = Denominator.TOKENS
    real_vocab_size: int | None = None  # ids at or above are padding and masked on both sides

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise SpecError(
                f"temperature = {self.temperature}: expected > 0, because logits are divided by it; try 1.0"
            )
        for name in ("beta", "alpha", "hard_weight"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise SpecError(f"{name} = {value}: expected 0 to 1, because it is a mixing weight; try 0.5")
        if (self.top_k is None) != (self.top_k_form is TopKForm.FULL):
            raise SpecError(
                f"top_k = {self.top_k}, top_k_form = {self.top_k_form.value}: expected both or neither, because the five "
                "forms of top-k differ; try top_k_form='tail'"
            )
        if self.top_k is not None and (self.top_k < 1 or self.divergence is not Divergence.FORWARD_KL):
            raise SpecError(
                f"top_k = {self.top_k} with {self.divergence.value}: expected top_k >= 1 with forward_kl, because the "
                "teacher's top k says nothing about the other divergences; try divergence='forward_kl'"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The whole training objective: cross-entropy alone, or distillation when `distil` is given."""

    distil: DistilOptions | None = None
    z_loss: float = 0.0  # weight of (log Z)^2 in the cross-entropy (PaLM, 2204.02311, section 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWOptions:
    """AdamW (Loshchilov & Hutter, 1711.05101) to one formula; the learning rate comes in separately at each step."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8  # outside the root
    weight_decay: float = 0.1  # p -= lr * weight_decay * p where the tensor table says decay
    clip_norm: float | None = 1.0  # global norm, no epsilon in it; None = no clipping

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise SpecError(
                    f"{name} = {getattr(self, name)}: expected 0 <= beta < 1, because it is a decay; try 0.9"
                )
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise SpecError(
                f"clip_norm = {self.clip_norm}: expected > 0 or None, because gradients are scaled to it; try 1.0"
            )
