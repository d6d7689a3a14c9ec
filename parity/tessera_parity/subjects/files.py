"""Files: specs through config.json, weights through the directory format, and through each half's arrays, to the
bit."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tessera_parity.exact import Equalities
from tessera_parity.families import family_spec
from tessera_parity.result import Check
from tessera_parity.subjects.context import Context, Subject
from tessera_shared.hf_config import config_from_spec, spec_from_config
from tessera_shared.spec import ARCHITECTURES
from tessera_shared.tensors import tensor_table
from tessera_shared.weights import load_model, save_model

_DTYPES: dict[str, Any] = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def run(context: Context) -> Iterator[Check]:
    """Yield config, directory and array round trips."""
    configs = Equalities("files", "config.json and back", ("spec", "config.json"))
    for index in range(context.budget(quick=40, default=200, full=800)):
        spec = family_spec(ARCHITECTURES[index % 4], np.random.default_rng((context.seed, 29, index)))
        configs.values(spec_from_config(json.loads(json.dumps(config_from_spec(spec)))), spec, f"case {index}")
    yield configs.check("generated specs of the four families")
    yield from _weights(context)


def _weights(context: Context) -> Iterator[Check]:
    directory = Equalities("files", "weight directory", ("memory", "directory"))
    through = {half.name: Equalities("files", "arrays in and out", ("numpy", half.name)) for half in context.halves}
    for index in range(context.budget(quick=6, default=24, full=60)):
        context.advance(f"files: directory {index + 1}")
        rng = np.random.default_rng((context.seed, 31, index))
        dtype = tuple(_DTYPES)[index % 3]
        spec = family_spec(ARCHITECTURES[index % 4], rng)
        arrays = {name: _any_bits(rng, info.shape, dtype) for name, info in tensor_table(spec).items()}
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder) / "model", spec, arrays, max_shard_bytes=(None, 4096)[index % 2])
            loaded = load_model(Path(folder) / "model")
            directory.values(loaded.spec, spec, f"case {index}: spec")
            directory.sequences(sorted(loaded.arrays), sorted(arrays), f"case {index}: names")
            for name, value in arrays.items():
                directory.arrays(np.asarray(loaded.arrays[name]), value, f"case {index}: {name}")
        for half in context.halves:
            module = half.module("model.params")
            back = module.params_to_numpy(module.params_from_numpy(arrays, dtype=dtype, device=half.device))
            for name, value in arrays.items():
                through[half.name].arrays(back[name], value, f"case {index}: {name}")
    yield directory.check("float64, float32 and bfloat16; one file and several")
    for equalities in through.values():
        yield equalities.check()


def _any_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Values of every size: tiny, huge, negative zero; finite, because weights with NaN are refused."""
    value = rng.standard_normal(shape) * 10.0 ** rng.uniform(-20, 20, shape)
    value.ravel()[:1] = -0.0
    return value.astype(_DTYPES[dtype])


SUBJECT = Subject(name="files", about="config.json and weight directories, in and out, to the bit", run=run)
