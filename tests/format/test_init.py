"""Initial weights: the right distribution, and the same numbers whatever the order, framework or world size."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera_parity.budget import chance_limit, distribution_limit
from tessera_shared.errors import SpecError
from tessera_shared.init import initial_weights, standard_normals
from tessera_shared.presets import PRESETS
from tessera_shared.randomness import stream_key, uniforms
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import tensor_table

SPEC = ModelSpec(
    architecture="llama", vocab_size=37, num_layers=2, width=12, ffn_width=20, num_heads=3, num_kv_heads=1,
    head_width=6, max_positions=16, qkv_bias=True, output_bias=True, init_std=0.05,
)  # fmt: skip


@given(st.integers(0, 2**64 - 1))
def test_every_tensor_of_the_table_is_there_with_its_shape_gains_one_and_biases_zero(seed: int) -> None:
    weights = initial_weights(SPEC, seed=seed)
    assert {name: array.shape for name, array in weights.items()} == {n: i.shape for n, i in tensor_table(SPEC).items()}
    for name, info in tensor_table(SPEC).items():
        assert weights[name].dtype == np.float32
        if info.init != "normal":
            assert np.all(weights[name] == {"ones": 1.0, "zeros": 0.0}[info.init])
        else:
            assert np.unique(weights[name]).size > 0.9 * weights[name].size


def test_a_tensor_does_not_depend_on_the_rest_of_the_model() -> None:
    small = initial_weights(SPEC, seed=3)
    large = initial_weights(replace(SPEC, num_layers=4, vocab_size=41, tie_embeddings=True), seed=3)
    for name in small.keys() & large.keys():
        rows = min(len(small[name]), len(large[name]))
        assert np.array_equal(small[name][:rows], large[name][:rows]), name


def test_tensors_and_seeds_draw_from_different_streams() -> None:
    weights = initial_weights(SPEC, seed=3)
    first, second = (weights[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
    assert not np.any(first == second)
    assert not np.any(first == initial_weights(SPEC, seed=4)["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("count", [1, 2, 3, 1001])
def test_normals_are_box_and_mullers_from_consecutive_uniforms(count: int) -> None:
    key = stream_key(11, "init/x")
    drawn = np.concatenate(list(standard_normals(key, count)))
    pairs = uniforms(key, 0, 2 * ((count + 1) // 2)).reshape(-1, 2)
    radius, angle = np.sqrt(-2 * np.log1p(-pairs[:, 0])), 2 * np.pi * pairs[:, 1]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
    assert np.array_equal(drawn, expected[:count])


def test_pieces_join_without_a_seam() -> None:
    from tessera_shared import init

    key, count = stream_key(0, "init/long"), 2 * init._PAIRS_AT_ONCE + 5
    pieces = list(standard_normals(key, count))
    assert [piece.size for piece in pieces] == [2 * init._PAIRS_AT_ONCE, 5]
    again = uniforms(key, 2 * init._PAIRS_AT_ONCE, 2)
    assert pieces[1][0] == np.sqrt(-2 * np.log1p(-again[0])) * np.cos(2 * np.pi * again[1])


def test_the_numbers_are_normal_with_the_specs_deviation() -> None:
    """Kolmogorov and Smirnov's distance over 200k numbers, then the mean and deviation of one tensor."""
    from math import erf

    drawn = np.sort(np.concatenate(list(standard_normals(stream_key(5, "init/ks"), 200_000))))
    below = np.array([0.5 * (1 + erf(value / 2**0.5)) for value in drawn[::10]])
    assert np.abs(below - np.arange(0, drawn.size, 10) / drawn.size).max() < distribution_limit(drawn.size)
    embedding = initial_weights(PRESETS["nano"], seed=0)["model.embed_tokens.weight"].astype(np.float64)
    size = embedding.size
    assert abs(embedding.std() / PRESETS["nano"].init_std - 1) < chance_limit() / (2 * size) ** 0.5
    assert abs(embedding.mean()) < chance_limit() * PRESETS["nano"].init_std / size**0.5


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_each_dtype_is_the_float64_weights_rounded(dtype: str) -> None:
    truth = initial_weights(SPEC, seed=9, dtype="float64")
    for name, array in initial_weights(SPEC, seed=9, dtype=dtype).items():
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        assert array.dtype == kind
        assert np.array_equal(array, truth[name].astype(kind))


def test_an_unknown_dtype_or_seed_is_refused() -> None:
    with pytest.raises(SpecError, match="dtype = 'float16'"):
        initial_weights(SPEC, seed=0, dtype="float16")
    with pytest.raises(SpecError, match="seed = -1"):
        initial_weights(SPEC, seed=-1)
