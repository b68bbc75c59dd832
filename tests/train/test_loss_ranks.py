"""The loss in runs of rows and from whole logits, under every kind of training and home of weights."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import ows_ds.train.loss
from ows_ds import config, methods
from ows_ds.data.encoded import IGNORE
from ows_ds.model.layers import find_layers
from ows_ds.train.loss import token_losses
from tests.methods.test_whole import place
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import LENGTH, NAMES, VOCABULARY, distance, micro_batches, whole_weights

STEPS, ACCUMULATION = 5, 2


def settings(method: str, always_on: str, dtype: torch.dtype) -> config.Recipe:
    return config.from_dict(
        {
            "model": {"path": "none", "dtype": NAMES[dtype]},
            "method": {"name": method},
            "sampling": {"gamma": 1, "scheme": "fixed", "period": 3},
            "optim": {"rank": 5, "update_proj_gap": 2, "lr": 1e-2, "always_on": always_on},
            "train": {"output_dir": "none", "global_batch_size": 24},
        }
    )


def batches(step: int, rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """The first tokens of every row are prompt."""
    found = []
    for ids in micro_batches(step, rank, world_size, ACCUMULATION):
        labels = ids.clone()
        labels[:, : LENGTH // 3] = IGNORE
        found.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return found


def trained(
    rank: int,
    world_size: int,
    method: str,
    always_on: str,
    sharding: str,
    dtype: torch.dtype,
    family: str,
    rows: int | None,
) -> tuple[dict[str, Tensor], dict[str, int], bool]:
    """Weights and bytes sent after some steps, and whether the model's loss can be cut. rows: a run; None: whole."""
    recipe = settings(method, always_on, dtype)
    plain = tiny(family, always_on == "low_rank", dtype)
    layers = find_layers(plain)
    weights = place(methods.adapt(recipe, plain), sharding, world_size, recipe)
    head: Any = weights.module.get_output_embeddings()  # type: ignore[operator]
    before = ows_ds.train.loss.CHUNK
    try:
        if rows is None:
            ows_ds.train.loss._fits[head] = False
        else:
            ows_ds.train.loss.CHUNK = rows * VOCABULARY
        run = methods.build(recipe, weights, layers, [1.0] * len(layers.layers), ACCUMULATION)
        for step in range(STEPS):
            weights.module.train()
            run.train_step(
                [functools.partial(lambda b: token_losses(weights, b) / 40, b) for b in batches(step, rank, world_size)]
            )
        fits = ows_ds.train.loss._fits[head]
        run.close()
    finally:
        ows_ds.train.loss.CHUNK = before
    return whole_weights(weights), dict(weights.comm.sent), fits


CASES = [("ows", "full"), ("ows", "low_rank"), ("ows", "none"), ("lisa", "full"), ("hift", "full"), ("mezo", "full")]
CASES += [("full", "full"), ("lora", "full")]
FAST = [("ows", "full", "zero3"), ("ows", "low_rank", "replicated")]
FAST += [("lisa", "full", "zero3"), ("full", "full", "zero3")]


@pytest.mark.parametrize(
    ("method", "always_on", "sharding"),
    [
        pytest.param(*case, sharding, marks=() if (*case, sharding) in FAST else pytest.mark.slow)
        for case in CASES
        for sharding in ("zero3", "replicated")
    ],
)
def test_equals_whole_logits(pools: Pools, method: str, always_on: str, sharding: str) -> None:
    # DeepSpeed's own optimizer, under full and lora, has no float64
    dtype, close = (torch.float32, 2e-5) if method in ("full", "lora") else (torch.float64, 1e-9)
    common = (method, always_on, sharding, dtype, "llama")
    whole = pools(2).run(trained, *common, None)
    cut = pools(2).run(trained, *common, 5)
    for (expected, sent, _), (found, also_sent, fits) in zip(whole, cut, strict=True):
        assert fits
        assert distance(found, expected) < close
        assert also_sent == sent


@pytest.mark.parametrize("method", ["full", pytest.param("ows", marks=pytest.mark.slow)])
def test_a_model_that_changes_its_logits_under_zero3(pools: Pools, method: str) -> None:
    """It is found out in the first forward pass, which is taken once more."""
    common = (method, "full", "zero3", torch.float32, "gemma2")
    whole = pools(2).run(trained, *common, None)
    tried = pools(2).run(trained, *common, 5)
    for (expected, _, _), (found, _, fits) in zip(whole, tried, strict=True):
        assert not fits
        assert distance(found, expected) < 1e-6
