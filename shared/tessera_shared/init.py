"""Initial weights, made in NumPy, once: the same bits for every framework, world size and order of tensors."""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from tessera_shared.errors import SpecError
from tessera_shared.numerics import DTYPES
from tessera_shared.randomness import stream_key, uniforms
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import TensorInfo, tensor_table

_PAIRS_AT_ONCE = 1 << 18


def initial_weights(spec: ModelSpec, *, seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return every weight of the tensor table: matrices normal with `spec.init_std`, gains one, biases zero.

    Tensor `name` draws from the random stream `init/name`, so its values depend on (seed, name, shape) alone. They are
    made in float64 and rounded to `dtype` at the end. The uniforms are exact everywhere; NumPy's log, sin and cos may
    differ in the last bit of float64 between processors.
    """
    if dtype not in DTYPES:
        raise SpecError(
            f"dtype = {dtype!r}: expected one of {', '.join(DTYPES)}, because weights are stored so; try 'float32'"
        )
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return {name: _initial(info, spec.init_std, seed, kind) for name, info in tensor_table(spec).items()}


def standard_normals(key_2: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Yield `count` standard normals of a stream in pieces, float64, by Box and Muller (1958).

    Pair i takes uniforms 2i and 2i + 1: sqrt(-2 ln(1 - u)) (cos 2 pi v, sin 2 pi v), with 1 - u in (0, 1].
    """
    pairs = (count + 1) // 2
    for first in range(0, pairs, _PAIRS_AT_ONCE):
        size = min(_PAIRS_AT_ONCE, pairs - first)
        uniforms_X2 = uniforms(key_2, 2 * first, 2 * size, dtype="float64").reshape(-1, 2)
        radius_X = np.sqrt(-2.0 * np.log1p(-uniforms_X2[:, 0]))
        angle_X = 2.0 * np.pi * uniforms_X2[:, 1]
        normals_X = np.stack([radius_X * np.cos(angle_X), radius_X * np.sin(angle_X)], axis=1).reshape(-1)
        yield normals_X[: count - 2 * first]


def _initial(info: TensorInfo, std: float, seed: int, dtype: np.dtype) -> np.ndarray:
    if info.init == "ones":
        return np.ones(info.shape, dtype)
    if info.init == "zeros":
        return np.zeros(info.shape, dtype)
    weights = np.empty(info.shape, dtype)
    flat_X, at = weights.reshape(-1), 0
    for normals_X in standard_normals(stream_key(seed, f"init/{info.name}"), weights.size):
        flat_X[at : at + normals_X.size] = (std * normals_X).astype(dtype)
        at += normals_X.size
    return weights
