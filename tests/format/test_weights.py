"""Model directories: every bit comes back, other tools open them, and what they leave is opened here."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tessera_shared.checksums import spec_digest
from tessera_shared.errors import FormatError
from tessera_shared.numerics import BFLOAT16
from tessera_shared.spec import RopeSpec
from tessera_shared.weights import load_model, save_model

from .model_directories import (
    EMBEDDING,
    KINDS,
    SPEC,
    UNTIED,
    Q,
    any_bits,
    assert_same_bits,
    forget_checksums,
    made,
    names_in,
    outcome,
    rewrite,
)


@pytest.mark.parametrize("dtype", list(KINDS))
@given(seed=st.integers(0, 2**32), shard=st.none() | st.integers(1, 400), tied=st.booleans())
def test_every_bit_comes_back_nan_payloads_included(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, seed: int, shard: int | None, tied: bool
) -> None:
    directory = tmp_path_factory.mktemp("m") / "model"
    spec = replace(SPEC, tie_embeddings=tied)
    arrays = any_bits(spec, dtype, seed)
    save_model(directory, spec, arrays, max_shard_bytes=shard, numerics=BFLOAT16)
    model = load_model(directory, allow_nonfinite=True)
    assert_same_bits(arrays, model.arrays)
    assert (model.spec, model.numerics, model.verified, model.notes) == (spec, BFLOAT16, True, ())


def test_a_bfloat16_nan_keeps_its_payload_and_sign(tmp_path: Path) -> None:
    arrays = made()
    arrays[EMBEDDING] = np.full(28, 0xFFA5, np.uint16).view(ml_dtypes.bfloat16).reshape(7, 4)
    save_model(tmp_path / "m", SPEC, arrays)
    back = load_model(tmp_path / "m", allow_nonfinite=True).arrays[EMBEDDING]
    assert np.all(back.view(np.uint16) == 0xFFA5)


ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "every second": lambda array: np.repeat(array, 2, axis=0)[::2],
    "backwards": lambda array: array[::-1].copy()[::-1],
    "broadcast": lambda array: np.broadcast_to(array[:1], array.shape),
}


@given(st.lists(st.tuples(st.sampled_from(list(ORDERS)), st.sampled_from(list(KINDS))), min_size=11, max_size=11))
@example([("Fortran", "float64"), ("every second", "bfloat16"), ("C", "float32")] * 3 + [("broadcast", "float32")] * 2)
def test_arrays_in_any_memory_order_and_mixed_dtypes_are_stored_as_their_numbers(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, str]]
) -> None:
    arrays = {
        name: ORDERS[order](array.astype(KINDS[dtype]))
        for (name, array), (order, dtype) in zip(made(dtype="float32").items(), kinds, strict=True)
    }
    directory = tmp_path_factory.mktemp("m") / "model"
    save_model(directory, SPEC, arrays)
    model = load_model(directory)
    assert_same_bits(arrays, model.arrays)
    names = sorted({{"bfloat16": "BF16", "float32": "F32", "float64": "F64"}[dtype] for _, dtype in kinds})
    several = f"tensors have several dtypes: {', '.join(names)}"
    assert model.notes == ((several,) if len(names) > 1 else ())


@given(st.integers(1, 1000))
@example(1)
@example(100)
@example(10**6)
def test_shards_keep_to_their_limit_and_are_listed_as_hugging_face_lists_them(
    tmp_path_factory: pytest.TempPathFactory, limit: int
) -> None:
    arrays = made(UNTIED)
    directory = tmp_path_factory.mktemp("m") / "model"
    save_model(directory, UNTIED, arrays, max_shard_bytes=limit)
    files = [name for name in names_in(directory) if name.endswith(".safetensors")]
    if limit >= sum(array.nbytes for array in arrays.values()):
        assert files == ["model.safetensors"]
        return
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == arrays.keys()
    assert sorted(set(index["weight_map"].values())) == files
    for number, file in enumerate(files, 1):
        held = [name for name, home in index["weight_map"].items() if home == file]
        assert len(held) == 1 or sum(arrays[name].nbytes for name in held) <= limit
        assert file == f"model-{number:05d}-of-{len(files):05d}.safetensors"


def test_the_safetensors_package_and_ours_read_each_other(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    arrays = made()
    save_model(tmp_path / "m", SPEC, arrays)
    theirs = load_file(tmp_path / "m" / "model.safetensors")
    assert theirs.keys() == arrays.keys()
    for name, tensor in theirs.items():
        assert tensor.view(torch.uint16).numpy().tobytes() == arrays[name].tobytes()
    save_file(theirs, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    forget_checksums(tmp_path / "m")
    assert_same_bits(arrays, load_model(tmp_path / "m").arrays)


@pytest.mark.parametrize("limit", [None, 300])
def test_transformers_opens_what_is_saved_here_and_the_reverse(tmp_path: Path, limit: int | None) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    arrays = made(dtype="float32")
    save_model(tmp_path / "m", SPEC, arrays, max_shard_bytes=limit)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    state = model.state_dict()
    assert all(np.array_equal(state[name].numpy(), array) for name, array in arrays.items())
    assert state[EMBEDDING].dtype == torch.float32
    model.save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")
    assert_same_bits(arrays, back.arrays)
    assert back.spec == replace(SPEC, real_vocab_size=None)
    assert not back.verified
    assert back.notes[0].startswith("unverified: no tessera.json")


def test_views_are_lazy_private_and_writable(tmp_path: Path) -> None:
    arrays = made(dtype="float32")
    save_model(tmp_path / "m", SPEC, arrays)
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    model = load_model(tmp_path / "m")
    assert not model.arrays[Q].flags.owndata
    model.arrays[Q][:] = 7.0
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


def test_a_model_can_be_saved_over_the_directory_it_was_loaded_from(tmp_path: Path) -> None:
    arrays = made()
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    save_model(tmp_path / "m", SPEC, arrays, tokenizer_file=tmp_path / "tokenizer.json")
    model = load_model(tmp_path / "m")
    save_model(tmp_path / "m", model.spec, model.arrays, tokenizer_file=model.tokenizer_file, max_shard_bytes=99)
    again = load_model(tmp_path / "m")
    assert_same_bits(arrays, again.arrays)
    assert again.tokenizer_file is not None
    assert again.tokenizer_file.read_text() == '{"a": 1}'


def test_companion_files_and_generation_settings_travel_untouched(tmp_path: Path) -> None:
    text = '{"eos_token_id": [2, 4],  "temperature": 0.6}\n'
    (tmp_path / "generation_config.json").write_text(text)
    save_model(tmp_path / "m", replace(SPEC, eos_token_id=3), made(), companions=[tmp_path / "generation_config.json"])
    model = load_model(tmp_path / "m")
    assert (tmp_path / "m" / "generation_config.json").read_text() == text
    assert model.generation == {"eos_token_id": [2, 4], "temperature": 0.6}
    assert model.end_token_ids == (2, 4, 3)
    with pytest.raises(FormatError, match=r"notes\.txt: not a companion"):
        save_model(tmp_path / "n", SPEC, made(), companions=[tmp_path / "notes.txt"])


def test_equal_specs_have_equal_digests_and_every_field_counts() -> None:
    assert spec_digest(replace(SPEC, rope=RopeSpec(theta=10000))) == spec_digest(SPEC)
    changes: list[dict[str, Any]] = [
        {"vocab_size": 8}, {"rope": RopeSpec(theta=10001)}, {"real_vocab_size": 6}, {"norm_eps": 2e-6},
        {"qk_norm": True},
    ]  # fmt: skip
    digests = {spec_digest(replace(SPEC, **change)) for change in changes}
    assert len(digests | {spec_digest(SPEC)}) == len(changes) + 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", list(KINDS))
def test_weights_that_are_not_finite_are_named_unless_allowed(tmp_path: Path, dtype: str, value: float) -> None:
    arrays = made(dtype=dtype)
    arrays[Q][1, 2] = value
    save_model(tmp_path / "m", SPEC, arrays)
    with pytest.raises(FormatError, match=r"q_proj\.weight: 1 of 16 numbers are NaN or infinite"):
        load_model(tmp_path / "m")
    assert_same_bits(arrays, load_model(tmp_path / "m", allow_nonfinite=True).arrays)


def test_a_tied_unembedding_may_be_stored_if_its_bits_are_the_embeddings(tmp_path: Path) -> None:
    arrays = made()
    save_model(tmp_path / "m", SPEC, arrays)
    forget_checksums(tmp_path / "m")
    rewrite(tmp_path / "m", arrays | {"lm_head.weight": arrays[EMBEDDING]})
    assert_same_bits(arrays, load_model(tmp_path / "m").arrays)
    other = arrays[EMBEDDING].copy()
    other[0, 0] = -other[0, 0]
    rewrite(tmp_path / "m", arrays | {"lm_head.weight": other})
    assert "lm_head.weight: differs" in str(outcome(tmp_path / "m"))


def test_derived_rotary_buffers_of_older_checkpoints_are_passed_over_and_said(tmp_path: Path) -> None:
    arrays = made()
    save_model(tmp_path / "m", SPEC, arrays)
    forget_checksums(tmp_path / "m")
    rewrite(tmp_path / "m", arrays | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32)})
    model = load_model(tmp_path / "m")
    assert_same_bits(arrays, model.arrays)
    assert any("inv_freq" in note for note in model.notes)


def test_float16_checkpoints_open_with_a_word_of_warning(tmp_path: Path) -> None:
    arrays = {name: array.astype(np.float16) for name, array in made(dtype="float32").items()}
    save_model(tmp_path / "m", SPEC, made())
    forget_checksums(tmp_path / "m")
    rewrite(tmp_path / "m", arrays)
    model = load_model(tmp_path / "m")
    assert_same_bits(arrays, model.arrays)
    assert any("float16" in note for note in model.notes)


def test_without_verification_no_number_is_read_and_the_notes_say_so(tmp_path: Path) -> None:
    save_model(tmp_path / "m", SPEC, made())
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    model = load_model(tmp_path / "m", verify=False)
    assert not model.verified
    assert model.notes == ("unverified: loaded with verify=False",)
