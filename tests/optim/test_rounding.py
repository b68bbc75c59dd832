"""Stochastic rounding at the merge: the same bits on every rank, at any world size, after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.optim.test_period import SETTINGS
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.tiny_run import cut, recipe
from tests.support.training import HOMES, SHARDINGS, home, run_ows, whole_weights, worlds
from tests.train.test_trainer import contents, run


def merge_all(rank: int, world_size: int, sharding: str) -> dict[str, Tensor]:
    """All matrices after a merge of the same coordinates; a shard of most of them begins within a block."""
    weights = home(tiny("llama", False, torch.bfloat16), sharding, world_size)
    weights.after_step()
    for name, parameter in weights.module.named_parameters():
        shape = weights.shape(parameter)
        if len(shape) == 2:
            stream = torch.Generator().manual_seed(len(name))
            left, right = (0.1 * torch.randn(side, 4, generator=stream) for side in shape)
            with mock.patch("ows_ds.distributed.merging.MERGE_ENTRIES", 150):
                weights.merge(parameter, left, right, 0.99, f"3/7/{name}")
    return whole_weights(weights)


@pytest.mark.parametrize(("world_size", "sharding"), worlds(HOMES, also=[(1, "zero3"), (3, "zero3")]))
def test_equal_coordinates_merge_to_equal_bits(pools: Pools, world_size: int, sharding: str) -> None:
    expected = merge_all(0, 1, "replicated")
    for weights in pools(world_size).run(merge_all, sharding):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


@SHARDINGS
def test_ranks_agree_and_training_repeats(pools: Pools, sharding: str) -> None:
    settings = {**SETTINGS, "merge_rounding": "stochastic"}

    def trained(settings: dict[str, object]) -> list[dict[str, Tensor]]:
        results = pools(3).run(run_ows, sharding, "llama", False, torch.bfloat16, 7, settings)
        return [result["weights"] for result in results]

    first, *others = trained(settings)
    nearest = trained(SETTINGS)[0]
    for weights in (*others, trained(settings)[0]):
        assert all(torch.equal(weights[name], first[name]) for name in first)
    assert any(not torch.equal(nearest[name], first[name]) for name in first)


@SHARDINGS
def test_resumed_run_is_bit_identical(
    pools: Pools, inputs: Path, straight: Callable[..., Path], tmp_path: Path, sharding: str
) -> None:
    settings: dict[str, Any] = {"optim": {"merge_rounding": "stochastic"}, "sharding": sharding}
    whole = straight(2, **settings)
    parts = cut(whole, tmp_path / "parts")
    pools(2).run(run, recipe(inputs, parts, resume="auto", **settings), None)
    assert contents(parts) == contents(whole)
    nearest = contents(straight(2, sharding=sharding))[1]
    assert nearest["model/model.safetensors"] != contents(whole)[1]["model/model.safetensors"]
