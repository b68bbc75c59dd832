"""A run that is killed at any moment and started again is the run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kills import kill


@pytest.mark.parametrize(
    ("kills", "seed"), [(5, 1), pytest.param(50, 0, marks=pytest.mark.slow)], ids=["a few", "many"]
)
@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
def test_kills(inputs: Path, tmp_path: Path, sharding: str, kills: int, seed: int) -> None:
    outcome = kill(inputs, tmp_path, kills, sharding, seed)
    assert outcome.hit.total() == kills
    assert outcome.opened >= kills // 2
