from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import Init
from torch import nn

from ows_ds.compat import deepspeed as ours
from ows_ds.distributed.communicator import join
from ows_ds.distributed.ds_config import DEFAULT_CONFIG, resolve_config
from ows_ds.distributed.zero3 import InShards, Zero3, Zero3AdamW, join_deepspeed
from tests.compat import unchanged
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import mean_loss, micro_batches


def config_of(world_size: int, **zero: Any) -> dict[str, Any]:
    return resolve_config(
        {"zero_optimization": DEFAULT_CONFIG["zero_optimization"] | zero}, "float32", 1, 1, world_size
    )


def engine(world_size: int, family: str = "llama", **zero: Any) -> Zero3:
    weights = Zero3(tiny(family), config_of(world_size, **zero), join("cpu"))
    for name, parameter in weights.module.named_parameters():
        parameter.requires_grad_("norm" in name or "ln_" in name)
    return weights


def in_float64(rank: int, world_size: int) -> None:
    """As on a GPU, where half precision is supported; it is on some CPUs only."""
    with patch.object(get_accelerator(), "is_fp16_supported", lambda: True):
        weights = Zero3(tiny("llama", dtype=torch.float64), config_of(world_size), join("cpu"))
        with pytest.raises(AssertionError, match="float64"):  # what `any_dtype` is for
            Init(module=tiny("llama", dtype=torch.float64), dtype=torch.float64)
    assert {ours.shard(parameter).dtype for parameter in weights.module.parameters()} == {torch.float64}


def parameter_in_shards(rank: int, world_size: int) -> None:
    model = tiny("llama")
    full = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    weights = Zero3(model, config_of(world_size), join("cpu"))
    assert ours.stays_gathered(weights.module) == []
    for name, parameter in weights.module.named_parameters():
        expected = full[name]
        assert ours.full_shape(parameter) == expected.shape
        assert ours.full_numel(parameter) == expected.numel()
        size = -(-expected.numel() // world_size)
        assert ours.shard_numel(parameter) == size
        own = expected.flatten()[rank * size : (rank + 1) * size]
        assert torch.equal(ours.shard(parameter)[: own.numel()], own)
        ours.shard(parameter).add_(1)
        with weights.gathered([parameter]):
            assert torch.equal(parameter, expected + 1)
            with pytest.raises(RuntimeError, match="is gathered"):
                ours.shard(parameter)


def made_in_shards(rank: int, world_size: int) -> None:
    join_deepspeed()
    make = InShards(config_of(world_size))

    def fill(start: int, out: torch.Tensor) -> None:
        out.copy_(torch.arange(start, start + out.numel()))

    parameter = make.parameter((3, 5), torch.float32, fill)
    start = rank * -(-15 // world_size)
    assert ours.shard(parameter)[0] == start


@pytest.mark.parametrize("check", [parameter_in_shards, made_in_shards, in_float64])
def test_parameters(pools: Pools, check: Any) -> None:
    with unchanged("DeepSpeed", "what it adds to parameters (ds_tensor, ds_status, ds_numel, ...) or zero.Init"):
        pools(2).run(check)


def prefetcher(rank: int, world_size: int) -> None:
    weights = engine(world_size)
    coordinator: Any = weights.engine.optimizer.get_param_coordinator()
    assert coordinator.is_invalid_trace()
    for _ in range(3):
        weights.backward(mean_loss(weights, micro_batches(0, rank, world_size, 1)[0]))
        weights.after_step()
    assert coordinator.is_complete_trace()
    assert ours.release_cache(coordinator).cache_info().currsize > 0
    assert all(parameter.numel() == 0 for parameter in weights.module.parameters())  # released


def test_the_prefetcher(pools: Pools) -> None:
    with unchanged("DeepSpeed", "PartitionedParameterCoordinator or DeepSpeedZeRoOffload"):
        pools(2).run(prefetcher)


# ------------------------------------------------------------------ bytes


def watched(actual: Counter[str]) -> Any:
    """Within it ``actual`` counts what DeepSpeed's two collectives of the process really send."""
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero import partition_parameters

    gather, reduce = partition_parameters._dist_allgather_fn, coalesced_collectives._torch_reduce_scatter_fn

    def counting_gather(part: torch.Tensor, full: torch.Tensor, group: Any = None) -> Any:
        actual["weights"] += full.nbytes - part.nbytes
        return gather(part, full, group)

    def counting_reduce(full: torch.Tensor, part: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        actual["full_rank_gradients"] += full.nbytes - part.nbytes
        return reduce(full, part, *args, **kwargs)

    return (
        patch.object(partition_parameters, "_dist_allgather_fn", counting_gather),
        patch.object(coalesced_collectives, "_torch_reduce_scatter_fn", counting_reduce),
    )


def two_engines(rank: int, world_size: int, hpz: int) -> None:
    """Each counts its own bytes, in turns and with one pass inside the other's."""
    actual = Counter[str]()
    gathers, reduces = watched(actual)
    ids = micro_batches(0, rank, world_size, 1)[0]
    first = engine(world_size, zero_hpz_partition_size=hpz)
    second = engine(world_size, "gpt2")
    each: dict[str, list[int]] = {"first": [], "second": []}

    def step(*those: tuple[str, Zero3]) -> None:
        before = {name: weights.comm.sent["weights"] for name, weights in those}
        actual.clear()
        losses = [mean_loss(weights, ids) for _, weights in those]
        for (name, weights), loss in zip(those, losses, strict=True):
            weights.backward(loss)
            weights.after_step()
            each[name].append(weights.comm.sent["weights"] - before[name])
        assert sum(each[name][-1] for name, _ in those) == actual["weights"] > 0

    with gathers, reduces:
        for _ in range(2):
            step(("first", first))
            step(("second", second))
        for _ in range(2):
            step(("first", first), ("second", second))
    assert each["first"][0] != each["second"][0]
    for found in each.values():
        assert found[1] == found[2] == found[3]


def own_optimizer(rank: int, world_size: int) -> None:
    actual = Counter[str]()
    gathers, reduces = watched(actual)
    model: nn.Module = tiny("llama")
    weights = Zero3AdamW(model, config_of(world_size), join("cpu"), None)
    settings = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    masters = {name: state["master"].clone() for name, state in weights.states.items()}
    before = Counter(weights.comm.sent)
    with gathers, reduces:
        weights.backward(mean_loss(weights, micro_batches(0, rank, world_size, 1)[0]))
        weights.step(settings, settings)
    found = weights.comm.sent - before
    assert found == actual
    assert found["full_rank_gradients"] > 0
    assert any(not torch.equal(state["master"], masters[name]) for name, state in weights.states.items())


@pytest.mark.parametrize("world_size", [2, 3])
def test_two_engines_of_a_process_count_their_own_bytes(pools: Pools, world_size: int) -> None:
    with unchanged("DeepSpeed", "param.all_gather_coalesced"):
        pools(world_size).run(two_engines, 1)


def test_an_optimizer_of_deepspeed_counts_too(pools: Pools) -> None:
    with unchanged("DeepSpeed", "DeepSpeedZeroOptimizer_Stage3.__avg_scatter_grads or its masters"):
        pools(2).run(own_optimizer)
