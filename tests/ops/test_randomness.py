"""Random streams: Random123's known answers, the same bits on all three sides, and numbers that look uniform."""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera_parity.budget import chance_limit
from tessera_shared import randomness
from tessera_shared.errors import SpecError

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # counter, key, answer: Random123 1.14, tests/kat_vectors, "threefry2x32 20"
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((ONES, ONES), (ONES, ONES), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]
STARTS = st.one_of(st.integers(0, 2**64 - 8), st.integers(2**32 - 8, 2**32 + 8), st.integers(0, 8))


@pytest.fixture(params=["numpy", "torch", "jax"])
def side(request: pytest.FixtureRequest) -> Any:
    if request.param == "numpy":
        return randomness
    pytest.importorskip(request.param)
    return import_module(f"tessera_{request.param}.randomness")


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers_of_random123_come_out(side: Any, counter: Any, key: Any, answer: Any) -> None:
    key_2, counters_X2 = np.array(key, dtype=np.uint32), np.array([counter, counter], dtype=np.uint32)
    for bits_2 in np.asarray(side.threefry_2x32(key_2, counters_X2)):
        assert tuple(int(word) for word in bits_2) == answer
    assert tuple(int(word) for word in np.asarray(side.threefry_2x32(key_2, counters_X2[0]))) == answer


@given(start=STARTS, seed=st.integers(0, 2**64 - 1))
def test_both_halves_draw_the_bits_of_numpy(backend: str, start: int, seed: int) -> None:
    half = import_module(f"tessera_{backend}.randomness")
    key_2 = randomness.stream_key(seed, "bits")
    np.testing.assert_array_equal(
        np.asarray(half.random_bits(key_2, start, 7)), randomness.random_bits(key_2, start, 7)
    )
    with _wide(backend):
        for dtype in ("float32", "float64"):
            drawn_X, truth_X = (side.uniforms(key_2, start, 7, dtype=dtype) for side in (half, randomness))
            assert np.asarray(drawn_X).dtype == truth_X.dtype == dtype
            np.testing.assert_array_equal(np.asarray(drawn_X), truth_X)


def test_jax_draws_the_same_bits_with_64_bit_types_on_and_refuses_float64_with_them_off() -> None:
    jax = pytest.importorskip("jax")
    from tessera_jax import randomness as half

    key_2 = randomness.stream_key(3, "x64")
    with jax.enable_x64(True):
        bits_X2 = np.asarray(half.random_bits(key_2, 2**32 - 3, 7))
    with jax.enable_x64(False):
        np.testing.assert_array_equal(np.asarray(half.random_bits(key_2, 2**32 - 3, 7)), bits_X2)
        with pytest.raises(SpecError, match="jax_enable_x64"):
            half.uniforms(key_2, 0, 1, dtype="float64")


@given(start=st.integers(0, 2**64 - 64), first=st.integers(0, 64))
def test_drawing_in_two_pieces_is_drawing_once(start: int, first: int) -> None:
    key_2 = randomness.stream_key(0, "pieces")
    whole = randomness.random_bits(key_2, start, 64)
    pieces = [randomness.random_bits(key_2, start, first), randomness.random_bits(key_2, start + first, 64 - first)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_a_float32_uniform_is_the_float64_one_rounded_down() -> None:
    key_2 = randomness.stream_key(1, "floor")
    wide_X, narrow_X = (randomness.uniforms(key_2, 0, 4096, dtype=dtype) for dtype in ("float64", "float32"))
    np.testing.assert_array_equal(np.floor(wide_X * 2**24) / 2**24, narrow_X)
    assert narrow_X.min() >= 0.0
    assert wide_X.max() < 1.0


def test_uniforms_fill_the_interval_evenly_and_use_all_their_bits() -> None:
    count, bins = 1 << 16, 256
    uniforms_X = randomness.uniforms(randomness.stream_key(5, "even"), 2**32 - count // 2, count, dtype="float64")
    found = np.bincount((uniforms_X * bins).astype(int), minlength=bins)
    chi_squared = float(((found - count / bins) ** 2 / (count / bins)).sum())
    # mean bins - 1, variance 2 (bins - 1); and both sides count: too even is wrong as well
    assert abs(chi_squared - (bins - 1)) < chance_limit() * (2 * (bins - 1)) ** 0.5
    low_bits = (uniforms_X * 2.0**53).astype(np.int64) & 0xFF
    assert len(np.unique(low_bits)) == 256


@given(seed=st.integers(0, 2**64 - 1), name=st.text(max_size=20), other=st.text(max_size=20))
def test_streams_differ_by_name_and_by_seed(seed: int, name: str, other: str) -> None:
    key_2 = randomness.stream_key(seed, name)
    assert key_2.dtype == np.uint32
    assert key_2.shape == (2,)
    assert (key_2 == randomness.stream_key(seed, other)).all() == (name == other)
    assert (key_2 != randomness.stream_key(seed ^ 1, name)).any()


def test_a_name_that_differs_by_trailing_zeros_or_by_block_is_another_stream() -> None:
    names = ["", "\0", "a", "a\0", "a" * 7, "a" * 8, "a" * 9, "b" * 8 + "a" * 8, "a" * 8 + "b" * 8, "Ä", "A"]
    assert len({tuple(randomness.stream_key(7, name).tolist()) for name in names}) == len(names)


def test_the_key_of_a_stream_never_changes() -> None:
    assert randomness.stream_key(5, "abc").tolist() == [4121058531, 749611100]
    assert randomness.stream_key(5, "").tolist() == [1396233059, 315918555]


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, -1), (2**64, 1), (2**64 - 1, 2)])
def test_counters_outside_64_bits_are_refused(side: Any, start: int, count: int) -> None:
    with pytest.raises(SpecError, match="a counter is 64 bits"):
        side.random_bits(randomness.stream_key(0, "edge"), start, count)


def test_the_last_counter_and_no_counter_are_legal(side: Any) -> None:
    key_2 = randomness.stream_key(0, "edge")
    assert tuple(side.random_bits(key_2, 2**64 - 1, 1).shape) == (1, 2)
    assert tuple(side.random_bits(key_2, 2**64, 0).shape) == (0, 2)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_is_not_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(SpecError, match="seed"):
        randomness.stream_key(seed, "x")


def test_uniforms_in_bfloat16_are_refused(side: Any) -> None:
    with pytest.raises(SpecError, match="float32"):
        side.uniforms(randomness.stream_key(0, "x"), 0, 1, dtype="bfloat16")


def _wide(backend: str) -> Any:
    if backend == "jax":
        return import_module("jax").enable_x64(True)
    from contextlib import nullcontext

    return nullcontext()
