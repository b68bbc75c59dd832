"""A loss or gradient that is NaN or infinite on one rank: all skip the step, and nothing of it stays."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ows_ds import config
from ows_ds.config import changed
from ows_ds.errors import Failed
from ows_ds.optim.ows import OWS
from ows_ds.optim.refresh import Refresh
from ows_ds.train import log, trainer
from ows_ds.train import step as step_module
from ows_ds.train.step import StepRunner
from tests.optim.test_period import Waits
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.tiny_run import recipe
from tests.support.training import RATIOS, home, mean_loss, micro_batches, whole_weights

SETTINGS: dict[str, Any] = {
    "scheme": "fixed", "gamma": 2, "period": 100, "rank": 4, "update_proj_gap": 3, "lr": 1e-2, "weight_decay": 0.1,
}  # fmt: skip


def trained(
    rank: int, world_size: int, sharding: str, settings: dict[str, Any], batches: Sequence[int | None]
) -> dict[str, Tensor]:
    """Weights after a step with each of the ``batches``; None: one that is not finite on the last rank alone."""
    accumulation = settings.get("accumulation", 1)
    own, Refresh._seeds = Refresh._seeds, lambda self, part, step: zlib.crc32(part.name.encode())  # type: ignore[method-assign]
    try:
        ows = OWS(home(tiny("llama"), sharding, world_size), RATIOS, **{**SETTINGS, **settings})
        for number in batches:
            parts = micro_batches(number or 0, rank, world_size, accumulation)
            # of several micro-batches the last one: the first ones' gradients, and a refresh from the first, are finite
            factors = [1.0] * (accumulation - 1) + [math.nan if number is None and rank == world_size - 1 else 1.0]
            losses = [
                lambda ids=ids, factor=factor: mean_loss(ows.weights, ids) * factor / accumulation
                for ids, factor in zip(parts, factors, strict=True)
            ]
            ows.train_step(losses, lambda loss, norm: bool(norm.isfinite()))
        assert ows.skipped == sum(number is None for number in batches)
        assert ows.steps == len(batches)
        ows.merge()
        found = whole_weights(ows.weights)
        ows.close()
        return found
    finally:
        Refresh._seeds = own  # type: ignore[method-assign]


VARIANTS: dict[str, dict[str, Any]] = {
    "rotate": {"moments_on_refresh": "rotate"},
    "first": {"refresh_batch": "first", "accumulation": 2, "moments_on_refresh": "reset"},
    "accumulated": {"accumulation": 2, "always_on": "low_rank"},
    "sketch": {"refresh": "sketch"},
    "full rank": {"rank": None},
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("sharding", "variant"),
    [
        ("zero3", "rotate"),
        ("replicated", "first"),
        ("replicated", "sketch"),
        *(pytest.param(*both, marks=SLOW) for both in [("replicated", "accumulated"), ("zero3", "sketch")]),
        *(pytest.param(*both, marks=SLOW) for both in [("zero3", "first"), ("zero3", "full rank")]),
    ],
)
def test_it_is_as_if_the_step_had_not_been(pools: Pools, sharding: str, variant: str) -> None:
    """At the first step, where layers enter; at a refresh; in the step after one; in a plain one; twice."""
    with_them = [None, 0, None, 1, 2, None, 3, None, None, 4, 5]
    some = pools(2).run(trained, sharding, VARIANTS[variant], with_them)
    without = pools(2).run(trained, sharding, VARIANTS[variant], [0, 1, 2, 3, 4, 5])
    for a, b in zip(some, without, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert all(bool(tensor.isfinite().all()) for tensor in a.values())


def run(
    rank: int, world_size: int, recipe: config.Recipe, bad: Sequence[int], on: int, value: float, added: bool = False
) -> tuple[str, list[str], int]:
    """Train; in the steps ``bad`` (from 1) rank ``on`` gets losses times ``value``, or with it added, which leaves
    the gradient alone. What ended it, the lines that were shown, and how often the host waited in a plain step.
    """
    step, lines, take, losses = 0, [], StepRunner.take, step_module.token_losses

    def taking(self: Any, number: int, last: bool) -> dict[str, Any]:
        nonlocal step
        step = number + 1
        return take(self, number, last)

    def spoiled(*arguments: Any) -> Tensor:
        loss = losses(*arguments)
        if step not in bad or rank != on:
            return loss
        return loss + value if added else loss * value

    event = log.RunLog.event
    StepRunner.take, step_module.token_losses = taking, spoiled  # type: ignore[method-assign,assignment]
    log.RunLog.event = lambda self, text: lines.append(text)  # type: ignore[method-assign]
    ended = ""
    try:
        trainer.train(recipe)
    except Failed as failed:
        ended = str(failed)
    finally:
        StepRunner.take, step_module.token_losses = take, losses  # type: ignore[method-assign]
        log.RunLog.event = event  # type: ignore[method-assign]
    return ended, lines, step


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][1:]


def state(run_dir: Path, step: int) -> list[dict[str, Tensor]]:
    """All tensors of a checkpoint, by rank."""
    return [load_file(file) for file in sorted((run_dir / "checkpoints" / f"step-{step}").glob("*.safetensors"))]


@pytest.mark.parametrize(
    ("method", "sharding", "value", "added"),
    [
        ("ows", "zero3", math.inf, True),
        ("full", "zero3", math.nan, False),  # DeepSpeed's optimizer
        ("mezo", "replicated", math.nan, False),
        *(
            pytest.param(*four, marks=SLOW)
            for four in [
                ("lora", "zero3", math.inf, True),
                ("lora", "replicated", math.nan, False),
                ("full", "replicated", math.inf, True),
                ("galore", "replicated", math.nan, False),
                ("lisa", "zero3", math.nan, False),
                ("badam", "replicated", math.nan, False),
                ("hift", "zero3", math.nan, False),
                ("hift", "replicated", math.inf, True),
                ("dora", "zero3", math.nan, False),
                ("mezo", "zero3", math.inf, True),
            ]
        ),
    ],
)
def test_every_method_skips_on_all_ranks(
    pools: Pools, inputs: Path, tmp_path: Path, method: str, sharding: str, value: float, added: bool
) -> None:
    optim = {"always_on": "full", "warmup_steps": 0}
    asked = recipe(inputs, tmp_path, None, optim, method, sharding=sharding, save_steps=1, save_total_limit=9, steps=5)
    for ended, lines, _ in pools(2).run(run, asked, [3], 1, value, added):
        assert ended == ""
        assert [line for line in lines if "skipped: " in line] == ["step 3 is skipped: the loss is nan on rank 1"]
        assert lines[-1].endswith("layers trained, 1 steps skipped")
    found = records(tmp_path)
    assert [record.get("skipped", False) for record in found] == [False, False, True, False, False]
    assert found[2]["loss"] is None
    assert found[2]["nonfinite"]["loss"] == "nan"
    assert all(math.isfinite(record["loss"]) for record in found if not record.get("skipped"))
    for before, after in zip(state(tmp_path, 2), state(tmp_path, 3), strict=True):
        assert method == "hift" or before.keys() == after.keys()  # another of its groups has entered
        for name in before.keys() & after.keys():
            if method == "mezo":  # two roundings of bfloat16
                assert torch.allclose(before[name].float(), after[name].float(), rtol=0.02, atol=1e-3), name
            else:
                assert torch.equal(before[name], after[name]), name
    assert any(
        not torch.equal(before[name], after[name])
        for before, after in zip(state(tmp_path, 3), state(tmp_path, 4), strict=True)
        for name in before.keys() & after.keys()
    )


def test_so_many_in_a_row_stop_all(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    """Two in a row, one good step, and then nothing else: the third stops; a repaired run resumes."""
    settings: dict[str, Any] = {"sharding": "zero3", "max_nonfinite_steps": 3}
    asked = recipe(inputs, tmp_path, **settings)
    for ended, lines, step in pools(2).run(run, asked, [2, 3, 5, 6, 7, 8, 9], 0, math.nan):
        assert step == 7
        assert ended == (
            "step 7: the loss is nan on rank 0, for 3 steps in a row (train.max_nonfinite_steps); "
            f"the last good checkpoint is {tmp_path}/checkpoints/step-6"
        )
        assert sum("is skipped: " in line for line in lines) == 5
    assert not (tmp_path / "model").exists()
    assert len(records(tmp_path)) == 7
    again = recipe(inputs, tmp_path, resume="auto", **settings)
    for ended, lines, _ in pools(2).run(run, again, [], 0, math.nan):
        assert ended == ""
        assert (
            lines[-1] == f"done: {tmp_path}/model, 3 of 3 layers trained, 4 steps skipped"
        )  # of those before the checkpoint


@pytest.mark.slow
def test_without_a_limit_any_number_is_skipped(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    asked = recipe(inputs, tmp_path, max_nonfinite_steps=None, steps=12)
    for ended, lines, _ in pools(2).run(run, asked, range(1, 13), 0, math.nan):
        assert ended == ""
        assert lines[-1].endswith("12 steps skipped")


def looks(rank: int, world_size: int, recipe: config.Recipe) -> list[tuple[bool, list[Any], int]]:
    """Of each step: whether anything was found in it or after it, what waited for the device, how often it was
    looked at for the record.
    """
    take, tolist = StepRunner.take, Tensor.tolist
    seen, count = [], 0

    def counting(self: Tensor) -> Any:
        nonlocal count
        count += 1
        return tolist(self)

    def watched(self: Any, step: int, last: bool) -> dict[str, Any]:
        nonlocal count
        ows, count = self.method, 0
        steps = [one for unit in ows.active.buffer.blocks.values() for one in unit.steps.values()]
        steps += [part.step for _, parts in ows.active.full._runs for part in parts]
        refreshes = ows.refresh.plan is not None
        with Waits({one.data_ptr() for one in steps}) as mode:
            record = take(self, step, last)
        changes = refreshes or ows.refresh.plan is not None or ows.steps % ows.config.period == 0 or "skipped" in record
        seen.append((changes, mode.found, count))
        return record

    StepRunner.take, Tensor.tolist = watched, counting  # type: ignore[method-assign]
    try:
        trainer.train(recipe)
    finally:
        StepRunner.take, Tensor.tolist = take, tolist  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("packing", [pytest.param(False, marks=SLOW), True])
def test_a_plain_step_waits_for_the_device_once(pools: Pools, inputs: Path, tmp_path: Path, packing: bool) -> None:
    size = {"global_batch_size": 4, "micro_batch_size": 1} if packing else {}
    asked = recipe(inputs, tmp_path, {"gamma": 2.0, "period": 5}, {"update_proj_gap": 9}, sharding="replicated", **size)
    asked = changed(asked, {"data.packing": packing, "data.max_length": 100 if packing else 64})
    plain = 0
    for seen in pools(2).run(looks, asked):
        for changes, found, count in seen:
            if not changes:
                # which labels count is asked on the CPU, where they are
                assert [one for one in found if one[0] != "nonzero" or one[2] != torch.bool] == []
                assert count == 1
                plain += 1
    assert plain > 4
