"""`optim.refresh: sketch`: projectors from two products of each gradient, which is never formed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ows_ds.optim.ows import OWS
from ows_ds.optim.projection import is_tall
from tests.optim.test_period import SETTINGS, watching
from tests.optim.test_projection import energy, top
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.tiny_run import cut, recipe
from tests.support.training import HOMES, RATIOS, SHARDINGS, batch, home, mean_loss, micro_batches, one_step, worlds
from tests.train.test_trainer import contents, run

# rank 3: sketches have 14 columns, of as many entries as no weight
SKETCH: dict[str, Any] = {**SETTINGS, "gamma": 2.0, "refresh": "sketch", "update_proj_gap": 4, "rank": 3}


def course(
    rank: int, world_size: int, sharding: str, accumulation: int
) -> list[tuple[list[bool], int, dict[str, int], dict[str, int], dict[str, Tensor]]]:
    """For each step: the passes it takes, full gradients made, bytes sent and foreseen, projectors after it."""
    ows = OWS(
        home(tiny("llama", False, torch.float32), sharding, world_size),
        RATIOS, always_on="none", accumulation=accumulation, **SKETCH,
    )  # fmt: skip
    seen = []
    for _ in range(9):
        before, foreseen, passes = Counter(ows.comm.sent), Counter[str](), []
        for sketch in ows.refresh.sketches:
            passes.append(sketch.second)
            foreseen.update(sketch.plan.bytes_of_pass(world_size, sketch.result, weight_itemsize=4))
        made = 0
        for ids in [] if ows.nothing_to_train else micro_batches(ows.steps, rank, world_size, accumulation):
            loss = mean_loss(ows.weights, ids) / accumulation
            with watching(ows, sharding == "zero3") as mode:
                ows.backward(loss)
            made += mode.made
            assert all(p.grad is None for p in ows.module.parameters())
        ows.step()
        ows.zero_grad()
        sent = {name: n for name, n in (ows.comm.sent - before).items() if name in ("sketches", *foreseen)}
        seen.append((passes, made, sent, {k: n for k, n in foreseen.items() if n}, dict(ows.active.projectors)))
        assert "refresh_gradients" not in ows.comm.sent
    ows.close()
    return seen


@pytest.mark.parametrize(("world_size", "sharding"), worlds(HOMES, also=[(1, "replicated"), (3, "zero3")]))
def test_no_full_gradient_ever(pools: Pools, sharding: str, world_size: int) -> None:
    """Nor other bytes than the plan tells, nor other projectors than on the other ranks."""
    results = pools(world_size).run(course, sharding, 1 if world_size == 3 else 2)
    passes = [one for one, *_ in results[0]]
    assert {second for one in passes for second in one} == {False, True}
    assert [] in passes
    for seen in results:
        for (_, made, sent, foreseen, projectors), (*_, theirs) in zip(seen, results[0], strict=True):
            assert made == 0
            assert sent == foreseen
            assert projectors.keys() == theirs.keys()
            assert all(torch.equal(projectors[name], theirs[name]) for name in theirs)
    if world_size > 1:
        assert any(foreseen for _, _, _, foreseen, _ in results[0])


def projectors_of_one_batch(rank: int, world_size: int, sharding: str, family: str) -> list[dict[str, Tensor]]:
    """After a first and a second refresh that see the same batch under weights that stay."""
    ows = OWS(
        home(tiny(family, False, torch.float32), sharding, world_size),
        RATIOS, gamma=3, rank=8, period=100, update_proj_gap=3, lr=0.0, refresh="sketch", always_on="low_rank",
    )  # fmt: skip
    found = []
    for step in range(5):
        assert bool(ows.active.projectors) == (step >= 2)
        for ids in micro_batches(0, rank, world_size, 1):
            ows.backward(mean_loss(ows.weights, ids))
        ows.step()
        ows.zero_grad()
        if step in (1, 4):
            found.append(dict(ows.active.projectors))
    ows.close()
    return found


@SHARDINGS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_projector_keeps_the_energy(pools: Pools, sharding: str, family: str) -> None:
    model = tiny(family, False, torch.float32)
    mean_loss(model, batch(0)).backward()
    first, second = pools(2).run(projectors_of_one_batch, sharding, family)[0]
    assert len(first) > 12
    for name, weight in model.named_parameters():
        if name not in first:
            continue
        assert weight.grad is not None
        best = energy(weight.grad, top(weight.grad, 8))
        assert 0.99 <= energy(weight.grad, first[name]) / best <= 1 + 1e-5, name
        # the second starts from the first
        assert energy(weight.grad, second[name]) >= (1 - 1e-4) * energy(weight.grad, first[name]), name
        assert first[name].shape == (min(weight.shape), 8)


def test_a_layer_that_has_just_entered_trains_from_its_third_step() -> None:
    model = tiny("llama")
    ows = OWS(model, RATIOS, gamma=3, rank=4, refresh="sketch", always_on="none", lr=1e-2, weight_decay=0.1)
    names = [m.name for block in ows.layers.layers for m in block.matrices]
    vectors = [v.name for block in ows.layers.layers for v in block.vectors]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(4):
        assert [bool(ows.active.hooks[name][0].coordinates) for name in names] == [step >= 2] * len(names)
        assert [bool(ows.active.hooks[name][0].sketch) for name in names] == [step < 2] * len(names)
        one_step(ows, 0, 1)
        ows.merge()
        now = dict(model.named_parameters())
        assert [torch.equal(now[name], start[name]) for name in names] == [step < 2] * len(names)
        assert not any(torch.equal(now[name], start[name]) for name in vectors)
    # Adam's count began with the first step that trained them
    assert {float(n) for (_, kind), n in ows.active.buffer.steps.items() if kind == "matrices"} == {2.0}
    assert {float(n) for (_, kind), n in ows.active.buffer.steps.items() if kind == "vectors"} == {4.0}


def test_a_sketch_leaves_nothing_behind() -> None:
    """Values of zero take no memory and stay zero; after the passes only the projector is there."""
    ows = OWS(tiny("llama"), RATIOS, gamma=3, rank=4, refresh="sketch", always_on="none")
    for coordinates in ows.refresh.sketches[0].coordinates.values():
        assert coordinates.values.untyped_storage().nbytes() == 4
    one_step(ows, 0, 1)
    for name, coordinates in ows.refresh.sketches[0].coordinates.items():
        rows = coordinates.values.shape[0]
        assert rows == min(coordinates.shape)
        assert coordinates.projector.shape == (max(coordinates.shape), 16)
        assert is_tall(coordinates.shape) == (coordinates.factors[0] is coordinates.projector), name
    one_step(ows, 0, 1)
    assert (ows.refresh.sketches, ows.refresh.bases) == ([], {})
    assert isinstance(ows.module, nn.Module)
    ows.zero_grad()
    ows.close()


@pytest.mark.parametrize(("world_size", "sharding"), worlds(HOMES, also=[(3, "replicated")]))
def test_resumes_bit_identically(
    pools: Pools, inputs: Path, straight: Callable[..., Path], tmp_path: Path, world_size: int, sharding: str
) -> None:
    """From a checkpoint between the two passes: embedding and head take their second one in the step after it."""
    optim = {"refresh": "sketch", "always_on": "low_rank", "update_proj_gap": 3}
    settings: dict[str, Any] = {"optim": optim, "sharding": sharding, "save_steps": 4, "save_total_limit": 3}
    whole = straight(world_size, **settings)
    parts = cut(whole, tmp_path / "parts", 4)
    pools(world_size).run(run, recipe(inputs, parts, resume="auto", **settings), None)
    records, files = contents(whole)
    assert contents(parts) == (records, files)
    assert "sketch_basis/" in (whole / "checkpoints" / "step-4" / "manifest.json").read_text()
    assert any("sketches" in record["comm_bytes"] for record in records) == (world_size > 1)
