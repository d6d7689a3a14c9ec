"""Parameters of the oracle: float64 arrays by the tensor table's names, rounded where a policy stores them smaller."""

from collections.abc import Callable, Mapping

import numpy as np

from tessera_shared.numerics import Numerics
from tessera_shared.reference.rounding import round_to

Params = Mapping[str, np.ndarray]
Tap = Callable[[str, np.ndarray], np.ndarray]
"""Sees every named value of the forward pass and returns what to go on with."""
Remember = Callable[[int, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(layer, new keys, new values) -> all keys and values to attend to: what a cache does."""


def params_from_numpy(arrays: Mapping[str, np.ndarray], *, dtype: str, device: str = "cpu") -> dict[str, np.ndarray]:
    """Return float64 copies holding only values of `dtype`. There is no device here but the CPU."""
    del device
    return {name: round_to(np.array(array, np.float64), dtype) for name, array in arrays.items()}


def params_to_numpy(params: Params) -> dict[str, np.ndarray]:
    """Return the parameters as they are."""
    return dict(params)


def compute_params(params: Params, *, numerics: Numerics) -> dict[str, np.ndarray]:
    """Return the parameters rounded to the compute dtype."""
    return {name: round_to(array, numerics.compute) for name, array in params.items()}
