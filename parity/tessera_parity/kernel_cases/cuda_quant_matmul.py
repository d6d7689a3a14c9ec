"""Cases of `quant_matmul` in CUDA C++: bfloat16, an even number of outputs, rows and inputs around its larger tiles."""

from dataclasses import replace

from hypothesis import strategies as st

from tessera_kernels.cuda.quant_matmul import CONFIGS, FEW_OUTPUTS, QuantConfig, choose_config, quant_matmul
from tessera_parity.kernel_cases.case import Tensors, layouts, seeds, sizes, value_kinds
from tessera_parity.kernel_cases.quant_matmul import FORMATS, Case, weight_of
from tessera_parity.kernel_cases.quant_matmul import OP as TRITON
from tessera_parity.loading import Patch


def cases(gpu: bool) -> st.SearchStrategy[Case]:
    """Draw shapes around tiles of 64 and 128 rows, 256 outputs and 128 inputs."""
    return st.builds(
        Case,
        rows=sizes(tile=128, most=1100 if gpu else 140, least=0),
        outputs=sizes(tile=128, most=600 if gpu else 140).map(lambda pairs: 2 * pairs),
        width=sizes(tile=128, most=2100 if gpu else 400),
        format=st.sampled_from(FORMATS),
        dtype=st.just("bfloat16"),
        layout=layouts(),
        values=value_kinds(),
        seed=seeds(),
        config=st.none() if gpu else st.sampled_from((None, *CONFIGS)),
    ).map(_fitting)


def _fitting(case: Case) -> Case:
    refused = case.config is not None and case.config.is_few and case.outputs % FEW_OUTPUTS
    return replace(case, config=None) if refused else case


def _run(case: Case, given: Tensors) -> Tensors:
    """A row alone takes its batch's configuration: with that its answer is the same, and a choice is by the rows."""
    config = case.config or choose_config(case.rows, case.outputs, case.width)
    return {"y": quant_matmul(given["x"], weight_of(case, given), config=config)}


_TILE, _SHALLOW, _FEW = QuantConfig(64), QuantConfig(64, stages=2), QuantConfig(16, 64, stages=2)


def _bug(find: str, replace_by: str, file: str = "quant_matmul.cu") -> Patch:
    return Patch(file=f"tessera_kernels/cuda/{file}", find=find, replace=replace_by)


def _few_bug(find: str, replace_by: str) -> Patch:
    return _bug(find, replace_by, "quant_matmul_few.cu")


OP = replace(
    TRITON,
    name="cuda_quant_matmul",
    cases=cases,
    kernel=_run,
    configs=lambda: CONFIGS,
    row_independent=("y",),
    row_inputs=("x",),
    examples=(
        Case(rows=1, outputs=2, width=1, format="w8"),
        Case(rows=1, outputs=4, width=1, format="w4g64"),
        Case(rows=0, outputs=6, width=128, format="w4g128"),
        Case(rows=3, outputs=258, width=129, format="w4g128", config=_TILE),
        Case(rows=130, outputs=66, width=300, format="w8", layout="transposed", config=QuantConfig(128, splits=2)),
        Case(rows=70, outputs=514, width=520, format="w4g64", layout="sliced", config=_SHALLOW),
        Case(rows=66, outputs=38, width=199, format="w8g64", layout="offset1", config=QuantConfig(128, splits=4)),
        Case(rows=129, outputs=256, width=640, format="w8g192", values="mixed", config=QuantConfig(128, stages=2)),
        Case(rows=9, outputs=34, width=700, format="w4g128 symmetric", values="ties", config=QuantConfig(64, splits=4)),
        Case(rows=5, outputs=32, width=131, format="w8g128", values="extreme"),
        Case(rows=5, outputs=32, width=384, format="w4g64", values="constant"),
        Case(rows=300, outputs=600, width=256, format="w4g128", seed=1),  # more tiles than blocks
        Case(rows=16, outputs=260, width=1300, format="w4g128", config=_FEW),
        Case(rows=19, outputs=200, width=2000, format="w8g192", layout="offset1", config=_FEW),
        Case(rows=7, outputs=96, width=700, format="w8", layout="sliced", values="mixed", config=QuantConfig(8, 32)),
        Case(rows=2, outputs=72, width=4000, format="w4g64", layout="transposed", config=QuantConfig(8, 16)),
        Case(rows=13, outputs=68, width=2300, format="w8g64", values="extreme", config=QuantConfig(16, 16)),
    ),
    bug_cases=(
        Case(rows=70, outputs=66, width=900, format="w8", config=_SHALLOW),
        Case(rows=9, outputs=260, width=300, format="w4g64", config=_TILE),
        Case(rows=66, outputs=38, width=640, format="w8g64", config=QuantConfig(64, splits=4)),
        Case(rows=300, outputs=600, width=256, format="w4g128", config=QuantConfig(128)),
        Case(rows=200, outputs=300, width=640, format="w4g64", config=QuantConfig(64, splits=3)),  # more tiles than clusters
    ),
    bug_cases_of={
        "tessera_kernels/cuda/quant_matmul_few.cu": (
            Case(rows=16, outputs=260, width=2300, format="w4g64", config=_FEW),
            Case(rows=7, outputs=96, width=2000, format="w8", config=QuantConfig(8, 32)),
        ),
    },
    bugs=(
        _bug("packed<bf16>(one, one)", "packed<bf16>(one, 0.0f)"),
        _bug("fetch(next, p, tile + 1,", "fetch(next, p, tile,"),
        _bug("(tile * INPUTS + half * HALF)", "(tile * INPUTS)", "quant_words.cuh"),
        _bug("above[i % 2]);", "above[0]);", "quant_words.cuh"),
        _bug("quarter / 2 * 16", "0"),
        _bug("row * 128 + ((piece ^ row % 8) << 4)", "row * 128 + (piece << 4)", "quant_words.cuh"),
        _bug("row < p.rows && output < p.outputs)\n            *rein", "row < p.rows && output <= p.outputs)\n            *rein"),
        _bug("from < to ? from : from - 1", "from < to ? from : 0"),
        _bug("from == 0 ? one : total[k + i] + one", "one"),
        _bug("write(total, OWN * SHARE,", "write(total, 0,"),
        _bug("p.outputs - 1)] * SHRUNK;\n        // outputs", "p.outputs - 1)];\n        // outputs"),
        _bug("min(w.first + p.tiles_per_split, p.tiles)", "min(w.first + p.tiles_per_split, p.tiles - 1)"),
        _few_bug("depth < DEPTH; ++depth)\n#pragma", "depth < DEPTH - 1; ++depth)\n#pragma"),
        _few_bug("group_of(tile + lane / SETS, lane % SETS, p.groups)", "group_of(tile, lane % SETS, p.groups)"),
        _few_bug("x[i] = 2 * depth * PANEL_BYTES", "x[i] = depth * PANEL_BYTES"),
        _few_bug("(tile + depth < p.tiles)", "(tile + depth < p.tiles - 1)"),
        _few_bug("scale[set][i % 4 / 2]", "scale[0][i % 4 / 2]"),
        _few_bug("both[2];", "both[0];"),
        _few_bug("f + output >= p.outputs", "f + output > p.outputs"),
    ),
    cpu_bugs=(
        _few_bug("barrier_wait(&tiles.empty[turn.stage], turn.parity ^ 1);", ""),
        _bug("barrier_wait(&tiles.empty[turn.stage], turn.parity ^ 1);", ""),
        _bug("group_wait<1>();", "group_wait<2>();"),
        _bug("(quarter == 0 && tile > w.first && speaks)", "(quarter == 3 && tile + 1 < w.last && speaks)"),
        _bug("sync_cluster();  // no copy and no product uses a ring", ""),
        _bug("            sync_cluster();\n            sync_cluster();\n", "            sync_cluster();\n"),
        _bug("    fence_for_engine();\n    sync_cluster();\n", ""),
        _few_bug("        sync_some(1, SPEAKING);\n        write", "        write"),
        _few_bug("        sync_some(1, SPEAKING);  // the sums have been read\n", ""),
    ),
)  # fmt: skip
