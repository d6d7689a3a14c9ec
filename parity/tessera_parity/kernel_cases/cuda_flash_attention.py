"""Cases of attention in CUDA C++: those of the Triton kernel, in half precision, and the configurations of both sources."""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tessera_kernels.cuda import flash_attention as fused
from tessera_kernels.cuda._attention_configs import CONFIGS, CudaConfig, choose_config
from tessera_kernels.cuda.flash_attention import has_backward
from tessera_kernels.reference import flash_attention as plain
from tessera_parity.kernel_cases.case import dtypes
from tessera_parity.kernel_cases.flash_attention import OP as DENSE
from tessera_parity.kernel_cases.flash_attention import Case, cases_of, run
from tessera_parity.loading import Patch

FOLDER = "tessera_kernels/cuda"

HOPPER = CudaConfig(90, 2, 64, 2)
AMPERE = CudaConfig(80, 1, 16, 2)
AMPERE_WIDE = CudaConfig(80, 2, 32, 2)
"""Small tiles: the emulator sees several of them, their edges and the rings at small sizes."""


def _cases(gpu: bool) -> SearchStrategy[Case]:
    config = st.none() if gpu else st.sampled_from([HOPPER, AMPERE, AMPERE_WIDE])
    return cases_of(gpu, dtype=dtypes("bfloat16", "float16"), config=config)


def _unordered(case: Case) -> frozenset[str]:
    config = case.config or choose_config(case.width, 90)
    if not case.packed and has_backward(case.width, case.softcap, case.deterministic, config):
        return frozenset({"grad q"})
    return DENSE.unordered(replace(case, config=None))


def _bug(file: str, find: str, replace_by: str) -> Patch:
    return Patch(file=f"{FOLDER}/{file}", find=find, replace=replace_by)


OP = replace(
    DENSE,
    name="cuda_flash_attention",
    cases=_cases,
    kernel=lambda case, tensors: run(fused, case, tensors),
    reference=lambda case, tensors: run(plain, case, tensors),
    configs=lambda: CONFIGS,
    unordered=_unordered,
    examples=(
        Case(rows=2, queries=37, keys=37, kv_heads=2, group=2, width=32, dtype="bfloat16"),
        Case(rows=2, queries=33, keys=50, group=3, width=48, dtype="bfloat16", packed=True, seed=1, config=AMPERE),
        Case(queries=40, keys=19, window=7, softcap=2.0, dtype="float16", layout="sliced", values="large"),
        Case(queries=199, keys=199, width=64, dtype="bfloat16", window=50, layout="transposed", config=HOPPER),
        Case(queries=130, keys=257, width=128, dtype="float16", causal=False, group=2),
        Case(rows=2, queries=150, keys=140, kv_heads=2, width=80, dtype="bfloat16", group=3, layout="sliced"),
        Case(queries=190, keys=300, width=128, dtype="bfloat16", window=70, layout="offset1"),
        Case(queries=70, keys=129, width=256, dtype="bfloat16", values="mixed"),
        Case(queries=3, keys=300, width=80, dtype="bfloat16", causal=False, window=9, layout="offset1"),
        Case(queries=65, keys=64, width=64, dtype="bfloat16", values="extreme", config=AMPERE_WIDE),
        Case(
            queries=17, keys=31, dtype="float16", values="ties", deterministic=True, packed=True, rows=2, config=HOPPER
        ),
        Case(queries=40, keys=90, kv_heads=2, width=48, dtype="bfloat16", values="extreme", scale=1.0, config=HOPPER),
        Case(queries=140, keys=210, dtype="bfloat16", packed=True, rows=3, seed=4, width=80),
        Case(queries=30, keys=500, width=64, dtype="float16", scale=1.0, causal=False, config=HOPPER),
        Case(queries=20, keys=20, values="constant", window=1, dtype="bfloat16", config=AMPERE),
        Case(rows=2, queries=0, keys=7, dtype="bfloat16"),
        Case(rows=2, queries=7, keys=0, dtype="float16"),
        Case(rows=0, queries=7, keys=7, dtype="bfloat16"),
        Case(queries=13, keys=31, causal=False, dtype="float16", values="extreme"),  # gradients overflow
        Case(queries=2, keys=2, group=3, width=192, scale=1.0, causal=False, dtype="float16", values="extreme"),
    ),
    bug_cases=(
        Case(queries=20, keys=300, width=64, dtype="bfloat16", scale=1.0, config=HOPPER),
        Case(queries=20, keys=200, kv_heads=2, group=2, dtype="bfloat16", config=HOPPER),
        Case(rows=3, queries=20, keys=70, packed=True, seed=1, dtype="bfloat16", config=HOPPER),
        Case(queries=33, keys=33, window=9, dtype="bfloat16", config=AMPERE, softcap=2.0),
        Case(queries=40, keys=80, width=128, dtype="float16", config=AMPERE_WIDE, causal=False),
        Case(queries=40, keys=40, width=64, dtype="bfloat16", values="extreme", scale=1.0, config=AMPERE),
    ),
    bug_cases_of={
        f"{FOLDER}/flash_attention_backward_sm90.cu": (
            Case(queries=140, keys=200, width=80, dtype="bfloat16", kv_heads=2, group=2, config=HOPPER),
            Case(queries=20, keys=5, width=80, dtype="float16", causal=False, scale=1.0, config=HOPPER),
        ),
        f"{FOLDER}/flash_attention_sm80.cu": (
            Case(queries=20, keys=100, width=64, dtype="bfloat16", scale=1.0, config=AMPERE),
            Case(queries=33, keys=33, window=9, dtype="bfloat16", config=AMPERE, softcap=2.0),
        ),
    },
    bugs=(
        _bug("attention.cuh", "total[half] *= fade[half];", ""),
        _bug("attention.cuh", "FUSED_BASE = 4096.0f", "FUSED_BASE = 1e30f"),
        _bug("attention.cuh", "least[half] = here - p.before;", "least[half] = here - p.before + 1;"),
        _bug("attention.cuh", "top[first + inside] = raw;", "top[first + inside] = base;"),
        _bug("attention.cuh", "scores[i] = tanhf(scores[i] * inner);", "scores[i] = tanhf(scores[i]);"),
        _bug("flash_attention_sm90.cu", "out[i] *= fade[i / 2 % 2];", "out[i] *= 1.0f;"),
        _bug("flash_attention_sm90.cu", "const int kv_head = w.head / p.group;", "const int kv_head = 0 * w.head;"),
        _bug("flash_attention_sm90.cu", "if (keys >= BLOCK_N) return;", "if (keys >= 0) return;"),
        _bug("flash_attention_backward_sm90.cu", "least[half] = here - p.after;", "least[half] = here - p.after - 1;"),
        _bug(
            "flash_attention_backward_sm90.cu",
            "p.heads + r.kv_head * p.group + member)",
            "p.heads + r.kv_head * p.group)",
        ),
        _bug("flash_attention_backward_sm90.cu", "delta - row_dlse", "delta"),
        _bug("flash_attention_sm80.cu", "result[i] *= fade[i / 2 % 2];", "result[i] *= 1.0f;"),
    ),
    cpu_bugs=(
        _bug("flash_attention_sm90.cu", "group_wait<1>();", "group_wait<2>();"),
        _bug("flash_attention_backward_sm90.cu", "tiles.dscores[turn.stage]", "tiles.dscores[0]"),
        _bug(
            "flash_attention_backward_sm90.cu",
            "for (int member = 0; member < p.group; ++member) {\n            const",
            "for (int member = 0; member < p.group; member += p.group) {\n            const",
        ),
        _bug("flash_attention_sm90.cu", "        barrier_wait(&tiles.q_full[q_turn.stage], q_turn.parity);\n", ""),
        _bug("flash_attention_backward_sm90.cu", "                sync_some(1, 256);\n", ""),
        _bug("flash_attention_backward_sm90.cu", "group_wait<OVERLAP == 1>();", "group_wait<2>();"),
        _bug("flash_attention_backward_sm90.cu", "    barrier_wait(&tiles.kv_empty, kv_parity ^ 1);\n", ""),
        _bug(
            "flash_attention_backward_sm90.cu",
            "    if (thread == 0) bulk_wait_read<0>();\n    sync_some",
            "    sync_some",
        ),
        _bug("flash_attention_sm80.cu", "copy_wait<1>();  // V is there", "copy_wait<2>();  // V is there"),
    ),
)
