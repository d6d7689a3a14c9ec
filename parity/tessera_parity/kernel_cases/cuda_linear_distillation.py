"""Cases of the linear distillation loss with its logits in CUDA C++: those of the Triton op that this product reads."""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tessera_kernels.cuda.linear_distillation import CONFIGS, linear_distillation
from tessera_kernels.triton._divergence_series import DIVERGENCES
from tessera_kernels.triton._loss_plans import LossConfig
from tessera_parity.kernel_cases.case import dtypes, layouts, seeds, sizes, value_kinds
from tessera_parity.kernel_cases.linear_distillation import OP as TRITON
from tessera_parity.kernel_cases.linear_distillation import Case, run
from tessera_parity.loading import Patch

FOLDER = "tessera_kernels/cuda"
LONG_BLOCKS = LossConfig(block=1024, num_warps=4, stages=1, product=3)
"""Long blocks for the row kernel: the interpreter takes as long for one as for a short one."""


def _cases(gpu: bool) -> SearchStrategy[Case]:
    return st.builds(
        Case,
        dtype=dtypes("bfloat16", "float16"),
        layout=layouts("contiguous", "sliced"),
        values=value_kinds("normal", "small", "constant", "ties"),
        seed=seeds(),
        rows=sizes(tile=128, most=500 if gpu else 140, least=0),
        width=sizes(tile=8, most=25).map(lambda eights: 8 * eights),
        wider=st.sampled_from([0, 8, 200, 64]),
        vocab=sizes(tile=256, most=5000 if gpu else 300),
        near=st.booleans(),
        divergence=st.sampled_from(DIVERGENCES),
        temperature=st.sampled_from([1.0, 2.5, 0.7]),
        weight=st.sampled_from([0.3, 0.0, 1.0, 0.5]),
        label_weight=st.sampled_from([0.0, 0.3, 1.0]),
        z_loss=st.sampled_from([0.0, 1e-2]),
        chunk_rows=st.sampled_from([1000, 3, 50, 128, 200]),
        padding=st.sampled_from([0, 7]),
        accumulate=st.sampled_from(["float32", "float32", "head"]),
        frozen=st.sampled_from(["", "", "student", "head"]),
        config=st.none() if gpu else st.just(LONG_BLOCKS),
    ).map(lambda case: replace(case, accumulate="float32") if case.dtype == "float16" else case)


def _bug(file: str, find: str, replace_by: str) -> Patch:
    return Patch(file=f"{FOLDER}/{file}", find=find, replace=replace_by)


_JSD = Case(dtype="bfloat16", wider=8, rows=9, vocab=300, divergence="generalized_jsd", config=LONG_BLOCKS)
_PAIRED = replace(_JSD, rows=131, width=320, vocab=200, ignored=0.0)  # two blocks a cluster
_RING, _LOGITS = "product_ring.cuh", "linear_logits.cu"

OP = replace(
    TRITON,
    name="cuda_linear_distillation",
    cases=_cases,
    kernel=lambda case, tensors: run(linear_distillation, case, tensors),
    configs=lambda: CONFIGS,
    examples=(
        _JSD,
        Case(dtype="bfloat16", values="constant", rows=7, width=8, wider=0, vocab=2, divergence="reverse_kl"),  # 1e-11
        replace(_JSD, divergence="forward_kl", near=True, width=200, vocab=600, rows=130, chunk_rows=64),
        replace(_JSD, divergence="skew_kl", label_weight=0.3, z_loss=1e-2, temperature=0.7, padding=7, wider=200),
        replace(_JSD, divergence="reverse_kl", near=True, wider=0, accumulate="head", label_weight=0.3),
        replace(_JSD, divergence="skew_reverse_kl", dtype="float16", temperature=2.5, label_weight=1.0, frozen="student"),
        replace(_JSD, rows=140, width=320, vocab=1100, chunk_rows=1000, layout="sliced", frozen="head"),  # more tiles than blocks
        replace(_JSD, rows=270, width=72, vocab=530, chunk_rows=260, divergence="forward_kl"),  # half a cluster's rows
        replace(_JSD, rows=1, vocab=1, width=8, wider=0, ignored=0.0),
        replace(_JSD, rows=0),
        replace(_JSD, dtype="float32"),  # by the library
    ),
    bug_cases=(
        replace(_JSD, width=320, chunk_rows=3, ignored=0.0),  # more stages than the ring has, more chunks than one
        replace(_JSD, temperature=2.5, label_weight=0.3, ignored=0.0, vocab=530),
        replace(_JSD, divergence="forward_kl", label_weight=1.0, ignored=0.0, vocab=5),
        _PAIRED,
    ),
    bug_cases_of={f"{FOLDER}/{_RING}": (_PAIRED,)},
    bugs=(
        _bug(_RING, "step + slice > 0", "slice > 0"),
        _bug(_RING, "own_rank() * (COLUMNS / PAIR)", "0"),
        _bug(_RING, "term, column + part", "term, column"),
        _bug(_LOGITS, ">= p.vocab) z[i] = LOWEST;", "> p.vocab) z[i] = LOWEST;"),
        _bug(_LOGITS, "if (own == 8 * i + j) cold = 0.0f;", ""),
        _bug(_LOGITS, "COLD ? exp2_fast((pair[j] - top) * LOG2_E) : e", "e"),
        _bug(_LOGITS, "(pair[j] - top) * p.unit", "(pair[j] - top) * LOG2_E"),
        _bug(_LOGITS, "    x += shuffle_xor(x, 1);\n", ""),
        _bug(_LOGITS, "z[4 * i + 2 * HALF], z", "z[4 * i], z"),
        _bug(_LOGITS, "* PAIR + own_rank()) * ROWS", "* PAIR) * ROWS"),
    ),
    cpu_bugs=(
        _bug(_RING, "barrier_wait(&ring.empty[turn.stage], turn.parity ^ 1);", ""),
        _bug(_RING, "    barrier_wait(&ring.full[turn.stage], turn.parity);\n        group", "    group"),
        _bug(_RING, "group_wait<1>();", "group_wait<2>();"),
        _bug(_RING, "if (lane < PAIR)", "if (lane < 1)"),
        _bug(_RING, "4 * CONSUMERS * PAIR", "4 * CONSUMERS"),
    ),
)  # fmt: skip
"""The loss's cases in CUDA C++."""
