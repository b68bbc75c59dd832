"""Stochastic rounding at the merge: the same bits on every process, at any number of them, after a resume."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.optim.test_period import SETTINGS
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.tiny_run import recipe
from tests.support.training import home, run_ows, whole_weights
from tests.train.test_trainer import contents, run


def fold_all(rank: int, world_size: int, sharding: str) -> dict[str, Tensor]:
    """All matrices after a merge of the same coordinates; a shard of most of them begins within a block."""
    weights = home(tiny("llama", False, torch.bfloat16), sharding, world_size)
    weights.after_step()
    for name, parameter in weights.module.named_parameters():
        shape = weights.shape(parameter)
        if len(shape) == 2:
            stream = torch.Generator().manual_seed(len(name))
            left, right = (0.1 * torch.randn(side, 4, generator=stream) for side in shape)
            with mock.patch("ows_ds.distributed.weights.FOLD", 150):
                weights.merge(parameter, left, right, 0.99, f"3/7/{name}")
    return whole_weights(weights)


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equal_coordinates_fold_to_equal_bits(pools: Pools, world_size: int, sharding: str) -> None:
    expected = fold_all(0, 1, "replicated")
    for weights in pools(world_size).run(fold_all, sharding):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
def test_processes_agree_and_training_repeats(pools: Pools, sharding: str) -> None:
    settings = {**SETTINGS, "merge_rounding": "stochastic"}

    def trained(settings: dict[str, object]) -> list[dict[str, Tensor]]:
        results = pools(3).run(run_ows, sharding, "llama", False, torch.bfloat16, 7, settings)
        return [result["weights"] for result in results]

    first, *others = trained(settings)
    nearest = trained(SETTINGS)[0]
    for weights in (*others, trained(settings)[0]):
        assert all(torch.equal(weights[name], first[name]) for name in first)
    assert any(not torch.equal(nearest[name], first[name]) for name in first)


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
def test_resumed_run_is_bit_identical(pools: Pools, inputs: Path, tmp_path: Path, sharding: str) -> None:
    optim = {"merge_rounding": "stochastic"}
    whole, parts, nearest = (tmp_path / name for name in ("whole", "parts", "nearest"))
    pools(2).run(run, recipe(inputs, whole, optim=optim, sharding=sharding), None)
    pools(2).run(run, recipe(inputs, parts, optim=optim, sharding=sharding), 5)
    pools(2).run(run, recipe(inputs, parts, optim=optim, sharding=sharding, resume="auto"), None)
    assert contents(parts) == contents(whole)
    pools(2).run(run, recipe(inputs, nearest, sharding=sharding), None)
    assert contents(nearest)[1]["model/model.safetensors"] != contents(whole)[1]["model/model.safetensors"]
