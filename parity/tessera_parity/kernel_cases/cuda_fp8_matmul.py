"""Cases of `fp8_matmul` in CUDA C++: scales by tensor and row, fast accumulation, outputs in eights."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tessera_kernels.cuda.fp8_matmul import CONFIGS, SCALINGS, Fp8Config, fp8_matmul
from tessera_parity.kernel_cases.case import Tensors, layouts, seeds, sizes, value_kinds
from tessera_parity.kernel_cases.fp8_matmul import OP as TRITON
from tessera_parity.kernel_cases.fp8_matmul import Case
from tessera_parity.loading import Patch


def _cases(gpu: bool) -> SearchStrategy[Case]:
    most = 1100 if gpu else 270
    widths = sizes(tile=128, most=2100 if gpu else 700)
    return st.builds(
        Case,
        rows=sizes(tile=128, most=most, least=0),
        outputs=sizes(tile=32, most=most // 8).map(lambda eights: 8 * eights),
        width=widths | widths.map(lambda width: -(-width // 16) * 16),
        scaling=st.sampled_from(SCALINGS),
        accumulation=st.just("fast"),
        dtype=st.sampled_from(("bfloat16", "float16")),
        layout=layouts(),
        values=value_kinds("normal", "small", "mixed", "constant", "ties"),
        seed=seeds(),
        config=st.sampled_from((None, *CONFIGS)),
    )


def _run(case: Case, given: Tensors) -> Tensors:
    options: dict[str, Any] = {"scaling": case.scaling, "out_dtype": getattr(torch, case.dtype), "config": case.config}
    return {"c": fp8_matmul(*given.values(), **options)}


def _bug(find: str, replace_by: str, file: str = "fp8_matmul.cu") -> Patch:
    return Patch(file=f"tessera_kernels/cuda/{file}", find=find, replace=replace_by)


_ROW = Case(rows=70, outputs=264, width=900, scaling="row", accumulation="fast")

OP = replace(
    TRITON,
    name="cuda_fp8_matmul",
    cases=_cases,
    kernel=_run,
    configs=lambda: CONFIGS,
    examples=(
        _ROW,
        replace(_ROW, rows=1, outputs=8, width=1, scaling="tensor"),
        replace(_ROW, rows=0),
        replace(_ROW, width=257, layout="sliced", values="mixed"),
        replace(_ROW, width=272, layout="offset1", scaling="tensor", dtype="float16"),
        replace(_ROW, rows=300, outputs=600, width=130, layout="transposed", config=Fp8Config(3)),  # more tiles than blocks
        replace(_ROW, rows=2300, outputs=8, width=16),  # more row blocks than share b
        replace(_ROW, width=128, values="constant", scaling="tensor"),
    ),
    bug_cases=(_ROW, replace(_ROW, rows=300, outputs=600, width=130, scaling="tensor")),
    bugs=(
        _bug("p.scale_a[0] * p.scale_b[0]", "p.scale_a[0]"),
        _bug("if constexpr (BY_ROW) scale_columns", "if constexpr (BY_ROW && GROUP_X == 0) scale_columns"),
        _bug("sums[4 * i + 2 * half + 1] *= scale.second;", ""),
        _bug("row + lane / 4 + 8 * half, p.rows", "row + lane / 4, p.rows"),
        _bug("p.rows - row, p.outputs - w.output - 64 * part", "p.rows - row + 1, p.outputs - w.output - 64 * part"),
        _bug("p.outputs - w.output - 64 * part, lane", "p.outputs - w.output, lane"),
        _bug("c + 64 * part", "c"),
        _bug("w.output, step * TERMS", "w.output, 0"),
        _bug("* PAIR + own_rank()) * ROWS", "* PAIR) * ROWS"),
    ),
    cpu_bugs=(
        _bug("barrier_wait(&ring.empty[turn.stage], turn.parity ^ 1);", "", "product_ring.cuh"),
    ),
)  # fmt: skip
"""The product's cases in CUDA C++."""
