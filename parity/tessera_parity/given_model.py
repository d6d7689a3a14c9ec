"""The model that `--model` names: a preset or a Hugging Face directory, whole or its first layers, as a case like any
other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tessera_parity.cases import ModelCase
from tessera_shared.errors import ParityError
from tessera_shared.objectives import IGNORE_INDEX
from tessera_shared.presets import PRESETS
from tessera_shared.spec import ModelSpec
from tessera_shared.stored_model import open_model
from tessera_shared.tensors import tensor_table
from tessera_shared.weights import load_model

Arrays = dict[str, np.ndarray[Any, Any]]


def given_case(model: str, *, seed: int, rows: int = 2, positions: int = 24) -> ModelCase:
    """Return the case of `--model NAME_OR_DIRECTORY[:LAYERS]`, with random tokens and one ignored label a row.

    A preset's weights are drawn around its initialization; a directory's are its own, widened to float64.
    """
    spec, arrays = given_weights(model, seed=seed)
    rng = np.random.default_rng((seed, 53))
    positions = min(positions, spec.max_positions)
    token_ids_BT = rng.integers(0, spec.real_vocab_size or spec.vocab_size, (rows, positions)).astype(np.int32)
    labels_BT = np.roll(token_ids_BT, -1, axis=1)
    labels_BT[:, -1] = IGNORE_INDEX
    positions_BT = np.broadcast_to(np.arange(positions, dtype=np.int32), labels_BT.shape).copy()
    return ModelCase(
        spec=spec,
        params=arrays,
        token_ids_BT=token_ids_BT,
        labels_BT=labels_BT,
        positions_BT=positions_BT,
        segments_BT=np.zeros_like(positions_BT),
        seed=(seed, 53),
        notes=(model,),
    )


def given_weights(model: str, *, seed: int) -> tuple[ModelSpec, Arrays]:
    """Return spec and float64 weights of `NAME_OR_DIRECTORY[:LAYERS]`."""
    name, layers = _split(model)
    if name in PRESETS:
        spec = _cut(PRESETS[name], layers)
        rng = np.random.default_rng((seed, 59))
        return spec, {info.name: _drawn(info.init, info.shape, spec, rng) for info in tensor_table(spec).values()}
    _check_directory(name)
    loaded = load_model(Path(name))
    spec = _cut(loaded.spec, layers)
    return spec, {key: np.asarray(loaded.arrays[key], dtype=np.float64) for key in tensor_table(spec)}


def check_model(model: str) -> None:
    """Refuse a `--model` that is neither a preset nor a directory that opens; reads headers, no weights.

    Raises `ParityError` for the former and `FormatError`, naming the file, for the latter.
    """
    name, _ = _split(model)
    if name not in PRESETS:
        _check_directory(name)
        open_model(name)


def _check_directory(name: str) -> None:
    if not Path(name).is_dir():
        raise ParityError(
            f"model = {name!r}: expected a preset ({', '.join(PRESETS)}) or a directory in the Hugging Face layout, because "
            "nothing else has weights; try --model nano"
        )


def _split(model: str) -> tuple[str, int | None]:
    name, colon, layers = model.rpartition(":")
    return (name, int(layers)) if colon and layers.isdigit() and int(layers) > 0 else (model, None)


def _cut(spec: ModelSpec, layers: int | None) -> ModelSpec:
    return spec if layers is None else replace(spec, num_layers=min(layers, spec.num_layers))


def _drawn(init: str, shape: tuple[int, ...], spec: ModelSpec, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Values of the initializer's size, but no tensor trivial: gains are not all one, biases not all zero."""
    values = rng.standard_normal(shape)
    values *= spec.init_std if init == "normal" else 0.1
    return values + 1.0 if init == "ones" else values
