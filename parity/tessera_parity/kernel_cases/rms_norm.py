"""Cases of the RMSNorm kernel: with and without the residual add, gain before and after the cast, wide rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tessera_kernels.reference import rms_norm as plain
from tessera_kernels.triton import rms_norm as fused
from tessera_kernels.triton.rms_norm import CONFIGS, BackwardConfig, ForwardConfig, NormConfig
from tessera_parity.kernel_cases.case import KernelOp, Tensors, draw, dtypes, layouts, seeds, sizes, value_kinds
from tessera_parity.loading import Patch

KERNELS = "tessera_kernels/triton/_rms_norm_kernels.py"
SMALL_TILES = NormConfig(ForwardConfig(64, 4, 4), BackwardConfig(64, 2, 4, 1, 2))
"""Lets the interpreter see several tiles, persistent programs and looped rows at small sizes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """rms_norm, or add_rms_norm when `add`, of x [rows, width], with all gradients."""

    dtype: str = "float32"
    layout: str = "contiguous"
    values: str = "normal"  # of x and the residual
    seed: int = 0
    rows: int = 3
    width: int = 8
    eps: float = 1e-6
    add: bool = False
    gain_after_cast: bool = False
    config: Any = None  # a NormConfig of the module that is judged


def cases_of(gpu: bool, small_tiles: object) -> SearchStrategy[Case]:
    """Draw cases; off a GPU half of them in the configuration `small_tiles`."""
    return st.builds(
        Case,
        dtype=dtypes(),
        layout=layouts(),
        values=value_kinds(),
        seed=seeds(),
        rows=sizes(tile=8, most=3000 if gpu else 20, least=0),
        width=sizes(tile=1024, most=20000) | st.sampled_from([32769, 65536]) if gpu else sizes(tile=64, most=200),
        eps=st.sampled_from([1e-6, 1e-5]),
        add=st.booleans(),
        gain_after_cast=st.booleans(),
        config=st.none() if gpu else st.sampled_from([None, small_tiles]),
    )


def _tensors(case: Case) -> Tensors:
    shape = (case.rows, case.width)
    found = {
        "x": draw(case, "x", shape),
        "gain": draw(case, "gain", shape[1:], values="normal"),
        "dy": draw(case, "dy", shape, values="normal"),
    }
    if case.add:
        found |= {"residual": draw(case, "residual", shape), "dtotal": draw(case, "dtotal", shape, values="normal")}
    return found


def run(module: ModuleType, case: Case, tensors: Tensors) -> Tensors:
    """Return outputs and gradients of a module's rms_norm or add_rms_norm."""
    names = [name for name in ("x", "residual", "gain") if name in tensors]
    leaves = [tensors[name].detach().requires_grad_() for name in names]
    function = module.add_rms_norm if case.add else module.rms_norm
    made = function(*leaves, eps=case.eps, gain_after_cast=case.gain_after_cast, config=case.config)
    outputs = dict(zip(("y", "total"), made, strict=True)) if case.add else {"y": made}
    upstream = [tensors["dy"], tensors["dtotal"]] if case.add else [tensors["dy"]]
    gradients = torch.autograd.grad(list(outputs.values()), leaves, upstream)
    found = outputs | {f"grad {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}


def _magnitudes(case: Case, tensors: Tensors) -> Mapping[str, float]:
    """dx is a difference: as large as dy * gain / root mean square."""
    if 0 in tensors["x"].shape:
        return {}
    x = tensors["x"].double() + (tensors["residual"].double() if case.add else 0.0)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + case.eps)
    terms = (tensors["dy"].double() * tensors["gain"].double() * scale).abs()
    size = float(torch.where(terms.isfinite(), terms, 0.0).max())
    return {"grad x": size, "grad residual": size}


def _bug(find: str, replace: str) -> Patch:
    return Patch(file=KERNELS, find=find, replace=replace)


OP = KernelOp(
    name="rms_norm",
    cases=lambda gpu: cases_of(gpu, SMALL_TILES),
    tensors=_tensors,
    kernel=lambda case, tensors: run(fused, case, tensors),
    reference=lambda case, tensors: run(plain, case, tensors),
    row_independent=("y", "grad x"),
    row_inputs=("x", "residual", "dy", "dtotal"),
    configs=lambda: CONFIGS,
    magnitudes=_magnitudes,
    examples=(
        Case(rows=5, width=100),
        Case(rows=9, width=199, dtype="bfloat16", add=True, gain_after_cast=True, layout="sliced"),
        Case(rows=17, width=128, dtype="float16", values="mixed", gain_after_cast=True, config=SMALL_TILES),
        Case(rows=7, width=65, dtype="bfloat16", add=True, config=SMALL_TILES, layout="offset1"),
        Case(rows=3, width=1, values="constant", layout="transposed"),
        Case(rows=4, width=64, dtype="float16", values="extreme", add=True),
        Case(rows=0, width=7, add=True),
        Case(rows=2, width=8193),  # H200: two stages of two float32 tiles did not fit shared memory
        Case(rows=1201, width=64, dtype="bfloat16"),  # more blocks of rows than persistent programs on a GPU
        Case(rows=13, width=4096, dtype="bfloat16", gain_after_cast=True, add=True),
        Case(rows=3, width=300, dtype="bfloat16", gain_after_cast=True, config=SMALL_TILES),
    ),
    bug_cases=(
        Case(rows=5, width=100),
        Case(rows=5, width=100, add=True),
        Case(rows=9, width=60, config=SMALL_TILES),
        Case(rows=2, width=100, config=SMALL_TILES),
    ),
    bugs=(
        _bug(
            "tl.sum(lifted * lifted, axis=1) / D + eps",
            "tl.sum(lifted * lifted, axis=1) / BLOCK_D + eps",
        ),
        _bug("change = ((dunit - unit * mean) * scale).to(dtype)", "change = (dunit * scale).to(dtype)"),
        _bug("squares += lifted * lifted", "squares = lifted * lifted"),
        _bug(
            "inside = (rows < num_partials)[:, None]",
            "inside = (rows < num_partials - 1)[:, None]",
        ),
    ),
    cpu_bugs=(
        _bug(
            "        dgain += upstream * _rounded_unit(unit, dtype, GAIN_AFTER_CAST)\n        mean",
            "        dgain = upstream * _rounded_unit(unit, dtype, GAIN_AFTER_CAST)\n        mean",
        ),
    ),
)
