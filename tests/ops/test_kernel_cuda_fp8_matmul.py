"""The E4M3 product in CUDA C++, run by the emulator: what its cases do not say."""

import os
import shutil
from typing import Any

import pytest
import torch

pytest.importorskip("cuda.bindings")

from tessera_kernels.cuda._compile import build
from tessera_kernels.cuda.fp8_matmul import fp8_matmul, specializations
from tessera_kernels.fp8_scaling import quantize_fp8
from tessera_parity.kernel_memory import same_bits
from tessera_shared.errors import KernelError, MissingDependency

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: make gpu runs the kernels"),
]

E4M3 = torch.float8_e4m3fn


def operands(rows: int = 5, outputs: int = 16, width: int = 40, scaling: str = "row") -> list[torch.Tensor]:
    stream = torch.Generator().manual_seed(0)
    a, scale_a = quantize_fp8(torch.randn(rows, width, generator=stream), scaling=scaling)
    b, scale_b = quantize_fp8(torch.randn(outputs, width, generator=stream), scaling=scaling)
    return [a, b, scale_a, scale_b]


@pytest.mark.parametrize("width", [256, 257, 300])
def test_every_code_is_multiplied_as_the_number_that_it_is(width: int) -> None:
    """All 256 bit patterns, in either half of a pair, against one: no product rounds, and NaN stays what it is."""
    codes = torch.arange(width, dtype=torch.int32).to(torch.uint8).view(E4M3)
    a = torch.zeros(width, width).to(E4M3)
    a.view(torch.uint8).diagonal().copy_(codes.view(torch.uint8))
    number = codes.isnan().nonzero().flatten()
    a[number, number] = 0.0
    b = torch.eye(width)[:, :width].to(E4M3)[: width // 8 * 8]
    one = torch.ones(())
    c = fp8_matmul(a, b, one, one)
    assert torch.equal(c.float(), a.float()[:, : len(b)])
    a[number, number] = torch.nan
    assert fp8_matmul(a, b, one, one).isnan().any(1).nonzero().flatten().tolist() == number[number < width].tolist()


def test_strided_rows_give_the_bits_of_contiguous_ones() -> None:
    a, b, scale_a, scale_b = operands(width=48)
    memory = torch.zeros(5, 96).to(E4M3)
    memory.view(torch.uint8)[:, :48] = a.view(torch.uint8)
    for other in (memory[:, :48], a.t().contiguous().t()):
        assert same_bits(
            fp8_matmul(other, b, scale_a, scale_b, scaling="row"), fp8_matmul(a, b, scale_a, scale_b, scaling="row")
        )


def test_a_row_does_not_depend_on_its_neighbors() -> None:
    a, b, scale_a, scale_b = operands(rows=140, outputs=264, width=300)
    whole = fp8_matmul(a, b, scale_a, scale_b, scaling="row")
    for row in (0, 63, 129):
        alone = fp8_matmul(a[row : row + 1], b, scale_a[row : row + 1], scale_b, scaling="row")
        assert same_bits(alone, whole[row : row + 1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scaling": "block"}, "scaling = 'block': expected one of tensor, row"),
        ({"accumulation": "accurate"}, "accumulation = 'accurate': expected one of fast"),
        ({"out_dtype": torch.float32}, "out_dtype = torch.float32: expected one of"),
        ({"outputs": 12}, r"b_FD.shape\[0\] = 12: expected a positive multiple of 8"),
        ({"scales": "tensor"}, r"scale_a.shape = \[\]: expected \[5\]"),
    ],
)
def test_what_does_not_fit_is_one_line(change: dict[str, Any], says: str) -> None:
    options = {"scaling": "row"} | {name: value for name, value in change.items() if name not in ("outputs", "scales")}
    given = operands(outputs=change.get("outputs", 16), scaling=change.get("scales", "row"))
    with pytest.raises(KernelError, match=says) as caught:
        fp8_matmul(*given, **options)
    assert "\n" not in str(caught.value)


def test_a_cpu_without_the_emulator_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(MissingDependency, match=r"fp8_matmul on device cpu: expected cuda, .*TESSERA_CUDA_EMULATE=1"):
        fp8_matmul(*operands(), scaling="row")


def test_on_hopper_nothing_spills_and_products_overlap() -> None:
    for kernel in specializations():
        built = build(kernel, "sm_90a")
        assert (built.spill_bytes, built.stack_bytes, built.slow) == (0, 0, ""), kernel.title
