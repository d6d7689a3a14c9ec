"""Cases of the in-place RoPE kernel: head counts and widths of both, tables with unequal halves, gradients."""

from dataclasses import dataclass
from types import ModuleType

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tessera_kernels.reference import rope as plain
from tessera_kernels.triton import rope as fused
from tessera_kernels.triton.rope import CONFIGS, RopeConfig
from tessera_parity.kernel_cases.case import KernelOp, Tensors, draw, dtypes, layouts, seeds, sizes, value_kinds
from tessera_parity.loading import Patch

KERNELS = "tessera_kernels/triton/rope.py"
SMALL_TILES = RopeConfig(2, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Case:
    """q [batch, positions, heads, width] and k turned by one table, and their gradients."""

    dtype: str = "float32"
    layout: str = "contiguous"
    values: str = "normal"
    seed: int = 0
    batch: int = 2
    positions: int = 3
    heads: int = 4
    kv_heads: int = 2
    half: int = 4  # of a head's width
    config: RopeConfig | None = None


def _cases(gpu: bool) -> SearchStrategy[Case]:
    return st.builds(
        Case,
        dtype=dtypes(),
        layout=layouts(),
        values=value_kinds(),
        seed=seeds(),
        batch=st.integers(1, 3),
        positions=sizes(tile=4, most=700 if gpu else 7, least=0),
        heads=st.sampled_from([1, 3, 8, 14, 32, 65] if gpu else [1, 3, 5]),
        kv_heads=st.sampled_from([1, 2, 8, 33] if gpu else [1, 3]),
        half=st.sampled_from([1, 3, 8, 32, 40, 64, 128] if gpu else [1, 3, 8]),
        config=st.sampled_from([None, *CONFIGS] if gpu else [None, SMALL_TILES]),
    )


def _tensors(case: Case) -> Tensors:
    ahead, width = (case.batch, case.positions), 2 * case.half
    shapes = {"q": (*ahead, case.heads, width), "k": (*ahead, case.kv_heads, width)}
    heads = {name: draw(case, name, shape) for name, shape in shapes.items()}
    tables = {name: draw(case, name, (*ahead, width), values="normal") for name in ("cos", "sin")}
    return (
        heads | tables | {f"d{name}": draw(case, f"d{name}", shape, values="normal") for name, shape in shapes.items()}
    )


def _run(module: ModuleType, case: Case, tensors: Tensors) -> Tensors:
    """The forward in place on the tensors themselves, as in inference; then once more with gradients, on copies."""
    tables = tensors["cos"], tensors["sin"]
    leaves = [tensors[name].detach().clone().requires_grad_() for name in ("q", "k")]
    turned = module.apply_rope_(*(leaf * 1 for leaf in leaves), *tables, config=case.config)
    gradients = torch.autograd.grad(turned, leaves, (tensors["dq"], tensors["dk"]))
    q, k = module.apply_rope_(tensors["q"], tensors["k"], *tables, config=case.config)
    return {"q": q, "k": k, "grad q": gradients[0], "grad k": gradients[1]}


def _bug(find: str, replace: str) -> Patch:
    return Patch(file=KERNELS, find=find, replace=replace)


OP = KernelOp(
    name="rope",
    cases=_cases,
    tensors=_tensors,
    kernel=lambda case, tensors: _run(fused, case, tensors),
    reference=lambda case, tensors: _run(plain, case, tensors),
    writes=frozenset({"q", "k"}),
    row_independent=("q", "k", "grad q", "grad k"),
    row_inputs=("q", "k", "cos", "sin", "dq", "dk"),
    configs=lambda: CONFIGS,
    lengths=lambda case, tensors: dict.fromkeys(("q", "k", "grad q", "grad k"), 2),
    examples=(
        Case(),
        Case(dtype="bfloat16", heads=5, kv_heads=3, half=3, layout="sliced", config=SMALL_TILES),
        Case(dtype="float16", values="extreme", heads=3, half=8),
        Case(dtype="bfloat16", values="mixed", layout="transposed", positions=5),
        Case(layout="offset1", batch=1, positions=7, heads=1, kv_heads=1, half=1),
        Case(positions=0),
        Case(dtype="bfloat16", batch=1, positions=2, heads=33, kv_heads=8, half=64),
    ),
    bug_cases=(
        Case(batch=1, positions=5, config=SMALL_TILES),
        Case(heads=3, half=3),
        Case(batch=1, positions=1, kv_heads=3, config=SMALL_TILES),
    ),
    bugs=(
        _bug(
            "new_second = (second * cos_2).to(dtype).to(tl.float32) + (first * sin_2)",
            "new_second = (second * cos_2).to(dtype).to(tl.float32) + (first * sin_1)",
        ),
        _bug(
            "new_second = (second * cos_2).to(dtype).to(tl.float32) - (first * sin_1)",
            "new_second = (second * cos_2).to(dtype).to(tl.float32) + (first * sin_1)",
        ),
        _bug("    inside = token < num_tokens\n", "    inside = token < num_tokens - 1\n"),
        _bug(
            "(token // T).to(tl.int64), (token % T).to(tl.int64)",
            "(token // T).to(tl.int64), (token // T).to(tl.int64)",
        ),
        _bug(
            "for start in tl.static_range(HEADS_K, K, HEADS_K):",
            "for start in tl.static_range(HEADS_K, K - 1, HEADS_K):",
        ),
    ),
)
