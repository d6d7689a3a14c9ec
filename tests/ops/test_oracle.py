"""The oracle: rounding as an operation, rotary frequencies against Hugging Face's, derivatives by a complex step."""

import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tessera_parity.budget import gamma, gradient_limit
from tessera_parity.cases import model_case
from tessera_parity.half_numpy import NumpyHalf
from tessera_parity.loading import load_half
from tessera_shared.numerics import BFLOAT16, FLOAT64
from tessera_shared.reference.attention import attention_mask
from tessera_shared.reference.mlp import swiglu
from tessera_shared.reference.params import compute_params
from tessera_shared.reference.rounding import round_to
from tessera_shared.reference.transformer import forward
from tessera_shared.rope import inverse_frequencies
from tessera_shared.spec import ModelSpec, RopeSpec

SCALED = (
    RopeSpec(theta=10000.0),
    RopeSpec(theta=500000.0, scaling="linear", factor=3.0),
    RopeSpec(theta=500000.0, scaling="llama3", factor=8.0, original_max_positions=64),
    RopeSpec(theta=10000.0, scaling="yarn", factor=4.0, original_max_positions=64),
    RopeSpec(theta=10000.0, scaling="yarn", factor=4.0, original_max_positions=2048, truncate=False),
    RopeSpec(theta=10000.0, scaling="yarn", factor=40.0, original_max_positions=256, mscale=0.7, mscale_all_dim=1.3),
    RopeSpec(theta=10000.0, scaling="yarn", factor=1.0, original_max_positions=256, beta_fast=8.0, beta_slow=2.0),
    RopeSpec(theta=300.0, scaling="yarn", factor=4.0, original_max_positions=4, attention_factor=1.25),
)


def spec_with(rope: RopeSpec, head_width: int) -> ModelSpec:
    return ModelSpec(
        vocab_size=8,
        num_layers=1,
        width=6,
        ffn_width=6,
        num_heads=1,
        num_kv_heads=1,
        head_width=head_width,
        max_positions=4096,
        rope=rope,
    )


@pytest.mark.parametrize("head_width", [2, 6, 64])
@pytest.mark.parametrize("rope", SCALED, ids=lambda rope: f"{rope.scaling}-{rope.factor}")
def test_inverse_frequencies_are_those_of_hugging_face_up_to_its_float32(rope, head_width):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    parameters = {
        "rope_theta": rope.theta,
        "rope_type": "default" if rope.scaling == "none" else rope.scaling,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_positions,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "attention_factor": rope.attention_factor,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
        "truncate": rope.truncate,
    }

    class Config:
        head_dim = head_width
        hidden_size, num_attention_heads, max_position_embeddings = 6, 1, 4096
        rope_parameters = parameters
        layer_types = None

        def standardize_rope_params(self):
            pass

    if rope.scaling == "none":
        expected, factor = llama.LlamaRotaryEmbedding.compute_default_rope_parameters(Config())
    else:
        expected, factor = rope_utils.ROPE_INIT_FUNCTIONS[rope.scaling](Config())
    ours, our_factor = inverse_frequencies(spec_with(rope, head_width))
    assert ours.dtype == np.float64
    assert ours.shape == (head_width // 2,)
    # the witness's power in float32: its exponent's rounding is multiplied by ln(theta) < 14, a dozen roundings follow
    assert np.abs(ours / expected.double().numpy() - 1.0).max() <= gamma(64, "float32")
    assert our_factor == factor


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=64), min_size=1, max_size=20))
def test_rounding_to_float32_is_what_hardware_does(values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = np.array(values).astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(round_to(np.array(values), "float32"), expected)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=20))
def test_rounding_float32_to_bfloat16_is_what_ml_dtypes_does(values):
    expected = np.array(values, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(round_to(np.array(values), "bfloat16"), expected)


def test_rounding_happens_once_and_not_by_way_of_float32():
    just_above_the_tie = 1.0 + 2.0**-8 + 2.0**-40  # float32 would first fall back onto the tie, then to even
    assert round_to(np.array([just_above_the_tie]), "bfloat16")[0] == 1.0 + 2.0**-7


def test_float64_policy_rounds_nothing_and_bfloat16_policy_rounds_every_parameter():
    params = model_case(3).params
    assert all(value is params[name] for name, value in compute_params(params, numerics=FLOAT64).items())
    for value in compute_params(params, numerics=BFLOAT16).values():
        np.testing.assert_array_equal(value, value.astype(ml_dtypes.bfloat16).astype(np.float64))


@given(st.data())
def test_mask_is_what_a_loop_over_pairs_says(data):
    rows, queries, keys = (data.draw(st.integers(1, 4), label=name) for name in "BTS")
    window = data.draw(st.sampled_from([None, 1, 2, 5]))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).integers
    q_pos, k_pos = draw(-1, 7, (rows, queries)), draw(-1, 7, (rows, keys))
    q_seg, k_seg = draw(-1, 3, (rows, queries)), draw(-1, 3, (rows, keys))
    mask = attention_mask(q_pos, k_pos, q_seg, k_seg, window=window)
    for row, query, key in np.ndindex(rows, queries, keys):
        distance = q_pos[row, query] - k_pos[row, key]
        near = distance >= 0 and (window is None or distance < window)
        together = q_seg[row, query] == k_seg[row, key] >= 0
        assert mask[row, query, key] == (near and together and k_pos[row, key] >= 0)


@pytest.mark.parametrize("half_name", ["numpy", "torch", "jax"])
@given(
    mask=st.sampled_from([(1, 3, 4), (2, 1, 1), (2, 5, 3)]).flatmap(lambda shape: npst.arrays(bool, shape)),
    scale=st.sampled_from([0.0, 1.0, 50.0, 1e4]),
    seed=st.integers(0, 99),
)
@example(mask=np.array([[[True, False, True, True], [False] * 4, [False, True, False, False]]]), scale=50.0, seed=1)
def test_a_query_that_may_look_nowhere_gets_zeros_and_the_others_sum_to_one(half_name, mask, scale, seed):
    half = load_half(half_name)
    rows, queries, keys = mask.shape
    scores = np.random.default_rng(seed).normal(size=(rows, 2, queries, keys)) * scale  # at 0 all are ties
    attention = half.module("model.attention")
    probs = half.numpy(attention.attention_probs(half.array(scores), half.array(mask), numerics=FLOAT64))
    assert not probs[~np.broadcast_to(mask[:, None], probs.shape)].any()
    sums = probs.sum(-1)
    looks = np.broadcast_to(mask.any(-1)[:, None], sums.shape)
    np.testing.assert_array_equal(sums[~looks], 0.0)
    assert np.abs(sums[looks] - 1.0).max(initial=0.0) <= 2.0 * gamma(2 * keys)  # two sums and a quotient for each term


@given(npst.arrays(np.float64, st.integers(0, 9), elements=st.floats(allow_nan=False, allow_infinity=False)))
@example(np.array([-1e4, -800.0, -1.0, 0.0, 1.0, 800.0, 1e4]))
def test_swiglu_neither_overflows_nor_loses_its_tails(gate):
    with np.errstate(all="raise", under="ignore"):
        act = swiglu(gate, np.ones(gate.size), numerics=FLOAT64)
    assert np.all(np.where(gate >= 0.0, (act >= gate / 2.0) & (act <= gate), (act <= 0.0) & (act >= gate / 2.0)))
    tail = np.abs(gate) > 40.0  # where 1 + exp(-|gate|) rounds to 1
    np.testing.assert_array_equal(act[tail & (gate > 0.0)], gate[tail & (gate > 0.0)])
    np.testing.assert_array_equal(act[gate < -800.0], 0.0)


@pytest.mark.parametrize("seed", range(6))
def test_complex_step_through_the_oracle_agrees_with_reverse_differentiation(seed):
    pytest.importorskip("torch")
    case = model_case(seed)
    oracle, torch_half = load_half("numpy"), load_half("torch")
    assert isinstance(oracle, NumpyHalf)
    rng = np.random.default_rng(seed)
    direction = {name: rng.standard_normal(value.shape) for name, value in case.params.items()}
    weights = rng.standard_normal((*case.token_ids_BT.shape, case.spec.vocab_size))

    def loss(half, params):
        logits = half.module("model.transformer").forward(
            params,
            half.array(case.token_ids_BT),
            spec=case.spec,
            numerics=FLOAT64,
            positions_BT=half.array(case.positions_BT),
            segments_BT=half.array(case.segments_BT),
        )
        return (logits * half.array(weights)).sum()

    derivative = oracle.directional_derivative(
        lambda params: (
            forward(
                params,
                case.token_ids_BT,
                spec=case.spec,
                numerics=FLOAT64,
                positions_BT=case.positions_BT,
                segments_BT=case.segments_BT,
            )
            * weights
        ).sum(),
        case.params,
        direction,
    )
    params = {name: torch_half.array(value) for name, value in case.params.items()}
    _, grads = torch_half.value_and_grad(lambda leaves: loss(torch_half, leaves), params)
    terms = [torch_half.numpy(grads[name]) * direction[name] for name in case.params]
    scale = sum(np.abs(term).sum() for term in terms)
    limit = gradient_limit(case.spec, num_positions=case.token_ids_BT.shape[1])
    assert abs(derivative - sum(term.sum() for term in terms)) <= limit * scale
