"""memory.traffic against what is counted, byte by byte; ZeRO-3's gathers against their bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ows_ds.optim.ows import OWS
from ows_ds.planner.memory import Job, gathers, traffic
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import RATIOS, home, mean_loss, micro_batches

STEPS, RANK = 5, 5
NOT_PLANNED = {"agree", "layer_set", "share", "moments", "broadcast", "weights"}  # some bytes, now and then; gathers


def sent_by_steps(
    rank: int, world_size: int, sharding: str, method: str, always_on: str, refresh: str, accumulation: int
) -> list[tuple[dict[str, int], dict[str, int], tuple[int, int], int]]:
    """For each step: what was sent, what was planned, the bounds of gathers and what they sent."""
    settings: dict[str, Any] = {"rank": RANK if method == "ows" else None, "refresh": refresh}
    ows = OWS(
        home(tiny("llama", False, torch.float32), sharding, world_size), RATIOS, gamma=2, scheme="fixed",
        update_proj_gap=3, period=100, always_on=always_on, accumulation=accumulation, **settings,
    )  # fmt: skip
    job = Job(
        ows.layers, method, ows.layer_set, RANK, always_on, refresh, itemsize=4, accumulation=accumulation,
        world_size=world_size, sharded=sharding == "zero3",
    )  # fmt: skip
    seen = []
    for step in range(STEPS):
        before = dict(ows.comm.sent)
        for ids in micro_batches(step, rank, world_size, accumulation):
            ows.backward(mean_loss(ows.weights, ids) / accumulation)
        ows.step()
        ows.zero_grad()
        sent = {name: size - before.get(name, 0) for name, size in ows.comm.sent.items()}
        counted = {name: size for name, size in sent.items() if size and name not in NOT_PLANNED}
        due = step % 3 == 0 and method == "ows"
        seen.append((counted, traffic(job, due, rank), gathers(job), sent.get("weights", 0)))
    ows.close()
    return seen


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
@pytest.mark.parametrize(
    ("method", "always_on"), [("ows", "none"), ("ows", "full"), ("ows", "low_rank"), ("lisa", "full"), ("lisa", "none")]
)
def test_traffic_is_exact(pools: Pools, method: str, always_on: str, sharding: str) -> None:
    for seen in pools(2).run(sent_by_steps, sharding, method, always_on, "full", 2):
        for counted, planned, (least, most), weights in seen:
            assert counted == planned
            assert least <= weights <= most
            assert (weights > 0) == (sharding == "zero3")


def test_sketches(pools: Pools) -> None:
    """The two steps of a refresh by sketches send together what is planned for it and for a plain step."""
    for seen in pools(2).run(sent_by_steps, "replicated", "ows", "none", "sketch", 1):
        (first, refresh, *_), (second, plain, *_) = seen[:2]
        both = {name: first.get(name, 0) + second.get(name, 0) for name in refresh}
        assert both == {name: size + plain.get(name, 0) for name, size in refresh.items()}
        assert set(refresh) == set(plain) | {"sketches", "sketch_bases", "projectors"} == set(first) | set(second)
