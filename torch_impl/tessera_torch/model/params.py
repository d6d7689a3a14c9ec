"""Parameters: one flat dict by the tensor table's names, and the way in and out through NumPy."""

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from tessera_shared.numerics import Numerics
from tessera_torch.model.dtypes import dtype_of

Params = Mapping[str, Tensor]
Tap = Callable[[str, Tensor], Tensor]
"""Sees every named value of the forward pass and returns what to go on with."""
Remember = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, new keys, new values) -> all keys and values to attend to: what a cache does."""


def params_from_numpy(arrays: Mapping[str, np.ndarray], *, dtype: str, device: str = "cpu") -> dict[str, Tensor]:
    """Copy arrays (bfloat16 as `ml_dtypes.bfloat16`) to `device` as `dtype`."""
    return {name: _from_numpy(array).to(device=device, dtype=dtype_of(dtype)) for name, array in arrays.items()}


def params_to_numpy(params: Params) -> dict[str, np.ndarray]:
    """Copy parameters out; bfloat16 comes as `ml_dtypes.bfloat16`, bit for bit."""
    return {name: _to_numpy(tensor.detach().cpu()) for name, tensor in params.items()}


def compute_params(params: Params, *, numerics: Numerics) -> dict[str, Tensor]:
    """Return the parameters cast to the compute dtype; gradients flow through the cast."""
    compute = dtype_of(numerics.compute)
    return {name: tensor.to(compute) for name, tensor in params.items()}


def _from_numpy(array: np.ndarray) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _to_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return np.array(tensor.contiguous().view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    return np.array(tensor.numpy())
