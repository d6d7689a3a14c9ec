"""Cases of `quant_matmul`: formats x shapes x strides x values; the weight is quantized once and handed to both sides."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from tessera_kernels.quant_weight import QuantWeight, quantize_w4, quantize_w8
from tessera_kernels.reference import quant_matmul as reference
from tessera_kernels.triton import quant_matmul as kernel
from tessera_parity.kernel_cases.case import (
    KernelOp,
    Tensors,
    draw,
    dtypes,
    lay_out,
    layouts,
    seeds,
    sizes,
    value_kinds,
)
from tessera_parity.loading import Patch

FORMATS = ("w8", "w8g64", "w8g128", "w8g192", "w4g128", "w4g64", "w4g128 symmetric")
SOURCE = "tessera_kernels/triton/_quant_kernels.py"


@dataclass(frozen=True, kw_only=True)
class Case:
    """y [rows, outputs] = x [rows, width] times a weight in `format`."""

    rows: int
    outputs: int
    width: int
    format: str
    dtype: str = "bfloat16"
    layout: str = "contiguous"
    values: str = "normal"
    seed: int = 0
    config: Any = None  # of the module that is judged


def cases(gpu: bool) -> SearchStrategy[Case]:
    """Draw shapes around tiles of 16 to 256 rows, 32 to 256 outputs and 128 inputs."""
    return st.builds(
        Case,
        rows=sizes(tile=128 if gpu else 16, most=1100 if gpu else 20, least=0),
        outputs=sizes(tile=128 if gpu else 64, most=1100 if gpu else 70),
        width=sizes(tile=128, most=2100 if gpu else 300),
        format=st.sampled_from(FORMATS),
        dtype=dtypes("bfloat16", "float16", "float32"),
        layout=layouts(),
        values=value_kinds(),
        seed=seeds(),
    )


def tensors(case: Case) -> Tensors:
    """Return x in its layout, codes and steps contiguous (codes one word off an aligned address for `offset1`)."""
    weight = quantized(draw(case, "weight", (case.outputs, case.width), layout="contiguous"), case.format)
    return {
        "x": draw(case, "x", (case.rows, case.width)),
        "codes": lay_out(weight.codes, "offset1" if case.layout == "offset1" else "contiguous"),
        "steps": lay_out(weight.steps, "contiguous"),
    }


def quantized(weight_FD: Tensor, form: str) -> QuantWeight:
    """Return the weight in one of `FORMATS`."""
    bits, group = _bits_and_group(form)
    if bits == 8:
        return quantize_w8(weight_FD, group=group)
    return quantize_w4(weight_FD, group=group, zero_points="symmetric" not in form)


def _bits_and_group(form: str) -> tuple[int, int | None]:
    word, _, group = form.split()[0].partition("g")
    return int(word[1:]), int(group) if group else None


def weight_of(case: Case, given: Tensors) -> QuantWeight:
    """Return the case's weight around its tensors."""
    bits, group = _bits_and_group(case.format)
    return QuantWeight(codes=given["codes"], steps=given["steps"], bits=bits, group=group, width=given["x"].shape[1])


def run_kernel(case: Case, given: Tensors) -> Tensors:
    """Run the Triton kernel."""
    return {"y": kernel.quant_matmul(given["x"], weight_of(case, given), config=case.config)}


def run_reference(case: Case, given: Tensors) -> Tensors:
    """Dequantize, then multiply."""
    return {"y": reference.quant_matmul(given["x"], weight_of(case, given))}


def terms(case: Case, given: Tensors) -> dict[str, Tensor]:
    """Sums may cancel below what float32 resolves of their products, in half precision among large equal ones."""
    return {"y": given["x"].double().abs() @ reference.dequantize(weight_of(case, given), torch.float64).abs().t()}


def configs() -> tuple[Any, ...]:
    """Every configuration that can be chosen."""
    return kernel.CONFIGS


def _bug(find: str, replace: str) -> Patch:
    return Patch(file=SOURCE, find=find, replace=replace)


BUGS = (
    _bug("seen = seen & (column < width)", "seen = seen & (column <= width)"),
    _bug("x_tiles.load([first_r, first_k])", "x_tiles.load([0, first_k])"),
    _bug("        acc *= whole[:, None] if WIDE else whole[None, :]\n", "        acc *= 1.0\n"),
    _bug("for split in tl.static_range(1, SPLITS):", "for split in tl.static_range(2, SPLITS):"),
    _bug("word & 0xFFFF", "word & 0x7"),
    _bug("(tile * _TILE + high * _HALF) // GROUP", "(tile * _TILE) // GROUP"),
    _bug("(own_f[None, :] < num_outputs)", "(own_f[None, :] <= num_outputs)"),
    _bug("acc += low * low_scale + high * high_scale", "acc += low * low_scale + high * low_scale"),
    Patch(
        file="tessera_kernels/triton/_unpack.py",
        find="((wide >> 12 & 15) - high_zero)",
        replace="((wide >> 8 & 15) - high_zero)",
    ),
    Patch(file="tessera_kernels/triton/_unpack.py", find="(wide & 0x80) != 0", replace="(wide & 0x40) != 0"),
)

_NARROW = kernel.Config("tile", 64, 16, False, 2, 4, 5)
_WIDE = kernel.Config("tile", 128, 64, True, 1, 8, 3)
_TWO_A_TURN = kernel.Config("tile", 64, 16, True, 2, 4, 3, 2)
_VECTOR = kernel.Config("vector", 32, 1, True, 2, 4, 6)

EXAMPLES = (
    Case(rows=1, outputs=1, width=1, format="w8"),
    Case(rows=3, outputs=65, width=129, format="w4g128"),
    Case(rows=0, outputs=5, width=128, format="w4g128"),
    Case(rows=17, outputs=33, width=199, format="w8", config=_NARROW),
    Case(rows=5, outputs=70, width=300, format="w4g64", layout="transposed", config=_NARROW),
    Case(rows=5, outputs=70, width=320, format="w4g64", values="mixed", config=_WIDE),
    Case(rows=66, outputs=37, width=200, format="w8g128", config=_WIDE),
    Case(rows=3, outputs=66, width=700, format="w4g128", config=_TWO_A_TURN),
    Case(rows=2, outputs=37, width=256, format="w8g64", layout="offset1", config=_VECTOR),
    Case(rows=7, outputs=37, width=257, format="w8g192", dtype="float16", layout="sliced", config=_WIDE),
    Case(rows=4, outputs=31, width=131, format="w4g128 symmetric", dtype="float32", values="ties"),
    Case(rows=3, outputs=31, width=131, format="w4g128", dtype="float16", values="extreme"),
    Case(rows=31, outputs=1, width=101, format="w8", dtype="float16", values="extreme"),  # terms of 1e9 add up to 6e3
    Case(
        rows=127, outputs=1, width=911, format="w8", dtype="float16", values="extreme"
    ),  # all the same, not one number alone
    Case(rows=3, outputs=31, width=131, format="w8g128", values="constant", config=kernel.Config("dequantize")),
)

OP = KernelOp(
    name="quant_matmul",
    cases=cases,
    tensors=tensors,
    kernel=run_kernel,
    reference=run_reference,
    bugs=BUGS,
    examples=EXAMPLES,
    configs=configs,
    terms=terms,
)
