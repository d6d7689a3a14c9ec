"""What all tests of kernels share."""

from collections.abc import Iterator

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
