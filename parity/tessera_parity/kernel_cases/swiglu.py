"""Cases of the SwiGLU kernels: elementwise, and (`fused`) the gate-up GEMM with the activation in its epilogue."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from tessera_kernels.reference import swiglu as plain
from tessera_kernels.triton import swiglu as ours
from tessera_kernels.triton._gate_up import CONFIGS as GEMM_CONFIGS
from tessera_kernels.triton._gate_up import GateUpConfig
from tessera_kernels.triton.swiglu import CONFIGS, SwigluConfig
from tessera_parity.kernel_cases.case import KernelOp, Tensors, draw, dtypes, layouts, seeds, sizes, value_kinds
from tessera_parity.loading import Patch
from tessera_shared.errors import KernelError

ELEMENTWISE = "tessera_kernels/triton/swiglu.py"
GEMM = "tessera_kernels/triton/_gate_up.py"
SMALL_TILES = GateUpConfig(16, 16, 16, 4, 2, 2, 1, 1)
SMALL_PAIRS = GateUpConfig(16, 16, 16, 4, 2, 2, 1, 1, 1, 1)
SMALL_POINTER_TILES = GateUpConfig(16, 16, 16, 4, 2, 2, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """swiglu of gate, up [rows, ffn]; or of x [rows, width] through two weights [ffn, width] when `fused`."""

    dtype: str = "float32"
    layout: str = "contiguous"
    values: str = "normal"
    seed: int = 0
    rows: int = 3
    ffn: int = 8
    width: int = 8
    fused: bool = False
    one_buffer: str = ""  # "gate" or "up" comes first in a buffer of both weights
    config: SwigluConfig | GateUpConfig | None = None


def _cases(gpu: bool) -> SearchStrategy[Case]:
    shared = {
        "dtype": dtypes(), "layout": layouts(), "seed": seeds(), "rows": sizes(tile=16, most=3000 if gpu else 20, least=0),
    }  # fmt: skip
    elementwise = st.builds(
        Case,
        **shared,
        values=value_kinds(),
        ffn=sizes(tile=1024 if gpu else 64, most=5000 if gpu else 150),
        config=st.sampled_from([None, *CONFIGS] if gpu else [None, SwigluConfig(64, 4)]),
    )
    # Products of extreme numbers overflow in float16 whichever way they are added up, but not at the same places.
    fused = st.builds(
        Case,
        **shared,
        fused=st.just(True),
        values=value_kinds("normal", "small", "mixed", "constant", "ties"),
        ffn=sizes(tile=128 if gpu else 16, most=2000 if gpu else 40),
        width=sizes(tile=64 if gpu else 16, most=1100 if gpu else 40),
        one_buffer=st.sampled_from(["", "gate", "up"]),
        config=st.none() if gpu else st.sampled_from([SMALL_TILES, SMALL_PAIRS, SMALL_POINTER_TILES]),
    )
    return elementwise | fused


def _tensors(case: Case) -> Tensors:
    dact = {"dact": draw(case, "dact", (case.rows, case.ffn), values="normal")}
    if not case.fused:
        return {name: draw(case, name, (case.rows, case.ffn)) for name in ("gate", "up")} | dact
    x = draw(case, "x", (case.rows, case.width))
    if case.values == "mixed":
        x.clamp_(-30.0, 30.0)
    weights = {name: draw(case, name, (case.ffn, case.width), values="normal") for name in ("gate", "up")}
    return {"x": x, **{name: weight.mul_(max(case.width, 1) ** -0.5) for name, weight in weights.items()}} | dact


def _run(module: ModuleType, case: Case, tensors: Tensors) -> Tensors:
    if case.config is not None and isinstance(case.config, GateUpConfig) != case.fused:
        raise KernelError(f"config = {case.config}: expected one of the other kernel, because fused = {case.fused}")
    names = [name for name in ("x", "gate", "up") if name in tensors]
    leaves = [tensors[name].detach().requires_grad_() for name in names]
    act = (module.gate_up_swiglu if case.fused else module.swiglu)(*_laid(case, leaves), config=case.config)
    gradients = torch.autograd.grad(act, leaves, tensors["dact"])
    return {"act": act.detach()} | {f"grad {name}": gradient for name, gradient in zip(names, gradients, strict=True)}


def _laid(case: Case, leaves: list[Tensor]) -> list[Tensor]:
    """Return the operands as they lie: apart, or both weights in one buffer."""
    if not case.one_buffer:
        return leaves
    x, gate, up = leaves
    if case.one_buffer == "gate":
        both = torch.cat((gate, up))
        return [x, both[: case.ffn], both[case.ffn :]]
    both = torch.cat((up, gate))
    return [x, both[case.ffn :], both[: case.ffn]]


def _magnitudes(case: Case, tensors: Tensors) -> Mapping[str, float]:
    """Sums of products of both signs: as large as the sum of the terms' magnitudes, over a row."""
    if not case.fused or 0 in (case.rows, case.ffn, case.width):
        return {}
    x, gate, up, dact = (tensors[name].double().abs() for name in ("x", "gate", "up", "dact"))
    g, u = x @ gate.T, x @ up.T  # what the products' terms add up to, without their signs
    dgate, dup = dact * u * 1.1, dact * g
    sizes_of = {"act": g * u, "grad x": dgate @ gate + dup @ up, "grad gate": dgate.T @ x, "grad up": dup.T @ x}
    return {name: float(size.max()) for name, size in sizes_of.items()}


def _bug(file: str, find: str, replace: str) -> Patch:
    return Patch(file=file, find=find, replace=replace)


OP = KernelOp(
    name="swiglu",
    cases=_cases,
    tensors=_tensors,
    kernel=lambda case, tensors: _run(ours, case, tensors),
    reference=lambda case, tensors: _run(plain, case, tensors),
    configs=lambda: (*CONFIGS, *GEMM_CONFIGS),
    magnitudes=_magnitudes,
    examples=(
        Case(rows=3, ffn=199),
        Case(rows=5, ffn=65, dtype="bfloat16", layout="sliced", config=SwigluConfig(64, 4)),
        Case(rows=2, ffn=130, dtype="float16", values="extreme", layout="offset1"),
        Case(rows=4, ffn=33, values="large", layout="transposed"),
        Case(rows=1, ffn=1, width=8, values="large", seed=1),  # one number, far out: e^-40
        Case(rows=0, ffn=5),
        Case(rows=17, ffn=24, width=40, fused=True, dtype="bfloat16", config=SMALL_TILES),
        Case(rows=17, ffn=24, width=40, fused=True, dtype="bfloat16", one_buffer="gate", config=SMALL_PAIRS),
        Case(rows=150, ffn=72, width=200, fused=True, dtype="bfloat16", one_buffer="up"),
        Case(rows=17, ffn=33, width=31, fused=True, config=SMALL_POINTER_TILES),
        Case(rows=19, ffn=32, width=48, fused=True, dtype="float16", layout="sliced", values="small"),
        Case(rows=0, ffn=5, width=3, fused=True),
        Case(rows=150, ffn=136, width=200, fused=True, dtype="bfloat16"),
        Case(rows=3, ffn=17, width=16, fused=True, dtype="bfloat16", layout="transposed"),
    ),
    bug_cases=(
        Case(rows=3, ffn=70, config=SwigluConfig(64, 4)),
        Case(rows=17, ffn=33, width=40, fused=True, config=SMALL_POINTER_TILES),
        Case(rows=33, ffn=32, width=32, fused=True, config=SMALL_TILES),
        Case(rows=33, ffn=24, width=32, fused=True, one_buffer="up", config=SMALL_PAIRS),
    ),
    bugs=(
        _bug(ELEMENTWISE, "sigmoid * (1.0 + g * (1.0 - sigmoid))", "sigmoid * (1.0 - g * (1.0 - sigmoid))"),
        _bug(ELEMENTWISE, "return rows, width, cut, triton.cdiv(width, cut.block)", "return rows, width, cut, width // cut.block"),
        _bug(GEMM, "gate_acc = tl.zeros([BLOCK_X, BLOCK_F], tl.float32)", "gate_acc = tl.full([BLOCK_X, BLOCK_F], 1e-2, tl.float32)"),
        _bug(GEMM, "(second_acc, first_acc) if UP_FIRST else (first_acc, second_acc)", "(first_acc, second_acc)"),
        _bug(GEMM, "b = gate_weight.load([0, column, start])", "b = gate_weight.load([0, row, start])"),
        _bug(GEMM, "height = tl.minimum(blocks_x - first, GROUP)", "height = GROUP"),
        _bug(GEMM, "a = _tile(x, x_stride, row, start,", "a = _tile(x, x_stride, row, 0,"),
    ),
)  # fmt: skip
