"""RMSNorm in CUDA C++, run by the emulator: behavior and bad input. Numbers over generated cases: `parity run kernels`."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tessera_kernels.cuda import rms_norm as fused
from tessera_kernels.cuda.rms_norm import CONFIGS, NormConfig, RowConfig, choose_config, cut_of
from tessera_kernels.reference import rms_norm as plain
from tessera_parity.kernel_budget import kernel_limit
from tessera_shared.errors import KernelError, MissingDependency

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: make gpu runs the kernels"),
]


def _limit(found: torch.Tensor, usual: torch.Tensor, truth: torch.Tensor) -> float:
    return kernel_limit(
        float((usual - truth).abs().max()), found.dtype, magnitude=float(truth.abs().max()), length=truth.shape[-1]
    )


def test_leading_dimensions_are_kept() -> None:
    x, gain = torch.randn(2, 3, 24), torch.randn(24)
    found, truth = fused.rms_norm(x, gain, eps=1e-6), plain.rms_norm(x.double(), gain.double(), eps=1e-6)
    assert found.shape == x.shape
    assert float((found - truth).abs().max()) <= _limit(found, plain.rms_norm(x, gain, eps=1e-6), truth)


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    x, gain = torch.randn(9, 40, dtype=torch.bfloat16), torch.randn(40, dtype=torch.bfloat16)
    whole = fused.rms_norm(x, gain, eps=1e-6)
    assert torch.equal(whole[4:5], fused.rms_norm(x[4:5], gain, eps=1e-6))


@pytest.mark.parametrize("width", [40, 520, 8200])
def test_a_row_does_not_depend_on_where_it_lies(width: int) -> None:
    """Whole pieces and numbers one by one are summed in the same order."""
    x, gain, dy = torch.randn(3, width), torch.randn(width), torch.randn(3, width)
    answers = []
    for shift in (0, 1):
        memory = torch.empty(3, width + shift).copy_(torch.cat([x, x], 1)[:, : width + shift])
        inside = memory[:, :width].detach().requires_grad_()
        y = fused.rms_norm(inside, gain, eps=1e-6)
        answers.append((y, *torch.autograd.grad(y, inside, dy)))
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)


def test_only_the_sum_flows_back_when_only_the_sum_is_used() -> None:
    x, residual = (torch.randn(3, 16, requires_grad=True) for _ in range(2))
    gain = torch.randn(16, requires_grad=True)
    _, total = fused.add_rms_norm(x, residual, gain, eps=1e-6)
    upstream = torch.randn(3, 16)
    found = torch.autograd.grad(total, (x, residual, gain), upstream, allow_unused=True)
    assert torch.equal(found[0], upstream)
    assert torch.equal(found[1], upstream)
    assert found[2] is None


def test_an_expanded_gradient_is_read_as_what_it_stands_for() -> None:
    x, gain = torch.randn(3, 16, requires_grad=True), torch.randn(16)
    found = torch.autograd.grad(fused.rms_norm(x, gain, eps=1e-6).sum(), x)[0]
    dense = torch.autograd.grad(fused.rms_norm(x, gain, eps=1e-6), x, torch.ones(3, 16))[0]
    assert torch.equal(found, dense)


# torch's own tracer makes an instance of every autograd.Function, which torch deprecates
@pytest.mark.unfenced
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_and_eager_give_the_same_bits() -> None:
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


def test_nan_stays_in_its_row() -> None:
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
def test_what_does_not_fit_is_named(x: torch.Tensor, gain: torch.Tensor, says: str) -> None:
    with pytest.raises(KernelError, match=says):
        fused.rms_norm(x, gain, eps=1e-6)


def test_a_residual_of_another_shape_is_named() -> None:
    with pytest.raises(KernelError, match=r"residual_XD.shape = \[2, 4\]: expected \[2, 8\]"):
        fused.add_rms_norm(torch.ones(2, 8), torch.ones(2, 4), torch.ones(8), eps=1e-6)


def test_more_rows_than_the_kernel_counts_are_refused() -> None:
    x = torch.ones(1, 1).expand(2**29 + 1, 1)
    with pytest.raises(KernelError, match=r"x_XD.shape = \[536870913, 1\]: expected at most 536870912 rows"):
        fused._run_forward(x, None, torch.ones(1), 1e-6, False, [])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (RowConfig(4, 1024, 128, 1, 0), "threads = 1024: expected 32 to 512"),
        (RowConfig(4, 48, 128, 1, 0), "row_threads = 48: expected a positive multiple of 32"),
        (RowConfig(4, 512, 512, 1, 4), "stages = 4: expected fewer, because 2 rows of 4 pieces"),
    ],
)
def test_a_configuration_that_no_block_can_have_is_named(row: RowConfig, says: str) -> None:
    x = torch.ones(2, 64, requires_grad=True)
    with pytest.raises(KernelError, match=says):
        fused.rms_norm(x, torch.ones(64), eps=1e-6, config=NormConfig(CONFIGS[0].forward, row)).sum().backward()


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_cut_covers_its_row_in_whole_warps(itemsize: int) -> None:
    for width in (1, 2, 65, 128, 199, 512, 1000, 4096, 6144, 16384, 16392, 65536, 100_003):
        for config in (*CONFIGS, choose_config(width, itemsize)):
            for row in config:
                cut = cut_of(width, itemsize, row)
                threads = cut.row_threads * cut.rows
                assert threads % 32 == 0
                assert threads <= 512
                assert cut.rows <= 15 or cut.row_threads <= 32  # a row of several warps has a barrier of its own
                holds = cut.row_threads * row.held * 16 >= width * itemsize
                assert cut.is_wide != holds


def test_a_gpu_with_less_shared_memory_reads_fewer_rows_ahead() -> None:
    config = choose_config(16384, 2).backward
    cut = cut_of(16384, 2, config)
    found = [fused._staging(cut, config, 3, True, 2, kib * 1024, True)[0] for kib in (227, 163, 99)]
    assert found == [2, 1, 0]


def test_a_cpu_without_the_emulator_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(MissingDependency, match=r"x_XD on device cpu: expected cuda, .*TESSERA_CUDA_EMULATE=1"):
        fused.rms_norm(torch.ones(2, 8), torch.ones(8), eps=1e-6)


def test_the_cuda_room_loads_neither_triton_nor_a_compiler() -> None:
    code = (
        "import sys; import tessera_kernels.cuda.rms_norm; "
        "print([name for name in ('triton', 'cuda.bindings.nvrtc', 'rich', 'typer') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
