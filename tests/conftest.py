"""Fixtures for all tests, and the order of their files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# before torch: MKL's products otherwise depend in their last bit on where in memory a matrix lies
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

from tests.support.pool import Pools
from tests.support.tiny_run import recipe, write_inputs

ROOT = Path(__file__).resolve().parent.parent
LONG = {"pools", "inputs", "smollm2", "finished"}  # fixtures of tests that start ranks or train


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked ci is slow. Files of such tests, and those that start ranks, come first, so that the two sessions
    end at the same time.
    """
    long = {item.path for item in items if LONG & set(getattr(item, "fixturenames", ()))}
    for item in items:
        if item.get_closest_marker("ci"):
            item.add_marker(pytest.mark.slow)
            long.add(item.path)
    items.sort(key=lambda item: item.path not in long)  # stable


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
def straight(pools: Pools, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``straight(2, **arguments of recipe)``: the folder of a run of so many ranks that nothing stops, made once.

    It is shared: tests read it, or copy it (`tests.support.tiny_run.cut`).
    """
    made: dict[str, Path] = {}

    def run_of(world_size: int, **settings: Any) -> Path:
        from tests.train.test_trainer import run

        key = f"{world_size} {json.dumps(settings, sort_keys=True)}"
        if key not in made:
            folder = tmp_path_factory.mktemp("straight") / "run"
            pools(world_size).run(run, recipe(inputs, folder, **settings), None)
            made[key] = folder
        return made[key]

    return run_of


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in bfloat16, shared with the demo; converted once."""
    from ows_ds.data import samples

    return samples.smollm2(ROOT / "runs" / "demo-inputs" / "SmolLM2-135M-Instruct")
