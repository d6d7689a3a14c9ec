"""RMSNorm in CUDA C++, run by the emulator: what the room has alone; `test_kernel_rms_norm` has the rest."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tessera_kernels.cuda import rms_norm as fused
from tessera_kernels.cuda.rms_norm import CONFIGS, NormConfig, RowConfig, choose_config, cut_of
from tessera_shared.errors import KernelError, MissingDependency

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: make gpu runs the kernels"),
]


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


def test_more_rows_than_the_kernel_counts_are_refused() -> None:
    x = torch.ones(1, 1).expand(2**29 + 1, 1)
    with pytest.raises(KernelError, match=r"x_XD.shape = \[536870913, 1\]: expected at most 536870912 rows"):
        fused.run_forward(x, None, torch.ones(1), 1e-6, False, [])


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
