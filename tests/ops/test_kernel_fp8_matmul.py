"""E4M3: the quantizer on its own terms, and the product's behavior."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from tessera_kernels.fp8_scaling import SCALINGS, quantize_fp8, spread_scales
from tessera_kernels.triton import fp8_matmul as kernel
from tessera_parity.kernel_cases.fp8_matmul import OP, Case
from tessera_parity.kernel_judge import judge
from tessera_parity.kernel_memory import same_bits
from tessera_shared.errors import KernelError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def half_steps(codes: torch.Tensor) -> torch.Tensor:
    """Half the distance of E4M3 numbers around each code: 3 fraction bits, exponents from -6 on."""
    exponent = codes.double().abs().clamp(min=2.0**-6).log2().floor()
    return 2.0 ** (exponent - 4)


@given(
    scaling=st.sampled_from(SCALINGS),
    rows=st.integers(1, 9),
    width=st.integers(1, 300),
    power=st.integers(-30, 30),
    block_rows=st.sampled_from((1, 128)),
    seed=st.integers(0, 99),
)
def test_every_number_comes_back_within_half_a_step(scaling, rows, width, power, block_rows, seed):
    x = random(rows, width, seed=seed) * 10.0**power
    codes, scales = quantize_fp8(x, scaling=scaling, block_rows=block_rows)
    wide = spread_scales(scales, x.shape, scaling).double()
    error = (codes.double() * wide - x.double()).abs()
    quotient = torch.finfo(torch.float32).eps * x.double().abs()  # scale and quotient are float32
    assert bool((error <= half_steps(codes) * wide + quotient).all())


@given(scaling=st.sampled_from(SCALINGS), power=st.integers(-30, 30), seed=st.integers(0, 99))
def test_the_largest_number_is_the_largest_code(scaling, power, seed):
    codes, _ = quantize_fp8(random(3, 140, seed=seed) * 10.0**power, scaling=scaling)
    parts = {"tensor": [codes], "row": list(codes), "block": [*codes[:, :128], *codes[:, 128:]]}[scaling]
    assert all(float(part.float().abs().max()) == 448.0 for part in parts)


def test_zeros_are_exact_and_nan_poisons_only_its_block():
    x = random(4, 256)
    x[1] = 0.0
    x[2, 200] = float("nan")
    x[3, 0] = float("inf")
    codes, scales = quantize_fp8(x, scaling="block")
    assert scales[1].tolist() == [1.0, 1.0]
    assert not codes[1].float().any()
    assert bool(codes[2, 128:].float().isnan().all())
    assert not codes[2, :128].float().isnan().any()
    assert bool(codes[3, 0].float().isnan())
    assert not codes[3, 128:].float().isnan().any()


def test_scales_of_blocks_lie_column_by_column():
    _, scales = quantize_fp8(random(300, 257), scaling="block")
    assert scales.shape == (300, 3)
    assert scales.stride() == (1, 300)
    assert quantize_fp8(random(300, 257), scaling="block", block_rows=128)[1].shape == (3, 3)


def operands(rows: int = 3, outputs: int = 5, width: int = 128, scaling: str = "tensor") -> tuple[torch.Tensor, ...]:
    a, scale_a = quantize_fp8(random(rows, width), scaling=scaling)
    b, scale_b = quantize_fp8(random(outputs, width, seed=1), scaling=scaling, block_rows=128)
    return a, b, scale_a, scale_b


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: quantize_fp8(torch.tensor([[float("nan")]]), check_finite=True),
            r"x_XD\[0, 0\] = nan: expected finite",
        ),
        (lambda: quantize_fp8(torch.ones(3)), "2 dimensions"),
        (lambda: quantize_fp8(torch.ones(3, 3), scaling="column"), "scaling = 'column': expected one of tensor"),
        (lambda: quantize_fp8(torch.ones(3, 3).double()), "x_XD.dtype = float64"),
        (lambda: kernel.fp8_matmul(*operands(), accumulation="exact"), "accumulation = 'exact'"),
        (lambda: kernel.fp8_matmul(*operands(), scaling="row"), r"scale_a.shape = \[\]: expected \[3\]"),
        (lambda: kernel.fp8_matmul(*operands(scaling="row"), scaling="block"), r"scale_a.shape = \[3\]"),
        (lambda: kernel.fp8_matmul(operands()[0].float(), *operands()[1:]), "a_XD.dtype = float32"),
        (lambda: kernel.fp8_matmul(operands(width=64)[0], *operands()[1:]), r"b_FD.shape = \[5, 128\]"),
        (
            lambda: kernel.fp8_matmul(*operands(scaling="block"), scaling="block", config=kernel.CONFIGS[0]),
            r"block_x \* block_f = 32768: expected 1 to 16384",
        ),
        (lambda: kernel.fp8_matmul(*operands(), out_dtype=torch.float64), "out_dtype = torch.float64"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, words):
    with pytest.raises(KernelError, match=words) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1
    assert "try" in str(caught.value)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("accumulation", kernel.ACCUMULATIONS)
@pytest.mark.parametrize("width", [144, 199])
def test_chosen_configurations_agree_with_the_reference(scaling, accumulation, width):
    judge(OP, Case(rows=70, outputs=130, width=width, scaling=scaling, accumulation=accumulation))


def test_descriptors_and_pointers_give_the_same_bits():
    given_operands = operands(70, 136, 272, "row")
    by_tma = kernel.fp8_matmul(*given_operands, scaling="row", config=kernel.Config(64, 128, 4, 4, True))
    by_pointer = kernel.fp8_matmul(*given_operands, scaling="row", config=kernel.Config(64, 128, 4, 4, False))
    assert same_bits(by_tma, by_pointer)


def test_no_rows_and_no_inputs():
    a, b, scale_a, scale_b = operands()
    assert kernel.fp8_matmul(a[:0], b, scale_a, scale_b).shape == (0, 5)
    assert not kernel.fp8_matmul(a[:, :0], b[:, :0], scale_a, scale_b).any()


@pytest.mark.unfenced
def test_compiles_into_one_graph():
    given_operands = operands()
    compiled = torch.compile(lambda a: kernel.fp8_matmul(a, *given_operands[1:]) * 2, backend="eager", fullgraph=True)
    assert same_bits(compiled(given_operands[0]), kernel.fp8_matmul(*given_operands) * 2)


def test_whatever_is_chosen_is_in_the_list():
    for rows in (1, 64, 65, 128, 4096, 8192):
        for outputs in (1, 256, 8192):
            for scaling in SCALINGS:
                for accumulation in kernel.ACCUMULATIONS:
                    assert kernel.choose_config(rows, outputs, 4096, scaling, accumulation) in kernel.CONFIGS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the instructions that it looks at are the GPU's")
def test_accurate_accumulation_is_more_accurate_than_fast():
    """Only tensor cores have the narrow accumulator: with numbers of one sign its lost bits add up."""
    a, scale_a = quantize_fp8(random(256, 16384).abs().cuda(), scaling="row")
    b, scale_b = quantize_fp8(random(256, 16384, seed=1).abs().cuda(), scaling="row")
    truth = (a.double() * scale_a[:, None].double()) @ (b.double() * scale_b[:, None].double()).t()
    error = {
        accumulation: float(
            (
                kernel.fp8_matmul(
                    a, b, scale_a, scale_b, scaling="row", accumulation=accumulation, out_dtype=torch.float32
                ).double()
                - truth
            ).norm()
        )
        for accumulation in kernel.ACCUMULATIONS
    }
    assert error["accurate"] < error["fast"]
