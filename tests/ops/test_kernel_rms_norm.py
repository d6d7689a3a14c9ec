"""The RMSNorm kernels of both rooms, interpreted and emulated: behavior and bad input. Numbers: `parity run kernels`."""

import os
import shutil
from importlib import import_module
from types import ModuleType

import pytest
import torch

from tessera_kernels.reference import rms_norm as plain
from tessera_kernels.triton import rms_norm as triton
from tessera_kernels.triton._launch import expect_tile
from tessera_parity.kernel_budget import kernel_limit
from tessera_shared.errors import KernelError

pytest.importorskip("triton")


@pytest.fixture(params=["triton.rms_norm", "cuda.rms_norm", "fastest_rms_norm"])
def fused(request: pytest.FixtureRequest) -> ModuleType:
    """Each room's kernel in turn, and a forward with another's backward; CUDA C++ where something can run it."""
    if request.param != "triton.rms_norm":
        pytest.importorskip("cuda.bindings")
        if shutil.which("c++") is None:
            pytest.skip("no C++ compiler")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("a GPU is here: make gpu runs the kernels")
    return import_module(f"tessera_kernels.{request.param}")


def _limit(found: torch.Tensor, usual: torch.Tensor, truth: torch.Tensor) -> float:
    return kernel_limit(
        float((usual - truth).abs().max()), found.dtype, magnitude=float(truth.abs().max()), length=truth.shape[-1]
    )


def test_leading_dimensions_are_kept(fused: ModuleType) -> None:
    x, gain = torch.randn(2, 3, 24), torch.randn(24)
    found, truth = fused.rms_norm(x, gain, eps=1e-6), plain.rms_norm(x.double(), gain.double(), eps=1e-6)
    assert found.shape == x.shape
    assert float((found - truth).abs().max()) <= _limit(found, plain.rms_norm(x, gain, eps=1e-6), truth)


def test_a_row_does_not_depend_on_the_other_rows(fused: ModuleType) -> None:
    x, gain = torch.randn(9, 40, dtype=torch.bfloat16), torch.randn(40, dtype=torch.bfloat16)
    whole = fused.rms_norm(x, gain, eps=1e-6)
    assert torch.equal(whole[4:5], fused.rms_norm(x[4:5], gain, eps=1e-6))


def test_only_the_sum_flows_back_when_only_the_sum_is_used(fused: ModuleType) -> None:
    x, residual = (torch.randn(3, 16, requires_grad=True) for _ in range(2))
    gain = torch.randn(16, requires_grad=True)
    _, total = fused.add_rms_norm(x, residual, gain, eps=1e-6)
    upstream = torch.randn(3, 16)
    found = torch.autograd.grad(total, (x, residual, gain), upstream, allow_unused=True)
    assert torch.equal(found[0], upstream)
    assert torch.equal(found[1], upstream)
    assert found[2] is None


def test_an_expanded_gradient_is_read_as_what_it_stands_for(fused: ModuleType) -> None:
    x, gain = torch.randn(3, 16, requires_grad=True), torch.randn(16)
    found = torch.autograd.grad(fused.rms_norm(x, gain, eps=1e-6).sum(), x)[0]
    dense = torch.autograd.grad(fused.rms_norm(x, gain, eps=1e-6), x, torch.ones(3, 16))[0]
    assert torch.equal(found, dense)


# torch's own tracer makes an instance of every autograd.Function, which torch deprecates
@pytest.mark.unfenced
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_and_eager_give_the_same_bits(fused: ModuleType) -> None:
    def both(x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        y, total = fused.add_rms_norm(x, residual, gain, eps=1e-6, gain_after_cast=True)
        return fused.rms_norm(y + total, gain, eps=1e-6)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    inputs = [torch.randn(4, 24, requires_grad=True), torch.randn(4, 24), torch.randn(24, requires_grad=True)]
    upstream = torch.randn(4, 24)
    answers = []
    for function in (both, compiled):
        y = function(*inputs)
        answers.append((y, *torch.autograd.grad(y, (inputs[0], inputs[2]), upstream)))
    for eager, graph in zip(*answers, strict=True):
        assert torch.equal(eager, graph)


def test_nan_stays_in_its_row(fused: ModuleType) -> None:
    x = torch.randn(3, 16)
    x[1, 5] = torch.nan
    y = fused.rms_norm(x, torch.randn(16), eps=1e-6)
    assert y.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("x", "gain", "says"),
    [
        (torch.ones(2, 8), torch.ones(7), r"gain_D.shape = \[7\]: expected \[8\]"),
        (torch.ones(2, 8), torch.ones(8, dtype=torch.bfloat16), "gain_D.dtype = bfloat16: expected float32"),
        (torch.ones(2, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64), "x_XD.dtype = float64: expected"),
    ],
)
def test_what_does_not_fit_is_named(fused: ModuleType, x: torch.Tensor, gain: torch.Tensor, says: str) -> None:
    with pytest.raises(KernelError, match=says):
        fused.rms_norm(x, gain, eps=1e-6)


def test_a_residual_of_another_shape_is_named(fused: ModuleType) -> None:
    with pytest.raises(KernelError, match=r"residual_XD.shape = \[2, 4\]: expected \[2, 8\]"):
        fused.add_rms_norm(torch.ones(2, 8), torch.ones(2, 4), torch.ones(8), eps=1e-6)


def test_a_tile_too_large_for_the_registers_is_refused() -> None:
    config = triton.NormConfig(triton.ForwardConfig(32768, 16, 4), triton.BackwardConfig(32768, 16, 4, 1, 1))
    with pytest.raises(KernelError, match=r"rows x block = 131072 elements"):
        triton.rms_norm(torch.ones(2, 8192), torch.ones(8192), eps=1e-6, config=config)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_chosen_tile_fits_registers_and_shared_memory(itemsize: int) -> None:
    for width in (1, 2, 128, 199, 512, 1024, 4096, 16384, 32768, 65536, 100_003):
        config = triton.choose_config(width, itemsize)
        for cut in config:
            tile = cut.rows * min(cut.block, 2 ** (width - 1).bit_length())
            expect_tile("tile", tile, cut.num_warps)
        triton.expect_read_ahead(3 * tile * itemsize, config.backward.stages)


def test_more_read_ahead_than_shared_memory_holds_is_refused() -> None:
    forward, backward = triton.choose_config(16384, 4)
    config = triton.NormConfig(forward, backward._replace(stages=4))
    x = torch.ones(2, 16384, requires_grad=True)
    with pytest.raises(KernelError, match=r"stages = 4 with 131072 bytes a block of rows: expected at most 2"):
        triton.rms_norm(x, torch.ones(16384), eps=1e-6, config=config).sum().backward()
