"""SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202)."""

import numpy as np

from tessera_shared.numerics import Numerics
from tessera_shared.reference.linear import linear
from tessera_shared.reference.norms import rms_norm
from tessera_shared.reference.params import Params, Tap
from tessera_shared.reference.rounding import round_to
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import layer_prefix


def swiglu(gate_BTF: np.ndarray, up_BTF: np.ndarray, *, numerics: Numerics) -> np.ndarray:
    """silu(gate) * up with silu(g) = g / (1 + exp(-g)), rounded once."""
    positive = gate_BTF.real >= 0.0
    small = np.exp(np.where(positive, -gate_BTF, gate_BTF))  # never overflows
    sigmoid = np.where(positive, 1.0, small) / (1.0 + small)
    return round_to(gate_BTF * sigmoid * up_BTF, numerics.compute)


def mlp_block(
    params: Params, x_BTD: np.ndarray, *, layer: int, spec: ModelSpec, numerics: Numerics, tap: Tap | None = None
) -> np.ndarray:
    """Norm, gate and up projections, SwiGLU and down projection of one layer, without the residual."""
    prefix, name = layer_prefix(layer), f"layers.{layer}.mlp."

    def see(what: str, value: np.ndarray) -> np.ndarray:
        return value if tap is None else tap(name + what, value)

    def project(which: str, x: np.ndarray) -> np.ndarray:
        weight = f"{prefix}mlp.{which}_proj."
        return linear(x, params[weight + "weight"], params.get(weight + "bias"), numerics=numerics)

    gain_D = params[prefix + "post_attention_layernorm.weight"]
    normed = see("norm", rms_norm(x_BTD, gain_D, eps=spec.norm_eps, numerics=numerics))
    gate = see("gate", project("gate", normed))
    up = see("up", project("up", normed))
    act = see("act", swiglu(gate, up, numerics=numerics))
    return see("down", project("down", act))
