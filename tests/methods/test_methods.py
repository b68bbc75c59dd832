"""The methods that OWS is compared with, over ranks and shards, against independent implementations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ows_ds.importance.probabilities import importance, probabilities
from ows_ds.optim.ows import OWS
from ows_ds.optim.sampling import Cycle, Sampler
from tests.optim.test_ows import BASE, galore
from tests.optim.test_period import SETTINGS
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.tiny_run import cut, recipe
from tests.support.training import (
    HOMES,
    RATIOS,
    SHARDINGS,
    batch,
    distance,
    home,
    mean_loss,
    one_step,
    run_ows,
    whole_weights,
    worlds,
)  # fmt: skip
from tests.train.test_trainer import contents, run

STEPS = 10
LISA: dict[str, Any] = {
    "gamma": 1.5, "period": 3, "rank": None, "lr": 5e-3, "seed": 1, "weight_decay": 0.1, "max_grad_norm": 0.5,
}  # fmt: skip
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
DTYPES = tuple(TOLERANCE)


def names_of(model: Any, layers: tuple[int, ...], always: bool) -> list[str]:
    outside = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    return [
        name
        for name, _ in model.named_parameters()
        if any(f"layers.{i}." in name for i in layers) or (always and name in outside)
    ]


@functools.lru_cache
def lisa(kind: str, dtype: torch.dtype, always: bool) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """torch's AdamW on the parameters of each period; what leaves loses its state."""
    model: Any = tiny("llama", False, dtype)
    parameters = dict(model.named_parameters())
    sampler = Sampler(probabilities(importance(kind, 3), LISA["gamma"]), "bernoulli", LISA["seed"])
    states: dict[str, Any] = {}
    sets = []
    for step in range(STEPS):
        if step % LISA["period"] == 0:
            layers = sampler.draw()
            names = names_of(model, layers, always)
            model.requires_grad_(False)
            for name in names:
                parameters[name].requires_grad_(True)
            states = {name: states.get(name, {}) for name in names}
            # as usual, neither biases nor norms decay
            groups = [
                {"params": [parameters[n]], "weight_decay": LISA["weight_decay"] if parameters[n].dim() > 1 else 0.0}
                for n in names
            ]
            optimizer = torch.optim.AdamW(groups, lr=LISA["lr"])
            for name in names:
                optimizer.state[parameters[name]] = states[name]
        sets.append(layers)
        if names:
            mean_loss(model, batch(step)).backward()
            torch.nn.utils.clip_grad_norm_([parameters[n] for n in names], LISA["max_grad_norm"])
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in parameters.items()}, tuple(sets)


def run_lisa(rank: int, world_size: int, sharding: str, kind: str, dtype: torch.dtype, settings: dict[str, Any]) -> Any:
    model = tiny("llama", False, dtype)
    weights = home(model, sharding, world_size)
    ows = OWS(weights, scores=importance(kind, 3), **settings)
    sets = []
    for _ in range(STEPS):
        sets.append(ows.layer_set)
        one_step(ows, rank, world_size)
    ows.close()
    return whole_weights(weights), tuple(sets)


@pytest.mark.parametrize(
    ("world_size", "sharding", "dtype"), worlds(HOMES, DTYPES, also=[(1, "zero3", DTYPES[0]), (3, "zero3", DTYPES[0])])
)
@pytest.mark.parametrize(("kind", "always_on"), [("uniform", "full"), ("decreasing", "none")])
def test_lisa_equals_torch_adamw(
    pools: Pools, world_size: int, sharding: str, dtype: torch.dtype, kind: str, always_on: str
) -> None:
    settings = {**LISA, "always_on": always_on, "accumulation": 2}
    expected, sets = lisa(kind, dtype, always_on == "full")
    assert len(set(sets)) > 2
    for weights, drawn in pools(world_size).run(run_lisa, sharding, kind, dtype, settings):
        assert drawn == sets
        assert distance(weights, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("world_size", "sharding", "dtype"), worlds(HOMES, DTYPES, also=[(3, "replicated", DTYPES[0])])
)
def test_galore_equals_galore_torch(pools: Pools, world_size: int, sharding: str, dtype: torch.dtype) -> None:
    settings = {**BASE, "eps": 1e-8, "accumulation": 2, "gamma": 3, "scheme": "fixed", "moments_on_refresh": "keep"}
    result = pools(world_size).run(run_ows, sharding, "llama", False, dtype, STEPS, settings)[0]
    assert set(result["sets"]) == {(0, 1, 2)}
    expected, _ = galore(dtype, STEPS, 3.0)
    assert distance(result["weights"], expected) < TOLERANCE[dtype]


@functools.lru_cache
def badam(dtype: torch.dtype, order: str) -> dict[str, Tensor]:
    """The algorithm of BAdam's paper in plain torch: a new AdamW for each turn of a layer."""
    model: Any = tiny("llama", False, dtype)
    rounds = {"ascending": [0, 1, 2, 0], "descending": [2, 1, 0, 2]}[order]
    for turn, layer in enumerate(rounds):
        block = [p for name, p in model.named_parameters() if f"layers.{layer}." in name]
        model.requires_grad_(False)
        optimizer = torch.optim.AdamW([p.requires_grad_(True) for p in block], lr=LISA["lr"], weight_decay=0.0)
        for step in range(3 * turn, min(3 * turn + 3, STEPS)):
            mean_loss(model, batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run_badam(rank: int, world_size: int, sharding: str, order: str, dtype: torch.dtype) -> dict[str, Tensor]:
    weights = home(tiny("llama", False, dtype), sharding, world_size)
    settings = {"period": 3, "rank": None, "lr": LISA["lr"], "always_on": "none", "accumulation": 2, "gamma": 1}
    ows = OWS(weights, scores=[1.0] * 3, sampler=Cycle(3, order, 0), **settings)
    for _ in range(STEPS):
        one_step(ows, rank, world_size)
    ows.close()
    return whole_weights(weights)


@pytest.mark.parametrize(
    ("world_size", "sharding", "dtype", "order"),
    worlds(HOMES, DTYPES, ["ascending", "descending"], also=[(3, "zero3", DTYPES[0], "descending")]),
)
def test_badam_equals_plain_torch(pools: Pools, world_size: int, sharding: str, dtype: torch.dtype, order: str) -> None:
    for weights in pools(world_size).run(run_badam, sharding, order, dtype):
        assert distance(weights, badam(dtype, order)) < TOLERANCE[dtype]


def test_cycles_visit_every_layer_once_a_round() -> None:
    cycle, drawn = Cycle(5, "random", 3), []
    for _ in range(15):
        if len(drawn) == 7:
            resumed = Cycle(5, "random", 3)
            resumed.load_state_dict(cycle.state_dict())
            cycle = resumed
        drawn.append(cycle.draw()[0])
    rounds = [drawn[i : i + 5] for i in (0, 5, 10)]
    assert [sorted(one) for one in rounds] == [[0, 1, 2, 3, 4]] * 3
    assert len({tuple(one) for one in rounds}) > 1


def freed(rank: int, world_size: int, sharding: str) -> list[tuple[int, int, bool]]:
    """After each change of the set: state tensors that left, how many are alive, and whether frozen weights moved."""
    model = tiny("llama", False, torch.bfloat16)
    ows = OWS(home(model, sharding, world_size), RATIOS, always_on="none", **{**SETTINGS, "rank": None})
    found = []
    for _ in range(5):
        before, active = whole_weights(ows.weights), set(ows.active.full.parameters)
        blocks = [ows.layers.layers[i] for i in ows.layer_set]
        trained = {part.name for block in blocks for part in (*block.matrices, *block.vectors)}
        state = {
            name: [StorageWeakRef(t.untyped_storage()) for t in tensors] for name, tensors in _state_of(ows).items()
        }
        for _ in range(SETTINGS["period"]):
            one_step(ows, rank, world_size)
        left = active - set(ows.active.full.parameters)
        alive = sum(not reference.expired() for name in left for reference in state[name])
        after = whole_weights(ows.weights)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        found.append((len(left), alive, moved <= trained and bool(moved) == bool(trained)))
    ows.close()
    return found


def _state_of(ows: OWS) -> dict[str, list[Tensor]]:
    return {name: list(state.values()) for name, state in ows.active.full.states().items()}


@SHARDINGS
def test_lisa_frees_what_leaves_and_moves_nothing_else(pools: Pools, sharding: str) -> None:
    for found in pools(2).run(freed, sharding):
        assert sum(left for left, _, _ in found) > 0
        assert all(alive == 0 and still for _, alive, still in found)


@pytest.mark.parametrize(
    ("method", "sharding"),
    [
        ("lisa", "zero3"),
        ("badam", "zero3"),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in [("lisa-d", "replicated"), ("galore", "zero3")]),
    ],
)
def test_methods_resume_bit_identically_and_export(
    pools: Pools, inputs: Path, straight: Callable[..., Path], tmp_path: Path, method: str, sharding: str
) -> None:
    whole = straight(2, method=method, sharding=sharding)
    parts = cut(whole, tmp_path / "parts")
    pools(2).run(run, recipe(inputs, parts, method=method, sharding=sharding, resume="auto"), None)
    records, files = contents(whole)
    assert contents(parts) == (records, files)
    assert records[-1]["eval_loss"] < records[0]["eval_loss"]
    assert "model/model.safetensors" in files
    # no scores are computed where none are needed
    assert not (whole / "scores.json").exists()
