"""Choosing tokens and generating over the contiguous cache."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera_parity.budget import law_limit
from tessera_parity.compare import relative_difference
from tessera_parity.families import family_spec, random_weights
from tessera_parity.loading import load_half
from tessera_shared.errors import DataError
from tessera_shared.init import initial_weights
from tessera_shared.numerics import FLOAT32, FLOAT64
from tessera_shared.presets import preset
from tessera_shared.reference import sampling as oracle

SPEC = replace(family_spec("qwen3", np.random.default_rng(2)), sliding_window=4, window_from_layer=0)
HALVES = {name: load_half(name) for name in ("torch", "jax")}


@pytest.fixture
def half(backend):
    return HALVES[backend]


def drawn(seed: int, rows: int, length: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    return random_weights(SPEC, rng), rng.integers(0, SPEC.vocab_size, (rows, length)).astype(np.int32)


def brought(half, arrays):
    return half.module("model.params").params_from_numpy(arrays, dtype="float64")


@pytest.mark.parametrize("half_name", ["numpy", "torch", "jax"])
def test_greedy_takes_the_lowest_id_among_ties(half_name):
    half = load_half(half_name)
    logits = np.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-np.inf, -5.0, -np.inf, -5.0]])
    ids = half.numpy(half.module("serve.sampling").greedy(half.array(logits)))
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, 0, 1]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([0.0, 0.2, 0.77, 1.0]),
    min_p=st.sampled_from([0.0, 0.06, 1.0]),
)
def test_both_halves_sample_what_the_oracle_samples(seed, temperature, top_k, top_p, min_p):
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal((4, 13)) * 3.0) * 0.7  # coarse: many exact ties
    uniforms = np.concatenate([[0.0, np.nextafter(1.0, 0.0)], rng.random(2)])
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    expected = oracle.sample(logits, uniforms, **options)
    for half in HALVES.values():
        ids = half.module("serve.sampling").sample(half.array(logits), half.array(uniforms), **options)
        np.testing.assert_array_equal(half.numpy(ids), expected)


def test_sampled_tokens_are_exactly_as_frequent_as_their_probabilities(half):
    logits = np.log([[0.5, 0.125, 0.25, 0.125]])
    uniforms = (np.arange(64) + 0.5) / 64
    ids = half.module("serve.sampling").sample(
        half.array(np.repeat(logits, 64, axis=0)),
        half.array(uniforms),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
    )
    assert np.bincount(half.numpy(ids)).tolist() == [32, 8, 16, 8]


@pytest.mark.parametrize("half_name", ["numpy", "torch", "jax"])
def test_a_uniform_exactly_on_a_boundary_belongs_to_the_next_token(half_name):
    half = load_half(half_name)
    logits, uniforms = np.zeros((4, 4)), np.array([0.0, 0.25, 0.5, 0.75])  # four probabilities of exactly 1/4
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    ids = half.module("serve.sampling").sample(half.array(logits), half.array(uniforms), **options)
    assert half.numpy(ids).tolist() == [0, 1, 2, 3]


def test_each_rule_keeps_what_it_says(half):
    logits = np.log([[0.4, 0.3, 0.2, 0.1]])
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

    def last_kept(**rule):
        sample = half.module("serve.sampling").sample
        return int(half.numpy(sample(half.array(logits), half.array(np.array([1.0 - 1e-9])), **(plain | rule)))[0])

    assert last_kept() == 3
    assert last_kept(top_k=2) == 1
    assert last_kept(top_p=0.65) == 1
    assert last_kept(top_p=0.75) == 2
    assert last_kept(min_p=0.6) == 1
    assert last_kept(top_p=0.0) == 0


@pytest.mark.parametrize("prefill", [0, 3])
def test_prefill_then_single_tokens_is_the_full_forward_in_float64(half, prefill):
    arrays, ids = drawn(1, 2, 5)
    params = brought(half, arrays)
    full = half.module("model.transformer").forward(params, half.array(ids), spec=SPEC, numerics=FLOAT64)
    decode = half.module("serve.decode")
    stepped = decode.teacher_forced_logits(params, half.array(ids), spec=SPEC, numerics=FLOAT64, prefill=prefill)
    difference = relative_difference(half.numpy(stepped), half.numpy(full))
    assert difference.value <= law_limit(SPEC, num_positions=5)


@pytest.mark.parametrize("half_name", ["numpy", "torch", "jax"])
def test_padding_is_not_written_and_does_not_disturb_its_row(half_name):
    half = load_half(half_name)
    arrays, ids = drawn(2, 3, 3)
    params, cache = brought(half, arrays), half.module("model.cache")
    positions = np.array([[0, 1, -1], [-1, 0, 1], [-1, -1, -1]], np.int32)
    empty = cache.empty_cache(params, spec=SPEC, numerics=FLOAT64, batch=3, capacity=5)
    logits, filled = cache.forward_cached(
        params, half.array(ids), empty, spec=SPEC, numerics=FLOAT64, positions_BT=half.array(positions)
    )
    assert half.numpy(filled["positions_BS"]).tolist() == [[0, 1, -1, -1, -1], [0, 1, -1, -1, -1], [-1] * 5]
    keys = np.abs(half.numpy(filled["layers.0.k"])).max((2, 3)) > 0.0
    assert keys.tolist() == (half.numpy(filled["positions_BS"]) >= 0).tolist()
    alone = half.module("model.transformer").forward(params, half.array(ids[1:2, 1:]), spec=SPEC, numerics=FLOAT64)
    difference = relative_difference(half.numpy(logits)[1:2, 1:], half.numpy(alone))
    assert difference.value <= law_limit(SPEC, num_positions=3)
    assert np.isfinite(half.numpy(logits)).all()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_generation_is_the_oracles_token_for_token(half, temperature):
    arrays, ids = drawn(3, 2, 3)
    uniforms = np.random.default_rng(3).random((2, 9))
    options = {"spec": SPEC, "numerics": FLOAT64, "num_tokens": 9, "temperature": temperature, "top_p": 0.95}
    tokens = [
        side.numpy(
            side.module("serve.decode").generate(
                brought(side, arrays), side.array(ids), uniforms_BT=side.array(uniforms), **options
            )
        )
        for side in (load_half("numpy"), half)
    ]
    assert tokens[1].dtype == np.int32
    np.testing.assert_array_equal(tokens[1], tokens[0])


def test_greedy_generation_feeds_its_own_tokens_back(half):
    arrays, ids = drawn(4, 2, 3)
    params = brought(half, arrays)
    options = {"spec": SPEC, "numerics": FLOAT64}
    generate = half.module("serve.decode").generate
    new = half.numpy(generate(params, half.array(ids), num_tokens=9, top_p=0.95, **options))
    whole = np.concatenate([ids, new], axis=1)
    logits = load_half("numpy").module("model.transformer").forward(arrays, whole, **options)
    np.testing.assert_array_equal(new, logits[:, 2:-1].argmax(-1))


def test_ten_thousand_tokens_of_the_smallest_preset_take_seconds(half):
    spec = preset("nano")
    arrays = initial_weights(spec, seed=0)
    params = half.module("model.params").params_from_numpy(arrays, dtype="float32")
    prompt = half.array(np.arange(70, dtype=np.int32).reshape(10, 7))
    before = time.monotonic()
    ids = half.module("serve.decode").generate(params, prompt, spec=spec, numerics=FLOAT32, num_tokens=1000)
    assert half.numpy(ids).shape == (10, 1000)
    assert time.monotonic() - before < 60.0  # seconds on a free machine; tests share theirs


def test_no_new_tokens_is_an_empty_answer(half):
    arrays, ids = drawn(5, 2, 3)
    new = half.module("serve.decode").generate(
        brought(half, arrays), half.array(ids), spec=SPEC, numerics=FLOAT64, num_tokens=0
    )
    assert half.numpy(new).shape == (2, 0)


@pytest.mark.parametrize("half_name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_tokens": 63}, "max_positions"),
        ({"temperature": 0.5}, "uniforms_BT"),
        ({"temperature": -1.0}, "temperature"),
        ({"num_tokens": -1}, "num_tokens"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(half_name, change, said):
    half = load_half(half_name)
    arrays, ids = drawn(6, 1, 3)
    options = {"spec": SPEC, "numerics": FLOAT64, "num_tokens": 2} | change
    with pytest.raises(DataError, match=said) as caught:
        half.module("serve.decode").generate(brought(half, arrays), half.array(ids), **options)
    assert "\n" not in str(caught.value)
