"""Divergences one position at a time: the oracle in float64, and the laws that their definitions promise."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera_parity.budget import gamma, log_probability_scale
from tessera_shared.numerics import FLOAT32, FLOAT64
from tessera_shared.objectives import (
    TopKForm,
)
from tessera_shared.reference import losses as oracle
from tessera_shared.reference.step import directional_derivative

from .divergences import DIVERGENCES, LIMIT, Half, call, close, logits

ZERO_WHEN_EQUAL = [name for name in DIVERGENCES if name not in ("soft", "teacher", "truncated")]
NEVER_NEGATIVE = [name for name in DIVERGENCES if name != "truncated"]


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
