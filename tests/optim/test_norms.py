"""How far layers move and what projectors keep: against the weights and gradients themselves, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ows_ds.optim.ows import OWS
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import RATIOS, batch, home, mean_loss, micro_batches, whole_weights

STEPS, PERIOD, GAP = 8, 3, 4


def lengths(ows: OWS, change: dict[str, Tensor]) -> dict[int, float]:
    """Frobenius norm of the change of each layer's matrices."""
    squares = ([change[m.name].square().sum() for m in block.matrices] for block in ows.layers.layers)
    return {layer: float(torch.stack(some).sum().sqrt()) for layer, some in enumerate(squares)}


def watch(rank: int, world_size: int, sharding: str, refresh: str, always_on: str) -> dict[str, Any]:
    """Of every step: its layers, the energies, how far layers moved, and how far their weights did."""
    model = tiny("llama", False, torch.float64)
    ows = OWS(
        home(model, sharding, world_size), RATIOS, gamma=2, scheme="fixed", rank=5, period=PERIOD, update_proj_gap=GAP,
        always_on=always_on, lr=1e-2, accumulation=2, refresh=refresh,
    )  # fmt: skip
    before, seen, first = whole_weights(ows.weights), [], {}
    for step in range(STEPS):
        layers = ows.layer_set
        for ids in micro_batches(step, rank, world_size, 2):
            ows.backward(mean_loss(ows.weights, ids) / 2)
        ows.reduce()
        sums = {layer: ows.comm.all_reduce(part.clone()) for layer, part in ows.projector_energy().items()}
        ows.step()
        ows.zero_grad()
        if step == 0:
            first = {name: projector.clone() for name, projector in ows.active.projectors.items()}
        after = whole_weights(ows.weights)
        change = lengths(ows, {name: after[name] - before[name] for name in after})
        energies = {layer: float(kept / whole) for layer, (kept, whole) in sums.items()}
        seen.append((layers, energies, {n: float(norm) for n, norm in ows.update_norm().items()}, change))
        before = after
    everything = {n: float(norm) for n, norm in ows.update_norm(all_layers=True).items()}
    shown = dict(seen[-1][2])
    ows.close()
    after = whole_weights(ows.weights)
    rest = lengths(ows, {name: after[name] - before[name] for name in after})
    return {"seen": seen, "first": first, "all": everything, "shown": shown, "rest": rest}


@pytest.mark.parametrize(
    ("sharding", "refresh", "always_on"),
    [("replicated", "full", "low_rank"), ("zero3", "full", "none"), ("replicated", "sketch", "none")],
)
def test_norms_and_energies(pools: Pools, sharding: str, refresh: str, always_on: str) -> None:
    one, other = pools(2).run(watch, sharding, refresh, always_on)
    for key in ("seen", "all"):
        assert one[key] == other[key]  # to the last bit
    merges = 0
    for step, (layers, energies, moved, change) in enumerate(one["seen"]):
        assert moved == pytest.approx({n: length for n, length in change.items() if length})
        assert set(moved) <= set(layers)
        merges += len(moved)
        assert set(energies) <= set(layers)
        if step % PERIOD == 0 and refresh == "full":
            entered = set(layers) - set(one["seen"][step - 1][0] if step else ())
            assert entered <= set(energies)
        assert all(0 < share < 1 for share in energies.values())
    assert merges >= 3
    assert one["seen"][1][1:3] == ({}, {})  # a plain step
    # what has not been merged after the last step shows when it is
    left = {n: length for n, length in one["rest"].items() if length}
    assert {n: length for n, length in one["all"].items() if length} == pytest.approx({**left, **one["shown"]})
    if refresh == "sketch":
        assert not any(energies for _, energies, _, _ in one["seen"])
        return
    model = tiny("llama", False, torch.float64)
    mean_loss(model, batch(0)).backward()  # type: ignore[arg-type]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for layer, share in one["seen"][0][1].items():
        kept = whole = 0.0
        for name in (name for name in one["first"] if f".{layer}." in name):
            gradient, projector = gradients[name], one["first"][name]
            assert gradient is not None
            side = gradient if gradient.shape[0] >= gradient.shape[1] else gradient.T
            kept += float((side @ projector).square().sum())
            whole += float(gradient.square().sum())
        assert share == pytest.approx(kept / whole, rel=1e-9)
