"""Lean states of weights that train at full rank: moments in 8 bits, no master."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated, load_weights, weight_shards
from ows_ds.optim.full_rank import FullRank, Lean, adam_steps, load_states, state_shards
from ows_ds.optim.moments import Moment8
from ows_ds.optim.ows import OWS
from ows_ds.optim.sizes import MOMENT_BLOCK
from ows_ds.optim.update import AdamWSettings
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import RATIOS, home, one_step, whole_weights

SETTINGS = AdamWSettings(1e-2, (0.9, 0.999), 1e-8, 0.1)
LEAN = Lean("int8", False)


@pytest.mark.parametrize("signed", [True, False])
def test_moments_come_back(signed: bool) -> None:
    values = torch.randn(3 * MOMENT_BLOCK + 7, generator=torch.Generator().manual_seed(0))
    values = values if signed else values.square()
    moment = Moment8.zeros(len(values), signed, torch.device("cpu"))
    assert not moment.read(slice(0, len(values))).any()
    moment.write(slice(0, len(values)), values)
    found = moment.read(slice(0, len(values)))
    assert (found - values).norm() < 0.02 * values.norm()
    moment.write(slice(2 * MOMENT_BLOCK, len(values)), torch.zeros(MOMENT_BLOCK + 7))
    assert torch.equal(moment.read(slice(0, 2 * MOMENT_BLOCK)), found[: 2 * MOMENT_BLOCK])
    assert not moment.read(slice(2 * MOMENT_BLOCK, len(values))).any()


def model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(40, 30).to(dtype)


def train(full: FullRank, weights: Replicated, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 40, generator=generator).to(next(weights.module.parameters()).dtype)
        (weights.module(x).float().square().mean() + weights.module(x).float().sum()).backward()
        full.end_pass()
        full.update(SETTINGS, torch.tensor(1.0))


def test_bytes_of_an_entry() -> None:
    """Weight, gradient, moments, and no master: at most 6.2."""
    weights = Replicated(nn.Linear(512, 512, bias=False).bfloat16(), Communicator())
    full = FullRank(weights, torch.float32, LEAN)
    full.enter(dict(weights.module.named_parameters()))
    weights.module(torch.randn(2, 512).bfloat16()).float().sum().backward()
    [state], [gradient], [weight] = full.states().values(), full.grads.values(), weights.module.parameters()
    moments = [state[kind] for kind in ("exp_avg", "exp_avg_sq")]
    held = [weight.data, gradient, *(t for m in moments for t in (m.codes, m.scales))]
    assert "master" not in state
    assert all(not part.master.numel() for _, parts in full._runs for part in parts)
    assert not any(adamw.state for adamw, _ in full._runs)
    assert sum(t.nbytes for t in held) <= 6.2 * weight.numel()


@pytest.mark.parametrize("lean", [Lean("int8"), Lean(master=False), LEAN])
def test_near_to_adamw(lean: Lean) -> None:
    """Of 20 steps, within a small part of the way."""
    found = []
    for one in (Lean(), lean):
        weights = Replicated(model(torch.bfloat16), Communicator())
        start = weights.module.weight.detach().clone()  # type: ignore[union-attr]
        full = FullRank(weights, torch.float32, one)
        full.enter(dict(weights.module.named_parameters()))
        train(full, weights, 20)
        found.append((weights.module.weight.detach() - start).float())  # type: ignore[union-attr, operator]
    assert (found[1] - found[0]).norm() < 0.1 * found[0].norm()


def test_of_float32_weights_a_master_changes_nothing() -> None:
    found: list[Tensor] = []
    for one in (Lean(), Lean(master=False)):
        weights = Replicated(model(torch.float32), Communicator())
        full = FullRank(weights, torch.float32, one)
        full.enter(dict(weights.module.named_parameters()))
        train(full, weights, 5)
        found.append(weights.module.weight.detach())  # type: ignore[arg-type, union-attr]
    assert torch.equal(*found)


@pytest.mark.parametrize("before", [Lean(), LEAN])
@pytest.mark.parametrize("after", [Lean(), LEAN])
def test_states_go_from_one_to_the_other(before: Lean, after: Lean) -> None:
    """To the bit where nothing is converted."""
    first = Replicated(model(torch.bfloat16), Communicator())
    named = dict(first.module.named_parameters())
    full = FullRank(first, torch.float32, before)
    full.enter(named)
    train(full, first, 3)
    shards = [*state_shards(first, named, full.states()), *weight_shards(first, named, named)]
    held = {shard.name: shard.tensor.clone() for shard in shards}

    def read(name: str, a: int, b: int) -> Tensor:
        return held[name][a:b]

    second = Replicated(model(torch.bfloat16), Communicator())
    renamed = dict(second.module.named_parameters())
    load_weights(second, renamed, renamed, read)
    other = FullRank(second, torch.float32, after)
    other.enter(renamed)
    load_states(second, renamed, other.states(), adam_steps(full.states()), read, full.describe())
    train(full, first, 2)
    train(other, second, 2)
    for a, b in zip(named.values(), renamed.values(), strict=True):
        if before == after:
            assert torch.equal(a, b)
        else:
            assert (a - b).float().norm() < 0.05 * a.float().norm()


def resumed(rank: int, world_size: int, sharding: str, method: dict[str, Any]) -> None:
    """An optimizer with lean states resumes to the bit."""
    settings = {"scheme": "fixed", "gamma": 1, "period": 3, "lr": 1e-2, "moments": "int8", "master": "none", **method}
    runs = []
    for stop in (None, 4):
        ows = OWS(home(tiny("llama", dtype=torch.bfloat16), sharding, world_size), RATIOS, **settings)
        for step in range(6):
            if step == stop:
                state = ows.state_dict()
                ows.close()
                ows = OWS(home(tiny("llama", dtype=torch.bfloat16), sharding, world_size), RATIOS, **settings)
                ows.load_state_dict(state)
            one_step(ows, rank, world_size)
        ows.merge()
        runs.append(whole_weights(ows.weights))
        ows.close()
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
@pytest.mark.parametrize("method", [{"rank": None}, {"rank": 4}])
def test_resumed_to_the_bit(pools: Pools, sharding: str, method: dict[str, Any]) -> None:
    pools(2).run(resumed, sharding, method)
