"""Rows that ranks share: losses and gradients are those of one process, and each rank keeps its part of activations."""

from __future__ import annotations

import functools
import gc
import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from torch import Tensor, nn

from ows_ds import config
from ows_ds.compat.transformers import known_rows
from ows_ds.data.attention import why_not_shared
from ows_ds.data.batches import collate, cut
from ows_ds.data.encoded import Encoded
from ows_ds.distributed.sequence import SequenceParallel
from ows_ds.distributed.weights import Weights
from ows_ds.errors import UserError
from ows_ds.model.shapes import check_shared, kv_copies
from ows_ds.optim.ows import OWS
from ows_ds.planner.memory import memory
from ows_ds.planner.step import StepSpec
from ows_ds.planner.traffic import traffic
from ows_ds.train.loss import token_losses
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.tiny_run import recipe
from tests.support.training import HOMES, home
from tests.train.test_trainer import run

TOKENS, STEPS = 2048, 2
# rows of two sequences: cuts at 512, 1024 and 1536 are inside of a row, or between two; the last is padded
PACKED = [[700, 836, 512], [1500, 300]]
WIDE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 16,
    "max_position_embeddings": TOKENS,
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


class Saved:
    """A tensor as a graph holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def live_bytes(weights: Weights, batch: dict[str, Tensor]) -> int:
    """Of what a forward pass keeps for the backward pass, weights aside."""
    known = {one.untyped_storage().data_ptr() for one in weights.module.parameters()}
    made = weakref.WeakSet[Saved]()  # of which those stay that the loss' graph still holds

    def pack(tensor: Tensor) -> Saved:
        made.add(saved := Saved(tensor))
        return saved

    # DeepSpeed replaces torch's function for good where an earlier test of this process had shards
    own = mock.patch.object(nn.functional, "linear", torch.ops.aten.linear.default)
    with own, torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = token_losses(weights, batch)
    gc.collect()
    storages = {one.data_ptr(): one.nbytes() for one in (saved.tensor.untyped_storage() for saved in made)}
    weights.backward(loss * 0)
    return sum(size for place, size in storages.items() if place not in known)


def trained(
    rank: int, world_size: int, size: int, sharding: str, family: str, more: Any, packed: bool, checkpointing: bool
) -> dict[str, Any]:
    """Loss and gradients of some steps of OWS; bytes of attention's exchanges and of what is kept, as planned too."""
    model = wide(family, more)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    weights = home(model, sharding, world_size)
    shared = SequenceParallel(weights.comm, size)
    ows = OWS(weights, [0.2, 0.3], rank=5, gamma=1, period=2, scheme="fixed", update_proj_gap=50, lr=1e-2,
              accumulation=2 // shared.data_ranks)  # fmt: skip
    found: list[tuple[float, dict[str, Tensor]]] = []
    planned = 0

    def loss(batch: dict[str, Tensor]) -> Tensor:
        shared.begin(batch)
        return token_losses(weights, batch) * (world_size / 2500)

    def keep(mine: Tensor, norm: Tensor) -> bool:
        found.append((float(ows.comm.all_reduce(mine.clone()) / world_size), gradients(ows)))
        return True

    for step in range(STEPS):
        weights.module.train()
        batches = micro_batches(step, packed, shared)
        with known_rows(None), shared.passes():
            ows.train_step([functools.partial(loss, one) for one in batches], keep)
        for batch in batches:
            spec = StepSpec(ows.layers, layer_set=(0, 1), itemsize=8, length=batch["input_ids"].numel() * size,
                            shared_by=size, kv_copies=kv_copies(model.config, size), checkpointing=checkpointing,
                            world_size=world_size)  # fmt: skip
            planned += traffic(spec).get("sequence", 0)
    sent, kept = ows.comm.sent["sequence"], 0
    if not checkpointing and sharding == "replicated":
        with known_rows(None), shared.passes():
            shared.begin(batches[0])
            kept = live_bytes(weights, batches[0])
    plan = memory(replace(spec, layer_set=ows.layer_set, on_gpu=False), False).phases["loss"]["activations"]
    return {"steps": found, "sent": sent, "planned": planned, "kept": kept, "plan": plan}


_alone: dict[str, Any] = {}  # what one process finds
CASES = [
    pytest.param(2, 2, "zero3", "llama", WIDE, True, False, marks=pytest.mark.slow),
    (2, 2, "replicated", "llama", WIDE, False, False),
    pytest.param(4, 2, "replicated", "llama", GROUPED, True, True, marks=pytest.mark.slow),
    (4, 4, "zero3", "llama", GROUPED, True, True),
    pytest.param(4, 4, "replicated", "mistral", GROUPED | {"sliding_window": 600}, True, False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world_size", "size", "sharding", "family", "more", "packed", "checkpointing"), CASES)
def test_equals_one_process(
    pools: Pools, world_size: int, size: int, sharding: str, family: str, more: Any, packed: bool, checkpointing: bool
) -> None:
    key = f"{family} {more} {packed}"
    if key not in _alone:
        _alone[key] = pools(1).run(trained, 1, "replicated", family, more, packed, False)[0]
    for found in pools(world_size).run(trained, size, sharding, family, more, packed, checkpointing):
        for (loss, grads), (right, wanted) in zip(found["steps"], _alone[key]["steps"], strict=True):
            assert abs(loss - right) < 1e-10 * right
            assert grads.keys() == wanted.keys()
            for name, one in grads.items():
                error = (one - wanted[name]).norm() / wanted[name].norm()
                assert error < 1e-10, (name, error)
        assert found["sent"] == found["planned"] > 0
        if found["kept"]:
            share = found["kept"] / _alone[key]["kept"]
            assert share <= (0.55 if size == 2 else 0.3)
            assert found["plan"] / _alone[key]["plan"] == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize(("family", "size", "expected"), [
    ("llama", 3, "a divisor of the 4 attention heads"), ("qwen3_5", 2, "1: layers of this model are linear_attention"),
])  # fmt: skip
def test_a_model_whose_rows_cannot_be_shared_is_refused(family: str, size: int, expected: str) -> None:
    with pytest.raises(UserError, match=f"train.sequence_parallel.*{expected}"):
        check_shared(tiny(family).config, size)


def probed(rank: int, world_size: int, family: str) -> str | None:
    model: Any = tiny(family)
    model.set_attn_implementation("sdpa")
    weights = home(model, "replicated", world_size)
    return why_not_shared(weights, SequenceParallel(weights.comm, world_size), 64)


def test_models_are_tried(pools: Pools) -> None:
    """By what their code does: of linear attention every rank would begin again."""
    assert pools(2).run(probed, "gpt2") == [None] * 2
    assert all("exchange" in str(one) for one in pools(2).run(probed, "qwen3_5"))


def test_a_checkpoint_of_two_goes_on_with_one_and_four(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    """In bfloat16, with another order of sums; rows, their order and the number of steps are the same."""
    pools(2).run(run, recipe(inputs, tmp_path / "two", sequence_parallel=2, sharding="zero3"), 5)
    whole = pools(1).run(losses, recipe(inputs, tmp_path / "one"))[0]
    for size in (1, 4):
        folder = tmp_path / f"then {size}"
        shutil.copytree(tmp_path / "two", folder)
        found = pools(size).run(losses, recipe(inputs, folder, sequence_parallel=size, resume="auto"))[0]
        assert [record["step"] for record in found] == list(range(10))
        assert [record["tokens"] for record in found] == [record["tokens"] for record in whole]
        for key, records in (("loss", found[1:]), ("eval_loss", [found[0], found[-1]])):
            expected = whole[1:] if key == "loss" else [whole[0], whole[-1]]
            assert all(abs(a[key] - b[key]) < 0.05 * b[key] for a, b in zip(records, expected, strict=True)), key


@pytest.mark.slow
@pytest.mark.parametrize("sharding", HOMES)
@pytest.mark.parametrize("method", ["lisa", "galore", "badam", "hift", "full", "lora", "mezo"])
def test_every_method_shares_rows(pools: Pools, inputs: Path, tmp_path: Path, method: str, sharding: str) -> None:
    """Its losses are those of one process, but for dropout and bfloat16's rounding."""
    lean = {"always_on": "none"} if method == "badam" else {}
    made = functools.partial(recipe, inputs, optim={"lr": 1e-3, **lean}, method=method, steps=4)
    whole = pools(1).run(losses, made(tmp_path / "one"))[0]
    shared = pools(2).run(losses, made(tmp_path / "two", sequence_parallel=2, sharding=sharding))[0]
    assert [record["tokens"] for record in shared[1:]] == [record["tokens"] for record in whole[1:]]
    for a, b in zip(shared[1:], whole[1:], strict=True):
        assert abs(a["loss"] - b["loss"]) < 0.05 * b["loss"]


def losses(rank: int, world_size: int, one: config.Recipe) -> list[dict[str, Any]]:
    """Records of a run."""
    run(rank, world_size, one, None)
    lines = (Path(one.train.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
