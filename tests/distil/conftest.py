"""What several files of this folder start from."""

from typing import Any

import pytest

from .divergences import Half


@pytest.fixture
def half(backend: str) -> Any:
    if backend == "torch":
        yield Half("torch")
        return
    import jax

    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield Half("jax")
    jax.config.update("jax_enable_x64", before)
