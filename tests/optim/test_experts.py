"""Experts, linear attention and convolutions: over ranks and shards against the one-process reference."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ows_ds.optim.ows import OWS
from ows_ds.optim.reference import Reference
from tests.support.alive import Alive
from tests.support.families import MIXED, tiny
from tests.support.pool import Pools
from tests.support.training import RATIOS, distance, home, mean_loss, whole_weights

STEPS, ACCUMULATION, RANKS, ROWS, LENGTH = 12, 2, 2, 3, 12
SETTINGS: dict[str, Any] = {
    "gamma": 1.5, "period": 4, "rank": 4, "expert_rank": 2, "update_proj_gap": 3, "lr": 5e-3, "seed": 3,
    "max_grad_norm": 0.5, "eps": 1e-6, "weight_decay": 0.1,
}  # fmt: skip
ONE_EXPERT = {"num_experts_per_tok": 1}  # a token goes to
HOMES = [(2, "zero3"), (1, "replicated"), (2, "replicated")]
EVERY_DAY = ("mixtral", "gpt_oss", "deepseek_v3")  # stacks; with biases; beside shared experts and low-rank attention
CLOSE = 1e-10  # float64: the order of sums differs, and Adam divides by small roots


def data(step: int, monotonous: bool) -> Tensor:
    """(ACCUMULATION, RANKS, ROWS, LENGTH). monotonous: the last rank's rows hold the same token everywhere, so that
    they go to few experts."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 64, (ACCUMULATION, RANKS, ROWS, LENGTH), generator=generator)
    if monotonous:
        ids[:, -1] = 5
    return ids


def model_of(family: str, implementation: str, more: dict[str, Any]) -> Any:
    model: Any = tiny(family, dtype=torch.float64, **more)
    if any("experts" in name for name, _ in model.named_parameters()):
        model.set_experts_implementation(implementation)
    return model


def run(
    rank: int, world_size: int, family: str, sharding: str, more: dict[str, Any], settings: dict[str, Any],
    checkpointing: bool = False, implementation: str = "grouped_mm",
) -> tuple[dict[str, Tensor], set[int]]:  # fmt: skip
    """The weights after training, and how many experts had no token in this rank's micro-batches."""
    model, missed = model_of(family, implementation, more), set()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        missed.add(4 - len(inputs[1].unique()))

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(count)
    ows = OWS(home(model, sharding, world_size), RATIOS, **{**SETTINGS, "accumulation": ACCUMULATION, **settings})
    for step in range(STEPS):
        for ids in data(step, "num_experts_per_tok" in more):
            mine = ids[rank] if world_size > 1 else ids.flatten(0, 1)
            ows.backward(mean_loss(ows.weights, mine) / ACCUMULATION)
        ows.step()
        ows.zero_grad()
    ows.merge()
    weights = whole_weights(ows.weights)
    ows.close()
    return weights, missed


@functools.lru_cache
def reference(family: str, world_size: int, *settings: tuple[str, Any]) -> dict[str, Tensor]:
    """The losses are the ranks' own: some models compute parts in float32, and so not the same in larger batches."""
    given = dict(settings)
    more = {key: given.pop(key) for key in ONE_EXPERT if key in given}
    model = model_of(family, "eager", more)
    ows, sets = Reference(model, RATIOS, **{**SETTINGS, **given}), set()
    for step in range(STEPS):
        parts = data(step, bool(more)).view(ACCUMULATION * world_size, -1, LENGTH)
        ows.step([functools.partial(mean_loss, model, ids) for ids in parts])
        sets.add(ows.layer_set)
    assert len(sets) > 1
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("world_size", "sharding", "family"),
    [
        pytest.param(*place, family, marks=() if place == HOMES[0] and family in EVERY_DAY else pytest.mark.slow)
        for place, family in itertools.product(HOMES, MIXED)
    ],
)
def test_equals_reference(pools: Pools, world_size: int, sharding: str, family: str) -> None:
    """Each expert's matrices have a scale of their own rank."""
    for weights, _ in pools(world_size).run(run, family, sharding, {}, {"scale": "auto"}):
        assert distance(weights, reference(family, world_size, ("scale", "auto"))) < CLOSE


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
def test_an_expert_that_one_rank_misses(pools: Pools, sharding: str) -> None:
    results = pools(2).run(run, "mixtral", sharding, ONE_EXPERT, {})
    (_, here), (_, there) = results
    assert (max(here), max(there)) == (1, 3)
    for weights, _ in results:
        assert distance(weights, reference("mixtral", 2, *ONE_EXPERT.items())) < CLOSE


def test_muon_of_stacks(pools: Pools) -> None:
    """Each expert's momentum is orthonormalised for itself, wherever its rows are."""
    for weights, _ in pools(2).run(run, "mixtral", "replicated", {}, {"rule": "muon"}):
        assert distance(weights, reference("mixtral", 2, ("rule", "muon"))) < CLOSE


# ------------------------------------------------------------------ gradients of whole stacks


def stacks_alive(rank: int, world_size: int, sharding: str, accumulation: int) -> list[tuple[bool, list[list[int]]]]:
    """For each step: whether it refreshes; of each backward pass, tensors of a whole stack's size: made, most at once,
    left."""
    ows = OWS(home(tiny("mixtral"), sharding, world_size), RATIOS, always_on="none", **{
        **SETTINGS, "gamma": 2.0, "accumulation": accumulation
    })  # fmt: skip
    stacks = {m.name: m for block in ows.layers.layers for m in block.matrices if m.experts}
    shapes = {shape for m in stacks.values() for shape in ((m.experts, *m.shape), (m.experts, *m.shape[::-1]))}
    seen = []
    for step in range(5):
        plan, counts = ows.refresh.plan, []
        for ids in [] if ows.nothing_to_train else data(step, False)[:accumulation]:
            loss = mean_loss(ows.weights, ids[rank]) / accumulation
            with Alive(lambda one: int(tuple(one.shape) in shapes), looks=4) as mode:
                ows.backward(loss)
            counts.append([mode.made, mode.most, mode.now(looks=4)])
        if counts:
            seen.append((plan is not None, counts))
        ows.step()
        ows.zero_grad()
    ows.close()
    return seen


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
def test_one_gradient_of_a_stack_at_a_time(pools: Pools, sharding: str, accumulation: int) -> None:
    """In a refresh; otherwise none. What is added up over micro-batches is of a rank's own experts alone."""
    for seen in pools(2).run(stacks_alive, sharding, accumulation):
        assert {refreshes for refreshes, _ in seen} == {True, False}
        for refreshes, counts in seen:
            for made, most, left in counts:
                assert (made > 0, most, left) == ((True, 1, 0) if refreshes else (False, 0, 0))


# ------------------------------------------------------------------ ways to compute experts

WAYS = ("eager", "grouped_mm", "batched_mm")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_all_implementations_give_the_same(family: str) -> None:
    """Losses, gradients of coordinates and vectors, and full gradients: float64, the order of sums aside."""
    found = {}
    for way in WAYS:
        model = model_of(family, way, {})
        ows = OWS(model, RATIOS, **{**SETTINGS, "gamma": 3.0})
        values = []
        for step in range(3):
            loss = mean_loss(ows.weights, data(step, False)[0].flatten(0, 1))
            ows.backward(loss)
            values += [loss.detach(), ows.reduce().clone()]  # with and without full gradients
            values += [block.grads.clone() for block in ows.active.buffer.blocks.values()]
            ows.step()
            ows.zero_grad()
        found[way] = values
    for way in WAYS[1:]:
        for one, other in zip(found["eager"], found[way], strict=True):
            assert float((one - other).norm() / other.norm()) < 1e-12


def test_an_expert_without_tokens_keeps_its_bits() -> None:
    model = model_of("mixtral", "grouped_mm", ONE_EXPERT).to(torch.bfloat16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    used: dict[str, set[int]] = {}

    def note(name: str, inputs: tuple[Tensor, ...]) -> None:
        used.setdefault(name, set()).update(inputs[1].flatten().tolist())

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs))
    ows = OWS(model, RATIOS, **{**SETTINGS, "gamma": 3.0, "weight_decay": 0.0, "merge_rounding": "stochastic"})
    for _ in range(6):
        ows.backward(mean_loss(ows.weights, torch.full((2, 8), 7)))
        ows.step()
        ows.zero_grad()
    ows.close()
    assert all(0 < len(experts) < 4 for experts in used.values())
    for name, parameter in model.named_parameters():
        for expert in range(4 if ".experts." in name else 0):
            same = torch.equal(parameter[expert], before[name][expert])
            assert same == (expert not in used[name.rpartition(".")[0]])
