"""SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202)."""

from torch import Tensor
from torch.nn import functional

from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import layer_prefix
from tessera_torch.model.dtypes import dtype_of
from tessera_torch.model.linear import linear
from tessera_torch.model.norms import rms_norm
from tessera_torch.model.params import Params, Tap


def swiglu(gate_BTF: Tensor, up_BTF: Tensor, *, numerics: Numerics) -> Tensor:
    """silu(gate) * up with silu(g) = g / (1 + exp(-g)), in the activation dtype, rounded once to compute."""
    up = dtype_of(numerics.activation)
    return (functional.silu(gate_BTF.to(up)) * up_BTF.to(up)).to(dtype_of(numerics.compute))


def mlp_block(
    params: Params, x_BTD: Tensor, *, layer: int, spec: ModelSpec, numerics: Numerics, tap: Tap | None = None
) -> Tensor:
    """Norm, gate and up projections, SwiGLU and down projection of one layer, without the residual."""
    prefix, name = layer_prefix(layer), f"layers.{layer}.mlp."

    def see(what: str, value: Tensor) -> Tensor:
        return value if tap is None else tap(name + what, value)

    def project(which: str, x: Tensor) -> Tensor:
        weight = f"{prefix}mlp.{which}_proj."
        return linear(x, params[weight + "weight"], params.get(weight + "bias"))

    gain_D = params[prefix + "post_attention_layernorm.weight"]
    normed_BTD = see("norm", rms_norm(x_BTD, gain_D, eps=spec.norm_eps, numerics=numerics))
    gate_BTF = see("gate", project("gate", normed_BTD))
    up_BTF = see("up", project("up", normed_BTD))
    act_BTF = see("act", swiglu(gate_BTF, up_BTF, numerics=numerics))
    return see("down", project("down", act_BTF))
