"""How often ZeRO-3 gathers weights: DeepSpeed's prefetcher must follow what the passes are, not what they once were."""

from __future__ import annotations

import pytest
import torch

from ows_ds.distributed.communicator import join
from ows_ds.distributed.ds_config import DEFAULT_CONFIG, resolve_config
from ows_ds.distributed.zero3 import Zero3
from ows_ds.optim.ows import OWS
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import RATIOS, mean_loss, micro_batches

STEPS = 6


def sharded(world_size: int) -> Zero3:
    return Zero3(tiny("llama"), resolve_config(DEFAULT_CONFIG, "float32", 1, 1, world_size), join("cpu"))


def evaluate(weights: Zero3, rank: int, world_size: int) -> None:
    with torch.no_grad():
        mean_loss(weights, micro_batches(0, rank, world_size, 1)[0])
    weights.after_step()


def gathered(rank: int, world_size: int, evaluations: int, every: int | None) -> list[int]:
    """Bytes of gathers of each training step, after ``evaluations`` forward passes and with one ``every`` few steps."""
    ows = OWS(
        sharded(world_size),
        scores=RATIOS,
        gamma=1,
        scheme="fixed",
        update_proj_gap=100,
        period=100,
        rank=4,
        always_on="none",
    )
    for _ in range(evaluations):
        evaluate(ows.weights, rank, world_size)
    sent = []
    for step in range(STEPS):
        before = ows.comm.sent["weights"]
        for ids in micro_batches(step, rank, world_size, 1):
            ows.backward(mean_loss(ows.weights, ids))
        ows.step()
        ows.zero_grad()
        sent.append(ows.comm.sent["weights"] - before)
        if every is not None and step % every == 0:
            evaluate(ows.weights, rank, world_size)
    ows.close()
    return sent


def test_evaluations_cost_training_no_gathers(pools: Pools) -> None:
    [expected, again] = pools(2).run(gathered, 0, None)
    assert expected == again
    assert expected[1:] == [expected[1]] * (STEPS - 1)
    assert expected[1] < expected[0]  # recorded in the first step; then top layers wait for their backward pass
    for evaluations in (0, 1, 2, 5):
        for every in (None, 2):
            assert pools(2).run(gathered, evaluations, every) == [expected] * 2


def course(rank: int, world_size: int, lowest: list[int]) -> list[int]:
    """Bytes of gathers of passes in which the layers from each ``lowest`` on train."""
    weights = sharded(world_size)
    sent = []
    for step, first in enumerate(lowest):
        for name, parameter in weights.module.named_parameters():
            parameter.requires_grad_(any(f"layers.{i}.input_layernorm" in name for i in range(first, 3)))
        before = weights.comm.sent["weights"]
        weights.backward(mean_loss(weights, micro_batches(step, rank, world_size, 1)[0]))
        weights.after_step()
        weights.module.zero_grad()
        sent.append(weights.comm.sent["weights"] - before)
    return sent


@pytest.mark.parametrize(
    ("before", "after"),
    [(0, 2), (2, 0), *(pytest.param(*way, marks=pytest.mark.slow) for way in [(1, 2), (0, 1)])],
)
def test_the_lowest_layer_moves(pools: Pools, before: int, after: int) -> None:
    """Three passes later gathers are those of a run that never did anything else."""
    moved, straight = (pools(2).run(course, lowest) for lowest in ([before] * 4 + [after] * 6, [after] * 6))
    assert [one[-3:] for one in moved] == [one[-3:] for one in straight]
    assert pools(2).run(course, [before] * 6) != straight
