"""What several files of this folder start from."""

import pytest

from .divergences import Half


@pytest.fixture
def half(wide_backend: str) -> Half:
    return Half(wide_backend)
