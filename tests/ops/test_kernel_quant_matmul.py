"""Weights in 8 and 4 bits: the quantizer on its own terms, the packed layout, and the product's behavior."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from tessera_kernels.quant_weight import QuantWeight, dequantize, pack, quantize_w4, quantize_w8, unpack
from tessera_kernels.triton import quant_matmul as kernel
from tessera_parity.kernel_cases.quant_matmul import FORMATS, OP, Case, quantized
from tessera_parity.kernel_judge import judge
from tessera_parity.kernel_memory import same_bits
from tessera_shared.errors import KernelError


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def steps_of(weight: QuantWeight) -> torch.Tensor:
    scales = weight.scales.double().t()
    return scales.repeat_interleave(weight.group or weight.width, 1)[:, : weight.width]


@given(
    form=st.sampled_from(FORMATS),
    outputs=st.integers(1, 9),
    width=st.integers(1, 400),
    power=st.integers(-36, 4),
    shift=st.sampled_from((0.0, 1.0, -3.0)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 99),
)
def test_every_weight_comes_back_within_half_a_step(form, outputs, width, power, shift, dtype, seed):
    weight = ((random(outputs, width, seed=seed) + shift) * 10.0**power).to(dtype)
    packed = quantized(weight, form)
    error = (dequantize(packed, torch.float64) - weight.double()).abs()
    assert bool((error <= steps_of(packed) / 2).all())


@pytest.mark.parametrize("form", FORMATS)
def test_steps_are_no_wider_than_the_range_needs(form):
    """A bound in steps says nothing if the steps may grow: one code fewer would have to fail."""
    weight = random(7, 300)
    packed = quantized(weight, form)
    group = packed.group or packed.width
    codes = {8: 254, 4: 14 if "symmetric" in form else 15}[packed.bits]
    for index, scales_F in enumerate(packed.scales):
        part = weight[:, index * group : (index + 1) * group].double()
        span = part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)
        wanted = (span if codes == 15 else 2 * part.abs().amax(1)) / codes
        rounding = torch.finfo(torch.float32 if packed.group is None else torch.bfloat16).eps
        assert bool((scales_F.double() >= wanted).all())
        assert bool((scales_F.double() <= wanted * (1 + rounding)).all())


def test_halves_round_to_even():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert unpack(quantize_w8(weight)).tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("form", FORMATS)
def test_groups_of_zeros_are_exact_and_zero_stays_zero(form):
    weight = random(5, 300)
    weight[2] = 0.0
    weight[:, 17] = 0.0
    back = dequantize(quantized(weight, form), torch.float64)
    assert not back[2].any()
    assert not back[:, 17].any()


def test_the_packed_layout_is_what_the_docstring_says():
    codes_FD = torch.arange(3 * 200).reshape(3, 200) % 16
    packed = pack(codes_FD, torch.ones(3, 2), torch.full((3, 2), 7.0), bits=4, group=128)
    assert packed.codes.shape == (2, 3, 64)
    for tile, f, j in ((0, 0, 0), (0, 2, 63), (1, 1, 5)):
        byte = int(packed.codes[tile, f, j])
        assert byte & 15 == int(codes_FD[f, 128 * tile + j])
        high = 128 * tile + 64 + j
        assert byte >> 4 == (int(codes_FD[f, high]) if high < 200 else 7)
    assert torch.equal(unpack(packed), (codes_FD - 7).to(torch.int32))
    assert packed.scales.tolist() == [[1.0] * 3] * 2
    assert packed.zeros.tolist() == [[7] * 3] * 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: quantize_w8(torch.tensor([[1.0, float("nan")]])), r"weight_FD\[0, 1\] = nan: expected finite"),
        (lambda: quantize_w4(torch.tensor([[1.0], [float("-inf")]])), r"weight_FD\[1, 0\] = -inf: expected finite"),
        (lambda: quantize_w8(torch.zeros(0, 4)), "at least one output"),
        (lambda: quantize_w8(torch.zeros(4)), "2 dimensions"),
        (lambda: quantize_w8(torch.zeros(4, 4, dtype=torch.float64)), "weight_FD.dtype = float64"),
        (lambda: quantize_w4(torch.ones(4, 128), group=96), "group = 96: expected a positive multiple of 64"),
        (lambda: quantize_w4(torch.ones(4, 128), group=None), "group = None"),
        (lambda: replace(quantize_w8(torch.ones(4, 128)), width=129), r"codes.shape = \[1, 4, 128\]"),
        (lambda: replace(quantize_w8(torch.ones(4, 128)), bits=3), "bits = 3"),
        (lambda: kernel.quant_matmul(torch.ones(2, 127), quantize_w8(torch.ones(4, 128))), "x_XD.shape"),
        (lambda: kernel.quant_matmul(torch.ones(2, 128).double(), quantize_w8(torch.ones(4, 128))), "x_XD.dtype"),
        (
            lambda: kernel.quant_matmul(torch.ones(2, 128), quantize_w8(torch.ones(4, 128)), config=kernel.CONFIGS[-2]),
            "float32 has no tensor cores",
        ),
        (lambda: kernel.Config("stream-k"), "kind = 'stream-k': expected one of tile"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, words):
    with pytest.raises(KernelError, match=words) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1
    assert "try" in str(caught.value)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [1, 19])
def test_chosen_configurations_agree_with_the_reference(form, rows):
    judge(OP, Case(rows=rows, outputs=37, width=330, format=form))


def test_writing_the_weight_out_gives_the_reference_bits():
    for form in FORMATS:
        packed = quantized(random(37, 300), form)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert same_bits(kernel.dequantize(packed, dtype), dequantize(packed, dtype))


def test_leading_dimensions_strides_and_no_rows():
    packed = quantize_w4(random(33, 256))
    x = random(2, 3, 256, dtype=torch.bfloat16)
    flat = kernel.quant_matmul(x.reshape(6, 256), packed)
    assert same_bits(kernel.quant_matmul(x, packed), flat.view(2, 3, 33))
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert same_bits(kernel.quant_matmul(turned, packed), flat.view(2, 3, 33))
    assert kernel.quant_matmul(x[:, :0], packed).shape == (2, 0, 33)


@pytest.mark.parametrize("config", [kernel.CONFIGS[1], kernel.Config("tile", 64, 16, True, 2, 4, 6)])
def test_a_row_alone_is_the_row_in_its_batch(config):
    packed = quantize_w4(random(70, 600))
    x = random(18, 600, dtype=torch.bfloat16)
    batch = kernel.quant_matmul(x, packed, config=config)
    for row in (0, 16, 17):
        assert same_bits(kernel.quant_matmul(x[row : row + 1], packed, config=config), batch[row : row + 1])


def test_gradient_of_x_is_the_written_out_weight():
    packed = quantize_w8(random(33, 130))
    x = random(3, 130).requires_grad_()
    cotangent = random(3, 33, seed=1)
    kernel.quant_matmul(x, packed).backward(cotangent)
    assert same_bits(x.grad, cotangent @ dequantize(packed, torch.float32))


@pytest.mark.unfenced
def test_compiles_into_one_graph():
    packed = quantize_w4(random(33, 256))
    x = random(3, 256, dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: kernel.quant_matmul(x, packed) * 2, backend="eager", fullgraph=True)
    assert same_bits(compiled(x), kernel.quant_matmul(x, packed) * 2)


def test_whatever_is_chosen_is_in_the_list():
    for rows in (1, 3, 16, 17, 32, 33, 64, 65, 128, 500, 1023, 1024, 4096):
        for outputs in (1, 128, 1000, 4096, 16384):
            for width in (1, 1024, 8192, 16384):
                for bits in (4, 8):
                    for is_float32 in (False, True):
                        assert kernel.choose_config(rows, outputs, width, bits, is_float32=is_float32) in kernel.CONFIGS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the instructions that it looks at are the GPU's")
def test_instructions_of_two_numbers_give_the_plain_path_bits():
    """The bit tricks run only on the GPU; float32's plain path multiplies the same integers."""
    for form in ("w8", "w4g128", "w4g64"):
        packed = quantized(random(128, 512), form).to("cuda")
        eye = torch.eye(512, dtype=torch.bfloat16, device="cuda")
        for config in (kernel.Config("tile", 64, 16, False, 1, 4, 6), kernel.Config("tile", 128, 128, True, 1, 8, 3)):
            y_DF = kernel.quant_matmul(eye, packed, config=config)
            assert same_bits(y_DF.t().contiguous(), kernel.dequantize(packed))
