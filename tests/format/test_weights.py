"""Model directories: bit-exact, whole or not at all, and no damage that goes unseen."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera_shared import atomic, tensor_file, weights
from tessera_shared.atomic import recover, replace_file, replaced_directory
from tessera_shared.checksums import checksum_array, spec_digest
from tessera_shared.errors import FormatError, SpecError
from tessera_shared.init import initial_weights
from tessera_shared.numerics import BFLOAT16
from tessera_shared.spec import ModelSpec, RopeSpec
from tessera_shared.stored_model import check_contents, manifest_checksum, open_model
from tessera_shared.tensors import tensor_table
from tessera_shared.weights import load_model, save_model

SPEC = ModelSpec(
    architecture="mistral", vocab_size=7, num_layers=1, width=4, ffn_width=6, num_heads=2, num_kv_heads=1, head_width=2,
    max_positions=16, tie_embeddings=True, real_vocab_size=5, sliding_window=3,
)  # fmt: skip
UNTIED = replace(SPEC, tie_embeddings=False, real_vocab_size=None)
KINDS = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
EMBEDDING, Q = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"

Arrays = dict[str, np.ndarray]


def made(spec: ModelSpec = SPEC, dtype: str = "bfloat16", seed: int = 0) -> Arrays:
    return initial_weights(spec, seed=seed, dtype=dtype)


def any_bits(spec: ModelSpec, dtype: str, seed: int) -> Arrays:
    """Arrays of random bits: infinities, subnormals and NaNs with payloads among them."""
    rng = np.random.default_rng(seed)
    size = np.dtype(KINDS[dtype]).itemsize
    return {
        name: np.frombuffer(rng.bytes(size * int(np.prod(info.shape))), np.uint8).view(KINDS[dtype]).reshape(info.shape)
        for name, info in tensor_table(spec).items()
    }


def assert_same_bits(one: Arrays, other: Arrays) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape)
        assert one[name].tobytes() == other[name].tobytes(), name


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def forget_checksums(directory: Path) -> None:
    (directory / "tessera.json").unlink()


def rewrite(directory: Path, arrays: Arrays) -> None:
    """Replace the weight file by one with other tensors, as another tool would."""
    (directory / "model.safetensors").unlink()
    tensor_file.write_tensors(directory / "model.safetensors", arrays)


# Round trips


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


def test_arrays_in_any_memory_order_and_mixed_dtypes_are_stored_as_their_numbers(tmp_path: Path) -> None:
    arrays = made(dtype="float32")
    arrays[Q] = np.asfortranarray(arrays[Q].astype(np.float64))
    arrays["model.norm.weight"] = np.repeat(arrays["model.norm.weight"], 2)[::2].astype(ml_dtypes.bfloat16)
    save_model(tmp_path / "m", SPEC, arrays)
    model = load_model(tmp_path / "m")
    assert_same_bits(arrays, model.arrays)
    assert model.notes == ("tensors have several dtypes: BF16, F32, F64",)


@pytest.mark.parametrize("limit", [1, 100, 10**6])
def test_shards_keep_to_their_limit_and_are_listed_as_hugging_face_lists_them(tmp_path: Path, limit: int) -> None:
    arrays = made(UNTIED)
    save_model(tmp_path / "m", UNTIED, arrays, max_shard_bytes=limit)
    files = [name for name in names_in(tmp_path / "m") if name.endswith(".safetensors")]
    if limit == 10**6:
        assert files == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
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


# Damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound") / "m"
    (directory.parent / "tokenizer.json").write_text('{"model": {}}')
    save_model(directory, SPEC, made(), tokenizer_file=directory.parent / "tokenizer.json", max_shard_bytes=300)
    return directory


def outcome(directory: Path) -> str | None:
    """Load a directory; return the complaint, or None if it loaded with every bit as it was saved."""
    try:
        model = load_model(directory)
    except FormatError as error:
        return str(error)
    assert_same_bits(made(), {name: np.asarray(array) for name, array in model.arrays.items()})
    assert model.spec == SPEC
    return None


def test_a_flip_of_any_byte_of_any_file_is_detected_or_changed_nothing(sound: Path, tmp_path: Path) -> None:
    """Every 3rd byte, each by one of eight masks; in weights and checksummed files not one may pass."""
    directory = tmp_path / "m"
    shutil.copytree(sound, directory)
    unseen: dict[str, int] = {}
    for path in sorted(directory.iterdir()):
        original = path.read_bytes()
        step = 29 if path.name == "tessera.json" else 3
        for at in range(0, len(original), step):
            mask = 1 << (at // step % 8)
            path.write_bytes(original[:at] + bytes([original[at] ^ mask]) + original[at + 1 :])
            if outcome(directory) is None:
                unseen[path.name] = unseen.get(path.name, 0) + 1
        path.write_bytes(original)
    assert outcome(directory) is None
    assert unseen.keys() <= {"tessera.json"}  # between its words a space may become a tab


def test_a_flip_in_a_weight_names_the_tensor_and_the_file(sound: Path, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(sound, directory)
    opened = open_model(directory)
    entry = opened.files[opened.tensors[Q]].entries[Q]
    path = directory / opened.tensors[Q]
    data = bytearray(path.read_bytes())
    data[entry.stop - 1] ^= 1
    path.write_bytes(data)
    complaint = outcome(directory)
    assert complaint is not None
    assert Q in complaint
    assert path.name in complaint
    assert "checksum" in complaint


@pytest.mark.parametrize("vouched", [True, False])
def test_a_file_cut_at_any_64_bytes_is_refused(sound: Path, tmp_path: Path, vouched: bool) -> None:
    directory = tmp_path / "m"
    shutil.copytree(sound, directory)
    if not vouched:
        forget_checksums(directory)
    for path in sorted(directory.glob("*.safetensors")):
        original = path.read_bytes()
        for length in [*range(0, len(original), 64), len(original) - 1]:
            path.write_bytes(original[:length])
            complaint = outcome(directory)
            assert complaint is not None
            assert path.name in complaint
        path.write_bytes(original + b"\0")
        assert "too long" in str(outcome(directory))
        path.write_bytes(original)
    assert outcome(directory) is None if vouched else True


def edited_header(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = edit(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def set_row(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].__setitem__(key, value)


def overlap(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (set_row(EMBEDDING, "shape", [8, 4]), "data_offsets"),
        (set_row(EMBEDDING, "shape", [4, 7]), "shape"),
        (set_row(EMBEDDING, "shape", [-7, -4]), "row"),
        (set_row(EMBEDDING, "shape", "7x4"), "row"),
        (set_row(EMBEDDING, "shape", [True, 28]), "row"),
        (set_row(EMBEDDING, "dtype", "F8_E4M3"), "dtype"),
        (set_row(EMBEDDING, "dtype", "I16"), "dtype"),
        (set_row(EMBEDDING, "dtype", ["BF16"]), "dtype"),
        (set_row(EMBEDDING, "data_offsets", [0]), "row"),
        (set_row(EMBEDDING, "data_offsets", [2**70, 2**70 + 56]), "row"),
        (set_row(EMBEDDING, "data_offsets", [10**6, 10**6 + 56]), "begins at byte"),
        (set_row(EMBEDDING, "surprise", 1), "row"),
        (overlap, "begins at byte"),
        (lambda header: header.__setitem__("model.norm.weight", 3), "row"),
        (lambda header: b"[]", "expected an object"),
        (lambda header: b"{" * 100_000, "JSON"),
        (lambda header: b"\xff\xfe{}", "JSON"),
        (lambda header: b'{"a": {}, "a": {}}', "twice"),
        (lambda header: b'{"a": NaN}', "JSON"),
        (lambda header: b"{}", "bytes: expected"),
        (lambda header: b"", "header"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], Any], word: str) -> None:
    save_model(tmp_path / "m", SPEC, made())
    forget_checksums(tmp_path / "m")
    edited_header(tmp_path / "m", edit)
    complaint = outcome(tmp_path / "m")
    assert complaint is not None
    assert "model.safetensors" in complaint
    assert word in complaint


def test_a_header_length_beyond_the_file_allocates_nothing(tmp_path: Path) -> None:
    save_model(tmp_path / "m", SPEC, made())
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes((2**63 - 1).to_bytes(8, "little") + path.read_bytes()[8:])
    assert "header" in str(outcome(tmp_path / "m"))


@pytest.mark.parametrize("vouched", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop(Q), (Q, "missing")),
        (lambda a: a.__setitem__("model.layers.1.mlp.up_proj.weight", a[Q]), ("model.layers.1.mlp", "surplus")),
        (lambda a: a.__setitem__("lm_head.bias", a["model.norm.weight"]), ("lm_head.bias", "surplus")),
        (lambda a: a.__setitem__(Q, a[Q].reshape(2, 8)), (Q, "shape (2, 8): expected (4, 4)")),
        (lambda a: a.__setitem__(Q, a[Q].astype(np.int32)), (Q, "dtype = I32")),
    ],
)
def test_a_tensor_that_is_missing_surplus_or_misshapen_is_named(
    tmp_path: Path, vouched: bool, change: Callable[[Arrays], Any], words: tuple[str, str]
) -> None:
    arrays = made()
    save_model(tmp_path / "m", SPEC, arrays)
    if not vouched:
        forget_checksums(tmp_path / "m")
    change(arrays)
    rewrite(tmp_path / "m", arrays)
    complaint = str(outcome(tmp_path / "m"))
    assert all(word in complaint for word in words), complaint


def test_another_dtype_than_the_manifest_says_is_named(tmp_path: Path) -> None:
    arrays = made()
    save_model(tmp_path / "m", SPEC, arrays)
    rewrite(tmp_path / "m", arrays | {Q: arrays[Q].astype(np.float32)})
    assert "dtype = F32: expected BF16" in str(outcome(tmp_path / "m"))


def test_saving_refuses_arrays_that_do_not_fit_the_spec(tmp_path: Path) -> None:
    arrays = made()
    bad: list[tuple[Arrays, str]] = [
        ({name: array for name, array in arrays.items() if name != Q}, f"{Q}: missing"),
        (arrays | {"lm_head.weight": arrays[EMBEDDING]}, "lm_head.weight: surplus"),
        (arrays | {Q: arrays[Q].T.reshape(2, 8)}, "shape"),
        (arrays | {Q: arrays[Q].astype(np.float16)}, "dtype = float16"),
        (arrays | {Q: arrays[Q].astype(">f4")}, "dtype = >f4"),
    ]
    for wrong, word in bad:
        with pytest.raises(FormatError) as caught:
            save_model(tmp_path / "m", SPEC, wrong)
        assert word in str(caught.value)
    with pytest.raises(SpecError, match="logit_softcap"):
        save_model(tmp_path / "m", replace(SPEC, logit_softcap=3.0), arrays)
    with pytest.raises(FormatError, match="max_shard_bytes = 0"):
        save_model(tmp_path / "m", SPEC, arrays, max_shard_bytes=0)
    assert names_in(tmp_path) == []


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


# Descriptions that do not fit


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", ".x.safetensors", "x.bin", 3, ""]
)
def test_an_index_cannot_lead_out_of_the_directory(sound: Path, tmp_path: Path, file: Any) -> None:
    directory = tmp_path / "m"
    shutil.copytree(sound, directory)
    forget_checksums(directory)
    tensor_file.write_tensors(tmp_path / "secret.safetensors", made())
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"][Q] = file
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    complaint = str(outcome(directory))
    assert Q in complaint
    assert "plain name" in complaint


def test_an_index_that_does_not_describe_its_shards_is_refused(sound: Path, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(sound, directory)
    forget_checksums(directory)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    home = index["weight_map"]
    elsewhere = next(file for file in home.values() if file != home[Q])

    def complaint_after(weight_map: Any) -> str:
        path.write_text(json.dumps({"weight_map": weight_map}))
        return str(outcome(directory))

    assert Q in complaint_after(home | {Q: elsewhere})
    assert Q in complaint_after({name: file for name, file in home.items() if name != Q})
    assert "ghost" in complaint_after(home | {"ghost": elsewhere})
    assert "not there" in complaint_after(home | {Q: "model-00009-of-00009.safetensors"})
    assert "weight_map" in complaint_after([1])
    assert "weight_map" in complaint_after({})


@pytest.mark.parametrize(
    ("file", "text", "word"),
    [
        ("config.json", "{", "JSON"),
        ("config.json", "[1]", "expected an object"),
        ("config.json", '{"model_type": "llama", "rope_theta": NaN}', "JSON"),
        ("config.json", '{"model_type": "gpt2"}', "model_type"),
        ("config.json", '{"model_type": "mistral", "num_hidden_layers": 1000000000}', "missing"),
        ("tessera.json", "{}", "version"),
        ("tessera.json", '{"format": "tessera-weights", "version": 2}', "version 2"),
        ("tessera.json", '{"format": "tessera-weights", "version": 1}', "its own checksum"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused_by_file(tmp_path: Path, file: str, text: str, word: str) -> None:
    save_model(tmp_path / "m", SPEC, made())
    if file == "config.json":
        forget_checksums(tmp_path / "m")
    (tmp_path / "m" / file).write_text(text)
    complaint = str(outcome(tmp_path / "m"))
    assert file in complaint
    assert word in complaint


@pytest.mark.parametrize(
    "change",
    [
        {"files": None}, {"tensors": []}, {"real_vocab_size": "5"}, {"real_vocab_size": 99},
        {"numerics": {"param": "x"}},
        {"files": {"../../etc/passwd": {"bytes": 1, "xxh3_128": "0"}}}, {"files": {"config.json": {}}}, {"files": {}},
        {"tensors": {EMBEDDING: {}}}, {"spec_sha256": "0"}, {"surprise": 1},
    ],
)  # fmt: skip
def test_a_manifest_that_vouches_for_nonsense_is_still_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    save_model(tmp_path / "m", SPEC, made())
    path = tmp_path / "m" / "tessera.json"
    manifest = json.loads(path.read_text())
    del manifest["manifest_xxh3_128"]
    manifest |= change
    path.write_text(json.dumps(manifest | {"manifest_xxh3_128": manifest_checksum(manifest)}))
    complaint = outcome(tmp_path / "m")
    assert complaint is None if change == {"surprise": 1} else complaint is not None


def test_missing_weights_both_layouts_at_once_and_a_changed_config_are_refused(sound: Path, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(sound, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert "config.json" in str(outcome(directory))
    (directory / "config.json").write_text(json.dumps(config))  # same meaning, other bytes
    assert "changed since it was written" in str(outcome(directory))
    forget_checksums(directory)
    tensor_file.write_tensors(directory / "model.safetensors", made())
    assert "they may differ" in str(outcome(directory))
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").unlink()
    assert "no model.safetensors" in str(outcome(directory))
    (directory / "config.json").unlink()
    assert "config.json: cannot be read" in str(outcome(directory))


def test_a_report_lists_every_problem_and_not_only_the_first(sound: Path, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(sound, directory)
    (directory / "tokenizer.json").write_text("{}")
    shards = sorted(directory.glob("*.safetensors"))
    for path in shards:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    reports = list(check_contents(open_model(directory)))
    assert {report.file for report in reports if report.problems} == {"tokenizer.json", *(p.name for p in shards)}


# All or nothing


def test_checksums_are_taken_from_memory_and_not_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that corrupts what it is given must not be believed."""

    def corrupting(path: Path, chunks: Any) -> int:
        pieces = [bytes(chunk) for chunk in chunks]
        if path.suffix == ".safetensors":
            pieces[-1] = pieces[-1][:-1] + bytes([pieces[-1][-1] ^ 1])
        return atomic.write_file(path, pieces)

    monkeypatch.setattr(tensor_file, "write_file", corrupting)
    save_model(tmp_path / "m", SPEC, made())
    assert "checksum" in str(outcome(tmp_path / "m"))


@pytest.mark.parametrize("fails_at", range(5))
def test_a_write_that_fails_leaves_the_old_model_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    save_model(tmp_path / "m", SPEC, made(), max_shard_bytes=300)
    calls = iter(range(99))

    def failing(path: Path, chunks: Any) -> int:
        if next(calls) == fails_at:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        return atomic.write_file(path, chunks)

    monkeypatch.setattr(tensor_file, "write_file", failing)
    monkeypatch.setattr(weights, "write_file", failing)
    with pytest.raises(OSError, match="No space"):
        save_model(tmp_path / "m", SPEC, made(seed=1), max_shard_bytes=300)
    assert outcome(tmp_path / "m") is None
    assert names_in(tmp_path) == ["m"]


@pytest.mark.parametrize("cut", ["before the old is aside", "between the renames", "before the old is removed"])
def test_a_process_killed_while_replacing_leaves_one_whole_model(tmp_path: Path, cut: str) -> None:
    """The kill is real: the process dies by SIGKILL at that point, and the next reader or writer recovers."""
    save_model(tmp_path / "m", SPEC, made())
    script = f"""
import os, shutil, signal, sys
from pathlib import Path
from tessera_shared import atomic
import test_weights as t
die = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
rename, count = Path.rename, [0]
def counted(self, target):
    if count[0] == {["before the old is aside", "between the renames"].index(cut) if "removed" not in cut else 9}:
        die()
    count[0] += 1
    return rename(self, target)
Path.rename = counted
atomic.shutil.rmtree = die
t.save_model(Path({str(tmp_path / "m")!r}), t.SPEC, t.made(seed=1))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    died = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    expected = made(seed=1) if "removed" in cut else made()
    assert_same_bits(expected, load_model(tmp_path / "m").arrays)
    save_model(tmp_path / "m", SPEC, made(seed=2))
    assert_same_bits(made(seed=2), load_model(tmp_path / "m").arrays)
    assert names_in(tmp_path) == ["m"]


def test_a_directory_that_holds_anything_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    save_model(tmp_path / "m", SPEC, made())
    (tmp_path / "m" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "tokenizer.json").write_text("{}")
    for name, holds in (("home", "thesis.tex"), ("m", "notes.txt"), ("file", "file"), ("partial", "tokenizer.json")):
        with pytest.raises(FormatError, match=f"holds {holds}"):
            save_model(tmp_path / name, SPEC, made(seed=1))
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"
    assert_same_bits(made(), load_model(tmp_path / "m").arrays)


def test_two_writers_of_one_directory_are_kept_apart(tmp_path: Path) -> None:
    with replaced_directory(tmp_path / "m") as staged:
        (staged / "a").write_text("first")
        with pytest.raises(FormatError, match="another process is writing"), replaced_directory(tmp_path / "m"):
            pass
    assert names_in(tmp_path / "m") == ["a"]


def test_what_a_dead_writer_staged_is_cleared_and_recovery_is_idle_when_nothing_happened(tmp_path: Path) -> None:
    (tmp_path / ".m.new").mkdir()
    (tmp_path / ".m.new" / "half").write_text("x")
    assert not recover(tmp_path / "m")
    with replaced_directory(tmp_path / "m") as staged:
        assert names_in(staged) == []
    assert names_in(tmp_path) == ["m"]


def test_replacing_one_file_is_atomic_and_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    replace_file(path, b"one")
    replace_file(path, b"two")

    def full(_: Path, __: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"three")
    assert path.read_bytes() == b"two"
    assert names_in(tmp_path) == ["report.json"]


@settings(max_examples=10)
@given(st.binary(min_size=1, max_size=64))
def test_a_checksum_sees_every_single_bit(data: bytes) -> None:
    array = np.frombuffer(data, np.uint8).copy()
    seen = {checksum_array(array)}
    for bit in range(8 * array.size):
        array[bit // 8] ^= 1 << bit % 8
        seen.add(checksum_array(array))
        array[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 8 * array.size + 1
