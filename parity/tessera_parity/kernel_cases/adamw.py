"""Cases of the flat AdamW kernel: sizes around a block, gradients in three dtypes, clipping factor, decay, copy-out."""

from dataclasses import dataclass
from types import ModuleType

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from tessera_kernels.reference import adamw as plain
from tessera_kernels.triton import adamw as fused
from tessera_kernels.triton.adamw import CONFIGS, AdamWConfig
from tessera_parity.kernel_cases.case import (
    KernelOp,
    Tensors,
    draw,
    drawn_values,
    dtypes,
    generator,
    lay_out,
    layouts,
    seeds,
    sizes,
    value_kinds,
)
from tessera_parity.loading import Patch

KERNELS = "tessera_kernels/triton/adamw.py"
SMALL_BLOCKS = AdamWConfig(64, 4, 1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One update of a shard of `count` elements after `step` updates; `dtype` is the gradient's and the copy's."""

    dtype: str = "float32"
    layout: str = "contiguous"
    values: str = "normal"  # of the gradient
    seed: int = 0
    count: int = 100
    step: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.1
    scaled: bool = False
    copied: bool = False
    config: AdamWConfig | None = None


def _cases(gpu: bool) -> SearchStrategy[Case]:
    return st.builds(
        Case,
        dtype=dtypes(),
        layout=layouts("contiguous", "offset1"),
        values=value_kinds("normal", "small", "large", "constant", "ties"),
        seed=seeds(),
        count=sizes(tile=1024 if gpu else 64, most=3_000_000 if gpu else 300, least=0),
        step=st.sampled_from([0, 1, 9, 1000, 100_000]),
        beta1=st.sampled_from([0.9, 0.0]),
        beta2=st.sampled_from([0.999, 0.95]),
        weight_decay=st.sampled_from([0.1, 0.0]),
        scaled=st.booleans(),
        copied=st.booleans(),
        config=st.sampled_from([None, *CONFIGS] if gpu else [None, SMALL_BLOCKS]),
    )


def _tensors(case: Case) -> Tensors:
    def state(name: str, scale: float) -> Tensor:
        numbers = drawn_values((case.count,), "normal", generator(case.seed, name)) * scale
        return lay_out(numbers.square() if name == "second" else numbers, case.layout)

    found = {
        "param": state("param", 1.0),
        "first": state("first", 0.1),
        "second": state("second", 0.3),
        "grad": draw(case, "grad", (case.count,)),
        "step": torch.tensor([case.step]),
        "lr": torch.tensor([3e-3]),
    }
    if case.copied:
        found["copy"] = torch.full_like(found["grad"], torch.nan)
    if case.scaled:
        found["grad_scale"] = torch.tensor([0.37])
    return found


def _run(module: ModuleType, case: Case, tensors: Tensors) -> Tensors:
    module.adamw_flat_(
        tensors["param"], tensors["grad"], tensors["first"], tensors["second"], step=tensors["step"], lr=tensors["lr"],
        beta1=case.beta1, beta2=case.beta2, eps=1e-8, weight_decay=case.weight_decay, copy=tensors.get("copy"),
        grad_scale=tensors.get("grad_scale"), config=case.config,
    )  # fmt: skip
    return {name: tensors[name] for name in ("param", "first", "second", "copy") if name in tensors}


def _bug(find: str, replace: str) -> Patch:
    return Patch(file=KERNELS, find=find, replace=replace)


OP = KernelOp(
    name="adamw",
    cases=_cases,
    tensors=_tensors,
    kernel=lambda case, tensors: _run(fused, case, tensors),
    reference=lambda case, tensors: _run(plain, case, tensors),
    writes=frozenset({"param", "first", "second", "copy"}),
    configs=lambda: CONFIGS,
    lengths=lambda case, tensors: dict.fromkeys(("param", "first", "second", "copy"), 8),
    examples=(
        Case(),
        Case(count=129, dtype="bfloat16", copied=True, scaled=True, step=1000, config=SMALL_BLOCKS),
        Case(count=64, dtype="float16", values="large", scaled=True, layout="offset1", step=9),
        Case(count=1, step=100_000, values="small"),
        Case(count=0),
        Case(count=513, beta1=0.0, beta2=0.95, weight_decay=0.0, copied=True, values="constant"),
        Case(count=20_003, dtype="bfloat16", copied=True, step=1),
    ),
    bug_cases=(
        Case(count=300, config=SMALL_BLOCKS),
        Case(count=70, scaled=True, copied=True, dtype="bfloat16", step=9),
    ),
    bugs=(
        _bug("now = tl.load(step) + 1", "now = tl.load(step) + 2"),
        _bug("tl.sqrt_rn(v * correction2) + eps", "tl.sqrt_rn((v + eps) * correction2)"),
        _bug("g = (g.to(tl.float32) * tl.load(grad_scale)).to(g.dtype)", "g = g"),
        _bug("change += weight_decay * p", "change += weight_decay * m"),
    ),
    cpu_bugs=(_bug("start += tl.num_programs(0) * BLOCK", "start += BLOCK"),),
)
