"""optim.update_proj_gap: auto, by hand, against the reference in one process, and from one process to another."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from ows_ds.config import OWSConfig, parse
from ows_ds.distributed.communicator import Communicator
from ows_ds.errors import UserError
from ows_ds.optim.gap import Gap
from ows_ds.optim.ows import OWS
from ows_ds.optim.reference import Reference
from ows_ds.planner.step import StepSpec
from ows_ds.planner.traffic import traffic
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import (
    RATIOS,
    batch,
    distance,
    home,
    mean_loss,
    one_step,
    whole_weights,
)  # fmt: skip

STEPS = 30
SETTINGS: dict[str, Any] = {
    "update_proj_gap": "auto", "proj_gap_range": (4, 9), "kept_energy": 0.97, "gamma": 1.5, "period": 12, "rank": 6,
    "lr": 5e-3, "seed": 3, "max_grad_norm": 0.5, "eps": 1e-6,
}  # fmt: skip


def gaps(least: int, most: int, energies: list[float]) -> list[int]:
    """Clocks at which one block is due whose steps have these energies: new projectors are taken in that very step."""
    gap, due = Gap(least, most, 0.5), []
    for clock, energy in enumerate(energies):
        if gap.due("b", clock):
            due.append(clock)
            gap.taken(["b"])
        else:
            gap.add("b", torch.tensor(energy))
        gap.decide({"b": clock + 1}, Communicator())
    return due


def test_by_hand() -> None:
    assert gaps(4, 100, [1.0] * 30) == [0]
    assert gaps(4, 10, [1.0] * 30) == [0, 10, 20]
    # windows of 2 steps from clock 1 on: 1 2 | 3 4 | 5 6; that of 5 and 6 is below a half of the first
    assert gaps(4, 100, [9.0, 4.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == [0, 7]
    assert gaps(4, 100, [9.0, 4.0, 2.0, 2.0, 1.2, 2.0, 1.0, 1.0, 1.8, 9.0]) == [0, 9]  # 2.8 of 6 are too little
    # never before the second window has ended
    assert gaps(20, 100, [1.0] * 5 + [0.0] * 30) == [0, 21]


def test_one_layer_does_not_decide_for_another() -> None:
    gap = Gap(2, 100, 0.5)
    gap.taken(["a", "b"])
    for clock, energy in enumerate((1.0, 0.1), 1):
        gap.add("a", torch.tensor(energy))
        gap.add("b", torch.tensor(1.0))
        gap.decide({"a": clock, "b": clock}, Communicator())
    assert (gap.due("a", 2), gap.due("b", 2)) == (True, False)
    gap.drop("a")
    assert gap.due("a", 0)


def run(
    rank: int, world_size: int, sharding: str, settings: dict[str, Any], state: dict[str, Any] | None, until: int
) -> dict[str, Any]:
    """Train to step ``until``; at the end the state, the weights, and of each step the clocks of the blocks due."""
    ows = OWS(home(tiny("llama", dtype=torch.float64), sharding, world_size), RATIOS, **{**SETTINGS, **settings})
    if state is not None:
        ows.load_state_dict(state)
    due = []
    while ows.steps < until:
        due.append({block.name: ows.active.clocks[block.name] for block in ows.active.due(ows.plan)})
        one_step(ows, rank, world_size)
    state = ows.state_dict()
    ows.merge()
    return {"weights": whole_weights(ows.weights), "state": state, "due": due}


@functools.lru_cache
def reference(refresh: str) -> dict[str, Tensor]:
    model = tiny("llama", dtype=torch.float64)
    ows = Reference(model, RATIOS, **{**SETTINGS, "refresh": refresh})
    for step in range(STEPS):
        ows.step([functools.partial(mean_loss, model, batch(step))])
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("world_size", "sharding", "refresh"),
    [(1, "replicated", "full"), (2, "replicated", "sketch"), (3, "zero3", "full")],
)
def test_equals_reference(pools: Pools, world_size: int, sharding: str, refresh: str) -> None:
    for found in pools(world_size).run(run, sharding, {"refresh": refresh}, None, STEPS):
        # sketches begin with noise in float32; a projector a step later moves weights far more
        assert distance(found["weights"], reference(refresh)) < (1e-9 if refresh == "full" else 1e-6)
        clocks = [clock for due in found["due"] for clock in due.values()]
        assert {0} < set(clocks) - {9, 18}  # some by what they keep, not by the longest gap


def test_resumed_to_the_bit_and_the_same_at_any_world_size(pools: Pools) -> None:
    """Inside a window and between two decisions."""
    for until in (6, 7, 8):
        [whole] = pools(1).run(run, "replicated", {}, None, until + 6)
        [begun] = pools(1).run(run, "replicated", {}, None, until)
        [end] = pools(1).run(run, "replicated", {}, begun["state"], until + 6)
        assert end["state"] == whole["state"]
        assert end["due"] == whole["due"][until:]
        assert all(torch.equal(end["weights"][name], whole["weights"][name]) for name in end["weights"])
    for other in pools(2).run(run, "zero3", {}, begun["state"], 8):
        assert other["state"] == begun["state"]
    for other in pools(2).run(run, "zero3", {}, begun["state"], 14):
        assert other["due"] == whole["due"][8:]
        assert distance(other["weights"], whole["weights"]) < 1e-9


def counted(rank: int, world_size: int) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Bytes that each step has sent and those that were planned for it."""
    more = {"gamma": 2, "scheme": "fixed", "period": 100, "always_on": "none"}
    ows, found = OWS(home(tiny("llama"), "replicated", world_size), RATIOS, **{**SETTINGS, **more}), []
    for _ in range(8):
        due, before = ows.active.due(ows.plan), dict(ows.comm.sent)
        spec = StepSpec(ows.layers, "ows", ows.layer_set, 6, "none", itemsize=4, world_size=world_size, watched=True)
        one_step(ows, rank, world_size)
        sent = {name: size - before.get(name, 0) for name, size in ows.comm.sent.items()}
        left_out = ("agree", "layer_set", "update_proj_gap")
        sent = {name: size for name, size in sent.items() if size and name not in left_out}
        if len(due) in (0, len(ows.plan.blocks)):
            found.append((sent, traffic(spec, bool(due), rank)))
    return found


def test_planned_bytes_are_counted_ones(pools: Pools) -> None:
    for found in pools(3).run(counted):
        assert len(found) > 2
        assert all(sent == planned for sent, planned in found)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match=r"proj_gap_range: .* is invalid: expected \[least, most\]"):
        parse(OWSConfig, {"proj_gap_range": (9, 4)})
    with pytest.raises(
        UserError, match="update_proj_gap: 'never' is invalid: expected an integer of at least 1, or auto"
    ):
        parse(OWSConfig, {"update_proj_gap": "never"})
    state = OWS(tiny("llama"), RATIOS, **SETTINGS).state_dict()
    with pytest.raises(UserError, match=r"optim.update_proj_gap: 3 is invalid: expected auto, as in the checkpoint"):
        OWS(tiny("llama"), RATIOS, **{**SETTINGS, "update_proj_gap": 3}).load_state_dict(state)
