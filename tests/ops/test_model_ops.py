"""The halves' model functions: against the oracle in float64, and by laws that need no oracle."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tessera_parity.budget import EXACT, law_limit, model_limit
from tessera_parity.cases import model_case
from tessera_parity.compare import relative_difference
from tessera_parity.families import random_weights
from tessera_parity.loading import load_half
from tessera_shared.errors import DataError, SpecError
from tessera_shared.numerics import BFLOAT16, FLOAT32, FLOAT64, Numerics
from tessera_shared.presets import preset
from tessera_shared.spec import ModelSpec, RopeSpec
from tessera_shared.validate import validate_token_ids

EVERYTHING = ModelSpec(
    vocab_size=23,
    num_layers=2,
    width=20,
    ffn_width=13,
    num_heads=6,
    num_kv_heads=3,
    head_width=4,
    max_positions=64,
    rope=RopeSpec(scaling="yarn", factor=4.0, original_max_positions=16),
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=True,
    sliding_window=3,
    window_from_layer=1,
    attention_softcap=2.0,
    logit_softcap=3.0,
)


PLAIN = replace(
    EVERYTHING,
    rope=RopeSpec(),
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    sliding_window=None,
    window_from_layer=0,
    attention_softcap=None,
    logit_softcap=None,
)
FAMILIES = {  # one size for all: JAX compiles each operation once for each shape
    "llama": replace(PLAIN, rope=RopeSpec(scaling="llama3", factor=8.0, original_max_positions=8)),
    "mistral": replace(PLAIN, architecture="mistral", sliding_window=3, tie_embeddings=True),
    "qwen2": replace(PLAIN, architecture="qwen2", qkv_bias=True, rope=RopeSpec(scaling="linear", factor=3.0)),
    "qwen3": replace(PLAIN, architecture="qwen3", qk_norm=True, tie_embeddings=True, sliding_window=3),
    "everything": EVERYTHING,
}


@pytest.fixture
def half(backend):
    return load_half(backend)


def run(half, spec, arrays, token_ids_BT, *, numerics=FLOAT64, function="forward", tap=None, recompute=False, **given):
    params = half.module("model.params").params_from_numpy(arrays, dtype=numerics.param)
    placed = {name: half.array(np.asarray(value, np.int32)) for name, value in given.items()}
    call = getattr(half.module("model.transformer"), function)
    return call(params, half.array(token_ids_BT), spec=spec, numerics=numerics, tap=tap, recompute=recompute, **placed)


def drawn(spec: ModelSpec, seed: int, rows: int = 2, length: int = 7) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, spec.vocab_size, (rows, length)).astype(np.int32)
    return random_weights(spec, rng), ids


def taps_of(half, spec, arrays, ids, numerics: Numerics) -> dict[str, object]:
    seen: dict[str, object] = {}

    def tap(name, value):
        assert name not in seen
        seen[name] = value
        return value

    run(half, spec, arrays, ids, numerics=numerics, tap=tap)
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_forward_of_a_generated_model_is_the_oracles_in_float64(half, seed):
    case = model_case(seed, pool=2)
    given = {"positions_BT": case.positions_BT, "segments_BT": case.segments_BT}
    expected = run(load_half("numpy"), case.spec, case.params, case.token_ids_BT, **given)
    actual = half.numpy(run(half, case.spec, case.params, case.token_ids_BT, **given))
    limit = model_limit(case.spec, num_positions=case.token_ids_BT.shape[1])
    assert relative_difference(actual, expected).value <= limit


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_of_each_family_is_the_oracles_in_float64(half, family):
    spec = FAMILIES[family]
    arrays, ids = drawn(spec, 11)
    expected = run(load_half("numpy"), spec, arrays, ids)
    assert relative_difference(half.numpy(run(half, spec, arrays, ids)), expected).value <= model_limit(
        spec, num_positions=7
    )


@pytest.mark.parametrize("numerics", [FLOAT64, replace(FLOAT64, norm_gain_after_cast=False)], ids=["after", "before"])
def test_every_tap_has_the_oracles_name_order_and_value(half, numerics):
    arrays, ids = drawn(EVERYTHING, 1)
    expected = taps_of(load_half("numpy"), EVERYTHING, arrays, ids, numerics)
    actual = taps_of(half, EVERYTHING, arrays, ids, numerics)
    assert list(actual) == list(expected)
    limit = model_limit(EVERYTHING, num_positions=7)
    for name, value in expected.items():
        assert relative_difference(half.numpy(actual[name]), value).value <= limit, name


def test_every_tap_has_the_dtype_that_the_policy_names(half):
    arrays, ids = drawn(EVERYTHING, 2)
    for name, value in taps_of(half, EVERYTHING, arrays, ids, BFLOAT16).items():
        wide = name.endswith(".scores") or name == "logits"
        assert str(value.dtype).removeprefix("torch.") == ("float32" if wide else "bfloat16"), name


def test_replacing_a_tap_changes_what_follows_and_nothing_before(half):
    arrays, ids = drawn(EVERYTHING, 3)
    clean = taps_of(half, EVERYTHING, arrays, ids, FLOAT64)
    target = "layers.1.attention.mix"
    seen: dict[str, np.ndarray] = {}

    def tap(name, value):
        seen[name] = half.numpy(value)
        return value * 1.5 if name == target else value

    run(half, EVERYTHING, arrays, ids, tap=tap)
    names = list(clean)
    first_changed = next(name for name in names if not np.array_equal(seen[name], half.numpy(clean[name])))
    assert names.index(first_changed) == names.index(target) + 1
    assert not np.array_equal(seen["logits"], half.numpy(clean["logits"]))


def test_no_position_has_a_gradient_from_a_later_token_or_from_outside_its_window(half):
    spec = replace(EVERYTHING, num_layers=1, window_from_layer=0)
    arrays, _ = drawn(spec, 4)
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 7, spec.width))
    positions = np.tile(np.arange(7, dtype=np.int32), (2, 1))
    rope, attention = half.module("model.rope"), half.module("model.attention")
    transformer = half.module("model.transformer")
    params = {name: half.array(value) for name, value in arrays.items()}
    cos, sin = rope.rope_tables(half.array(positions), spec=spec, numerics=FLOAT64)
    zeros = half.array(np.zeros_like(positions))
    mask = attention.attention_mask(half.array(positions), half.array(positions), zeros, zeros, window=3)

    for query in (0, 2, 6):
        here = half.array(np.eye(7)[query][None, :, None])

        def output_at(leaves, here=here):
            out = transformer.block(params, leaves["x"], cos, sin, mask, layer=0, spec=spec, numerics=FLOAT64)
            return ((out * here) ** 2).sum()

        _, grads = half.value_and_grad(output_at, {"x": half.array(x)})
        touched = np.abs(half.numpy(grads["x"])).max((0, 2)) > EXACT
        assert touched.tolist() == [query - 3 < key <= query for key in range(7)]


def test_gradients_are_finite_when_some_queries_may_look_nowhere(half):
    arrays, ids = drawn(EVERYTHING, 6)
    segments = np.array([[0, 0, 0, -1, -1, 1, 1], [-1] * 7], np.int32)

    def loss(params):
        forward = half.module("model.transformer").forward
        given = {"spec": EVERYTHING, "numerics": FLOAT64, "segments_BT": half.array(segments)}
        return (forward(params, half.array(ids), **given) ** 2).sum()

    value, grads = half.value_and_grad(loss, {name: half.array(array) for name, array in arrays.items()})
    assert np.isfinite(half.numpy(value))
    for name, grad in grads.items():
        assert np.isfinite(half.numpy(grad)).all(), name
        assert np.abs(half.numpy(grad)).max() > EXACT, name


@settings(max_examples=6)
@given(cuts=st.sets(st.integers(1, 6), max_size=6))
@example(cuts={3})
@example(cuts={1, 2, 3, 4, 5, 6})
def test_packed_documents_do_not_see_each_other(half, cuts):
    arrays, ids = drawn(EVERYTHING, 7, rows=2, length=7)
    borders = [0, *sorted(cuts), 7]
    lengths = np.diff(borders)
    positions = np.concatenate([np.arange(length) for length in lengths])
    segments = np.repeat(np.arange(len(lengths)), lengths)
    packed = half.numpy(run(half, EVERYTHING, arrays, ids, positions_BT=[positions] * 2, segments_BT=[segments] * 2))
    for start, length in zip(borders, lengths, strict=False):  # each in front, what follows it behind: shapes stay
        alone = half.numpy(run(half, EVERYTHING, arrays, np.roll(ids, -start, axis=1)))[:, :length]
        difference = relative_difference(packed[:, start : start + length], alone)
        assert difference.value <= law_limit(EVERYTHING, num_positions=7)


def test_recomputed_blocks_give_the_same_gradients(half):
    arrays, ids = drawn(EVERYTHING, 8)
    forward = half.module("model.transformer").forward
    params = {name: half.array(array) for name, array in arrays.items()}

    def grads(recompute):
        def loss(leaves):
            given = {"spec": EVERYTHING, "numerics": FLOAT64, "recompute": recompute}
            return (forward(leaves, half.array(ids), **given) ** 2).sum()

        return half.value_and_grad(loss, params)[1]

    plain, again = grads(False), grads(True)
    for name in plain:
        difference = relative_difference(half.numpy(again[name]), half.numpy(plain[name]))
        assert difference.value <= law_limit(EVERYTHING, num_positions=7), name
    with pytest.raises(SpecError, match="recompute"):
        run(half, EVERYTHING, arrays, ids, recompute=True, tap=lambda name, value: value)


def test_parameters_go_in_and_out_bit_for_bit_in_every_dtype(half):
    import ml_dtypes

    arrays, _ = drawn(EVERYTHING, 9)
    module = half.module("model.params")
    for dtype, numpy_dtype in (("float64", np.float64), ("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
        stored = {name: value.astype(np.float32).astype(numpy_dtype) for name, value in arrays.items()}
        back = module.params_to_numpy(module.params_from_numpy(stored, dtype=dtype))
        for name, value in stored.items():
            assert back[name].dtype == value.dtype
            assert back[name].tobytes() == value.tobytes()


def test_an_unknown_dtype_is_refused_by_name(half):
    with pytest.raises(SpecError, match="float16"):
        half.module("model.dtypes").dtype_of("float16")


def test_jax_refuses_float64_while_it_would_truncate_it():
    jax = pytest.importorskip("jax")
    from tessera_jax.model.dtypes import dtype_of

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(SpecError, match="jax_enable_x64"):
            dtype_of("float64")
    finally:
        jax.config.update("jax_enable_x64", before)


def test_forward_compiles_whole_and_says_what_eager_says(backend):
    half = load_half(backend)
    arrays, ids = drawn(EVERYTHING, 10)
    expected = half.numpy(run(half, EVERYTHING, arrays, ids))
    params = {name: half.array(array) for name, array in arrays.items()}
    forward = half.module("model.transformer").forward

    def call(params, ids):
        return forward(params, ids, spec=EVERYTHING, numerics=FLOAT64)

    if backend == "torch":
        import torch

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    else:
        import jax

        compiled = jax.jit(call)
    actual = half.numpy(compiled(params, half.array(ids)))
    assert relative_difference(actual, expected).value <= law_limit(EVERYTHING, num_positions=7)


@pytest.mark.parametrize(
    ("ids", "positions", "said"),
    [
        (np.zeros(3, np.int32), None, "shape"),
        (np.zeros((1, 3)), None, "dtype"),
        (np.array([[0, 512]]), None, r"\[0, 1\] = 512"),
        (np.array([[0, 1], [-1, 2]]), None, r"\[1, 0\] = -1"),
        (np.zeros((1, 1025), np.int32), None, "1025"),
        (np.zeros((1, 2), np.int32), np.array([[0, 1024]]), "1024"),
        (np.zeros((1, 2), np.int32), np.array([[0, 1, 2]]), "positions"),
    ],
)
def test_token_ids_are_refused_in_one_line_that_names_what_is_wrong(ids, positions, said):
    with pytest.raises(DataError, match=said) as caught:
        validate_token_ids(ids, preset("nano"), positions)
    assert "\n" not in str(caught.value)


def test_legal_token_ids_pass_the_edge():
    validate_token_ids(np.array([[0, 511]]), preset("nano"))
    validate_token_ids(np.array([[0, 511]], np.uint16), preset("nano"), np.array([[-1, 1023]]))
    validate_token_ids(np.zeros((0, 5), np.int64), preset("nano"))


def test_single_precision_stays_single_precision(half):
    arrays, ids = drawn(EVERYTHING, 12)
    for name, value in taps_of(half, EVERYTHING, arrays, ids, FLOAT32).items():
        assert str(value.dtype).endswith("float32"), name
