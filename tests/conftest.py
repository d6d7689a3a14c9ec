"""Fixtures that more than one folder of tests needs."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu" if not os.environ.get("TESSERA_GPU") else "")
if not Path("/dev/nvidiactl").exists():  # read when triton is first imported, which any test's torch.compile may do
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "tessera",
    deadline=None,  # the first call of a shape compiles
    derandomize=True,  # a red test is red again; `parity` is where new seeds come from
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
settings.load_profile("tessera")


@pytest.fixture(params=["torch", "jax"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each half in turn."""
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture
def wide_backend(backend: str) -> Iterator[str]:
    """Each half in turn, JAX with its 64-bit types."""
    with import_module("jax").enable_x64(True) if backend == "jax" else nullcontext():
        yield backend
