"""state_dict and load_state_dict: other tools' checkpoints take a run up again, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ows_ds.errors import UserError
from ows_ds.optim.adamw import BlockAdamW, Group
from ows_ds.optim.method import Method
from ows_ds.optim.ows import OWS
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import RATIOS, home, mean_loss, micro_batches, whole_weights

SETTINGS = {"gamma": 1.5, "rank": 5, "period": 4, "update_proj_gap": 3, "lr": 1e-2, "weight_decay": 0.1, "seed": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "ows": {},
    "sketch": {"refresh": "sketch", "always_on": "low_rank"},
    "auto": {"scale": "auto"},
    "lisa": {"rank": None},
}
BEFORE, AFTER = 7, 4  # steps; the first 7 end inside a period, between two refreshes


def build(kind: str, sharding: str, world_size: int) -> Method:
    weights = home(tiny("llama", True, torch.bfloat16), sharding, world_size)
    if kind == "full":
        names = tuple(name for name, _ in weights.module.named_parameters())
        settings: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}
        return BlockAdamW(weights, [Group(names, ())], lr=1e-2, **settings)
    return OWS(weights, RATIOS, **{**SETTINGS, **VARIANTS[kind]})


def train(method: Method, steps: int, rank: int, world_size: int) -> None:
    for _ in range(steps):
        [ids] = micro_batches(method.steps, rank, world_size, 1)
        method.train_step([lambda ids=ids: mean_loss(method.weights, ids)])


def round_trip(
    rank: int, world_size: int, kind: str, sharding: str, tool: str, folder: Path
) -> list[dict[str, Tensor]]:
    """The weights at the end of a run, and of one that another process takes up in between."""
    from accelerate import Accelerator

    method, ends = build(kind, sharding, world_size), []
    train(method, BEFORE, rank, world_size)
    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(method)
    if tool == "accelerate":
        accelerator.save_state(str(folder))
    elif tool == "dcp":
        dcp.save({"method": method}, checkpoint_id=folder)
    saved = method.state_dict()
    for one in (method, None):
        if one is None:
            one = build(kind, sharding, world_size)
            if tool == "accelerate":
                accelerator._custom_objects[:] = [one]
                accelerator.load_state(str(folder))
            elif tool == "dcp":
                dcp.load({"method": one}, checkpoint_id=folder)
            else:
                one.load_state_dict(saved)
            assert one.steps == BEFORE
        train(one, AFTER, rank, world_size)
        one.close()
        ends.append(whole_weights(one.weights))
    return ends


@pytest.mark.parametrize(
    ("kind", "sharding", "tool"),
    [
        ("ows", "replicated", "accelerate"),
        ("ows", "zero3", "accelerate"),
        ("ows", "replicated", "dcp"),
        ("ows", "zero3", "dcp"),
        ("sketch", "zero3", "dcp"),
        ("lisa", "zero3", "none"),
        ("full", "replicated", "dcp"),
    ],
)
def test_training_continues_to_the_bit(pools: Pools, tmp_path: Path, kind: str, sharding: str, tool: str) -> None:
    for end, resumed in pools(2).run(round_trip, kind, sharding, tool, tmp_path):
        assert all(torch.equal(end[name], resumed[name]) for name in end)


def across_worlds(
    rank: int, world_size: int, kind: str, state: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    method = build(kind, "zero3" if state else "replicated", world_size)
    if state is None:
        train(method, BEFORE, rank, world_size)
    else:
        method.load_state_dict(state)
    state = method.state_dict()
    method.close()
    return state, whole_weights(method.weights)


@pytest.mark.parametrize("kind", ["ows", "auto"])
def test_another_world_and_sharding(pools: Pools, kind: str) -> None:
    """Three ranks' state, which does not divide evenly, is that of two in shards."""
    states, ends = zip(*pools(3).run(across_worlds, kind, None), strict=True)
    assert states[0] == states[1] == states[2]
    for state, end in pools(2).run(across_worlds, kind, states[0]):
        assert state == states[0]
        assert all(torch.equal(end[name], ends[0][name]) for name in end)


def test_another_state_is_refused() -> None:
    method = build("ows", "replicated", 1)
    other = OWS(tiny("llama", True, torch.bfloat16), RATIOS, **{**SETTINGS, "rank": 4}).state_dict()
    with pytest.raises(UserError, match=r"state_dict: .* is invalid: expected what state_dict of the same class"):
        method.load_state_dict({"state": {}, "param_groups": []})
    with pytest.raises(UserError, match=r"optim.rank: 5 is invalid: expected 4, the rank of the checkpoint"):
        method.load_state_dict(other)
    train(method, 1, 0, 1)
