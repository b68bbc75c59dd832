"""Training on GPUs without one: nothing races, and the host waits once a step."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ows_ds import OWS, config
from ows_ds.distributed.ds_config import DEFAULT_CONFIG, resolve_config
from ows_ds.distributed.zero3 import Zero3
from ows_ds.train.log import RunLog
from ows_ds.train.trainer import train
from tests.fake_cuda.host_waits import host_waits
from tests.fake_cuda.races import races_of_body
from tests.fake_cuda.worlds import FakeCuda
from tests.support.families import tiny
from tests.support.tiny_run import recipe

RUNS = [(1, "ows", "replicated"), *((2, m, s) for m in ("ows", "lisa", "full") for s in ("replicated", "zero3"))]
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BUDGET = {"steady": 1, "refresh": 3}  # host waits of a step: the one is for its losses and its gradients' norm
PERIOD, STEPS = 6, 7


# ---------------------------------------------------------------- runs of the trainer


def train_steps(rank: int, world_size: int, recipe: config.Recipe) -> dict[str, Any]:
    """Of a run: its races, and of each step the kind and where its host waited. One rank has no launcher."""
    steps: list[tuple[str, Counter[str]]] = []
    step = RunLog.step

    def counted(self: RunLog, record: dict[str, Any]) -> None:
        steps.append((kind(record), host_waits.take()))
        step(self, record)

    with patch.dict(os.environ), patch.object(RunLog, "step", counted), races_of_body() as found:
        for variable in LAUNCHER if world_size == 1 else ():
            del os.environ[variable]
        train(recipe)
    kinds = [this for this, _ in steps] + [""]
    # what the coming step needs, merges and the ranks' agreement, counts for the step before it
    joined = ["refresh" if (this, after) == ("steady", "refresh") else this for this, after in pairwise(kinds)]
    return {"steps": [(this, waits) for this, (_, waits) in zip(joined, steps, strict=True)], "races": found}


def kind(record: dict[str, Any]) -> str:
    """first, last, draw (it ends with the merges and the draw of the next set), refresh, or steady."""
    if record["step"] in (1, STEPS):
        return "first" if record["step"] == 1 else "last"
    if record["step"] % PERIOD == 0:
        return "draw"
    return "refresh" if "projector_energy" in record else "steady"


@pytest.fixture(scope="module")
def steps(fake_cuda: FakeCuda, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``steps(ranks, method, sharding)``: what `train_steps` gives, by rank."""
    made: dict[tuple[int, str, str], list[dict[str, Any]]] = {}

    def run(ranks: int, method: str, sharding: str) -> list[dict[str, Any]]:
        key = ranks, method, sharding
        if key not in made:
            whole = recipe(
                inputs, tmp_path_factory.mktemp("runs") / "run", {"importance": "uniform", "period": PERIOD},
                method=method, sharding=sharding, steps=STEPS, save_steps=None, global_batch_size=4 * ranks,
            )  # fmt: skip
            without = whole.model_copy(update={"data": whole.data.model_copy(update={"eval": None})})
            made[key] = fake_cuda(ranks).run(train_steps, without)
        return made[key]

    return run


@pytest.mark.parametrize(("ranks", "method", "sharding"), RUNS)
def test_training_has_no_races(steps: Any, ranks: int, method: str, sharding: str) -> None:
    for rank in steps(ranks, method, sharding):
        assert rank["races"] == {}
        assert [kind for kind, _ in rank["steps"]].count("steady") >= 2


@pytest.mark.parametrize(("ranks", "method", "sharding"), RUNS)
def test_the_host_waits_once_a_step(steps: Any, ranks: int, method: str, sharding: str) -> None:
    assert_budget(steps(ranks, method, sharding), "steady")


@pytest.mark.parametrize(("ranks", "sharding"), [(1, "replicated"), (2, "replicated"), (2, "zero3")])
def test_the_host_waits_thrice_a_refresh(steps: Any, ranks: int, sharding: str) -> None:
    assert_budget(steps(ranks, "ows", sharding), "refresh")


def assert_budget(ranks: list[dict[str, Any]], kind: str) -> None:
    """DeepSpeed's own waits are not ours: they bound how far ahead it gathers."""
    steps = [waits for rank in ranks for this, waits in rank["steps"] if this == kind]
    assert steps
    for waits in steps:
        ours = Counter({place: number for place, number in waits.items() if " at [deepspeed/" not in place})
        report = "\n".join(f"{number:6d} {place}" for place, number in ours.most_common())
        assert ours.total() <= BUDGET[kind], f"the host waits\n{report}"


# ---------------------------------------------------------------- a loop whose batches are on the device


def loop(rank: int, world_size: int, ordered: bool) -> dict[str, int]:
    """The races of a loop over ZeRO-3 in which nothing lets the host wait between an update and the next gathers."""
    import deepspeed

    fix = contextlib.nullcontext() if ordered else patch.object(Zero3, "order_gathers", lambda self: None)
    model: Any = tiny("llama", False, torch.bfloat16)
    with races_of_body() as found, fix:
        engine = deepspeed.initialize(model=model, config=resolve_config(DEFAULT_CONFIG, "bfloat16", 2, 1, world_size))[
            0
        ]
        ows = OWS(engine, [1.0] * 3, gamma=1, period=3, rank=4, update_proj_gap=2, lr=1e-2)
        ids = torch.randint(3, 60, (5, 2, 16), device="cuda", generator=torch.Generator("cuda").manual_seed(rank))
        for batch in ids:
            ows.backward(engine.module(input_ids=batch, labels=batch).loss)
            ows.step()
            ows.zero_grad()
        ows.close()
    return found


def test_gathers_follow_what_was_written_to_shards(fake_cuda: FakeCuda) -> None:
    assert fake_cuda(2).run(loop, True) == [{}, {}]


def test_gathers_race_where_nothing_orders_them(fake_cuda: FakeCuda) -> None:
    for found in fake_cuda(2).run(loop, False):
        assert found
        assert all(race.startswith("write then read: ") for race in found)
