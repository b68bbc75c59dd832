"""What a period leaves untouched, what it leaves behind, and what is never there: counted, not assumed."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ows_ds.optim.refresh
from ows_ds.optim.layout import RefreshPlan, plan_refresh
from ows_ds.optim.ows import OWS
from ows_ds.optim.update import BlockBuffer
from ows_ds.train.loss import token_losses
from tests.support.alive import Alive
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import RATIOS, home, mean_loss, micro_batches, one_step, whole_weights

RANK = 5  # no weight or activation has this many columns
SETTINGS: dict[str, Any] = {"gamma": 1.2, "period": 3, "rank": RANK, "update_proj_gap": 2, "lr": 1e-2, "seed": 4}


# ------------------------------------------------------------------ what does not train does not move


def bits_over_periods(rank: int, world_size: int, sharding: str, dtype: torch.dtype) -> list[tuple[set[str], set[str]]]:
    """For each period: the weights that changed, and those that trained."""
    ows = OWS(home(tiny("llama with biases", False, dtype), sharding, world_size), RATIOS, always_on="none", **SETTINGS)
    periods = []
    for _ in range(4):
        before = whole_weights(ows.weights)
        blocks = [ows.layers.layers[i] for i in ows.layer_set]
        trained = {part.name for block in blocks for part in (*block.matrices, *block.vectors)}
        for _ in range(SETTINGS["period"]):
            one_step(ows, rank, world_size)
        ows.merge()
        after = whole_weights(ows.weights)
        periods.append(({name for name in before if not torch.equal(before[name], after[name])}, trained))
    ows.close()
    return periods


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_weights_keep_every_bit(pools: Pools, sharding: str, dtype: torch.dtype) -> None:
    for periods in pools(2).run(bits_over_periods, sharding, dtype):
        assert len({frozenset(trained) for _, trained in periods}) > 2
        for changed, trained in periods:
            # a bias without gradient may stay; nothing else may move, and no matrix may stay
            assert changed <= trained
            assert {name for name in trained if name.endswith("weight")} <= changed


# ------------------------------------------------------------------ what leaves is gone


def entries(tensor: Tensor) -> int:
    """Of the storage under a tensor of RANK columns: coordinates, gradients, moments, projectors."""
    is_state = tensor.dim() == 2 and tensor.shape[1] == RANK
    return tensor.untyped_storage().nbytes() // tensor.element_size() if is_state else 0


def elements_over_steps(
    rank: int, world_size: int, sharding: str, always_on: str
) -> list[tuple[int, int, tuple[int, ...]]]:
    """After each step: entries alive, entries that the plan of the next step accounts for, its layers."""
    weights = home(tiny("llama", True, torch.float32), sharding, world_size)
    with Alive(entries, new=False) as state:
        ows = OWS(weights, RATIOS, always_on=always_on, **SETTINGS)
    counted = []
    for _ in range(12):
        with state:
            one_step(ows, rank, world_size)
        plan = ows.plan
        # values, gradients; of this process's rows: the gradients' sums over processes, two moments
        buffers = (2 * plan.rows + 3 * plan.stride) * RANK
        entered = {block.name for block in plan.blocks if ows.state_values()["clocks"][block.name] == 0}
        projectors = sum(m.short for u in plan.blocks if u.name not in entered for m in u.matrices) * RANK
        planned = buffers + projectors
        gc.collect()
        counted.append((state.now(planned), planned, ows.layer_set))
    ows.close()
    del ows
    gc.collect()
    counted.append((state.now(), 0, ()))
    return counted


@pytest.mark.parametrize(("sharding", "always_on"), [("replicated", "none"), ("zero3", "low_rank")])
def test_no_state_of_a_layer_that_left_is_alive(pools: Pools, sharding: str, always_on: str) -> None:
    for counted in pools(2).run(elements_over_steps, sharding, always_on):
        assert len({layers for _, _, layers in counted}) > 2
        assert [alive for alive, _, _ in counted] == [planned for _, planned, _ in counted]


# ------------------------------------------------------------------ full gradients


def watching(ows: OWS, exact: bool) -> Alive:
    """Counts new tensors of a sampled weight's size.

    exact: of such a shape, not only of as many entries (ZeRO-3's flat gather buffers have as many).
    """
    shapes = {m.shape for i in ows.layer_set for m in ows.layers.layers[i].matrices}
    shapes |= {shape[::-1] for shape in shapes}
    sizes = {a * b for a, b in shapes}
    return Alive(lambda t: int(tuple(t.shape) in shapes or (not exact and t.numel() in sizes)), looks=4)


def full_gradients(
    rank: int, world_size: int, sharding: str, accumulation: int, refresh_batch: str
) -> list[tuple[bool, list[tuple[int, int, int]], int, int]]:
    """For each step: whether it refreshes; after each backward (made, most at once, left); owned; matrices."""
    # weights of 48 x 32, 32 x 48, 32 x 32 and 16 x 32; no activation has one of these shapes or as many entries
    model = tiny("llama", False, torch.float32)
    settings = {**SETTINGS, "gamma": 2.0, "accumulation": accumulation, "refresh_batch": refresh_batch}
    ows = OWS(home(model, sharding, world_size), RATIOS, always_on="none", **settings)
    seen = []
    for _ in range(6):
        plan = ows.refresh.plan
        owned = [] if plan is None else [part for part in plan.parts if part.owner == rank]
        counts = []
        for ids in [] if ows.nothing_to_train else micro_batches(ows.steps, rank, world_size, accumulation):
            loss = mean_loss(ows.weights, ids) / accumulation
            with watching(ows, sharding == "zero3") as mode:
                ows.backward(loss)
            counts.append((mode.made, mode.most, mode.now(looks=4)))
            assert all(p.grad is None for p in ows.module.parameters())
        if not ows.nothing_to_train:
            seen.append((plan is not None, counts, len(owned), len(plan.parts) if plan else 0))
        with watching(ows, sharding == "zero3") as mode:
            ows.step()
        ows.zero_grad()
    ows.close()
    return seen


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
@pytest.mark.parametrize(("accumulation", "refresh_batch"), [(1, "full"), (3, "full"), (3, "first")])
def test_full_gradients(pools: Pools, sharding: str, accumulation: int, refresh_batch: str) -> None:
    owners = []
    for seen in pools(2).run(full_gradients, sharding, accumulation, refresh_batch):
        assert {refreshes for refreshes, *_ in seen} == {True, False}
        for refreshes, counts, owned, matrices in seen:
            if not refreshes:
                assert counts == [(0, 0, 0)] * accumulation  # outside refreshes: none at all
            elif accumulation == 1:
                assert counts == [(matrices, 1, 0)]  # every one once, never two, none kept
            elif refresh_batch == "first":
                assert counts == [(matrices, 1, 0), (0, 0, 0), (0, 0, 0)]
            else:
                # an accumulator for each owned matrix and no more, beside the one gradient that passes; none at the end
                owners.append(owned)
                assert [made for made, _, _ in counts] == [matrices] * accumulation
                assert all(most <= owned + 1 for _, most, _ in counts)
                assert counts[0][2] == owned
                # watched again in each backward: earlier accumulators do not count, and no new one stays
                assert [left for _, _, left in counts[1:]] == [0] * (accumulation - 1)
    if accumulation > 1 and refresh_batch == "full":
        assert len(set(owners)) > 1 or owners[0] > 0


def order_of_work(rank: int, world_size: int, accumulation: int) -> tuple[list[str], int]:
    """What a step with a refresh does on this process: reductions of gradients, and projectors it finds."""
    events = []
    weights = home(tiny("llama", False, torch.float32), "replicated", world_size)
    ows = OWS(weights, RATIOS, always_on="none", accumulation=accumulation, **{**SETTINGS, "gamma": 3})
    plan, reduce, find = ows.refresh.plan, ows.comm.reduce, ows_ds.optim.refresh.find_range
    ows.comm.reduce = lambda *a: (events.append("reduce"), reduce(*a))[1]  # type: ignore[method-assign,func-returns-value]
    with mock.patch("ows_ds.optim.refresh.find_range", lambda *a: (events.append("find"), find(*a))[1]):
        one_step(ows, rank, world_size)
    ows.close()
    return events, [part.owner for part in plan.parts].count(rank)


def test_owners_of_sums_find_projectors_at_the_same_time(pools: Pools) -> None:
    """With several micro-batches no process waits for another between two of its projectors."""
    for events, owned in pools(2).run(order_of_work, 3):
        assert events == ["reduce"] * 63 + ["find"] * owned
    for events, owned in pools(2).run(order_of_work, 1):
        assert events.count("reduce") == 21
        assert events.count("find") == owned
        assert events[-1 - owned :] != ["reduce"] + ["find"] * owned  # streamed: each before the next gradient


# ------------------------------------------------------------------ reductions beside the backward pass


def order_of_reductions(rank: int, world_size: int, sharding: str, accumulation: int) -> list[tuple[bool, list[str]]]:
    """For each step: whether it refreshes; which units' reductions begin, and when backward passes end."""
    always = "low_rank" if accumulation == 1 else "none"
    settings = {**SETTINGS, "gamma": 2.0, "accumulation": accumulation, "always_on": always}
    ows = OWS(home(tiny("llama"), sharding, world_size), RATIOS, **settings)
    begun = BlockBuffer.start_reduce
    events: list[str] = []
    seen = []
    try:
        BlockBuffer.start_reduce = lambda block: (events.append(block.layout.block.name), begun(block))[1]  # type: ignore
        for _ in range(12):
            refreshes = ows.refresh.plan is not None
            for ids in [] if ows.nothing_to_train else micro_batches(ows.steps, rank, world_size, accumulation):
                ows.backward(mean_loss(ows.weights, ids) / accumulation)
                events.append("backward")
            ows.step()
            ows.zero_grad()
            seen.append((refreshes, events.copy()))
            events.clear()
    finally:
        BlockBuffer.start_reduce = begun  # type: ignore[method-assign]
    ows.close()
    return seen


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_reductions_begin_within_the_last_backward_pass(pools: Pools, sharding: str, accumulation: int) -> None:
    ranks = pools(2).run(order_of_reductions, sharding, accumulation)
    assert ranks[0] == ranks[1]
    early = 0
    for refreshes, events in ranks[0]:
        if not events:
            continue  # an idle step
        ends = [index for index, event in enumerate(events) if event == "backward"]
        assert len(ends) == accumulation
        layers = [event for event in events[: ends[-1]] if event != "backward"]
        after = events[ends[-1] + 1 :]
        assert accumulation == 1 or ends[0] == 0  # not while another micro-batch is to come
        if not refreshes:  # all layers, the highest first; what is always on at the end
            early += len(layers)
            assert layers == sorted(layers, reverse=True)
            assert after == (["always"] if accumulation == 1 else [])
    assert early >= 3


# ------------------------------------------------------------------ waits for the device


class Waits(TorchDispatchMode):
    """Names what would make the host wait for a GPU's numbers, but for counters that lie on the CPU by design."""

    LOOKS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique")

    def __init__(self, known: set[int]) -> None:
        """known: addresses of tensors that are always on the CPU."""
        super().__init__()
        self.known, self.found = known, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.partition(".")[0]
        on_cpu = args and isinstance(args[0], Tensor) and args[0].data_ptr() in self.known
        if any(name.startswith(look) for look in self.LOOKS) and not on_cpu:
            self.found.append((name, tuple(args[0].shape), args[0].dtype))
        return function(*args, **(kwargs or {}))


def waits(rank: int, world_size: int, sharding: str, always_on: str) -> list[tuple[bool, list[Any]]]:
    """For each step: whether anything is found again after it, or in it; what waits for the device."""
    settings = {**SETTINGS, "gamma": 2.0, "max_grad_norm": 0.1, "weight_decay": 0.1, "period": 4, "update_proj_gap": 4}
    ows = OWS(home(tiny("llama", dtype=torch.bfloat16), sharding, world_size), RATIOS, always_on=always_on, **settings)
    seen = []
    for step in range(9):
        [ids] = micro_batches(step, rank, world_size, 1)
        batch = {"input_ids": ids, "labels": ids.clone()}
        steps = [count for block in ows.active.buffer.blocks.values() for count in block.steps.values()]
        steps += [part.step for _, parts in ows.active.full._runs for part in parts]
        refreshes = ows.refresh.plan is not None
        with Waits({count.data_ptr() for count in steps}) as mode:
            ows.train_step([lambda b=batch: token_losses(ows.weights, b)])
        seen.append((refreshes or ows.steps % 4 == 0 or ows.nothing_to_train, mode.found))
    ows.close()
    return seen


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
@pytest.mark.parametrize("always_on", ["full", "low_rank", "none"])
def test_nothing_waits_for_the_device(pools: Pools, sharding: str, always_on: str) -> None:
    plain = 0
    for seen in pools(2).run(waits, sharding, always_on):
        for changes, found in seen:
            # which labels count is asked on the CPU, where they are; DeepSpeed has counters there, too
            own = [one for one in found if one[0] != "nonzero" or one[2] != torch.bool]
            others = [one for one in own if sharding == "replicated" or one[2].is_floating_point]
            assert changes or not others
            plain += not changes
    assert plain > 4


# ------------------------------------------------------------------ processes that disagree


def draws_other_layers(rank: int, world_size: int) -> None:
    class Odd(type(_weights(world_size).comm)):  # type: ignore[misc]
        def broadcast_object(self, value: Any, name: str = "broadcast_object") -> Any:
            drawn = super().broadcast_object(value, name)
            return [0, 2] if rank == 1 else drawn

    weights = _weights(world_size)
    weights.comm.__class__ = Odd
    OWS(weights, RATIOS, scheme="fixed", **{**SETTINGS, "gamma": 1})


def has_other_plan(rank: int, world_size: int) -> None:
    def odd(*given: Any) -> RefreshPlan:
        plan = plan_refresh(*given)
        if rank == 0:
            return plan
        other = [replace(p, owner=7 if p.name == "model.layers.0.mlp.up_proj.weight" else p.owner) for p in plan.parts]
        return replace(plan, parts=tuple(other))

    ows_ds.optim.refresh.plan_refresh = odd
    try:
        OWS(_weights(world_size), scores=[1.0, 0.0, 0.0], **{**SETTINGS, "gamma": 1})
    finally:
        ows_ds.optim.refresh.plan_refresh = plan_refresh


def _weights(world_size: int) -> Any:
    return home(tiny("llama"), "replicated", world_size)


def test_other_layers_stop_all_processes(pools: Pools) -> None:
    for error in pools(3).fail(draws_other_layers, timeout=60):
        assert error is not None
        assert "the ranks do not agree on the layers and the plan of step 1" in error
        assert "rank 1 has layers: [0, 2]" in error


def test_another_plan_stops_all_processes(pools: Pools) -> None:
    for error in pools(3).fail(has_other_plan, timeout=60):
        assert error is not None
        assert "rank 1 has refresh 0: owners: model.layers.0.mlp.up_proj.weight: 7" in error
