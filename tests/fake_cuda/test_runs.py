"""Training on GPUs that are not there: no races, and a budget of host waits a step."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ows_ds import config
from ows_ds.train.log import RunLog
from ows_ds.train.trainer import train
from tests.fake_cuda.host_waits import host_waits
from tests.fake_cuda.races import races
from tests.fake_cuda.worlds import FakeCuda
from tests.support.tiny_run import recipe

STEADY = 1  # host waits of a step: its losses and its gradients' norm, over all ranks
REFRESHED = 3  # of a step that finds projectors


def train_steps(rank: int, world_size: int, recipe: config.Recipe) -> dict[str, Any]:
    """Of a run: its races, and of each step the kind and where its host waited."""
    races.found.clear()
    steps: list[tuple[str, Counter[str]]] = []
    step = RunLog.step

    def counted(self: RunLog, record: dict[str, Any]) -> None:
        steps.append((kind(recipe, record), host_waits.take()))
        step(self, record)

    with patch.object(RunLog, "step", counted):
        train(recipe)
    gc.collect()
    torch.zeros((), device="cuda").add_(1)  # memory that was freed is reported before the next kernel
    return {"steps": steps, "races": dict(races.found)}


def kind(recipe: config.Recipe, record: dict[str, Any]) -> str:
    """first, draw (it ends with the merges and the draw of the next set), refresh, or steady."""
    if record["step"] == 1:
        return "first"
    if record["step"] % recipe.sampling.period == 0:
        return "draw"
    return "refresh" if "projector_energy" in record else "steady"


CASES = [(m, s) for m in ("ows", "lisa", "full") for s in ("replicated", "zero3")]


@pytest.mark.parametrize(("method", "sharding"), CASES)
def test_steps(fake_cuda: FakeCuda, inputs: Path, tmp_path: Path, method: str, sharding: str) -> None:
    import time
    t = time.time()
    given = recipe(
        inputs, tmp_path / "run", {"importance": "uniform", "period": 6}, method=method, sharding=sharding,
        steps=8, save_steps=None, global_batch_size=8,
    )  # fmt: skip
    given = given.model_copy(update={"data": given.data.model_copy(update={"eval": None})})
    for one in fake_cuda(2).run(train_steps, given):
        for kind, waits in one["steps"]:
            print(kind, sum(waits.values()))
            for w in waits.most_common(9):
                print("    ", w)
        print("races", one["races"])
    print(time.time() - t)
