"""A run that is killed at any moment and started again is the run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kills import kill


@pytest.mark.parametrize(
    ("kills", "seed", "sharding"),
    [
        pytest.param(3, 1, "zero3", marks=pytest.mark.ci),
        pytest.param(5, 1, "replicated", marks=pytest.mark.slow),
        pytest.param(50, 0, "replicated", marks=pytest.mark.slow),
        pytest.param(50, 0, "zero3", marks=pytest.mark.slow),
    ],
)
def test_kills(inputs: Path, tmp_path: Path, sharding: str, kills: int, seed: int) -> None:
    outcome = kill(inputs, tmp_path, kills, sharding, seed)
    assert outcome.hit.total() == kills
    assert outcome.opened >= kills // 2
