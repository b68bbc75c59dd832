"""gathering.py against what DeepSpeed does: which weights lie there after every use of a module, and what is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ows_ds.distributed.ds_config import DEFAULT_CONFIG, resolve_config
from ows_ds.distributed.weights import Weights
from ows_ds.distributed.zero3 import InShards, Zero3, join_deepspeed
from ows_ds.model.layers import find_layers
from ows_ds.model.parts import gathered_at_once
from ows_ds.model.pretrained import formats, let_freeze
from ows_ds.optim.hooks import hook_frozen
from ows_ds.optim.ows import OWS
from ows_ds.planner.forecast import Replays
from ows_ds.planner.step import StepSpec
from ows_ds.planner.traffic import traffic
from ows_ds.train.layer_runs import LayerRuns, Ways
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import RATIOS, mean_loss, micro_batches

# entries; a tiny layer has about 8,000, the embedding 2,048: (prefetch bucket, live, reuse distance)
LIMITS = [(0, 0, 0), (3000, 10**6, 10**6), (3000, 9000, 9000), (6000, 20000, 5000), (1500, 4000, 12000)]
STEPS = 4  # the first two passes teach DeepSpeed the order


def courses(
    rank: int,
    world_size: int,
    family: str,
    limits: tuple[int, int, int],
    always_on: str,
    checkpointing: bool,
    batches: int,
    frozen: str = "same",
    compiled: bool = False,
    tile: int | None = None,
) -> list[tuple[Any, Any]]:
    """For the last steps: (measured, replayed) bytes after each fetch of the first pass, and bytes of gathers."""
    from ows_ds.distributed.communicator import join

    model: Any = tiny(family, False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    model.train()
    config = resolve_config(DEFAULT_CONFIG, "float32", 1, 1, world_size)
    names = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    config["zero_optimization"] |= dict(zip(names, limits, strict=True))
    found = formats(find_layers(model), frozen, torch.float32)
    join_deepspeed()
    real = let_freeze(model, found, InShards(config)) if found else []
    layers = find_layers(model)
    weights: Weights = Zero3(model, config, join("cpu"), gathered_at_once(layers, compiled, tile))
    weights.freeze(real)
    hook_frozen(weights)
    ows = OWS(weights, RATIOS, gamma=2, scheme="fixed", rank=5, period=100, always_on=always_on, accumulation=batches)
    runs = LayerRuns(weights, layers, Ways(tile=tile))
    spec = StepSpec(ows.layers, "ows", ows.layer_set, 5, always_on, itemsize=4, accumulation=batches,
                    checkpointing=checkpointing, world_size=world_size, sharded=True, frozen=frozen,
                    compiled=compiled, tile=tile)  # fmt: skip
    spec = Replays(lambda: model.config, config["zero_optimization"]).complete(spec, lambda plain: plain)
    assert spec.gathered is not None
    coordinator, course = weights._gathers._offload.get_param_coordinator(), []  # type: ignore[attr-defined]
    fetch, parameters = coordinator.fetch_sub_module, list(weights.module.parameters())

    def watched(module: Any, forward: bool) -> None:
        fetch(module, forward)
        course.append(sum(p.ds_numel * p.element_size() for p in parameters if p.ds_status.name != "NOT_AVAILABLE"))

    coordinator.fetch_sub_module = watched
    seen = []
    for step in range(STEPS):
        before = ows.comm.sent["weights"]
        for index, ids in enumerate(micro_batches(step, rank, world_size, batches)):
            if not index:
                course.clear()
            ows.backward(mean_loss(ows.weights, ids) / batches)
            if not index:
                first = list(course)
        ows.step()
        ows.zero_grad()
        planned = ([fetch.size for fetch in spec.gathered.course], traffic(spec)["weights"])
        seen.append(((first, ows.comm.sent["weights"] - before), planned))
    runs.close()
    ows.close()
    return seen[2:]


CASES = [
    pytest.param(
        limits, always_on, checkpointing, marks=[pytest.mark.slow] if checkpointing != (always_on == "full") else []
    )
    for limits in LIMITS
    for always_on in ("none", "full")
    for checkpointing in (False, True)
]


@pytest.mark.parametrize(("limits", "always_on", "checkpointing"), CASES)
def test_every_use(pools: Pools, limits: tuple[int, int, int], always_on: str, checkpointing: bool) -> None:
    for seen in pools(2).run(courses, "llama", limits, always_on, checkpointing, 1):
        for measured, planned in seen:
            assert measured == planned


@pytest.mark.parametrize("frozen", ["int8", "nf4"])
@pytest.mark.parametrize("limits", LIMITS[:3])
def test_frozen_weights_in_few_bits(pools: Pools, limits: tuple[int, int, int], frozen: str) -> None:
    for seen in pools(2).run(courses, "llama", limits, "none", False, 2, frozen):
        for measured, planned in seen:
            assert measured == planned


@pytest.mark.parametrize(("compiled", "tile", "checkpointing"), [(True, None, False), (False, 8, True)])
def test_what_is_gathered_at_once(pools: Pools, compiled: bool, tile: int | None, checkpointing: bool) -> None:
    """Layers, as where each is compiled; MLPs, which tokens go through in runs."""
    for limits in (LIMITS[0], LIMITS[3]):
        for seen in pools(2).run(courses, "llama", limits, "none", checkpointing, 2, "same", compiled, tile):
            for measured, planned in seen:
                assert measured == planned


@pytest.mark.parametrize("family", ["qwen3", pytest.param("gpt2", marks=pytest.mark.slow), "gemma2"])
def test_other_families_and_micro_batches(pools: Pools, family: str) -> None:
    for seen in pools(2).run(courses, family, LIMITS[2], "none", False, 3):
        for measured, planned in seen:
            assert measured == planned
