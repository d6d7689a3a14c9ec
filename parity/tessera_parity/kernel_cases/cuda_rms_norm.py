"""Cases of RMSNorm in CUDA C++: those of the Triton kernel, and blocks of every shape that a row can take."""

from dataclasses import replace

from tessera_kernels.cuda import rms_norm as fused
from tessera_kernels.cuda.rms_norm import CONFIGS, NormConfig, RowConfig
from tessera_parity.kernel_cases.rms_norm import OP as TRITON
from tessera_parity.kernel_cases.rms_norm import Case, cases_of, run
from tessera_parity.loading import Patch

SMALL_TILES = NormConfig(RowConfig(1, 32, 64, 1, 0), RowConfig(1, 64, 128, 1, 2))
"""Lets the emulator see persistent blocks, rows of two warps and rows of several spans at small sizes."""


def _bug(file: str, find: str, replace_by: str) -> Patch:
    return Patch(file=f"tessera_kernels/cuda/{file}", find=find, replace=replace_by)


OP = replace(
    TRITON,
    name="cuda_rms_norm",
    cases=lambda gpu: cases_of(gpu, SMALL_TILES),
    kernel=lambda case, tensors: run(fused, case, tensors),
    configs=lambda: CONFIGS,
    examples=(
        Case(rows=5, width=104),
        Case(rows=9, width=199, dtype="bfloat16", add=True, gain_after_cast=True, layout="sliced"),
        Case(rows=40, width=128, dtype="float16", values="mixed", gain_after_cast=True, config=SMALL_TILES),
        Case(rows=7, width=65, dtype="bfloat16", add=True, config=SMALL_TILES, layout="offset1"),
        Case(rows=3, width=1, values="constant", layout="transposed"),
        Case(rows=4, width=64, dtype="float16", values="extreme", add=True),
        Case(rows=0, width=7, add=True),
        Case(rows=9, width=200, add=True, config=SMALL_TILES),  # two warps a row
        Case(rows=13, width=600, dtype="bfloat16", add=True, config=SMALL_TILES),  # two spans a row
        Case(rows=300, width=16, dtype="bfloat16"),  # eight rows a warp
        Case(rows=2, width=8192, dtype="bfloat16", gain_after_cast=True),
        Case(rows=2, width=8200, add=True),  # more than the threads of a block hold
        Case(rows=1201, width=64, dtype="bfloat16"),  # more groups of rows than persistent blocks on a GPU
    ),
    bug_cases=(
        Case(rows=5, width=104),
        Case(rows=40, width=64, dtype="bfloat16", add=True, config=SMALL_TILES),
        Case(rows=9, width=200, add=True, config=SMALL_TILES),
        Case(rows=13, width=600, dtype="bfloat16", config=SMALL_TILES),
        Case(rows=5, width=99, dtype="bfloat16", gain_after_cast=True),
    ),
    bugs=(
        _bug("rms_norm.cu", "row_sum(squares, sums, round++) * share", "row_sum(squares, sums, round++) / (width + 1)"),
        _bug("rms_norm_backward.cu", " - number * pull;", ";"),
        _bug("rms_norm_backward.cu", "= row < num_rows ? width : 0;", "= row <= num_rows ? width : 0;"),
        _bug("rms_norm_backward.cu", "group < groups; ++group", "group < 1; ++group"),
        _bug("rms_norm_sum_partials.cu", "row < num_partials && column", "row < num_partials - 1 && column"),
        _bug("rms_norm_backward.cu", "if (ADD) change[j] = lifted(change[j]) +", "if (ADD) change[j] = change[j] + 0.0f *"),
    ),
    cpu_bugs=(
        _bug("norm_rows.cuh", "    sync_some(1 + threadIdx.y, threads);\n", ""),
        _bug("rms_norm_backward.cu", "copy_wait<STAGES - 1>();", "copy_wait<STAGES>();"),
        _bug("rms_norm_backward.cu", "(round > 0 ? own[own_column] : 0.0f) + flow", "flow"),
        _bug("norm_rows.cuh", "    sync_row();  // what the passage held has been read\n", ""),
    ),
)  # fmt: skip
