"""`config.json` and `ModelSpec`: both ways, for four families, with transformers' own classes as the witness."""

import json
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera_shared.errors import SpecError
from tessera_shared.hf_config import config_from_spec, end_token_ids, passed_over, spec_from_config
from tessera_shared.presets import PRESETS
from tessera_shared.spec import ARCHITECTURES, ModelSpec, RopeSpec
from tessera_shared.tensors import tensor_table

OPEN_FACTS = st.floats(1.0, 64.0)


@st.composite
def ropes(draw: st.DrawFn) -> RopeSpec:
    theta = draw(st.floats(1.0, 1e7))
    scaling = draw(st.sampled_from(["none", "linear", "llama3", "yarn"]))
    if scaling == "none":
        return RopeSpec(theta=theta)
    if scaling == "linear":
        return RopeSpec(theta=theta, scaling=scaling, factor=draw(OPEN_FACTS))
    original = draw(st.integers(1, 10**6))
    if scaling == "llama3":
        low = draw(st.floats(0.5, 4.0))
        high = low + draw(st.floats(0.5, 8.0))
        return RopeSpec(
            theta=theta, scaling=scaling, factor=draw(OPEN_FACTS), original_max_positions=original,
            low_freq_factor=low, high_freq_factor=high,
        )  # fmt: skip
    optional = st.none() | st.floats(0.1, 4.0)
    return RopeSpec(
        theta=theta, scaling=scaling, factor=draw(OPEN_FACTS), original_max_positions=original,
        beta_fast=draw(st.floats(8.0, 64.0)), beta_slow=draw(st.floats(0.5, 4.0)), attention_factor=draw(optional),
        mscale=draw(optional), mscale_all_dim=draw(optional), truncate=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def sayable_specs(draw: st.DrawFn) -> ModelSpec:
    """A spec that its family's config.json can say."""
    family = draw(st.sampled_from(ARCHITECTURES))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, vocab = kv_heads * group, draw(st.integers(1, 300))
    layers = draw(st.integers(1, 5))
    width = heads * draw(st.integers(1, 9)) if family == "llama" else draw(st.integers(1, 70))
    bias = {"llama": st.booleans(), "qwen3": st.booleans(), "qwen2": st.just(True), "mistral": st.just(False)}[family]
    qkv_bias = draw(bias)
    window = None if family == "llama" else draw(st.none() | st.integers(1, 5000))
    token_id = st.none() | st.integers(0, vocab - 1)
    return ModelSpec(
        architecture=family, vocab_size=vocab, num_layers=layers, width=width, ffn_width=draw(st.integers(1, 99)),
        num_heads=heads, num_kv_heads=kv_heads, head_width=2 * draw(st.integers(1, 33)),
        max_positions=draw(st.integers(1, 10**6)), norm_eps=draw(st.floats(0.0, 1e-3)), rope=draw(ropes()),
        qkv_bias=qkv_bias, output_bias=qkv_bias and family != "qwen2",
        mlp_bias=draw(st.booleans()) if family == "llama" else False, qk_norm=family == "qwen3",
        sliding_window=window,
        window_from_layer=draw(st.integers(0, layers + 2)) if window and family.startswith("qwen") else 0,
        tie_embeddings=draw(st.booleans()), init_std=draw(st.floats(0.0, 1.0)),
        real_vocab_size=draw(st.none() | st.integers(1, vocab)), bos_token_id=draw(token_id),
        eos_token_id=draw(token_id), pad_token_id=draw(token_id),
    )  # fmt: skip


@given(sayable_specs())
def test_a_spec_survives_the_way_through_json_and_back(spec: ModelSpec) -> None:
    config = json.loads(json.dumps(config_from_spec(spec), allow_nan=False))
    assert spec_from_config(config) == replace(spec, real_vocab_size=None)


@given(sayable_specs())
def test_each_spelling_of_rope_alone_says_the_same(spec: ModelSpec) -> None:
    config = config_from_spec(spec)
    version_4 = {name: value for name, value in config.items() if name != "rope_parameters"}
    version_5 = {name: value for name, value in config.items() if name not in ("rope_theta", "rope_scaling")}
    assert spec_from_config(version_4) == spec_from_config(version_5) == replace(spec, real_vocab_size=None)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_can_be_said(name: str) -> None:
    assert spec_from_config(config_from_spec(PRESETS[name])) == PRESETS[name]


# transformers as the witness


@pytest.fixture(scope="module")
def hf() -> Any:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    return SimpleNamespace(llama=LlamaConfig, mistral=MistralConfig, qwen2=Qwen2Config, qwen3=Qwen3Config)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_config_that_says_nothing_means_what_transformers_takes_it_to_mean(hf: Any, family: str) -> None:
    defaults = getattr(hf, family)().to_dict()
    assert spec_from_config({"model_type": family}) == spec_from_config(json.loads(json.dumps(defaults)))


@given(spec=sayable_specs())
def test_transformers_reads_our_config_as_we_meant_it_and_we_read_what_it_writes(hf: Any, spec: ModelSpec) -> None:
    ours = config_from_spec(spec)
    theirs = getattr(hf, spec.architecture).from_dict(dict(ours))
    assert spec_from_config(json.loads(json.dumps(theirs.to_dict()))) == replace(spec, real_vocab_size=None)
    head_width = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (theirs.num_key_value_heads, head_width) == (spec.num_kv_heads, spec.head_width)
    assert theirs.rope_parameters["rope_theta"] == spec.rope.theta
    layer_types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * spec.num_layers
    for layer, kind in enumerate(layer_types):
        window = getattr(theirs, "sliding_window", None) if kind == "sliding_attention" else None
        assert window == spec.window_of(layer)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_tensor_table_is_the_state_dict_that_transformers_builds(
    hf: Any, family: str, bias: bool, tied: bool
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config = {
        "model_type": family, "vocab_size": 13, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": tied,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    config |= {"attention_bias": bias} if family in ("llama", "qwen3") else {}
    config |= {"mlp_bias": bias} if family == "llama" else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(getattr(hf, family).from_dict(dict(config)))
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if tied:
        theirs.pop("lm_head.weight", None)
    ours = {name: info.shape for name, info in tensor_table(spec_from_config(config)).items()}
    assert ours == theirs


def test_a_sliding_window_counts_the_query_itself_as_transformers_does() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.masking_utils import sliding_window_causal_mask_function

    mask = sliding_window_causal_mask_function(3)
    seen = [[bool(mask(0, 0, torch.tensor(query), torch.tensor(key))) for key in range(6)] for query in range(6)]
    assert seen == [[0 <= query - key < 3 for key in range(6)] for query in range(6)]


# Refusals, each by name

BASE = {
    "model_type": "qwen3", "vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
}  # fmt: skip
LLAMA = {**BASE, "model_type": "llama", "bos_token_id": None, "eos_token_id": None}
WINDOWED = {**BASE, "use_sliding_window": True, "sliding_window": 4}
LINEAR = {"rope_type": "linear", "factor": 2.0}
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "model_type"),
        ({"model_type": "gemma"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({**BASE, "architectures": ["Qwen3ForSequenceClassification"]}, "architectures"),
        ({**BASE, "new_feature": 1}, "new_feature"),
        ({**BASE, "mlp_bias": False}, "mlp_bias"),
        ({**LLAMA, "sliding_window": 8}, "sliding_window"),
        ({**BASE, "quantization_config": {"bits": 4}}, "quantization_config"),
        ({**BASE, "auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({**BASE, "hidden_act": "gelu"}, "hidden_act"),
        ({**LLAMA, "pretraining_tp": 2}, "pretraining_tp"),
        ({**BASE, "attention_dropout": 0.1}, "attention_dropout"),
        ({**BASE, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({**BASE, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({**BASE, "vocab_size": "20"}, "vocab_size"),
        ({**BASE, "num_hidden_layers": True}, "num_hidden_layers"),
        ({**BASE, "hidden_size": 8.0}, "hidden_size"),
        ({**BASE, "num_hidden_layers": 0}, "num_layers"),
        ({**BASE, "rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({**BASE, "rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({**BASE, "rope_theta": 10**400}, "rope_theta"),
        ({**BASE, "tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({**BASE, "eos_token_id": 20}, "eos_token_id"),
        ({**BASE, "pad_token_id": -1}, "pad_token_id"),
        ({**BASE, "eos_token_id": [3, 99]}, "eos_token_id"),
        ({**LLAMA, "hidden_size": 9}, "hidden_size"),
        ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads"),
        ({**BASE, "head_dim": 5}, "head_width"),
        ({**BASE, "num_key_value_heads": 3}, "num_kv_heads"),
        ({**WINDOWED, "layer_types": [FULL, SLIDING]}, "layer_types"),
        ({**WINDOWED, "layer_types": [SLIDING, FULL, SLIDING]}, "layer_types"),
        ({**WINDOWED, "layer_types": [FULL, FULL, "chunked_attention"]}, "layer_types"),
        ({**WINDOWED, "layer_types": [FULL, SLIDING, SLIDING], "max_window_layers": 2}, "max_window_layers"),
        ({**BASE, "layer_types": [FULL, SLIDING, SLIDING]}, "layer_types"),
        ({**BASE, "layer_types": 3}, "layer_types"),
        ({**BASE, "rope_scaling": "linear"}, "rope_scaling"),
        ({**BASE, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ({**BASE, "rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "type"),
        ({**BASE, "rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({**BASE, "rope_scaling": {**LINEAR, "factor": 0.5}}, "factor"),
        ({**BASE, "rope_scaling": {**LINEAR, "factor": True}}, "factor"),
        ({**BASE, "rope_scaling": {**LINEAR, "beta_fast": 3}}, "beta_fast"),
        ({**BASE, "rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({**BASE, "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate"),
        ({**BASE, "rope_parameters": {FULL: {"rope_type": "default"}}}, FULL),
        ({**BASE, "rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}, "rope_scaling"),
        ({**BASE, "rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 6.0}}, "rope_theta"),
    ],
)
def test_what_is_unknown_or_contradictory_is_refused_by_name(config: dict[str, Any], name: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_from_config(config)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


SPEC = spec_from_config(LLAMA)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"attention_softcap": 30.0}, "attention_softcap"),
        ({"logit_softcap": 30.0}, "logit_softcap"),
        ({"qkv_bias": True}, "output_bias"),
        ({"output_bias": True}, "output_bias"),
        ({"qk_norm": True}, "qk_norm"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"window_from_layer": 1}, "window_from_layer"),
        ({"architecture": "qwen2"}, "qkv_bias"),
        ({"architecture": "qwen3"}, "qk_norm"),
        ({"architecture": "mistral", "mlp_bias": True}, "mlp_bias"),
        ({"architecture": "mistral", "sliding_window": 4, "window_from_layer": 1}, "window_from_layer"),
        ({"rope": RopeSpec(factor=2.0)}, "rope.factor"),
        ({"rope": RopeSpec(scaling="linear", factor=2.0, beta_fast=3.0)}, "rope.beta_fast"),
        ({"width": 9}, "hidden_size"),
        ({"eos_token_id": 20}, "eos_token_id"),
    ],
)
def test_what_a_config_cannot_say_is_refused_on_export_by_name(change: dict[str, Any], name: str) -> None:
    with pytest.raises(SpecError) as caught:
        config_from_spec(replace(SPEC, **change))
    assert name in str(caught.value)


def test_no_field_of_a_spec_is_lost_in_silence() -> None:
    """A field added to the spec later must either be said in config.json or be refused there."""
    silent = {"real_vocab_size"}
    changed = {"architecture", "rope"}  # covered above
    for field in fields(ModelSpec):
        if field.name in silent | changed:
            continue
        value = getattr(SPEC, field.name)
        other = not value if isinstance(value, bool) else 2 * value if value else 3
        spec = replace(SPEC, **{"num_kv_heads": 4} if field.name == "num_kv_heads" else {field.name: other})
        try:
            assert getattr(spec_from_config(config_from_spec(spec)), field.name) == getattr(spec, field.name)
        except SpecError as error:
            assert field.name in str(error) or field.name == "qkv_bias"  # noqa: PT017 - either outcome is legal


def test_harmless_fields_are_passed_over_and_said() -> None:
    config = {
        **BASE,
        "use_cache": True,
        "transformers_version": "4.40.0",
        "torch_dtype": "bfloat16",
        "pretraining_tp": 1,
    }
    assert spec_from_config(config) == spec_from_config(BASE)
    assert passed_over(config) == ["transformers_version", "use_cache"]


def test_of_several_end_ids_the_spec_keeps_the_first_and_none_is_lost() -> None:
    config = {**BASE, "eos_token_id": [7, 3]}
    assert spec_from_config(config).eos_token_id == 7
    assert end_token_ids(config) == [7, 3]
    assert end_token_ids({"eos_token_id": 4}) == [4]
    assert end_token_ids({}) == []


def test_yarn_without_a_factor_takes_the_ratio_of_lengths_and_zeros_mean_defaults() -> None:
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 8, "beta_fast": 0, "mscale": 0}
    spec = spec_from_config({**BASE, "max_position_embeddings": 32, "rope_scaling": rope})
    assert (spec.rope.factor, spec.rope.beta_fast, spec.rope.mscale) == (4.0, 32.0, None)


def test_llama3_without_an_original_length_takes_the_whole_context_as_transformers_does() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    spec = spec_from_config({**BASE, "max_position_embeddings": 48, "rope_scaling": rope})
    assert spec.rope.original_max_positions == 48
