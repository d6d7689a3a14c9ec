"""What training minimizes, over batches with labels: the oracle, what does not count, and requests that clash."""

from typing import Any

import numpy as np
import pytest

from tessera_shared.errors import SpecError
from tessera_shared.numerics import FLOAT32, FLOAT64
from tessera_shared.objectives import (
    IGNORE_INDEX,
    Denominator,
    DistilOptions,
    Divergence,
    Objective,
    TemperatureScale,
    TopKForm,
)
from tessera_shared.reference import losses as oracle
from tessera_shared.reference.step import directional_derivative

from .divergences import Half, close, logits


def labeled(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    student, teacher = logits(seed)
    labels = np.random.default_rng(seed).integers(0, 11, size=(2, 3)).astype(np.int32)
    labels[0, 1] = labels[1, 2] = IGNORE_INDEX
    return student, teacher, labels


OPTIONS = [
    DistilOptions(),
    DistilOptions(divergence=Divergence.REVERSE_KL, temperature=2.0, temperature_scale=TemperatureScale.NONE),
    DistilOptions(divergence=Divergence.GENERALIZED_JSD, beta=0.2, hard_weight=0.25, denominator=Denominator.ROWS),
    DistilOptions(divergence=Divergence.SKEW_REVERSE_KL, detach_mixture=True, real_vocab_size=7, hard_weight=1.0),
    DistilOptions(divergence=Divergence.TOTAL_VARIATION, temperature=3.0, real_vocab_size=11),
    DistilOptions(divergence=Divergence.SOFT_CROSS_ENTROPY, real_vocab_size=1),
    DistilOptions(top_k=9, top_k_form=TopKForm.TAIL, real_vocab_size=7),
    DistilOptions(divergence=Divergence.SKEW_KL, alpha=0.3),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_distillation_loss_equals_the_oracle(half: Any, options: DistilOptions) -> None:
    student, teacher, labels = labeled(10)
    labels = np.where(labels >= (options.real_vocab_size or 11), 0, labels)
    ours = half.call("distillation_loss", student, teacher, labels, options=options, numerics=FLOAT64)
    reference = oracle.distillation_loss(student, teacher, labels, options=options, numerics=FLOAT64)
    close(ours[0], reference[0], scale=max(1.0, abs(float(reference[0]))) * 9)
    assert ours[1] == reference[1]
    assert ours[1].dtype == np.int32


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_and_z_loss_equal_the_oracle_in_value_and_slope(half: Any, z_loss: float) -> None:
    student, _, labels = labeled(11)
    options = {"z_loss": z_loss, "numerics": FLOAT64}
    loss, count = half.call("cross_entropy", student, labels, **options)
    reference, reference_count = oracle.cross_entropy(student, labels, **options)
    close(loss, reference)
    assert count == reference_count == 4
    direction = np.random.default_rng(0).normal(size=student.shape)
    slope = directional_derivative(
        lambda p: oracle.cross_entropy(p["student"], labels, **options)[0], {"student": student}, {"student": direction}
    )
    close((half.grads("cross_entropy", 1.0, student, labels, wrt=1, **options)[0] * direction).sum(), slope)


@pytest.mark.parametrize("objective", [Objective(z_loss=1e-3), *(Objective(distil=options) for options in OPTIONS[:3])])
def test_nothing_at_ignored_positions_matters(half: Any, objective: Objective) -> None:
    student, teacher, labels = labeled(12)
    targets = None if objective.distil is None else teacher
    options = {"objective": objective, "numerics": FLOAT64}
    loss = half.call("training_loss", student, targets, labels, **options)
    moved = student.copy()
    moved[labels == IGNORE_INDEX] = 77.0
    assert half.call("training_loss", moved, targets, labels, **options) == loss
    assert not half.grads("training_loss", 1.0, student, targets, labels, wrt=1, **options)[0][
        labels == IGNORE_INDEX
    ].any()


@pytest.mark.parametrize("objective", [Objective(z_loss=1e-3), *(Objective(distil=options) for options in OPTIONS)])
def test_a_batch_without_labels_has_loss_zero_count_zero_and_gradient_zero(half: Any, objective: Objective) -> None:
    student, teacher, labels = labeled(13)
    labels[:] = IGNORE_INDEX
    targets = None if objective.distil is None else teacher
    options = {"objective": objective, "numerics": FLOAT64}
    assert half.call("training_loss", student, targets, labels, **options) == (0.0, 0)
    assert not half.grads("training_loss", 1.0, student, targets, labels, wrt=1, **options)[0].any()


def test_squared_temperature_keeps_the_gradients_size(half: Any) -> None:
    """tau^2 times the divergence has the gradient tau (q - p), Hinton's point."""
    student, teacher, labels = labeled(14)
    options = DistilOptions(temperature=3.0)
    grad = half.grads("distillation_loss", 1.0, student, teacher, labels, wrt=1, options=options, numerics=FLOAT64)[0]
    p, q = (np.exp(oracle.log_softmax(side / 3.0, numerics=FLOAT64)) for side in (teacher, student))
    close(grad, np.where((labels != IGNORE_INDEX)[..., None], 3.0 * (q - p), 0.0))


@pytest.mark.parametrize("divergence", Divergence)
def test_padding_ids_have_no_probability_on_either_side(half: Any, divergence: Divergence) -> None:
    student, teacher, labels = labeled(15)
    labels = np.minimum(labels, 6)
    options = DistilOptions(divergence=divergence, hard_weight=0.5, real_vocab_size=7)
    settings = {"options": options, "numerics": FLOAT64}
    loss = half.call("distillation_loss", student, teacher, labels, **settings)
    padded, other = student.copy(), np.concatenate([teacher, teacher], axis=-1)
    padded[..., 7:], other[..., 7:] = 1e4, -3.0
    assert half.call("distillation_loss", padded, other, labels, **settings) == loss
    assert not half.grads("distillation_loss", 1.0, padded, other, labels, wrt=1, **settings)[0][..., 7:].any()


def test_rows_are_counted_only_where_a_position_counts(half: Any) -> None:
    student, teacher, labels = labeled(16)
    labels[1] = IGNORE_INDEX
    options = DistilOptions(denominator=Denominator.ROWS)
    assert half.call("distillation_loss", student, teacher, labels, options=options, numerics=FLOAT64)[1] == 1


@pytest.mark.parametrize("function", ["hidden_mse", "hidden_cosine"])
@pytest.mark.parametrize("projected", [True, False])
def test_hidden_state_losses_equal_the_oracle_in_value_and_slope(half: Any, function: str, projected: bool) -> None:
    rng = np.random.default_rng(17)
    student, teacher = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 7 if projected else 5))
    projection = rng.normal(size=(7, 5)) if projected else None
    labels = np.array([[1, IGNORE_INDEX, 3], [4, 5, 6]], np.int32)
    loss, count = half.call(function, student, teacher, projection, labels, numerics=FLOAT64)
    reference, reference_count = getattr(oracle, function)(student, teacher, projection, labels, numerics=FLOAT64)
    close(loss, reference)
    assert count == reference_count == 5
    arrays = {"student": student, "teacher": teacher} | ({"projection": projection} if projected else {})
    grads = half.grads(function, 1.0, student, teacher, projection, labels, wrt=len(arrays), numerics=FLOAT64)
    for (name, array), grad in zip(arrays.items(), grads, strict=True):
        direction = rng.normal(size=array.shape)
        slope = directional_derivative(
            lambda p: getattr(oracle, function)(
                p["student"], p["teacher"], p.get("projection"), labels, numerics=FLOAT64
            )[0],
            arrays,
            {name: direction},
        )
        close((grad * direction).sum(), slope)


def test_the_cosine_of_a_zero_vector_is_zero_with_zero_gradient(half: Any) -> None:
    student, teacher = np.full((2, 3, 5), 2.0), np.ones((2, 3, 5))
    student[0, 0] = 0.0
    labels = np.zeros((2, 3), np.int32)
    loss, _ = half.call("hidden_cosine", student, teacher, None, labels, numerics=FLOAT64)
    close(loss, 1.0)
    close(oracle.hidden_cosine(student, teacher, None, labels, numerics=FLOAT64)[0], 1.0)
    grads = half.grads("hidden_cosine", 1.0, student, teacher, None, labels, numerics=FLOAT64)
    assert not grads[0][0, 0].any()
    assert not grads[1][0, 0].any()
    assert np.isfinite(grads[0]).all()


def test_a_label_outside_the_vocabulary_does_not_pass_silently(backend: str) -> None:
    student, _, labels = labeled(19)
    for label in (11, -1):
        labels[0, 0] = label
        if backend == "torch":
            with pytest.raises((IndexError, RuntimeError)):
                Half(backend).call("cross_entropy", student.astype(np.float32), labels, numerics=FLOAT32)
        else:
            assert np.isnan(
                Half(backend).call("cross_entropy", student.astype(np.float32), labels, numerics=FLOAT32)[0]
            )


@pytest.mark.parametrize("side", ["oracle", "torch", "jax"])
def test_contradictory_requests_are_refused_with_both_numbers(side: str) -> None:
    def ask(function: str, *arrays: Any, **options: Any) -> Any:
        if side == "oracle":
            return getattr(oracle, function)(*arrays, **options)
        return Half(side).call(function, *arrays, **options)

    def distil(options: DistilOptions, targets: np.ndarray) -> Any:
        return ask("distillation_loss", student, targets, labels, options=options, numerics=FLOAT32)

    student, teacher, labels = labeled(20)
    student, teacher = student.astype(np.float32), teacher.astype(np.float32)
    one = {"temperature": 1.0, "numerics": FLOAT32}
    with pytest.raises(SpecError, match=r"student vocabulary = 11, teacher vocabulary = 9"):
        ask("forward_kl", student, teacher[..., :9], **one)
    with pytest.raises(SpecError, match=r"k = 12"):
        ask("top_k_kl", student, teacher, k=12, form=TopKForm.TAIL, **one)
    with pytest.raises(SpecError, match=r"beta = 1.5"):
        ask("generalized_jsd", student, teacher, beta=1.5, **one)
    with pytest.raises(SpecError, match=r"real_vocab_size = 10"):
        distil(DistilOptions(real_vocab_size=10), teacher[..., :9])
    with pytest.raises(SpecError, match="no gradient"):
        distil(DistilOptions(divergence=Divergence.SKEW_KL, detach_mixture=True), teacher)
    with pytest.raises(SpecError, match="both or neither"):
        ask("training_loss", student, None, labels, objective=Objective(distil=DistilOptions()), numerics=FLOAT32)
    with pytest.raises(SpecError, match="both or neither"):
        ask("training_loss", student, teacher, labels, objective=Objective(), numerics=FLOAT32)
    unused = Objective(distil=DistilOptions(), z_loss=0.1)
    with pytest.raises(SpecError, match="z_loss"):
        ask("training_loss", student, teacher, labels, objective=unused, numerics=FLOAT32)
    with pytest.raises(SpecError, match=r"student width = 11, teacher width = 9"):
        ask("hidden_mse", student, teacher[..., :9], None, labels, numerics=FLOAT32)
