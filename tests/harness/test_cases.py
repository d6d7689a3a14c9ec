import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera_parity import cases, draws
from tessera_parity.cases import MODEL_SIZES, OP_SIZES, STYLES, inputs_for, model_case, model_case_from_json
from tessera_shared.dims import shape_of
from tessera_shared.errors import ParityError
from tessera_shared.objectives import IGNORE_INDEX
from tessera_shared.tensors import tensor_table

DRAWN = [model_case(cases.case_seed(0, "test", index)) for index in range(300)]


@given(st.integers(0, 2**31))
def test_a_case_survives_json_and_is_drawn_again_to_the_bit(seed):
    case = model_case(seed)
    again = model_case_from_json(json.loads(json.dumps(case.to_json())))
    assert again.spec == case.spec
    assert again.params.keys() == case.params.keys()
    assert all(np.array_equal(again.params[name], case.params[name]) for name in case.params)
    for name in ("token_ids_BT", "labels_BT", "positions_BT", "segments_BT"):
        assert np.array_equal(getattr(again, name), getattr(case, name))
    assert np.array_equal(again.teacher_logits(), case.teacher_logits())


def test_a_recorded_case_that_this_version_draws_otherwise_is_refused():
    stored = model_case(3).to_json()
    stored["spec"]["width"] += 2
    with pytest.raises(ParityError, match="expected the recorded spec"):
        model_case_from_json(stored)


@given(st.integers(0, 2**31))
def test_cases_are_legal(seed):
    case = model_case(seed)
    spec = case.spec
    assert {name: value.shape for name, value in case.params.items()} == {
        name: info.shape for name, info in tensor_table(spec).items()
    }
    assert case.token_ids_BT.max() < spec.vocab_size
    counted = case.labels_BT[case.labels_BT != IGNORE_INDEX]
    assert np.all(counted < (spec.real_vocab_size or spec.vocab_size))
    assert np.all(case.labels_BT[case.segments_BT < 0] == IGNORE_INDEX)
    assert case.positions_BT.max() < spec.max_positions


def test_generated_models_cover_what_bugs_hide_in():
    specs = [case.spec for case in DRAWN]
    assert {spec.architecture for spec in specs} == {"llama", "mistral", "qwen2", "qwen3"}
    assert {spec.rope.scaling for spec in specs} == {"none", "linear", "llama3", "yarn"}
    for claim in (
        lambda s: s.sliding_window == 1,
        lambda s: s.window_from_layer > 0,
        lambda s: s.attention_softcap is not None and s.logit_softcap is not None,
        lambda s: s.tie_embeddings,
        lambda s: not s.tie_embeddings,
        lambda s: s.qk_norm and s.qkv_bias,
        lambda s: s.real_vocab_size is not None,
        lambda s: s.group_size > 1,
        lambda s: s.num_heads * s.head_width != s.width,
    ):
        assert any(claim(spec) for spec in specs)
    assert any(case.positions_BT.max() > 512 for case in DRAWN)
    assert any(np.all(case.labels_BT == IGNORE_INDEX) for case in DRAWN)
    assert any(case.segments_BT.min() < 0 for case in DRAWN)
    assert any(case.segments_BT.max() > 0 for case in DRAWN)
    assert any(case.token_ids_BT.size == 1 for case in DRAWN)
    sizes = [np.abs(case.params["model.embed_tokens.weight"]).mean() for case in DRAWN]
    assert min(sizes) < 1e-3
    assert max(sizes) > 10.0


def test_sizes_differ_from_each_other_so_that_swapped_axes_show():
    first = MODEL_SIZES[0]
    assert len(set(first.values()) - {2}) >= len(first) - 3
    assert any(size == 1 for sizes in OP_SIZES for size in sizes.values())


def some_function(x_BTD, positions_BT, mask_BTS, labels_BT, *, eps, window, temperature, options, numerics, other=7):
    return x_BTD


@pytest.mark.parametrize("style", STYLES)
def test_inputs_follow_from_names(style):
    sizes = OP_SIZES[2]
    inputs = inputs_for(some_function, sizes, np.random.default_rng(0), style=style)
    assert "other" not in inputs
    for name in ("x_BTD", "positions_BT", "mask_BTS", "labels_BT"):
        assert inputs[name].shape == shape_of(name, sizes)
    assert inputs["mask_BTS"].dtype == bool
    assert inputs["x_BTD"].dtype == np.float64
    assert inputs["options"].temperature > 0.0


def test_an_argument_without_a_rule_is_named():
    def strange(x_BTD, *, flavor):
        return x_BTD, flavor

    with pytest.raises(ParityError, match="argument = 'flavor' of strange"):
        inputs_for(strange, OP_SIZES[0], np.random.default_rng(0))


def test_styles_do_what_they_say():
    drawn = {
        style: cases.inputs_for(lambda x_BTD: x_BTD, OP_SIZES[0], np.random.default_rng(0), style=style)["x_BTD"]
        for style in STYLES
    }
    normal = drawn["normal"]
    assert len(np.unique(normal)) == normal.size
    for style, scale, offset in (("small", 1e-4, 0.0), ("large", 1e2, 0.0), ("tiny", 1e-9, 0.0), ("offset", 1.0, 1e3)):
        assert np.array_equal(drawn[style], normal * scale + offset), style
    assert np.array_equal(drawn["ties"] * 2.0, np.round(normal * 2.0))
    assert np.all(np.ptp(drawn["constant"], axis=-1) == 0.0)


@given(st.integers(0, 2**31), st.sampled_from([2, 3, 13]))
def test_drawn_losses_are_ones_that_the_halves_accept(seed, vocab_size):
    from tessera_shared.objective_checks import check_distil, check_objective

    rng = np.random.default_rng(seed)
    options = draws.distil_options(vocab_size, rng)
    check_distil(options, vocab_size, vocab_size)
    check_objective(draws.objective_of(options, rng), has_teacher=True)
    check_objective(draws.objective_of(None, rng), has_teacher=False)
