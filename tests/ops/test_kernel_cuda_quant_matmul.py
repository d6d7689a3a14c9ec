"""Packed weights in CUDA C++, run by the emulator: what the fuzzing's cases do not say of the room's own kernel."""

import os
import shutil
from itertools import product

import pytest
import torch

pytest.importorskip("cuda.bindings")


from tessera_kernels.cuda._compile import build
from tessera_kernels.cuda.quant_matmul import (
    CONFIGS,
    SPLITS,
    QuantConfig,
    choose_config,
    few_kernel,
    product_kernel,
    quant_matmul,
)
from tessera_kernels.quant_weight import dequantize, quantize_w4, quantize_w8
from tessera_kernels.reference import quant_matmul as plain
from tessera_parity.kernel_budget import kernel_limit
from tessera_parity.kernel_cases.quant_matmul import FORMATS, quantized
from tessera_parity.kernel_memory import same_bits
from tessera_shared.errors import KernelError, MissingDependency

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: make gpu runs the kernels"),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.mark.parametrize("form", FORMATS)
def test_the_identity_gives_the_weight_back(form: str) -> None:
    """Every input and output in its place, exactly as the weight rounds when it is written out."""
    weight = quantized(random(260, 200), form)
    y = quant_matmul(torch.eye(200, dtype=torch.bfloat16), weight)
    error = (y.t().double() - dequantize(weight, torch.bfloat16).double()).abs()
    assert not error.any()


@pytest.mark.parametrize("form", ["w8", "w4g64"])
def test_however_a_product_is_cut_it_is_as_exact_as_the_plain_one(form: str) -> None:
    x, weight = random(70, 600), quantized(random(68, 600, seed=1), form)
    exact = plain.quant_matmul(x.double(), weight)
    usual = float((plain.quant_matmul(x, weight).double() - exact).abs().max())
    limit = kernel_limit(usual, torch.bfloat16, magnitude=float(exact.abs().max()), length=600)
    answers = {config: quant_matmul(x, weight, config=config) for config in CONFIGS}
    for config, answer in answers.items():
        assert float((answer.double() - exact).abs().max()) <= limit, config
    for config in (QuantConfig(64), QuantConfig(16, 64)):  # the ring's depth changes nothing, rows of a block neither
        assert same_bits(answers[config], answers[config._replace(stages=2)])
        assert same_bits(answers[config], answers[config._replace(block_x=8 if config.is_few else 128)])


def test_parts_of_uneven_length_add_up() -> None:
    """Five tiles of inputs in two, three and four parts, of which the last is empty."""
    x, weight = random(3, 5 * 128), quantize_w8(random(4, 5 * 128, seed=1))
    whole, *split = (quant_matmul(x, weight, config=QuantConfig(64, splits=splits)) for splits in SPLITS)
    for one in split:
        assert float((whole.double() - one.double()).abs().max()) <= float(whole.abs().max()) * 2.0**-7


def test_any_leading_dimensions_and_none() -> None:
    weight = quantize_w4(random(34, 130))
    x = random(2, 3, 130, seed=1)
    y = quant_matmul(x, weight)
    assert y.shape == (2, 3, 34)
    assert same_bits(y.view(6, 34)[5], quant_matmul(x[1, 2], weight))
    assert quant_matmul(x[:, :0], weight).shape == (2, 0, 34)


def test_gradients_reach_x() -> None:
    weight, x, dy = quantize_w4(random(34, 130)), random(5, 130, seed=1).requires_grad_(), random(5, 34, seed=2)
    (found,) = torch.autograd.grad(quant_matmul(x, weight), x, dy)
    assert same_bits(found, dy @ dequantize(weight, torch.bfloat16))


@pytest.mark.unfenced
def test_a_compiler_sees_one_op() -> None:
    x, weight = random(5, 130), quantize_w8(random(34, 130, seed=1), group=128)
    compiled = torch.compile(lambda x: quant_matmul(x, weight), fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(x), quant_matmul(x, weight))


@pytest.mark.parametrize(
    ("x", "outputs", "config", "says"),
    [
        (random(3, 64).float(), 4, None, "x_XD.dtype = float32: expected bfloat16"),
        (random(3, 65), 4, None, r"x_XD.shape = \[3, 65\]: expected \[3, 64\]"),
        (random(3, 64), 5, None, "weight.num_outputs = 5: expected a multiple of 2"),
        (random(3, 64), 4, QuantConfig(96), "block_x = 96: expected one of 8, 16, 64, 128"),
        (random(3, 64), 4, QuantConfig(8), "block_f = 256: expected one of 16, 32, 64"),
        (random(3, 64), 6, QuantConfig(8, 16), "weight.num_outputs = 6: expected a multiple of 4"),
        (random(3, 64), 4, QuantConfig(128, splits=5), "splits = 5: expected one of 1, 2, 3, 4"),
        (random(3, 64), 4, QuantConfig(16, 64, splits=2), "splits = 2: expected one of 1,"),
        (random(3, 64), 4, QuantConfig(128, splits=4, stages=1), "bytes of sums .* = 98304: expected 0 to 65536"),
        (random(3, 64), 4, QuantConfig(128, stages=4), "bytes of shared memory = 263168: expected 0 to 232448"),
    ],
)
def test_what_does_not_fit_is_one_line(x: torch.Tensor, outputs: int, config: QuantConfig | None, says: str) -> None:
    with pytest.raises(KernelError, match=says) as caught:
        quant_matmul(x, quantize_w8(random(outputs, 64)), config=config)
    assert "\n" not in str(caught.value)


def test_a_cpu_without_the_emulator_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(MissingDependency, match=r"quant_matmul on device cpu: expected cuda, .*TESSERA_CUDA_EMULATE=1"):
        quant_matmul(random(2, 64), quantize_w8(random(4, 64)))


def test_the_chosen_configuration_is_one_that_the_gpu_lane_runs() -> None:
    for rows, outputs, width in product(
        (1, 9, 16, 64, 65, 128, 256, 1024), (2, 512, 8190, 8192, 28672), (64, 4096, 8192)
    ):
        assert choose_config(rows, outputs, width) in CONFIGS


FORMATS_BUILT = pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 64), (8, 128), (4, 64), (4, 128)])


@FORMATS_BUILT
@pytest.mark.parametrize("block_x", [64, 128])
@pytest.mark.parametrize("splits", SPLITS)
def test_on_hopper_nothing_spills_and_products_run_beside_the_unpacking(
    bits: int, group: int, block_x: int, splits: int
) -> None:
    built = build(product_kernel(bits, group, block_x, QuantConfig(block_x).depth(bits, group), splits), "sm_90a")
    assert (built.spill_bytes, built.stack_bytes, built.slow) == (0, 0, "")


@FORMATS_BUILT
def test_few_rows_take_few_registers(bits: int, group: int) -> None:
    for config in (config for config in CONFIGS if config.is_few):
        built = build(few_kernel(bits, group, config.block_x, config.block_f, config.depth(bits, group)), "sm_90a")
        assert (built.spill_bytes, built.stack_bytes) == (0, 0)
        assert built.registers <= 72  # 17 warps of a block could have 120


def test_few_rows_take_the_block_that_ends_soonest() -> None:
    for outputs, block_f in ((28672, 32), (11008, 32), (8192, 64), (4096, 32), (2048, 16), (256, 16)):
        assert choose_config(1, outputs, 8192) == QuantConfig(8, block_f)
    for outputs, block_f in ((28672, 64), (8192, 64), (4096, 32)):  # x is read for each block
        assert choose_config(16, outputs, 8192) == QuantConfig(16, block_f)
    assert choose_config(16, 8190, 8192) == QuantConfig(64, splits=3)  # steps of 8190 outputs are not whole 16 bytes


def test_few_tiles_divide_their_inputs_among_blocks_that_run_at_once() -> None:
    for rows, outputs, config in (
        (64, 8192, QuantConfig(64, splits=3)),
        (128, 8192, QuantConfig(64, splits=2)),
        (128, 28672, QuantConfig(128)),
        (256, 8192, QuantConfig(128, splits=2)),
        (512, 8192, QuantConfig(128)),
        (64, 1024, QuantConfig(64, splits=4)),
    ):
        assert choose_config(rows, outputs, 8192) == config
    assert choose_config(64, 1024, 512) == QuantConfig(64)  # nothing to divide
