"""What the CUDA driver is asked for, heard by a library that stands in for it: no GPU, the same bindings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("cuda.bindings.driver")

DRIVER = Path(__file__).with_name("recording_driver.c")

PROGRAM = """
import ctypes, sys, threading
from pathlib import Path
from types import SimpleNamespace
import torch
from tessera_kernels.cuda import _launch
from tessera_kernels.cuda._attention_configs import choose_config
from tessera_kernels.cuda.flash_attention import hopper
from tessera_shared.errors import KernelError

class OnGpu(torch.Tensor):  # memory of the CPU, which nothing reads
    is_cuda, device = property(lambda self: True), property(lambda self: torch.device("cuda", 0))

def on_gpu(tensor):
    return torch.Tensor._make_subclass(OnGpu, tensor)

torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.get_device_properties = lambda device: SimpleNamespace(shared_memory_per_block_optin=232448)
torch.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=0x77)
_launch.build = lambda kernel, arch: SimpleNamespace(path=Path(sys.argv[1]))  # NVRTC asks a driver for more than this one has
kernel = hopper(torch.bfloat16, 128, choose_config(128, 90))
heads = on_gpu(torch.zeros(2, 5, 3, 64, dtype=torch.bfloat16).permute(0, 2, 1, 3))

def call():
    try:
        for _ in range(9):  # wherever the memory of a map falls
            made = _launch.tensor_map(heads, (1, 1, 128, 64))
        assert list(made.packed) == list(range(128)), made.packed
        memory, layout = _launch._packed([made, _launch.Int64(0x1234567890AB), -17, 0.5, None])
        place = ctypes.addressof(memory) + layout.addresses_at
        _launch._launch_on_gpu(kernel, (3, 2, 1), (384, 1, 1), 200000, place, torch.device("cuda", 0))
    except KernelError as error:
        print("refused:", error)

call()
thread = threading.Thread(target=call)  # a backward runs in one of autograd's threads, which has no context yet
thread.start()
thread.join()
try:
    _launch.tensor_map(on_gpu(torch.zeros(1, 1, 1, 672, dtype=torch.bfloat16)[..., :666]), (1, 1, 128, 64))
except KernelError as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Run the program once; give the lines of the driver and of the program."""
    compiler = shutil.which("cc") or shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler here: the driver that records is built with one")
    folder = tmp_path_factory.mktemp("driver")
    command = [compiler, "-xc", "-shared", "-fPIC", "-O1", str(DRIVER), "-o", str(folder / "libcuda.so.1"), "-ldl"]
    subprocess.run(command, check=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "LD_LIBRARY_PATH": str(folder)}
    (folder / "cubin").write_bytes(b"\x7fELF")
    arguments = [sys.executable, "-u", "-c", PROGRAM, str(folder / "cubin")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_map_says_sizes_strides_box_and_swizzle_wherever_its_memory_falls(heard: list[str]) -> None:
    """[2, 3, 5, 64] seen in [2, 5, 3, 64]: innermost first, strides in bytes, bfloat16 = 9, 128-byte swizzle = 3, 256 B = 3."""
    maps = [line for line in heard if line.startswith("map")]
    assert len(maps) == 2 * 9
    assert set(maps) == {"map 9 4, 64 5 3 2, 384 128 1920, 64 128 1 1, 1 1 1 1, 0 3 3 0"}


def test_a_launch_passes_its_arguments_by_address_in_every_thread(heard: list[str]) -> None:
    launches = [line for line in heard if line.startswith("launch")]
    assert len(launches) == 2
    assert set(launches) == {
        "launch 3 2 1, 384 1 1, 200000, stream 0x77, extra 0, function 0x30: 1 127, 1234567890ab, -17, 0.5, (nil)"
    }


def test_module_function_and_context_are_asked_for_once(heard: list[str]) -> None:
    once = [line for line in heard if line.split()[0] in ("retain", "load", "function", "attribute")]
    assert once == ["retain 0", "load ELF", "function flash_attention_forward", "attribute 8 232448"]


def test_what_the_driver_refuses_is_one_line(heard: list[str]) -> None:
    refused = [line for line in heard if line.startswith("refused")]
    assert len(refused) == 1
    assert "tensor map of [1, 1, 1, 666], box [1, 1, 128, 64] = CUDA_ERROR_INVALID_VALUE (refused)" in refused[0]
