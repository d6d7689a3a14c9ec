"""Small kernels, written in a test and run in the emulator, and what their tests hold them against."""

import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera_kernels.cuda._launch import Argument, Kernel, launch

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
SHARED = 96 * 1024

Probe = Callable[..., None]
"""`run_probe` in a folder of the test's own."""


def run_probe(
    folder: Path, parameters: str, body: str, arguments: Sequence[Argument], *, threads: int = 128, grid: int = 1,
    cluster: int | None = None, shared_bytes: int = SHARED, **defines: str | int,
) -> None:  # fmt: skip
    """Compile and run one kernel of 128 threads whose body is given; `cluster`: it runs in clusters of so many blocks."""
    kind = "TESSERA_KERNEL(1024)" if cluster is None else f"TESSERA_CLUSTER_KERNEL({cluster}, 1024)"
    source = (
        f'#include "device.cuh"\n{kind} probe({parameters}) {{\n    TESSERA_SHARED(shared);\n'
        f"    const int t = threadIdx.x, lane = t % 32, warp = t / 32;\n{body}\n}}\nTESSERA_ENTRY(probe)\n"
    )
    path = folder / f"probe_{zlib.crc32(source.encode()):08x}.cu"  # a library is known by its path
    path.write_text(source, encoding="utf-8")
    kernel = Kernel(str(path), "probe", tuple(defines.items()))
    like = next(one for one in arguments if isinstance(one, Tensor))
    launch(kernel, grid=(grid, 1, 1), block=threads, arguments=arguments, like=like, shared_bytes=shared_bytes)


def bits(x: Tensor) -> np.ndarray:
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def swizzled_image(rows: Tensor) -> Tensor:
    """Rows of any width in panels of 64 numbers, as the copy engine leaves them with the 128-byte swizzle."""
    numbers = bits(rows)
    count, width = numbers.shape
    image = np.zeros((width // 64, count * 64), np.uint16)
    for row in range(count):
        for column in range(width):
            piece = (column % 64 // 8) ^ (row % 8)
            image[column // 64, row * 64 + piece * 8 + column % 8] = numbers[row, column]
    return torch.from_numpy(image.view(np.int16).reshape(-1))
