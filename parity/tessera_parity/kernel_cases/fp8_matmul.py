"""Cases of `fp8_matmul`: scalings x accumulations x shapes x strides x values; both sides get the same codes."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tessera_kernels.fp8_scaling import BLOCK, SCALINGS, quantize_fp8
from tessera_kernels.reference import fp8_matmul as reference
from tessera_kernels.triton import fp8_matmul as kernel
from tessera_parity.kernel_cases.case import KernelOp, Tensors, draw, lay_out, layouts, seeds, sizes, value_kinds
from tessera_parity.loading import Patch

SOURCE = "tessera_kernels/triton/fp8_matmul.py"


@dataclass(frozen=True, kw_only=True)
class Case:
    """c [rows, outputs] in `dtype` from codes a [rows, width] and b [outputs, width]; layout is theirs."""

    rows: int
    outputs: int
    width: int
    scaling: str
    accumulation: str = "accurate"
    dtype: str = "bfloat16"
    layout: str = "contiguous"
    values: str = "normal"
    seed: int = 0
    config: Any = None  # of the module that is judged


def cases(gpu: bool) -> SearchStrategy[Case]:
    """Draw shapes around tiles of 64 to 256; widths that are multiples of 16 take TMA, others pointers."""
    most = 1100 if gpu else 150
    widths = sizes(tile=128, most=2100 if gpu else 300)
    return st.builds(
        Case,
        rows=sizes(tile=128, most=most, least=0),
        outputs=sizes(tile=128, most=most),
        width=widths | widths.map(lambda width: -(-width // 16) * 16),
        scaling=st.sampled_from(SCALINGS),
        accumulation=st.sampled_from(kernel.ACCUMULATIONS),
        dtype=st.sampled_from(("bfloat16", "float32")) if not gpu else st.just("bfloat16"),
        layout=layouts(),
        values=value_kinds(),
        seed=seeds(),
    )


def tensors(case: Case) -> Tensors:
    """Return codes in the case's layout and the scales as the quantizer gives them."""
    a = draw(case, "a", (case.rows, case.width), layout="contiguous")
    b = draw(case, "b", (case.outputs, case.width), layout="contiguous")
    codes_a, scale_a = quantize_fp8(a, scaling=case.scaling)
    codes_b, scale_b = quantize_fp8(b, scaling=case.scaling, block_rows=BLOCK)
    layout = "transposed" if case.scaling == "block" else "contiguous"
    return {
        "a": lay_out(codes_a, case.layout),
        "b": lay_out(codes_b, case.layout),
        "scale_a": lay_out(scale_a, layout),
        "scale_b": lay_out(scale_b, layout),
    }


def run_kernel(case: Case, given: Tensors) -> Tensors:
    """Run the Triton kernel."""
    return {"c": kernel.fp8_matmul(*given.values(), **_options(case), config=case.config)}


def run_reference(case: Case, given: Tensors) -> Tensors:
    """Multiply as the tensor cores are documented to, or in float64."""
    return {"c": reference.fp8_matmul(*given.values(), **_options(case))}


def _options(case: Case) -> dict[str, Any]:
    out_dtype: torch.dtype = getattr(torch, case.dtype)
    return {"scaling": case.scaling, "accumulation": case.accumulation, "out_dtype": out_dtype}


def configs() -> tuple[Any, ...]:
    """Every configuration that can be chosen."""
    return kernel.CONFIGS


def _bug(find: str, replace: str) -> Patch:
    return Patch(file=SOURCE, find=find, replace=replace)


BUGS = (
    _bug("(r < rows) & (column < width)", "(r < rows) & (column <= width)"),
    _bug("acc *= by_row * by_output", "acc *= by_row"),
    _bug("scale_a + (r // A_ROWS) * sa_row + step * sa_col", "scale_a + (r // A_ROWS) * sa_row"),
    _bug("acc += part * sa[:, None]\n", "acc = part * sa[:, None]\n"),
    _bug("acc = tl.dot(a_tile, b_tile.T, acc, max_num", "acc = tl.dot(a_tile, b_tile.T, max_num"),
    _bug("row, output + BLOCK_F // 2, rows", "row, output, rows"),
    _bug("b, output, k, num_outputs", "b, output, 0, num_outputs"),
    _bug("mask=(row < rows) & (column < num_outputs)", "mask=(row <= rows) & (column < num_outputs)"),
)

_HALVES = kernel.Config(64, 256, 4, 4, True, True, False)
_POINTERS = kernel.Config(64, 128, 4, 4, False, False, False)

EXAMPLES = (
    Case(rows=1, outputs=1, width=1, scaling="tensor"),
    Case(rows=3, outputs=129, width=199, scaling="tensor"),
    Case(rows=5, outputs=72, width=272, scaling="block"),
    Case(rows=65, outputs=130, width=272, scaling="row", accumulation="fast"),
    Case(rows=70, outputs=264, width=144, scaling="row", accumulation="fast", config=_HALVES),
    Case(rows=0, outputs=5, width=128, scaling="row"),
    Case(rows=5, outputs=7, width=128, scaling="tensor", layout="offset1", values="mixed"),
    Case(rows=5, outputs=140, width=257, scaling="block", layout="sliced", values="mixed", config=_POINTERS),
    Case(rows=9, outputs=31, width=160, scaling="row", layout="transposed", values="extreme"),
    Case(rows=3, outputs=31, width=131, scaling="tensor", values="constant", accumulation="fast"),
    Case(rows=3, outputs=31, width=131, scaling="block", values="ties"),
)

OP = KernelOp(
    name="fp8_matmul",
    cases=cases,
    tensors=tensors,
    kernel=run_kernel,
    reference=run_reference,
    bugs=BUGS,
    examples=EXAMPLES,
    configs=configs,
)
