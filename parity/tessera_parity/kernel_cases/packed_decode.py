"""Generation with packed weights as one op: a prompt, then single tokens through pages, beside the plain model.

Codes, scales and the other weights are inputs of both sides; the quantizers are tested elsewhere. The reference is the plain,
paired model on the weights written out: in float64 the truth, in the working dtype the plain implementation.

`fp8` rounds activations to E4M3 too. That belongs to the format, as rounding to the working dtype belongs to the dtype: the
truth does not do it, and the plain side does it where the kernels do. Against a truth that rounds, one activation halfway
between two codes would decide by falling to either side: the plain side may have none of those, and twice nothing is no
limit. What this cannot see, an error smaller than the activations' rounding, the cases of `fp8_matmul` see.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tessera_kernels.fp8_scaling import quantize_fp8
from tessera_kernels.quant_weight import QuantWeight, dequantize
from tessera_parity.families import family_spec, random_weights
from tessera_parity.kernel_cases import case as draws
from tessera_parity.kernel_cases.case import KernelOp, Tensors
from tessera_parity.kernel_fast import paged_logits
from tessera_parity.loading import Patch
from tessera_shared.numerics import FLOAT64, numerics_for
from tessera_shared.spec import ARCHITECTURES, ModelSpec
from tessera_shared.tensors import projection_names
from tessera_torch.fast import decode
from tessera_torch.fast.packed_weights import Fp8Weight, PackedWeight, pack_model
from tessera_torch.fast.projections import packed_projections
from tessera_torch.kernels import triton_ops
from tessera_torch.model.transformer import forward

ROWS, STEPS = 5, 2
WIDTH, FFN_WIDTH = 136, 168
"""More than one tile of 128 inputs, and enough numbers that one activation that falls to the other of two codes decides little."""

DRAWN = ("w4", "w8", "w8g128")
"""Formats of generated cases. Of `fp8`, see above, examples alone: the sides round an activation here and there to different
codes, and of 1,980 drawn models (over the reference products) one used 0.91 of the limit by that luck alone."""

BITS_AND_GROUP: dict[str, tuple[int, int | None]] = {"w8": (8, None), "w8g128": (8, 128), "w4": (4, 128)}
PROJECTED = ("attention.norm", "attention.mix", "mlp.norm", "mlp.act")
"""Ends of the names under which the plain model shows what its projections take."""


@dataclass(frozen=True)
class PackedCase:
    """A small model of one family in one format. The seed makes spec, weights and tokens."""

    format: str = "w4"  # of WEIGHT_FORMATS
    family: str = "llama"
    prompt: int = 5
    dtype: str = "float32"
    layout: str = "contiguous"
    values: str = "normal"
    seed: int = 0
    config: None = None


def spec_of(case: PackedCase) -> ModelSpec:
    """Return the case's model: a generated member of its family with two layers and heads that the kernels take."""
    spec = family_spec(case.family, np.random.default_rng((case.seed, 83)))
    return replace(
        spec, width=WIDTH, ffn_width=FFN_WIDTH, num_heads=2, num_kv_heads=1, head_width=16, num_layers=2,
        max_positions=128, window_from_layer=0,
    )  # fmt: skip


def tensors(case: PackedCase) -> Tensors:
    """Return codes and scales of every projection, and the other weights in the compute dtype.

    Projections keep the size of what they take: with larger scores the softmax would choose one key, and one rounding which.
    """
    arrays = random_weights(spec_of(case), np.random.default_rng((case.seed, 89)))
    for name in projection_names(spec_of(case)):
        arrays[name] /= arrays[name].std() * np.sqrt(arrays[name].shape[1])
    held = pack_model(arrays, weights=case.format, spec=spec_of(case), numerics=numerics_for(case.dtype), device="cpu")
    drawn = {f"weight {name}": value for name, value in held.params.items()}
    for name, weight in held.packed.items():
        drawn[f"codes {name}"] = weight.codes
        drawn[f"scales {name}"] = weight.scales if isinstance(weight, Fp8Weight) else weight.steps
    return {name: draws.lay_out(value, "contiguous") for name, value in drawn.items()}


def kernel(case: PackedCase, given: Tensors) -> Tensors:
    """Return logits of the prompt's last position and of each step, through the Triton kernels."""
    params, ops = _side(given, "weight"), triton_ops()
    packed = {name: _packed(case, given, name) for name in projection_names(spec_of(case))}
    logits_BTV = paged_logits(
        decode, params, _ids(case, given), prompt=case.prompt, spec=spec_of(case), numerics=numerics_for(case.dtype),
        ops=ops, project=packed_projections(params, packed, ops.packed()),
    )  # fmt: skip
    return {"logits": logits_BTV.to(getattr(torch, case.dtype))}


def reference(case: PackedCase, given: Tensors) -> Tensors:
    """Return the same of the plain model on the weights written out, in float64 where the weights are."""
    params = _side(given, "weight")
    dtype = next(iter(params.values())).dtype
    is_truth = dtype == torch.float64
    numerics = FLOAT64 if is_truth else numerics_for(case.dtype)
    for name in projection_names(spec_of(case)):
        params[name] = _written_out(_packed(case, given, name), dtype)
    tap = _rounding_tap if case.format == "fp8" and not is_truth else None
    logits_BTV = forward(params, _ids(case, given), spec=spec_of(case), numerics=numerics, tap=tap)
    return {"logits": logits_BTV[:, case.prompt - 1 :].to(dtype)}


def _packed(case: PackedCase, given: Tensors, name: str) -> PackedWeight:
    codes, scales = given[f"codes {name}"], given[f"scales {name}"]
    if case.format == "fp8":
        return Fp8Weight(codes=codes, scales=scales)
    bits, group = BITS_AND_GROUP[case.format]
    spec = spec_of(case)
    heads = spec.num_heads * spec.head_width
    width = {"o_proj": heads, "down_proj": spec.ffn_width}.get(name.split(".")[-2], spec.width)
    return QuantWeight(codes=codes, steps=scales, bits=bits, group=group, width=width)


def _written_out(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, QuantWeight):
        return dequantize(weight, dtype)
    working = torch.promote_types(dtype, torch.float32)
    return (weight.codes.to(working) * weight.scales.to(working)[:, None]).to(dtype)


def _rounding_tap(name: str, value: Tensor) -> Tensor:
    """Round what a projection takes to E4M3, with one scale for each token."""
    if not name.endswith(PROJECTED):
        return value
    codes_XD, scales_X = quantize_fp8(value.flatten(2).flatten(0, 1), scaling="row")
    return (codes_XD.float() * scales_X[:, None]).to(value.dtype).view(value.shape)


def _side(given: Tensors, side: str) -> Tensors:
    return {key.removeprefix(side + " "): tensor for key, tensor in given.items() if key.startswith(side + " ")}


def _ids(case: PackedCase, given: Tensors) -> Tensor:
    rng = np.random.default_rng((case.seed, 97))
    ids_BT = rng.integers(0, spec_of(case).vocab_size, (ROWS, case.prompt + STEPS)).astype(np.int32)
    return torch.as_tensor(ids_BT, device=next(iter(given.values())).device)


def _cases(gpu: bool) -> st.SearchStrategy[PackedCase]:
    return st.builds(
        PackedCase,
        format=st.sampled_from(DRAWN),
        family=st.sampled_from(ARCHITECTURES),
        prompt=st.sampled_from((1, 3, 7, 17, 62, 65) if gpu else (1, 3, 7, 17)),
        dtype=draws.dtypes("float32", "bfloat16"),
        seed=draws.seeds(),
    )


def _lengths(case: PackedCase, given: Tensors) -> Mapping[str, int]:
    """The longest way to a logit: every sum of the model."""
    del given
    spec = spec_of(case)
    longest = max(spec.width, spec.ffn_width, spec.num_heads * spec.head_width, case.prompt + STEPS)
    return {"logits": longest * (4 * spec.num_layers + 2)}


def _bug(find: str, instead: str) -> Patch:
    return Patch(file="tessera_torch/fast/projections.py", find=find, replace=instead)


OP = KernelOp(
    name="packed_decode",
    cases=_cases,
    tensors=tensors,
    kernel=kernel,
    reference=reference,
    examples=(
        PackedCase(format="fp8", family="qwen2", prompt=3, dtype="bfloat16", seed=1),
        PackedCase(format="w8", seed=2),
        PackedCase(format="w8g128", family="mistral", prompt=1, dtype="bfloat16", seed=3),
        PackedCase(format="w4", family="qwen3", dtype="bfloat16", seed=4),
        PackedCase(format="fp8", seed=5),
        PackedCase(format="w4", family="qwen2", prompt=63, seed=6),  # the last step is on a second page
        PackedCase(format="fp8", family="qwen3", dtype="bfloat16", seed=7),
    ),
    bug_cases=(PackedCase(format="fp8", family="qwen2", prompt=1, dtype="bfloat16", seed=1),),
    lengths=_lengths,
    bugs=(
        _bug("packed[name + ", 'packed["model.layers.0." + name.split(".", 3)[3] + '),
        _bug("return y if bias_F is None else y + bias_F", "return y"),
        _bug("scales_X, weight.scales", "scales_X.amax().expand_as(scales_X), weight.scales"),
    ),
)
"""The cases of generation with packed weights."""
