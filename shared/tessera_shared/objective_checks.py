"""Checks of what is minimized, done once outside traced code: sizes and options, never values of arrays."""

from tessera_shared.errors import DataError, SpecError
from tessera_shared.objectives import DistilOptions, Divergence, Objective
from tessera_shared.spec import ModelSpec


def check_weight(name: str, value: float) -> None:
    """Raise SpecError unless a mixing weight (beta, alpha) lies in 0 .. 1."""
    if not 0.0 <= value <= 1.0:
        raise SpecError(f"{name} = {value}: expected 0 to 1, because it is a mixing weight; try 0.5")


def check_top_k(k: int, vocab_size: int) -> None:
    """Raise SpecError unless k ids can be kept."""
    if not 1 <= k <= vocab_size:
        raise SpecError(
            f"k = {k}: expected 1 to {vocab_size}, because that many ids have a logit; try the vocabulary's size"
        )


def check_logit_sizes(student_size: int, teacher_size: int) -> None:
    """Raise SpecError unless both sides have a logit for the same ids."""
    if student_size != teacher_size:
        raise SpecError(
            f"student vocabulary = {student_size}, teacher vocabulary = {teacher_size}: expected the same, because "
            "probabilities are compared id by id; try real_vocab_size where only the padding differs"
        )


def check_hidden_sizes(mapped_width: int, teacher_width: int) -> None:
    """Raise SpecError unless a student's (projected) hidden state is as wide as the teacher's."""
    if mapped_width != teacher_width:
        raise SpecError(
            f"student width = {mapped_width}, teacher width = {teacher_width}: expected the same, because hidden "
            "states are subtracted; try a projection of shape (teacher width, student width)"
        )


def check_distil(options: DistilOptions, student_size: int, teacher_size: int) -> None:
    """Raise SpecError where distillation options do not fit the vocabularies, or would train nothing."""
    real = options.real_vocab_size
    if real is None:
        check_logit_sizes(student_size, teacher_size)
    elif not 0 < real <= min(student_size, teacher_size):
        raise SpecError(
            f"real_vocab_size = {real}: expected 1 to {min(student_size, teacher_size)}, because both sides must have "
            "a logit for every real id; try the tokenizer's size"
        )
    if options.detach_mixture and options.divergence is Divergence.SKEW_KL:
        raise SpecError(
            "detach_mixture = True with skew_kl: expected False, because the student stands only inside the mixture "
            "and would get no gradient; try divergence='skew_reverse_kl'"
        )


def check_objective(objective: Objective, *, has_teacher: bool) -> None:
    """Raise SpecError where an objective and the presence of a teacher contradict each other."""
    if (objective.distil is not None) != has_teacher:
        raise SpecError(
            f"teacher given = {has_teacher} with objective.distil = {objective.distil}: expected both or neither, "
            "because a divergence needs a teacher and cross-entropy has no use for one; "
            "try Objective(distil=DistilOptions())"
        )
    if objective.z_loss and objective.distil is not None and not objective.distil.hard_weight:
        raise SpecError(
            f"z_loss = {objective.z_loss} with hard_weight = 0: expected a hard weight, because z_loss is a part of "
            "the cross-entropy; try z_loss=0.0"
        )


def check_vocabularies(spec: ModelSpec, teacher_spec: ModelSpec, objective: Objective) -> None:
    """Raise SpecError unless student and teacher name the same tokens: equal sizes, or a real size within both."""
    if objective.distil is not None:
        check_distil(objective.distil, spec.vocab_size, teacher_spec.vocab_size)


def check_micro_batches(count: int) -> None:
    """Raise DataError where a step is asked for without a micro-batch."""
    if count < 1:
        raise DataError(f"micro-batches = {count}: expected at least 1, because a step needs gradients; try one batch")
