"""Choosing tokens and generating over the contiguous cache."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

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
@given(
    st.sampled_from([(1, 1), (1, 13), (3, 4), (5, 2)]).flatmap(
        lambda shape: npst.arrays(np.float64, shape, elements=st.sampled_from([-np.inf, -5.0, 0.0, 3.0, np.inf]))
    )
)
@example(np.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-np.inf, -5.0, -np.inf, -5.0]]))
def test_greedy_takes_the_lowest_id_among_ties(half_name, logits):
    half = load_half(half_name)
    ids = half.numpy(half.module("serve.sampling").greedy(half.array(logits)))
    assert ids.dtype == np.int32
    assert ids.tolist() == [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.parametrize("half_name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(
    "row", [[1.0, np.nan, 3.0, 2.0], [np.nan] * 3, [np.inf, np.nan, np.inf, np.nan], [2.0, -np.inf, 2.0]]
)
def test_greedy_of_every_half_answers_nan_alike(half_name, row):
    half, logits = load_half(half_name), np.array([row])
    ids = half.numpy(half.module("serve.sampling").greedy(half.array(logits)))
    assert ids.tolist() == [int(np.argmax(logits))]  # NumPy's rule: the first NaN, else the first largest


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


@given(cuts=st.lists(st.integers(0, 64), min_size=3, max_size=3).map(sorted), shift=st.sampled_from([-300.0, 0.0, 7.0]))
@example(cuts=[32, 40, 56], shift=0.0)
@example(cuts=[0, 0, 64], shift=0.0)
def test_sampled_tokens_are_exactly_as_frequent_as_their_probabilities(half, cuts, shift):
    shares = np.diff([0, *cuts, 64])  # of 64; a share of 0 is a logit of minus infinity
    with np.errstate(divide="ignore"):
        logits = np.log(shares[None] / 64.0) + shift
    uniforms = (np.arange(64) + 0.5) / 64
    ids = half.module("serve.sampling").sample(
        half.array(np.repeat(logits, 64, axis=0)),
        half.array(uniforms),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
    )
    assert np.bincount(half.numpy(ids), minlength=4).tolist() == shares.tolist()


@pytest.mark.parametrize("size", [1, 2, 4, 32])
@pytest.mark.parametrize("half_name", ["numpy", "torch", "jax"])
def test_a_uniform_exactly_on_a_boundary_belongs_to_the_next_token(half_name, size):
    half = load_half(half_name)
    logits, uniforms = np.zeros((size, size)), np.arange(size) / size  # so many probabilities of exactly 1 / size
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    ids = half.module("serve.sampling").sample(half.array(logits), half.array(uniforms), **options)
    assert half.numpy(ids).tolist() == list(range(size))


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
@settings(max_examples=8)
@given(is_real=npst.arrays(bool, (3, 3)))
@example(is_real=np.array([[True, True, False], [False, True, True], [False, False, False]]))
@example(is_real=np.array([[True, False, True], [True, True, True], [False, True, False]]))
def test_padding_is_not_written_and_does_not_disturb_its_row(half_name, is_real):
    half = load_half(half_name)
    arrays, ids = drawn(2, 3, 3)
    params, cache = brought(half, arrays), half.module("model.cache")
    positions = np.where(is_real, is_real.cumsum(axis=1) - 1, -1).astype(np.int32)
    empty = cache.empty_cache(params, spec=SPEC, numerics=FLOAT64, batch=3, capacity=5)
    logits, filled = cache.forward_cached(
        params, half.array(ids), empty, spec=SPEC, numerics=FLOAT64, positions_BT=half.array(positions)
    )
    counts = is_real.sum(axis=1)
    assert half.numpy(filled["positions_BS"]).tolist() == [[*range(n)] + [-1] * (5 - n) for n in counts]
    keys = np.abs(half.numpy(filled["layers.0.k"])).max((2, 3)) > 0.0
    assert keys.tolist() == (half.numpy(filled["positions_BS"]) >= 0).tolist()
    assert np.isfinite(half.numpy(logits)).all()
    for row in np.flatnonzero(counts):
        alone_ids = half.array(ids[row, is_real[row]][None])
        alone = half.module("model.transformer").forward(params, alone_ids, spec=SPEC, numerics=FLOAT64)
        difference = relative_difference(half.numpy(logits)[row, is_real[row]][None], half.numpy(alone))
        assert difference.value <= law_limit(SPEC, num_positions=3)


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


def test_each_new_token_feeds_one_position_and_what_compiles_compiles_twice(half, backend, monkeypatch):
    decode, fed = half.module("serve.decode"), []
    forward_cached = decode.forward_cached

    def counted(params, tokens_BT, *cache, **options):
        fed.append(tokens_BT.shape[1])
        return forward_cached(params, tokens_BT, *cache, **options)

    monkeypatch.setattr(decode, "forward_cached", counted)
    spec = preset("nano")
    arrays = initial_weights(spec, seed=0)
    params = half.module("model.params").params_from_numpy(arrays, dtype="float32")
    prompt = half.array(np.arange(70, dtype=np.int32).reshape(10, 7))
    ids = decode.generate(params, prompt, spec=spec, numerics=FLOAT32, num_tokens=1000)
    assert half.numpy(ids).shape == (10, 1000)
    assert fed == ([7, 1] if backend == "jax" else [7] + [1] * 999)  # JAX passes here while it traces and not again


@pytest.mark.parametrize("half_name", ["numpy", "torch", "jax"])
def test_a_stream_gives_each_token_before_the_next_is_made_and_all_are_what_generate_gives(half_name, monkeypatch):
    half = load_half(half_name)
    arrays, ids = drawn(7, 3, 2)
    uniforms = np.random.default_rng(7).random((3, 5))
    options = {"spec": SPEC, "numerics": FLOAT64, "num_tokens": 5, "temperature": 0.8}
    decode, made = half.module("serve.decode"), []
    choose = "_step" if half_name == "jax" else "sample"
    monkeypatch.setattr(decode, choose, partial(counted, made, getattr(decode, choose)))
    stream = decode.stream_tokens(brought(half, arrays), half.array(ids), uniforms_BT=half.array(uniforms), **options)
    assert made == []
    columns = []
    for index, ids_B in enumerate(stream, 1):
        assert len(made) == index
        columns.append(half.numpy(ids_B))
    whole = decode.generate(brought(half, arrays), half.array(ids), uniforms_BT=half.array(uniforms), **options)
    np.testing.assert_array_equal(np.stack(columns, axis=1), half.numpy(whole))


def counted(made, function, *arguments, **options):
    made.append(1)
    return function(*arguments, **options)


def test_between_two_tokens_torch_records_gradients_as_before():
    torch = pytest.importorskip("torch")
    half = HALVES["torch"]
    arrays, ids = drawn(8, 1, 2)
    stream = half.module("serve.decode").stream_tokens(
        brought(half, arrays), half.array(ids), spec=SPEC, numerics=FLOAT64, num_tokens=3
    )
    for ids_B in stream:
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        assert not ids_B.is_inference()


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
    for function in ("generate", "stream_tokens"):  # the call itself refuses, not the first token
        with pytest.raises(DataError, match=said) as caught:
            getattr(half.module("serve.decode"), function)(brought(half, arrays), half.array(ids), **options)
        assert "\n" not in str(caught.value)
