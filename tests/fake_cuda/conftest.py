"""Fixtures of tests that see GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_cuda import build
from tests.fake_cuda.worlds import FakeCuda


@pytest.fixture(scope="session")
def fake_cuda() -> Iterator[FakeCuda]:
    """Worlds of ranks with GPUs: ``fake_cuda(2).run(function, *args)``."""
    if problem := build.missing():
        pytest.skip(problem)
    worlds = FakeCuda()
    yield worlds
    worlds.close()
