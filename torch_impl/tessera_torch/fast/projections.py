"""The products of a layer's seven projections, with weights as they are or packed."""

from collections.abc import Callable, Mapping

from torch import Tensor

from tessera_kernels.fp8_scaling import quantize_fp8
from tessera_kernels.quant_weight import QuantWeight
from tessera_torch.fast.packed_weights import PackedWeight
from tessera_torch.kernels import PackedOps
from tessera_torch.model.linear import linear
from tessera_torch.model.params import Params

Project = Callable[[str, Tensor], Tensor]
"""(name such as "model.layers.0.mlp.up_proj", x [..., D]) -> x W^T [..., F] in x's dtype, then the bias where there is one."""


def projections(params: Params) -> Project:
    """Return the projections of weights as they are."""

    def project(name: str, x: Tensor) -> Tensor:
        return linear(x, params[name + ".weight"], params.get(name + ".bias"))

    return project


def packed_projections(params: Params, packed: Mapping[str, PackedWeight], ops: PackedOps) -> Project:
    """Return the projections of packed weights; biases are among `params`."""

    def project(name: str, x: Tensor) -> Tensor:
        y, bias_F = _product(x, packed[name + ".weight"], ops), params.get(name + ".bias")
        return y if bias_F is None else y + bias_F

    return project


def _product(x: Tensor, weight: PackedWeight, ops: PackedOps) -> Tensor:
    """Return x W^T. For E4M3 weights each token's numbers become E4M3 with a scale of their own, so that no token's answer
    depends on its neighbors; partial sums go to float32 ("accurate"), because the tensor cores' own sum has 13 fraction
    bits, and its error grows with the width."""
    if isinstance(weight, QuantWeight):
        y: Tensor = ops.quant_matmul(x, weight)
        return y
    codes_XD, scales_X = quantize_fp8(x.flatten(0, -2), scaling="row")
    y_XF: Tensor = ops.fp8_matmul(
        codes_XD, weight.codes, scales_X, weight.scales, scaling="row", accumulation="accurate", out_dtype=x.dtype
    )
    return y_XF.view(*x.shape[:-1], -1)
