"""Projection weights in 8 or 4 bits, quantized once, from the numbers as they are stored.

    w8      8 bits, one scale an output                                                  `tessera_kernels.quant_weight`
    w8g128  8 bits, one scale for each 128 inputs of an output
    w4      4 bits, one scale and zero point for each 128 inputs of an output (AWQ's form)
    fp8     E4M3, one scale an output; what comes in becomes E4M3 too                    `tessera_kernels.fp8_scaling`

These are the seven projections of every layer (`projection_names`). Embedding, unembedding, norms and biases stay in the
compute dtype. The products are `tessera_torch.fast.projections`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tessera_kernels.fp8_scaling import quantize_fp8
from tessera_kernels.quant_weight import QuantWeight, quantize_w4, quantize_w8
from tessera_shared.errors import KernelError
from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import projection_names
from tessera_torch.model.dtypes import dtype_of
from tessera_torch.model.params import Params, params_from_numpy


@dataclass(frozen=True, kw_only=True)
class Fp8Weight:
    """A weight of F outputs and D inputs: scales times codes."""

    codes: Tensor  # float8_e4m3fn [F, D]
    scales: Tensor  # float32 [F]

    @property
    def num_bytes(self) -> int:
        """Bytes that a product must read of it."""
        return _bytes_of(self.codes) + _bytes_of(self.scales)


PackedWeight = QuantWeight | Fp8Weight


@dataclass(frozen=True, kw_only=True)
class PackedModel:
    """A model's weights, each in one of the two mappings, by the tensor table's names."""

    params: Params  # compute dtype
    packed: Mapping[str, PackedWeight]
    told: str  # one line for a person: what became of what


def pack_model(
    arrays: Mapping[str, np.ndarray], *, weights: str, spec: ModelSpec, numerics: Numerics, device: str
) -> PackedModel:
    """Return the model on `device` with its projections in a format of `WEIGHT_FORMATS`.

    Weights are brought to the device one by one: of the projections it never holds more than one beside the packed ones.
    Waits for the device. Raises `KernelError` with a tensor's name where it holds NaN or an infinity.
    """
    names = projection_names(spec)
    quantize = _QUANTIZERS[weights]
    packed = {name: _packed(name, arrays[name], quantize, device) for name in names}
    rest = {name: array for name, array in arrays.items() if name not in packed}
    params = params_from_numpy(rest, dtype=numerics.compute, device=device)
    plain = sum(arrays[name].size for name in names) * dtype_of(numerics.compute).itemsize
    held, others = sum(weight.num_bytes for weight in packed.values()), sum(map(_bytes_of, params.values()))
    told = (
        f"weights: {weights}, {len(packed)} projections, {_size(plain)} in {numerics.compute} -> {_size(held)}; "
        f"embeddings, norms and biases {_size(others)}"
    )
    return PackedModel(params=params, packed=packed, told=told)


def _packed(name: str, array: np.ndarray, quantize: Callable[[Tensor], PackedWeight], device: str) -> PackedWeight:
    weight_FD = params_from_numpy({name: array}, dtype="float32", device=device)[name]
    try:
        return quantize(weight_FD)
    except KernelError as error:
        raise KernelError(f"{name}: {error}") from None


def _fp8(weight_FD: Tensor) -> Fp8Weight:
    codes, scales = quantize_fp8(weight_FD, scaling="row", check_finite=True)
    return Fp8Weight(codes=codes, scales=scales)


def _w8g128(weight_FD: Tensor) -> QuantWeight:
    return quantize_w8(weight_FD, group=128)


_QUANTIZERS: dict[str, Callable[[Tensor], PackedWeight]] = {
    "w8": quantize_w8, "w8g128": _w8g128, "w4": quantize_w4, "fp8": _fp8,
}  # fmt: skip


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(num_bytes: int) -> str:
    """Return a size as a person reads it, in powers of 1024."""
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= one:
            return f"{num_bytes / one:.1f} {unit}"
    return f"{num_bytes} B"
