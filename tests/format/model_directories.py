"""Small models and their directories on disk, for the tests beside this file."""

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from tessera_shared import tensor_file
from tessera_shared.errors import FormatError
from tessera_shared.init import initial_weights
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import tensor_table
from tessera_shared.weights import load_model

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


def outcome(directory: Path) -> str | None:
    """Load a directory; return the complaint, or None if it loaded with every bit as it was saved."""
    try:
        model = load_model(directory)
    except FormatError as error:
        return str(error)
    assert_same_bits(made(), {name: np.asarray(array) for name, array in model.arrays.items()})
    assert model.spec == SPEC
    return None
