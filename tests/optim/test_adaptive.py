"""Layers are sampled by the gradients they have had: the ones that can lower the loss come more often."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ows_ds.errors import UserError
from ows_ds.optim.ows import OWS
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import home, one_step

LAYERS, PLANTED = 8, (2, 5)
SETTINGS: dict[str, Any] = {
    "gamma": 2, "rank": 4, "period": 2, "lr": 5e-3, "seed": 1, "always_on": "none", "adaptive": True
}  # fmt: skip


def build(sharding: str, world_size: int, **more: Any) -> OWS:
    """A model in which hardly anything comes out of the layers that are not planted."""
    model: Any = tiny("llama", False, torch.float64, num_hidden_layers=LAYERS)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for matrix in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                matrix.weight.mul_(1.0 if index in PLANTED else 1e-3)
    return OWS(home(model, sharding, world_size), None, **{**SETTINGS, **more})


def test_layers_that_lower_the_loss_are_drawn_more_often() -> None:
    ows = build("replicated", 1)
    assert len(set(ows.probabilities)) == 1
    for _ in range(20 * SETTINGS["period"]):
        one_step(ows, 0, 1)
    others = [p for layer, p in enumerate(ows.probabilities) if layer not in PLANTED]
    assert min(ows.probabilities[layer] for layer in PLANTED) >= 3 * max(others)
    assert min(others) > 0


def resumed(rank: int, world_size: int, sharding: str, state: dict[str, Any] | None) -> tuple[Any, ...]:
    """In the middle of a period: the state; after it, the sets and the probabilities they were drawn with."""
    ows = build(sharding, world_size)
    if state is None:
        for _ in range(9):
            one_step(ows, rank, world_size)
        state = ows.state_dict()
    else:
        ows.load_state_dict(state)
    taken, seen = ows.state_dict(), []
    for _ in range(8):
        one_step(ows, rank, world_size)
        seen.append((ows.block_set, ows.probabilities))
    return taken, seen


def test_a_resumed_run_draws_the_same_on_any_number_of_ranks(pools: Pools) -> None:
    state, seen = pools(2).run(resumed, "replicated", None)[0]
    assert len({tuple(p) for _, p in seen}) > 1
    for world_size, sharding in ((3, "zero3"), (1, "replicated")):
        for taken, again in pools(world_size).run(resumed, sharding, state):
            assert taken == state
            assert again == seen


def test_modules_adapt_on_their_own() -> None:
    """Of a layer that can lower the loss its matrices are drawn more often; the expected number of weights stays."""
    ows = build("replicated", 1, block="module")
    assert len(ows.draws.probabilities) == 7 * LAYERS
    for _ in range(20 * SETTINGS["period"]):
        one_step(ows, 0, 1)
    others = [p for layer, p in enumerate(ows.probabilities) if layer not in PLANTED]
    assert min(ows.probabilities[layer] for layer in PLANTED) >= 2 * max(others)
    sizes = [block.numel for block in ows.layers.layers]
    expected = sum(p * size for p, size in zip(ows.draws.probabilities, sizes, strict=True))
    assert expected == pytest.approx(SETTINGS["gamma"] / LAYERS * sum(sizes))


def test_without_subspaces_there_is_nothing_to_adapt_by() -> None:
    with pytest.raises(UserError, match="expected a rank under adaptive") as caught:
        OWS(tiny("llama", False, torch.float32), None, rank=None, gamma=1, adaptive=True)
    assert caught.value.key == "rank"
