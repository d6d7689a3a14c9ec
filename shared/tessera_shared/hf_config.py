"""Hugging Face's `config.json` and `ModelSpec`, both ways, for Llama, Mistral, Qwen2 and Qwen3.

Meaning follows what transformers 5 computes for each family (`configuration_*.py`, `modeling_*.py`); a missing key has
its default there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from tessera_shared.errors import SpecError
from tessera_shared.hf_rope import config_from_rope, real_number, rope_from_config
from tessera_shared.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What `config.json` leaves unsaid because the model class fixes it."""

    model_class: str
    defaults: Mapping[str, Any]  # of the keys that this family's configuration class has
    head_width: int | None = None  # when head_dim is missing; None = hidden_size / num_attention_heads
    qkv_bias: bool | None = False  # None = attention_bias decides, for o_proj too
    qk_norm: bool = False
    width_divides_by_heads: bool = False  # LlamaConfig.validate_architecture


_COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "head_dim": None,
    "pad_token_id": None,
}
_LLAMA = _COMMON | {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}
_QWEN = _COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_FAMILIES = {
    "llama": _Family(
        model_class="LlamaForCausalLM",
        defaults=_LLAMA
        | {"intermediate_size": 11008, "num_key_value_heads": None, "max_position_embeddings": 2048}
        | {"attention_bias": False, "mlp_bias": False},
        qkv_bias=None,
        width_divides_by_heads=True,
    ),
    "mistral": _Family(
        model_class="MistralForCausalLM",
        defaults=_LLAMA
        | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
        | {"sliding_window": 4096},
    ),
    "qwen2": _Family(model_class="Qwen2ForCausalLM", defaults=_QWEN, qkv_bias=True),
    "qwen3": _Family(
        model_class="Qwen3ForCausalLM",
        defaults=_QWEN | {"attention_bias": False},
        head_width=128,
        qkv_bias=None,
        qk_norm=True,
    ),
}

_MUST_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu",), "the MLP here is SwiGLU"),
    "pretraining_tp": ((1, None), "a product cut into slices rounds differently"),
    "attention_dropout": ((0.0, None), "attention here has no dropout"),
    "partial_rotary_factor": ((1.0, None), "every dimension of a head is rotated here"),
    "is_encoder_decoder": ((False, None), "only decoders are described"),
    "add_cross_attention": ((False, None), "only decoders are described"),
    "chunk_size_feed_forward": ((0, None), "the MLP is computed whole"),
    "pruned_heads": (({}, None), "heads are never pruned"),
    "quantization_config": ((None,), "these weights would be codes, not numbers"),
    "auto_map": ((None,), "it asks for the checkpoint's own code to be run"),
}

_HARMLESS = """
    _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset transformers_version use_cache dtype
    torch_dtype use_bfloat16 torchscript tf_legacy_loss return_dict output_hidden_states output_attentions is_decoder
    id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix
    tie_encoder_decoder cross_attention_hidden_size sep_token_id decoder_start_token_id max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
HARMLESS_FIELDS = frozenset(_HARMLESS.split())
"""Fields that transformers writes and that change neither shape nor arithmetic; they are passed over."""


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """Return the spec that transformers' model of this `config.json` computes.

    `real_vocab_size` and soft caps cannot be said there and stay None. Of several end-of-text ids the first is taken.
    SpecError names the field that is unknown, contradictory or not implemented here.
    """
    family = _family_of(config)
    reader = _Reader(config, family)
    heads = reader.whole("num_attention_heads")
    width = reader.whole("hidden_size")
    if family.width_divides_by_heads and (heads < 1 or width % heads):
        raise SpecError(
            f"hidden_size = {width}, num_attention_heads = {heads}: expected a multiple, because transformers' "
            f"{family.model_class} refuses anything else; try architecture 'mistral'"
        )
    window, from_layer = _window(reader)
    bias = reader.flag("attention_bias") if family.qkv_bias is None else family.qkv_bias
    spec = ModelSpec(
        architecture=reader.architecture,
        vocab_size=reader.whole("vocab_size"),
        num_layers=reader.whole("num_hidden_layers"),
        width=width,
        ffn_width=reader.whole("intermediate_size"),
        num_heads=heads,
        num_kv_heads=reader.whole_or_none("num_key_value_heads") or heads,
        head_width=reader.whole_or_none("head_dim") or family.head_width or width // max(heads, 1),
        max_positions=reader.whole("max_position_embeddings"),
        norm_eps=reader.real("rms_norm_eps"),
        rope=rope_from_config(config, reader.whole("max_position_embeddings")),
        qkv_bias=bias,
        output_bias=bias and family.qkv_bias is None,
        mlp_bias=reader.flag("mlp_bias") if "mlp_bias" in family.defaults else False,
        qk_norm=family.qk_norm,
        sliding_window=window,
        window_from_layer=from_layer,
        tie_embeddings=reader.flag("tie_word_embeddings"),
        init_std=reader.real("initializer_range"),
        bos_token_id=_token_id(reader, "bos_token_id"),
        eos_token_id=_token_id(reader, "eos_token_id"),
        pad_token_id=_token_id(reader, "pad_token_id"),
    )
    _refuse_unknown(config, family)
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """Return the `config.json` of a spec, every key written out so that no default matters.

    `real_vocab_size` is left out (`tessera.json` keeps it). SpecError names a field that this family's `config.json`
    cannot say; it is found by reading the result back.
    """
    family = _FAMILIES[spec.architecture]
    config: dict[str, Any] = {
        "architectures": [family.model_class],
        "model_type": spec.architecture,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "intermediate_size": spec.ffn_width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_positions,
        "initializer_range": spec.init_std,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_dropout": 0.0,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": spec.eos_token_id,
        "pad_token_id": spec.pad_token_id,
    }
    config |= config_from_rope(spec.rope) | _family_keys(spec, family)
    _refuse_unsayable(spec, config)
    return config


def passed_over(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the fields in `config` that were accepted without being used."""
    return sorted(HARMLESS_FIELDS & set(config) - {"dtype", "torch_dtype"})


def end_token_ids(config: Mapping[str, Any]) -> list[int]:
    """Return every end-of-text id that a `config.json` or `generation_config.json` names: a number, a list, or none."""
    ids = config.get("eos_token_id")
    return [ids] if isinstance(ids, int) else [i for i in ids if isinstance(i, int)] if isinstance(ids, list) else []


class _Reader:
    """Typed reading of one configuration, with the family's defaults for what is missing."""

    def __init__(self, config: Mapping[str, Any], family: _Family) -> None:
        self.architecture: str = config["model_type"]
        self.values = {**family.defaults, **config}
        self.given = frozenset(config)

    def whole(self, name: str) -> int:
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise SpecError(f"{name} = {value!r}: expected a whole number, because it is a size; try {name}=1")
        return value

    def whole_or_none(self, name: str) -> int | None:
        return None if self.values[name] is None else self.whole(name)

    def real(self, name: str) -> float:
        return real_number(name, self.values[name])

    def flag(self, name: str) -> bool:
        if not isinstance(self.values[name], bool):
            raise SpecError(
                f"{name} = {self.values[name]!r}: expected true or false, because it is a switch; try false"
            )
        return bool(self.values[name])


def _family_of(config: Mapping[str, Any]) -> _Family:
    name = config.get("model_type")
    if not isinstance(name, str) or name not in _FAMILIES:
        raise SpecError(
            f"model_type = {name!r}: expected one of {', '.join(_FAMILIES)}, because only these families are "
            "understood; try a checkpoint of one of them"
        )
    family = _FAMILIES[name]
    classes = config.get("architectures")
    if classes is not None and classes != [family.model_class]:
        raise SpecError(
            f"architectures = {classes!r}: expected ['{family.model_class}'], because model_type is {name!r} and a "
            "language model is wanted; try the checkpoint's causal language model"
        )
    return family


def _window(reader: _Reader) -> tuple[int | None, int]:
    """Return (sliding_window, window_from_layer). A query sees `window` positions, itself included (masking_utils)."""
    if "sliding_window" not in reader.values:
        return None, 0
    window, layers = reader.whole_or_none("sliding_window"), reader.whole("num_hidden_layers")
    if "use_sliding_window" not in reader.values:
        return window, 0
    if not reader.flag("use_sliding_window"):
        window = None
    first = reader.whole("max_window_layers")
    kinds = reader.values["layer_types"]
    if kinds is not None:
        sliding = _first_sliding(kinds, layers, window)
        if window is not None and "max_window_layers" in reader.given and min(first, layers) != sliding:
            raise SpecError(
                f"layer_types slides from layer {sliding}, max_window_layers = {first}: expected the same layer, "
                "because both say where the window begins; try removing max_window_layers"
            )
        first = first if "max_window_layers" in reader.given else sliding
    return window, 0 if window is None else first


def _first_sliding(kinds: Any, layers: int, window: int | None) -> int:
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise SpecError(
            f"layer_types = {str(kinds)[:60]}: expected a list of {layers} names, because num_hidden_layers = "
            f"{layers}; try removing layer_types"
        )
    first = kinds.index("sliding_attention") if "sliding_attention" in kinds else layers
    if kinds != ["full_attention"] * first + ["sliding_attention"] * (layers - first):
        raise SpecError(
            f"layer_types = {str(kinds)[:60]}: expected full_attention layers and then sliding_attention layers, "
            "because other orders and kinds are not implemented; try a checkpoint without them"
        )
    if window is None and first < layers:
        raise SpecError(
            f"layer_types[{first}] = 'sliding_attention' without a window: expected use_sliding_window = true and a "
            "sliding_window, because the layer has to know how far it sees; try full_attention"
        )
    return first


def _token_id(reader: _Reader, name: str) -> int | None:
    value = reader.values[name]
    ids: list[int | None] = value if isinstance(value, list) and value else [value]
    for token_id in ids:
        if token_id is not None and not (type(token_id) is int and 0 <= token_id < reader.whole("vocab_size")):
            raise SpecError(
                f"{name} = {value!r}: expected an id from 0 to {reader.whole('vocab_size') - 1}, because it is a row "
                "of the embedding; try null"
            )
    return ids[0]


def _family_keys(spec: ModelSpec, family: _Family) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if "attention_bias" in family.defaults:
        keys["attention_bias"] = spec.qkv_bias
    if "mlp_bias" in family.defaults:
        keys["mlp_bias"] = spec.mlp_bias
    if "sliding_window" in family.defaults:
        keys["sliding_window"] = spec.sliding_window
    if "layer_types" in family.defaults:
        slides = [spec.window_of(layer) is not None for layer in range(spec.num_layers)]
        keys |= {
            "use_sliding_window": spec.sliding_window is not None,
            "max_window_layers": spec.window_from_layer,
            "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        }
    return keys


def _refuse_unsayable(spec: ModelSpec, config: dict[str, Any]) -> None:
    back, wanted = spec_from_config(config), replace(spec, real_vocab_size=None)
    for prefix, one, other in (("rope.", back.rope, wanted.rope), ("", back, wanted)):
        for field in fields(one):
            said, meant = getattr(one, field.name), getattr(other, field.name)
            if said != meant:
                raise SpecError(
                    f"{prefix}{field.name} = {meant!r}: expected {said!r}, because config.json of {spec.architecture} "
                    f"cannot say otherwise; try another architecture or {prefix}{field.name}={said!r}"
                )


def _refuse_unknown(config: Mapping[str, Any], family: _Family) -> None:
    understood = {"model_type", "architectures", "rope_theta", "rope_scaling", "rope_parameters"} | set(family.defaults)
    for name in sorted(set(config) - understood - HARMLESS_FIELDS):
        if name not in _MUST_BE:
            raise SpecError(
                f"{name} = {str(config[name])[:40]!r}: a field that Tessera does not know for {config['model_type']}: "
                "expected only known ones, because an unknown one may change the arithmetic; try removing it if it "
                "means nothing"
            )
        allowed, reason = _MUST_BE[name]
        if config[name] not in allowed:
            raise SpecError(
                f"{name} = {str(config[name])[:40]!r}: expected {allowed[0]!r}, because {reason}; try {allowed[0]!r}"
            )
