"""optim.rule: muon, against torch.optim.Muon, against the reference in one process, and counted."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ows_ds.config import OWSConfig, parse
from ows_ds.distributed.communicator import Communicator
from ows_ds.errors import UserError
from ows_ds.model.blocks import Block, Matrix
from ows_ds.model.layers import find_layers
from ows_ds.optim import muon
from ows_ds.optim.layout import make_plan
from ows_ds.optim.muon import Rule
from ows_ds.optim.ows import OWS
from ows_ds.optim.reference import Reference
from ows_ds.optim.update import AdamWSettings, CoordinateBuffer
from ows_ds.planner.memory import memory, state
from ows_ds.planner.step import StepSpec
from ows_ds.planner.traffic import traffic
from tests.support.alive import Alive
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import (
    RATIOS,
    batch,
    distance,
    home,
    mean_loss,
    one_step,
    run_ows,
    whole_weights,
)  # fmt: skip

RANK, STEPS = 6, 9
SETTINGS: dict[str, Any] = {
    "rule": "muon", "gamma": 1.5, "period": 4, "rank": RANK, "update_proj_gap": 3, "lr": 5e-3, "seed": 3,
    "scale": "auto", "weight_decay": 0.1, "max_grad_norm": 0.5, "moments_on_refresh": "rotate", "eps": 1e-6,
}  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
def test_equals_torchs_muon_on_plain_matrices(adjust_lr: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two matrices in a block, without our last iteration; torch's own are in bfloat16, here made to keep float64."""
    monkeypatch.setattr(muon, "COEFFICIENTS", [muon.FAST] * 5)
    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor.clone())
    blocks = [Block("b", (Matrix("b.q", (9, 7), ("q",)), Matrix("b.k", (5, 4), ("k",))), ())]
    rule = Rule("muon", 1.0, 0.9, adjust_lr)  # type: ignore[arg-type]
    buffer = CoordinateBuffer(make_plan(blocks, 4, 1), Communicator(), *[torch.float64] * 2, torch.device("cpu"), rule)
    plain = {name: nn.Parameter(random(rows, 4, seed=rows)) for name, rows in (("b.q", 9), ("b.k", 5))}
    theirs = torch.optim.Muon(plain.values(), lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn=adjust_lr)
    for name, value in plain.items():
        buffer.block(name).fill(name, value.detach())
    for step in range(4):
        for name, value in plain.items():
            value.grad = random(*value.shape, seed=100 * step + len(value))
            buffer.grad(name).copy_(value.grad)
        theirs.step()
        buffer.reduce()
        buffer.update(AdamWSettings(0.02, (0.9, 0.999), 1e-8, 0.1))
        buffer.zero_grad()
    for name, value in plain.items():
        torch.testing.assert_close(buffer.value(name), value.detach(), rtol=1e-10, atol=1e-12)


def test_singular_values_of_a_step_are_near_1() -> None:
    """Where those of the momentum are within a factor of 100; zero stays zero."""
    left, right = torch.linalg.qr(random(64, 16))[0], torch.linalg.qr(random(16, 16, seed=1))[0]
    momentum = left @ torch.diag(torch.logspace(0, -2, 16, dtype=torch.float64)) @ right
    values = torch.linalg.svdvals(momentum @ muon.whitening((momentum.mT @ momentum)[None])[0])
    assert 0.9 < float(values.min()) < float(values.max()) < 1.1
    assert not (torch.zeros(1, 64, 16).double() @ muon.whitening(torch.zeros(1, 16, 16).double())).any()


@pytest.mark.parametrize("count", [1, 3])
def test_rows_of_ranks_add_up(count: int) -> None:
    """However the rows of (a stack of) matrices are divided: their Gram matrices, and what comes of them."""
    long, r = 5, 2
    whole = random(count * long, r)
    grams = whole.view(count, long, r).mT @ whole.view(count, long, r)
    for cut in range(1, count * long):
        parts = [(whole[:cut], 0), (whole[cut:], cut)]
        found = sum(muon.grams_of(rows, first, long, count) for rows, first in parts)
        torch.testing.assert_close(found, grams, rtol=1e-12, atol=1e-12)
        products = torch.cat([muon.times_whitening(rows, first, long, grams) for rows, first in parts])
        torch.testing.assert_close(products, (whole.view(count, long, r) @ grams).view(-1, r), rtol=1e-12, atol=1e-12)


@functools.lru_cache
def reference() -> dict[str, Tensor]:
    model = tiny("llama", dtype=torch.float64)
    ows = Reference(model, RATIOS, **SETTINGS)
    for step in range(STEPS):
        ows.step([functools.partial(mean_loss, model, batch(step))])
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("world_size", "sharding"), [(1, "replicated"), (2, "zero3"), (3, "replicated")])
def test_equals_reference(pools: Pools, world_size: int, sharding: str) -> None:
    """Stacks of experts: `tests.optim.test_experts`."""
    for result in pools(world_size).run(run_ows, sharding, "llama", False, torch.float64, STEPS, SETTINGS):
        assert distance(result["weights"], reference()) < 1e-10


def train(method: OWS, steps: int, rank: int, world_size: int) -> None:
    for _ in range(steps):
        one_step(method, rank, world_size)


def across_worlds(rank: int, world_size: int, state: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    weights = home(tiny("llama", True, torch.bfloat16), "zero3" if state else "replicated", world_size)
    method = OWS(weights, RATIOS, **SETTINGS)
    if state is None:
        train(method, 7, rank, world_size)
    else:
        method.load_state_dict(state)
    state = method.state_dict()
    method.close()
    return state, whole_weights(method.weights)


def test_a_state_is_that_of_any_world_and_has_one_moment(pools: Pools) -> None:
    from safetensors.torch import load

    states, ends = zip(*pools(3).run(across_worlds, None), strict=True)
    assert states[0] == states[1] == states[2]
    for found, end in pools(2).run(across_worlds, states[0]):
        assert found == states[0]
        assert all(torch.equal(end[name], ends[0][name]) for name in end)
    tensors = load(states[0]["tensors"])
    for name in (name for name in tensors if name.startswith("exp_avg_sq/") and "layers" in name):  # vectors alone
        assert tensors[name].shape[0] < 0.2 * tensors[name.replace("_sq", "")].shape[0]


def test_resumed_to_the_bit() -> None:
    ends = []
    for interrupted in (False, True):
        method = OWS(tiny("llama"), RATIOS, **SETTINGS)
        train(method, 5, 0, 1)
        if interrupted:
            state, method = method.state_dict(), OWS(tiny("llama"), RATIOS, **SETTINGS)
            method.load_state_dict(state)
        train(method, 4, 0, 1)
        method.close()
        ends.append({name: p.detach() for name, p in method.module.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_another_rule_is_refused() -> None:
    adamw = {**SETTINGS, "rule": "adamw"}
    state = OWS(tiny("llama"), RATIOS, **adamw).state_dict()
    with pytest.raises(UserError, match=r"optim.rule: 'muon' is invalid: expected adamw, the rule of the checkpoint"):
        OWS(tiny("llama"), RATIOS, **SETTINGS).load_state_dict(state)
    with pytest.raises(UserError, match=r"rule: 'muon' is invalid: expected adamw where the layers train at full rank"):
        parse(OWSConfig, {"rank": None, "rule": "muon"})


def spec_of(ows: OWS, world_size: int) -> StepSpec:
    return StepSpec(
        ows.layers, "ows", ows.layer_set, RANK, "none", itemsize=4, world_size=world_size, rule="muon", on_gpu=False
    )


def counted(rank: int, world_size: int) -> list[tuple[dict[str, int], dict[str, int], int, int]]:
    """For each step: bytes that were sent and planned; at last, bytes of moments that are there and planned."""
    settings = {**SETTINGS, "gamma": 2, "scheme": "fixed", "period": 100, "always_on": "none"}
    ows = OWS(home(tiny("llama"), "replicated", world_size), RATIOS, **settings)
    found = []
    for step in range(4):
        before = dict(ows.comm.sent)
        one_step(ows, rank, world_size)
        sent = {name: size - before.get(name, 0) for name, size in ows.comm.sent.items()}
        left_out = ("agree", "layer_set")
        sent = {name: size for name, size in sent.items() if size and name not in left_out}
        spec = spec_of(ows, world_size)
        blocks = ows.active.buffer.blocks.values()
        moments = sum(block.exp_avg.nbytes + block.exp_avg_sq.nbytes for block in blocks)
        found.append((sent, traffic(spec, step % 3 == 0, rank), moments, state(spec)["moments"]))
    return found


def test_planned_bytes_are_counted_ones(pools: Pools) -> None:
    for world_size in (1, 2, 3):
        ranks = pools(world_size).run(counted)
        for found in ranks:
            for sent, planned, _, _ in found:
                assert sent == planned
                assert ("grams" in sent) == (world_size > 1)
        assert max(rank[0][2] for rank in ranks) == ranks[0][0][3]


def test_one_moment_in_place_of_two() -> None:
    ows = OWS(tiny("llama"), RATIOS, **{**SETTINGS, "always_on": "none", "gamma": 2, "scheme": "fixed"})
    spec = spec_of(ows, 1)
    adamw = StepSpec(ows.layers, "ows", ows.layer_set, RANK, "none", itemsize=4)
    entries = sum(layout.segments["matrices"][1] for layout in spec.plan.layouts) * RANK
    assert state(adamw)["moments"] - state(spec)["moments"] == entries * 4
    assert memory(spec).phases["update"]["temporaries"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planned_temporaries_are_those_of_a_step(dtype: torch.dtype) -> None:
    layers = find_layers(tiny("llama", hidden_size=128, intermediate_size=512))
    itemsize = torch.empty(0, dtype=dtype).element_size()
    spec = StepSpec(layers, "ows", (0, 2), 24, "none", itemsize=itemsize, rule="muon", on_gpu=False)
    buffer = CoordinateBuffer(spec.plan, Communicator(), dtype, dtype, torch.device("cpu"), Rule("muon", "auto"))
    for block in buffer.blocks.values():
        block.grads.copy_(random(*block.grads.shape))
    buffer.reduce()
    with Alive() as alive:
        buffer.update(AdamWSettings(1e-2, (0.9, 0.999), 1e-8, 0.1))
    assert memory(spec).phases["update"]["temporaries"] == pytest.approx(alive.most, rel=0.05)
