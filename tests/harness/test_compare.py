import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tessera_parity.budget import gamma
from tessera_parity.compare import compare_results, flatten, relative_difference
from tessera_parity.half_numpy import NumpyHalf
from tessera_parity.loading import load_half
from tessera_shared.errors import ParityError

ARRAYS = npst.arrays(
    np.float64,
    npst.array_shapes(min_dims=0, max_dims=3, max_side=5),
    elements=st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf, 0.0])),
)


@given(ARRAYS)
def test_an_array_is_at_distance_zero_from_itself_even_with_nan_and_infinity(a):
    assert relative_difference(a, a.copy()).value == 0.0


@given(ARRAYS, st.data())
def test_the_metric_is_symmetric(a, data):
    b = data.draw(npst.arrays(np.float64, a.shape, elements=st.floats(-10, 10)))
    assert relative_difference(a, b).value == relative_difference(b, a).value


@given(ARRAYS, st.data(), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_one_special_value_on_one_side_is_infinitely_far_and_found(a, data, special):
    where = tuple(data.draw(st.integers(0, length - 1)) for length in a.shape)
    a = np.where(np.isfinite(a), a, 1.0)  # start from finite numbers, then spoil one
    b = a.copy()
    b[where] = special
    found = relative_difference(a, b)
    assert found.value == math.inf
    assert found.where == where


@given(st.floats(1e-200, 1e200), st.floats(0.0, 1.0))
def test_the_difference_does_not_depend_on_the_scale(scale, share):
    a, b = np.array([1.0, -2.0]), np.array([1.0 + share, -2.0])
    expected = share / 2.0
    assert abs(relative_difference(a * scale, b * scale).value - expected) <= gamma(4)  # 1 + share, two products, a - b


def test_it_names_the_worst_element_not_the_first():
    a = np.zeros((2, 3))
    b = a.copy()
    b[0, 1], b[1, 2] = 1.0, -4.0
    assert relative_difference(a, b).where == (1, 2)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros(3), np.zeros(4)),
        (np.zeros((1, 3)), np.zeros(3)),
        (np.zeros(3), np.zeros(3, np.int32)),
        (np.zeros(3, bool), np.zeros(3, np.int32)),
        (np.array([1, 2]), np.array([1, 3])),
        (np.zeros(3), np.zeros(3, complex)),
    ],
)
def test_other_shapes_kinds_and_integers_are_infinitely_far(a, b):
    found = relative_difference(a, b)
    assert found.value == math.inf
    assert found.reason


def test_a_large_negative_error_is_not_hidden_by_a_sign():
    assert relative_difference(np.array([1.0]), np.array([-1e9])).value >= 1.0


def test_nothing_compared_is_an_error_and_not_parity():
    with pytest.raises(ParityError, match="compared = 0"):
        relative_difference(np.zeros((0, 3)), np.zeros((0, 3)))
    with pytest.raises(ParityError, match="compared = 0"):
        compare_results({}, {})


def test_a_floor_divides_what_has_no_magnitude_of_its_own():
    a, b = np.array([1e-17]), np.array([-1e-17])
    assert relative_difference(a, b).value == 2.0
    assert relative_difference(a, b, floor=1.0).value == 2e-17


def test_results_with_other_names_are_infinitely_far_and_nested_results_are_flattened():
    half = load_half("numpy")
    assert isinstance(half, NumpyHalf)
    flat = flatten(half, ({"b": np.ones(2), "a": np.array(True)}, None, 3.0))
    assert list(flat) == ["out.0.a", "out.0.b", "out.2"]
    name, found = compare_results(flat, {key: value for key, value in flat.items() if key != "out.2"})
    assert (name, found.value) == ("out.2", math.inf)
    _, same = compare_results(flat, dict(flat))
    assert (same.value, same.compared) == (0.0, 4)
