"""What all tests of kernels share."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fresh memory is NaN between fences: what a kernel never wrote is red at once, not on an unlucky day."""
    if not request.path.stem.startswith("test_kernel_") or request.node.get_closest_marker("unfenced"):
        yield
        return
    from tessera_parity.kernel_memory import fenced_memory  # here, because the other tests run without torch

    with fenced_memory() as fences:
        yield
    assert fences.broken() == 0


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a small kernel in the emulator: see `run_probe`."""
    from .cuda_probe import run_probe

    monkeypatch.setenv("TESSERA_CUDA_EMULATE", "1")
    return partial(run_probe, tmp_path)


@pytest.fixture
def far_memory(tmp_path: Path) -> Any:
    """2^32 numbers and a few more of float16, zeros in a sparse file, for tensors that begin where 32 bits end.

    An offset that wraps around reads the zeros before the tensor instead of what lies outside the process.
    """
    import torch

    try:
        return torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**32 + 2**20, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no sparse file of 8.6 GB here: {error}")
