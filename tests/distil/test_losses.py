"""Losses: laws of divergences, the oracle in float64, digits near convergence, degenerate cases."""

from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera_parity.budget import gamma, log_probability_scale, mathematics_limit
from tessera_parity.compare import relative_difference
from tessera_shared.errors import SpecError
from tessera_shared.numerics import BFLOAT16, FLOAT32, FLOAT64, Numerics
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

LIMIT = mathematics_limit()

DIVERGENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "forward": ("forward_kl", {}),
    "reverse": ("reverse_kl", {}),
    "jsd_0": ("generalized_jsd", {"beta": 0.0}),
    "jsd_3": ("generalized_jsd", {"beta": 0.3}),
    "jsd_5_detached": ("generalized_jsd", {"beta": 0.5, "detach_mixture": True}),
    "jsd_1": ("generalized_jsd", {"beta": 1.0}),
    "skew": ("skew_kl", {"alpha": 0.1}),
    "skew_0": ("skew_kl", {"alpha": 0.0}),
    "skew_reverse": ("skew_reverse_kl", {"alpha": 0.1}),
    "skew_reverse_detached": ("skew_reverse_kl", {"alpha": 0.3, "detach_mixture": True}),
    "total_variation": ("total_variation", {}),
    "both": ("top_k_kl", {"k": 4, "form": TopKForm.BOTH_RENORMALIZED}),
    "teacher": ("top_k_kl", {"k": 4, "form": TopKForm.TEACHER_RENORMALIZED}),
    "tail": ("top_k_kl", {"k": 4, "form": TopKForm.TAIL}),
    "truncated": ("top_k_kl", {"k": 4, "form": TopKForm.TRUNCATED}),
    "soft": ("soft_cross_entropy", {}),
}
ZERO_WHEN_EQUAL = [name for name in DIVERGENCES if name not in ("soft", "teacher", "truncated")]
NEVER_NEGATIVE = [name for name in DIVERGENCES if name != "truncated"]


class Half:
    """One side's losses called with NumPy arrays, and its own differentiation."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name == "torch":
            import torch

            from tessera_torch.distil import losses

            self.frame: ModuleType = torch
        else:
            import jax

            from tessera_jax.distil import losses

            self.frame = jax
        self.losses: ModuleType = losses

    def call(self, function: str, *arrays: Any, **options: Any) -> Any:
        value = getattr(self.losses, function)(*(self._in(array) for array in arrays), **options)
        return tuple(self._out(part) for part in value) if isinstance(value, tuple) else self._out(value)

    def grads(self, function: str, weight: Any, *arrays: Any, wrt: int = 2, **options: Any) -> list[np.ndarray]:
        """Gradients by the first `wrt` arrays of the weighted sum of what `function` returns."""
        rest = [self._in(array) for array in arrays[wrt:]]

        def total(*leaves: Any) -> Any:
            value = getattr(self.losses, function)(*leaves, *rest, **options)
            value = value[0] if isinstance(value, tuple) else value
            return (value * self._in(np.asarray(weight, arrays[0].dtype))).sum()

        if self.name == "torch":
            leaves = [self._in(array).requires_grad_() for array in arrays[:wrt]]
            found = self.frame.autograd.grad(total(*leaves), leaves, materialize_grads=True)
        else:
            found = self.frame.grad(total, argnums=tuple(range(wrt)))(*(self._in(array) for array in arrays[:wrt]))
        return [self._out(grad) for grad in found]

    def _in(self, array: Any) -> Any:
        if array is None:
            return None
        return self.frame.tensor(array) if self.name == "torch" else self.frame.numpy.asarray(array)

    def _out(self, value: Any) -> np.ndarray:
        return value.detach().numpy() if self.name == "torch" else np.asarray(value)


@pytest.fixture
def half(backend: str) -> Any:
    if backend == "torch":
        yield Half("torch")
        return
    import jax

    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield Half("jax")
    jax.config.update("jax_enable_x64", before)


def logits(seed: int, *, vocab: int = 11, scale: float = 3.0, gap: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Student and teacher logits `[2, 3, V]`, with a tie among the teacher's."""
    rng = np.random.default_rng(seed)
    teacher = rng.normal(size=(2, 3, vocab)) * scale
    if vocab > 7:
        teacher[0, 0, [2, 5, 7]] = teacher[0, 0].max()
    return teacher + gap * rng.normal(size=teacher.shape), teacher


def close(left: Any, right: Any, *, scale: float = 0.0, limit: float = LIMIT) -> None:
    """Assert that two arrays agree to `limit` relative to their largest magnitude or `scale`."""
    if scale:
        assert np.max(np.abs(np.asarray(left) - np.asarray(right)), initial=0.0) <= limit * scale
        return
    difference = relative_difference(np.asarray(left), np.asarray(right))
    assert difference.value <= limit, str(difference)


def call(
    half: Any, name: str, student: np.ndarray, teacher: np.ndarray, *, tau: float = 1.0, numerics: Numerics = FLOAT64
) -> Any:
    function, options = DIVERGENCES[name]
    return half.call(function, student, teacher, temperature=tau, numerics=numerics, **options)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("gap", [5.0, 1e-3])
def test_divergence_equals_the_oracle_in_value_and_slope(half: Any, name: str, gap: float) -> None:
    student, teacher = logits(1, gap=gap)
    student[0] += 1.5  # a common shift of the logits is no difference
    function, options = DIVERGENCES[name]
    options = {**options, "temperature": 1.7, "numerics": FLOAT64}
    reference = getattr(oracle, function)(student, teacher, **options)
    scale = log_probability_scale({"student_BTV": student, "teacher_BTV": teacher, "temperature": 1.7})
    close(half.call(function, student, teacher, **options), reference, scale=scale)
    weight = np.random.default_rng(2).normal(size=(2, 3))
    for index, grad in enumerate(half.grads(function, weight, student, teacher, **options)):
        direction = np.random.default_rng(3 + index).normal(size=grad.shape)
        sides = {"student": student, "teacher": teacher}
        slope = directional_derivative(
            lambda p: (getattr(oracle, function)(p["student"], p["teacher"], **options) * weight).sum(),
            sides,
            {("student", "teacher")[index]: direction},
        )
        assert abs((grad * direction).sum() - slope) <= LIMIT * np.abs(direction).sum()


@pytest.mark.parametrize("name", NEVER_NEGATIVE)
@given(seed=st.integers(0, 999), gap=st.sampled_from([0.0, 1e-6, 0.1, 30.0]), tau=st.sampled_from([0.5, 1.0, 4.0]))
def test_divergence_is_never_negative(backend: str, name: str, seed: int, gap: float, tau: float) -> None:
    student, teacher = (side.astype(np.float32) for side in logits(seed, gap=gap))
    assert (call(Half(backend), name, student, teacher, tau=tau, numerics=FLOAT32) >= 0).all()


@pytest.mark.parametrize("name", ZERO_WHEN_EQUAL)
def test_divergence_and_its_gradient_are_exactly_zero_if_and_only_if_both_agree(half: Any, name: str) -> None:
    _, teacher = logits(4)
    function, options = DIVERGENCES[name]
    options = {**options, "temperature": 2.0, "numerics": FLOAT64}
    assert not half.call(function, teacher, teacher, **options).any()
    for grad in half.grads(function, np.ones((2, 3)), teacher, teacher, **options):
        assert not grad.any()
    moved = teacher.copy()
    moved[..., np.arange(11) == 2] += 1e-6
    moved[..., np.argsort(-teacher[1, 2])[0]] += 1e-6
    assert (half.call(function, moved, teacher, **options) > 0).any()


@given(seed=st.integers(0, 999))
def test_jsd_is_symmetric_at_one_half_and_bounded_by_log_2(backend: str, seed: int) -> None:
    student, teacher = (side.astype(np.float32) for side in logits(seed, gap=20.0))
    options = {"beta": 0.5, "temperature": 1.0, "numerics": FLOAT32}
    there = Half(backend).call("generalized_jsd", student, teacher, **options)
    back = Half(backend).call("generalized_jsd", teacher, student, **options)
    close(there, back, limit=gamma(32, "float32"))
    assert (there <= np.log(2) * (1 + gamma(32, "float32"))).all()


def test_total_variation_is_at_most_one(half: Any) -> None:
    far = np.zeros((2, 3, 11))
    far[..., 0] = 200.0
    close(call(half, "total_variation", far, far[..., ::-1].copy()), np.ones((2, 3)))


def test_jsd_ends_are_the_two_kls_by_definition(half: Any) -> None:
    student, teacher = logits(5)
    assert np.array_equal(call(half, "jsd_0", student, teacher), call(half, "forward", student, teacher))
    assert np.array_equal(call(half, "jsd_1", student, teacher), call(half, "reverse", student, teacher))
    assert not np.array_equal(call(half, "jsd_0", student, teacher), call(half, "reverse", student, teacher))


def test_skew_without_skew_is_kl_and_full_skew_is_nothing(half: Any) -> None:
    student, teacher = logits(6)
    options = {"temperature": 1.0, "numerics": FLOAT64}
    assert np.array_equal(
        half.call("skew_kl", student, teacher, alpha=0.0, **options), call(half, "forward", student, teacher)
    )
    assert np.array_equal(
        half.call("skew_reverse_kl", student, teacher, alpha=0.0, **options), call(half, "reverse", student, teacher)
    )
    assert not half.call("skew_kl", student, teacher, alpha=1.0, **options).any()


@pytest.mark.parametrize("form", TopKForm)
def test_top_k_of_the_whole_vocabulary_is_the_full_divergence(half: Any, form: TopKForm) -> None:
    student, teacher = logits(7, gap=0.01)
    options = {"temperature": 1.0, "numerics": FLOAT64}
    whole = half.call("top_k_kl", student, teacher, k=11, form=form, **options)
    close(whole, half.call("forward_kl", student, teacher, **options))
    weight = np.ones((2, 3))
    for ours, full in zip(
        half.grads("top_k_kl", weight, student, teacher, k=11, form=form, **options),
        half.grads("forward_kl", weight, student, teacher, **options),
        strict=True,
    ):
        close(ours, full)


def test_tail_form_is_a_lower_bound_of_the_full_divergence(half: Any) -> None:
    student, teacher = logits(8)
    assert (call(half, "tail", student, teacher) <= call(half, "forward", student, teacher) * (1 + LIMIT)).all()


@pytest.mark.parametrize("form", [form for form in TopKForm if form is not TopKForm.FULL])
def test_ties_among_the_teachers_logits_go_to_the_lowest_id(half: Any, form: TopKForm) -> None:
    teacher = np.tile([-1.0, 4.0, -0.0, 4.0, 4.0, 0.0, 0.0, -3.0, -3.0, -3.0, -3.0], (2, 3, 1))
    student = np.tile(np.arange(11.0), (2, 3, 1))
    broken = teacher.copy()
    broken[..., [1, 3]] += 1.0  # the same choice without a tie
    options = {"k": 2, "form": form, "temperature": 1.0, "numerics": FLOAT64}
    grad = half.grads("top_k_kl", np.ones((2, 3)), student, teacher, **options)[0][0, 0]
    free = half.grads("top_k_kl", np.ones((2, 3)), student, broken, **options)[0][0, 0]
    assert np.array_equal(np.sign(grad[[1, 3, 4]]), np.sign(free[[1, 3, 4]]))
    close(half.call("top_k_kl", student, teacher, **options), oracle.top_k_kl(student, teacher, **options))
    signed = {**options, "k": 5}
    close(half.call("top_k_kl", student, teacher, **signed), oracle.top_k_kl(student, teacher, **signed))


@given(seed=st.integers(0, 99), shift=st.sampled_from([-700.0, 0.5, 64.0, 1e4]))
def test_adding_a_constant_to_all_logits_changes_nothing(seed: int, shift: float) -> None:
    student, teacher = (np.round(side * 1024) / 1024 for side in logits(seed))  # so that the shift is exact
    for name in DIVERGENCES:
        scale = log_probability_scale({"student_BTV": student + shift, "teacher_BTV": teacher})
        close(
            call(Half("torch"), name, student + shift, teacher),
            call(Half("torch"), name, student, teacher),
            scale=scale,
        )


@pytest.mark.parametrize(
    "name", ["forward", "reverse", "jsd_3", "skew", "skew_reverse", "total_variation", "both", "tail"]
)
@pytest.mark.parametrize("gap", [1.0, 1e-2, 1e-4])
def test_float32_keeps_six_digits_of_loss_and_gradient_near_convergence(backend: str, name: str, gap: float) -> None:
    """Sixteen roundings, 1e-6, whatever the size of the loss; differences of logarithms lose all digits at 1e-4."""
    limit = gamma(16, "float32")
    half, (student, teacher) = Half(backend), (side.astype(np.float32) for side in logits(9, gap=gap))
    student += np.float32(0.5)
    function, options = DIVERGENCES[name]
    options = {**options, "temperature": 1.0}
    truth = getattr(oracle, function)(student.astype(float), teacher.astype(float), numerics=FLOAT64, **options)
    loss = half.call(function, student, teacher, numerics=FLOAT32, **options)
    assert loss.dtype == np.float32
    assert np.max(np.abs(loss / truth - 1)) <= limit
    import torch

    leaf = torch.tensor(student.astype(float), requires_grad=True)
    exact = getattr(Half("torch").losses, function)(
        leaf, torch.tensor(teacher.astype(float)), numerics=FLOAT64, **options
    )
    exact = torch.autograd.grad(exact.sum(), leaf)[0].numpy()
    grad = half.grads(function, np.ones((2, 3)), student, teacher, numerics=FLOAT32, **options)[0]
    assert np.linalg.norm(grad - exact) <= limit * np.linalg.norm(exact)


def test_a_large_vocabulary_loses_no_small_terms_when_compiled(backend: str) -> None:
    rng = np.random.default_rng(9)  # four positions: the shape for which XLA's fused loop adds one by one
    teacher = (rng.normal(size=(1, 4, 32768)) * 3.0).astype(np.float32)
    student = (teacher + rng.normal(size=teacher.shape) * 1e-2).astype(np.float32)
    options = {"beta": 0.5, "temperature": 1.0}
    half = Half(backend)
    if backend == "torch":
        loss = half.call("generalized_jsd", student, teacher, numerics=FLOAT32, **options)
    else:
        loss = half.frame.jit(partial(half.losses.generalized_jsd, numerics=FLOAT32, **options))(student, teacher)
    import torch

    sides = (torch.tensor(side.astype(float)) for side in (student, teacher))
    truth = Half("torch").losses.generalized_jsd(*sides, numerics=FLOAT64, **options).numpy()
    assert np.max(np.abs(np.asarray(loss) / truth - 1)) <= gamma(16, "float32")


def test_plain_float32_logarithms_would_not_have_six_digits() -> None:
    """The must-fail twin of the test above: its limit is one that the textbook formula misses by far."""
    student, teacher = (side.astype(np.float32) for side in logits(9, vocab=513, gap=1e-4))
    truth = oracle.forward_kl(student.astype(float), teacher.astype(float), temperature=1.0, numerics=FLOAT64)
    log_p, log_q = (side - np.log(np.exp(side).sum(-1, keepdims=True)) for side in (teacher, student))
    plain = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    assert np.max(np.abs(plain / truth - 1)) > 100 * gamma(16, "float32")


@pytest.mark.parametrize("name", DIVERGENCES)
def test_far_apart_distributions_stay_finite(backend: str, name: str) -> None:
    teacher = np.zeros((2, 3, 11), np.float32)
    teacher[0, 0, :2], teacher[0, 1, 5], teacher[0, 2, 3], teacher[1, 0] = (900.0, -900.0), 1e4, -1e4, 99.0
    student = np.ascontiguousarray(-teacher)
    function, options = DIVERGENCES[name]
    options = {**options, "temperature": 1.0, "numerics": FLOAT32}
    half = Half(backend)
    assert np.isfinite(half.call(function, student, teacher, **options)).all()
    for grad in half.grads(function, np.ones((2, 3)), student, teacher, **options):
        assert np.isfinite(grad).all()


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


def test_losses_of_bfloat16_logits_are_computed_in_float32(backend: str) -> None:
    if backend == "torch":
        import torch

        bfloat16: Any = torch.bfloat16
    else:
        import jax.numpy as jnp

        bfloat16 = jnp.bfloat16
    half = Half(backend)
    student, teacher = (np.round(side * 4) / 4 for side in logits(18))  # exact in bfloat16
    labels = np.zeros((2, 3), np.int32)
    sides = [half._in(side.astype(np.float32)) for side in (student, teacher)]
    small = [side.to(bfloat16) if backend == "torch" else side.astype(bfloat16) for side in sides]
    objective = Objective(distil=DistilOptions(hard_weight=0.5))
    loss = half.losses.training_loss(*small, half._in(labels), objective=objective, numerics=BFLOAT16)[0]
    reference = half.losses.training_loss(*sides, half._in(labels), objective=objective, numerics=FLOAT32)[0]
    assert half._out(loss).dtype == np.float32
    assert half._out(loss) == half._out(reference)


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
