"""A run that is killed at any moment and started again is the run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kills import kill


@pytest.mark.parametrize(
    ("kills", "seed", "sharding", "frozen"),
    [
        pytest.param(3, 1, "zero3", "same", marks=pytest.mark.ci),
        pytest.param(5, 1, "replicated", "same", marks=pytest.mark.slow),
        pytest.param(10, 2, "zero3", "int8", marks=pytest.mark.slow),
        pytest.param(50, 0, "replicated", "same", marks=pytest.mark.slow),
        pytest.param(50, 0, "zero3", "same", marks=pytest.mark.slow),
    ],
)
def test_kills(inputs: Path, tmp_path: Path, sharding: str, kills: int, seed: int, frozen: str) -> None:
    outcome = kill(inputs, tmp_path, kills, sharding, seed, frozen)
    assert outcome.hit.total() == kills
    assert outcome.opened >= kills // 2
