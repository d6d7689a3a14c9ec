"""The products of a layer's seven projections, with weights as they are or packed."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from tessera_kernels.fp8_scaling import quantize_fp8
from tessera_kernels.quant_weight import QuantWeight
from tessera_torch.fast.packed_weights import Fp8Weight, PackedWeight
from tessera_torch.kernels import PackedOps
from tessera_torch.model.linear import linear
from tessera_torch.model.params import Params


class Project(Protocol):
    """The products of one input with the projections that take it."""

    def __call__(self, x: Tensor, *names: str) -> list[Tensor]:
        """Return x W^T [..., F] in x's dtype for each name ("model.layers.0.mlp.up_proj"), then the bias where there is one."""
        ...


def projections(params: Params) -> Project:
    """Return the projections of weights as they are."""

    def project(x: Tensor, *names: str) -> list[Tensor]:
        return [linear(x, params[name + ".weight"], params.get(name + ".bias")) for name in names]

    return project


def packed_projections(params: Params, packed: Mapping[str, PackedWeight], ops: PackedOps) -> Project:
    """Return the projections of packed weights; biases are among `params`."""

    def project(x: Tensor, *names: str) -> list[Tensor]:
        products = _products(x, [packed[name + ".weight"] for name in names], ops)
        return [_with_bias(y, params.get(name + ".bias")) for name, y in zip(names, products, strict=True)]

    return project


def _with_bias(y: Tensor, bias_F: Tensor | None) -> Tensor:
    return y if bias_F is None else y + bias_F


def _products(x: Tensor, weights: Sequence[PackedWeight], ops: PackedOps) -> list[Tensor]:
    """Return x W^T for each weight. For E4M3 weights each token's numbers become E4M3 once, with a scale of their own, so
    that no token's answer depends on its neighbors; partial sums go to float32 ("accurate"), because the tensor cores' own
    sum has 13 fraction bits, and its error grows with the width."""
    if all(isinstance(weight, QuantWeight) for weight in weights):
        return [ops.quant_matmul(x, weight) for weight in weights]
    codes_XD, scales_X = quantize_fp8(x.flatten(0, -2), scaling="row")
    options = {"scaling": "row", "accumulation": "accurate", "out_dtype": x.dtype}
    return [
        ops.fp8_matmul(codes_XD, weight.codes, scales_X, weight.scales, **options).view(*x.shape[:-1], -1)
        for weight in weights
        if isinstance(weight, Fp8Weight)
    ]
