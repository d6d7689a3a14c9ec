"""Weights in 8 and 4 bits: the quantizer on its own terms, the packed layout, and the product's behavior."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from tessera_kernels.quant_weight import QuantWeight, dequantize, pack, quantize_w4, quantize_w8, unpack
from tessera_kernels.triton import quant_matmul as kernel
from tessera_kernels.triton._unpack import SHRUNK
from tessera_parity.kernel_cases.quant_matmul import FORMATS, OP, Case, quantized
from tessera_parity.kernel_judge import judge
from tessera_parity.kernel_memory import same_bits
from tessera_shared.errors import KernelError

_LARGE = kernel.Config("tile", 128, 64, True, 1, 8, 3)


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


def test_the_packed_layout_of_4_bits_is_what_the_docstring_says():
    codes_FD = torch.arange(3 * 200).reshape(3, 200) % 16
    packed = pack(codes_FD, torch.ones(3, 2), torch.full((3, 2), 7.0), bits=4, group=128)
    assert packed.codes.shape == (2, 3, 32)
    for tile, f, j in ((0, 0, 0), (0, 2, 31), (1, 1, 5)):
        word = int(packed.codes[tile, f, j])
        for i in range(4):
            place = 128 * tile + 32 * i + j
            assert word >> 4 * i & 15 == (int(codes_FD[f, place]) if place < 200 else 7)
    assert torch.equal(unpack(packed), (codes_FD - 7).to(torch.int32))
    assert packed.scales.tolist() == [[1.0] * 3] * 2
    assert packed.zeros.tolist() == [[7] * 3] * 2


def test_the_packed_layout_of_8_bits_is_what_the_docstring_says():
    codes_FD = torch.arange(3 * 200).reshape(3, 200) * 37 % 255 - 127
    packed = pack(codes_FD, torch.ones(3, 1), None, bits=8, group=None)
    assert packed.codes.shape == (2, 3, 64)
    for tile, f, j in ((0, 0, 0), (0, 2, 63), (1, 1, 5), (1, 0, 8)):
        word, low, high = int(packed.codes[tile, f, j]), 128 * tile + j, 128 * tile + 64 + j
        first, second = int(codes_FD[f, low]), int(codes_FD[f, high]) if high < 200 else 0
        assert (word & 0x7F, word >> 8 & 0x7F) == (abs(first), abs(second))
        assert (word >> 15 & 1, word >> 7 & 1) == (int(first < 0), int(second < 0))
    assert torch.equal(unpack(packed), codes_FD.to(torch.int32))


def test_the_bit_tricks_give_every_code():
    """What the GPU's instructions do with a word (`_unpack`), in plain arithmetic: tests without a GPU never run them."""
    codes_FD = torch.arange(-127, 128)[:, None].repeat(1, 128)
    codes_FD[:, 64:] *= -1
    words = pack(codes_FD, torch.ones(255, 1), None, bits=8, group=None).codes[0]
    swapped = (words.int() >> 8 & 0xFF | words.int() << 8).to(torch.int16)
    for half, first in ((words, 0), (swapped, 64)):
        tiny = (half & -0x7F81).view(torch.bfloat16).double()  # -0x7F81 is 0x807F
        assert torch.equal(tiny * 2.0**127 * SHRUNK, codes_FD[:, first : first + 64].double())
    codes_FD = torch.arange(16)[:, None] ^ torch.arange(128) // 8
    words = pack(codes_FD, torch.ones(16, 1), torch.full((16, 1), 7.0), bits=4, group=128).codes[0]
    for i in range(4):
        above_128 = (words.int() >> 4 * i & 15 | 0x4300).to(torch.int16).view(torch.bfloat16)
        assert torch.equal(above_128.double() - 128, codes_FD[:, 32 * i : 32 * i + 32].double())


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
        (lambda: replace(quantize_w8(torch.ones(4, 128)), width=129), r"codes.shape = \[1, 4, 64\]"),
        (lambda: replace(quantize_w8(torch.ones(4, 128)), bits=3), "bits = 3"),
        (lambda: kernel.quant_matmul(torch.ones(2, 127), quantize_w8(torch.ones(4, 128))), "x_XD.shape"),
        (lambda: kernel.quant_matmul(torch.ones(2, 128).double(), quantize_w8(torch.ones(4, 128))), "x_XD.dtype"),
        (
            lambda: kernel.quant_matmul(torch.ones(2, 128), quantize_w8(torch.ones(4, 128)), config=_LARGE),
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


@pytest.mark.parametrize(
    "config",
    [
        kernel.Config("tile", 64, 16, False, 2, 4, 5),
        kernel.Config("tile", 64, 16, True, 2, 4, 3, 2),
        kernel.Config("tile", 64, 32, True, 2, 4, 3),
    ],
)
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
                    for flags in product((False, True), repeat=2):
                        chosen = kernel.choose_config(
                            rows, outputs, width, bits, is_grouped=flags[0], is_float32=flags[1]
                        )
                        assert chosen in kernel.CONFIGS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the instructions that it looks at are the GPU's")
def test_instructions_of_two_numbers_give_the_plain_path_bits():
    """The bit tricks run only on the GPU; the quantizer's own way back is plain arithmetic."""
    for form in ("w8", "w4g128", "w4g64"):
        packed = quantized(random(128, 512), form).to("cuda")
        written_FD = dequantize(packed, torch.bfloat16)
        assert same_bits(kernel.dequantize(packed), written_FD)
        eye = torch.eye(512, dtype=torch.bfloat16, device="cuda")
        for config in (config for config in kernel.CONFIGS if config.kind == "tile"):
            y_DF = kernel.quant_matmul(eye, packed, config=config)
            assert same_bits(y_DF.t().contiguous(), written_FD)
