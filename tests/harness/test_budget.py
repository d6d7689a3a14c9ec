import math
import statistics

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tessera_parity import budget
from tessera_shared.numerics import UNIT_ROUNDOFF
from tessera_shared.presets import preset


def test_the_unit_is_twice_gamma_at_the_length_that_the_derivation_names():
    assert 2.0 * budget.gamma(4503) <= budget.UNIT < 2.0 * budget.gamma(4504)


@given(st.integers(1, 4000), st.sampled_from(sorted(UNIT_ROUNDOFF)))
def test_gamma_bounds_a_worst_case_product_of_roundings(n, dtype):
    u = UNIT_ROUNDOFF[dtype]
    if n * u < 0.5:
        assert math.expm1(n * math.log1p(u)) <= budget.gamma(n, dtype)
    assert budget.gamma(n + 1, dtype) >= budget.gamma(n, dtype)


def test_gamma_is_infinite_where_its_formula_ends():
    assert budget.gamma(2**9, "bfloat16") == math.inf


@given(st.integers(1, 50), st.integers(1, 10**6))
def test_limits_grow_with_depth_and_length_and_never_fall_below_the_unit(depth, length):
    limit = budget.mathematics_limit(depth, length=length)
    assert limit >= budget.UNIT
    assert limit <= budget.mathematics_limit(depth + 1, length=length)
    assert limit <= budget.mathematics_limit(depth, length=2 * length)


@given(st.integers(1, 2000), st.integers(0, 2**32 - 1))
def test_a_sum_in_any_order_stays_inside_its_limit(length, seed):
    rng = np.random.default_rng(seed)
    terms = rng.standard_normal(length)
    forward, shuffled = 0.0, 0.0
    for term in terms:
        forward += term
    for term in rng.permutation(terms):
        shuffled += term
    limit = budget.mathematics_limit(1, length=length)
    assert abs(forward - shuffled) <= limit * float(np.sum(np.abs(terms)))


def test_samples_of_a_law_keep_their_chance_limits_and_half_of_one_is_soon_passed():
    """2000 samples of 50 numbers: the promised share of alarms is an upper bound, of the right order."""
    samples = np.sort(np.random.default_rng(0).standard_normal((2000, 50)))
    largest = np.abs(samples).max(axis=1) / budget.chance_limit(50)
    below = np.array([statistics.NormalDist().cdf(value) for value in samples.ravel()]).reshape(samples.shape)
    steps = np.arange(51) / 50.0
    apart = np.maximum(np.abs(below - steps[:-1]), np.abs(below - steps[1:])).max(axis=1)
    for share in (largest, apart / budget.distribution_limit(50)):
        assert np.mean(share > 1.0) <= budget.CHANCE
        assert np.mean(share > 0.5) > 50 * budget.CHANCE


def test_gradients_may_depart_more_than_logits_and_laws_as_much_as_gradients():
    spec = preset("nano")
    model = budget.model_limit(spec, num_positions=16)
    assert model < budget.gradient_limit(spec, num_positions=16) <= budget.law_limit(spec, num_positions=16)


def test_cancelling_terms_are_measured_from_the_inputs():
    inputs = {"x_BTD": np.array([[[1.0, 1.0]]]), "weight_FD": np.array([[3.0, -3.0]])}
    assert budget.cancellation_floor("model.linear.linear", inputs) == 6.0
    assert budget.cancellation_floor("model.norms.rms_norm", inputs) == 0.0
    logits = {"student_BTV": np.full((1, 1, 4), -8.0), "temperature": 0.5}
    assert budget.cancellation_floor("distil.losses.forward_kl", logits) == 16.0 + math.log(4.0)
