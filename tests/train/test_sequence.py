"""Rows that ranks share: losses and gradients are those of one process, and each rank keeps its part of activations."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from ows_ds.compat.transformers import known_rows
from ows_ds.data.batches import collate, cut
from ows_ds.data.encoded import Encoded
from ows_ds.distributed.sequence import SequenceParallel
from ows_ds.optim.ows import OWS
from ows_ds.train.loss import token_losses
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import home

TOKENS, STEPS = 2048, 2
# rows of two sequences: cuts at 512, 1024 and 1536 are inside of a row, or between two; the last is padded
PACKED = [[700, 836, 512], [1500, 300]]
WIDE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": TOKENS
}  # fmt: skip
GROUPED = WIDE | {"num_key_value_heads": 2}


def wide(family: str, more: dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    model: Any = tiny(family, False, dtype, **more)
    model.set_attn_implementation("sdpa")
    return model


def sequences(step: int, packed: bool) -> list[list[Encoded]]:
    """Two of `TOKENS`, or nearly; the first third of each row is prompt."""
    generator = numpy.random.default_rng(step)
    found = []
    for lengths in PACKED if packed else [[TOKENS], [TOKENS - 9]]:
        ids = [generator.integers(3, 64, length).astype(numpy.int32) for length in lengths]
        found.append([Encoded(one, numpy.arange(len(one)) >= len(one) // 3, len(one) - len(one) // 3) for one in ids])
    return found


def micro_batches(step: int, packed: bool, shared: SequenceParallel) -> list[dict[str, Tensor]]:
    """Of one sequence each."""
    found = []
    for sequence in sequences(step, packed)[shared.data_rank :: shared.data_ranks]:
        batch = collate([sequence], 0, packed, 8 * shared.size)
        del batch["attention_mask"]
        found.append(cut(batch, shared.part, shared.size) if shared.size > 1 else batch)
    return found


def gradients(ows: OWS) -> dict[str, Tensor]:
    """Of all that trains, summed over ranks and put together. Collective."""
    found = {}
    for layout in ows.plan.layouts:
        whole = ows.comm.all_gather(ows.active.buffer.blocks[layout.block.name].reduced_grads)
        found |= {name: whole[slice(*rows)].clone() for name, rows in layout.slots.items()}
    parameters = ows.weights.parameters()
    for name, mine in ows.active.full.grads.items():
        entries = math.prod(ows.weights.shape(parameters[name]))
        size = -(-entries // ows.comm.world_size)
        found[name] = ows.comm.all_gather(torch.nn.functional.pad(mine, (0, size - len(mine))))[:entries]
    return found


def trained(
    rank: int,
    world_size: int,
    size: int,
    sharding: str,
    family: str,
    more: dict[str, Any],
    packed: bool,
    checkpointing: bool,
) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of some steps of OWS."""
    model = wide(family, more)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    weights = home(model, sharding, world_size)
    shared = SequenceParallel(weights.comm, size)
    ows = OWS(weights, [0.2, 0.3], rank=5, gamma=1, period=2, scheme="fixed", update_proj_gap=50, lr=1e-2,
              accumulation=2 // shared.data_ranks)  # fmt: skip
    found: list[tuple[float, dict[str, Tensor]]] = []

    def loss(batch: dict[str, Tensor]) -> Tensor:
        shared.begin(batch)
        return token_losses(weights, batch) * (world_size / 2500)

    def keep(mine: Tensor, norm: Tensor) -> bool:
        found.append((float(ows.comm.all_reduce(mine.clone()) / world_size), gradients(ows)))
        return True

    for step in range(STEPS):
        weights.module.train()
        with known_rows(None), shared.passes():
            ows.train_step([functools.partial(loss, one) for one in micro_batches(step, packed, shared)], keep)
    return found


_alone: dict[str, Any] = {}  # what one process finds
CASES = [
    (2, 2, "zero3", "llama", WIDE, True, False),
    (2, 2, "replicated", "llama", WIDE, False, True),
    (4, 2, "replicated", "llama", GROUPED, True, True),
    (4, 4, "zero3", "llama", GROUPED, True, True),
    (4, 4, "replicated", "mistral", GROUPED | {"sliding_window": 600}, True, False),
]


@pytest.mark.parametrize(("world_size", "size", "sharding", "family", "more", "packed", "checkpointing"), CASES)
def test_equals_one_process(
    pools: Pools, world_size: int, size: int, sharding: str, family: str, more: Any, packed: bool, checkpointing: bool
) -> None:
    key = f"{family} {more} {packed}"
    if key not in _alone:
        _alone[key] = pools(1).run(trained, 1, "replicated", family, more, packed, False)[0]
    expected = _alone[key]
    for found in pools(world_size).run(trained, size, sharding, family, more, packed, checkpointing):
        for (loss, grads), (right, wanted) in zip(found, expected, strict=True):
            assert abs(loss - right) < 1e-10 * right
            assert grads.keys() == wanted.keys()
            for name, one in grads.items():
                error = (one - wanted[name]).norm() / wanted[name].norm()
                assert error < 1e-10, (name, error)
