"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.pool import Pools
from tests.support.tiny_run import write_inputs

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave float32 at one and three processes to --slow: float64 shows the arithmetic, two processes float32."""
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        if given.get("dtype") == torch.float32 and given.get("world_size") in (1, 3):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Worlds of processes by size: ``pools(2).run(function, *args)`` (see `tests.support.pool`)."""
    worlds = Pools()
    yield worlds
    worlds.close()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tests.support.tiny_run.recipe` trains."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in bfloat16, shared with the demo; converted once."""
    from ows_ds.data import samples

    return samples.smollm2(ROOT / "runs" / "demo-inputs" / "SmolLM2-135M-Instruct")
