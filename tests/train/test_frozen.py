"""Runs over frozen weights in few bits: what they export, and how they resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ows_ds import config
from ows_ds.distributed.frozen import frozen_of
from ows_ds.distributed.launch import start
from ows_ds.errors import UserError
from ows_ds.train.context import load
from tests.support.pool import Pools
from tests.support.tiny_run import cut, recipe, write_inputs
from tests.train.test_trainer import run

SAMPLING = {"gamma": 1, "scheme": "fixed", "period": 2}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices in nf4 are exact on some directions of their inputs."""
    folder = tmp_path_factory.mktemp("wide")
    return write_inputs(folder, hidden_size=256, intermediate_size=320, head_dim=64)


def job(inputs: Path, output: Path, method: str, frozen: str, **train: Any) -> config.Recipe:
    optim = {} if method == "hift" else {"always_on": "none"}
    made = recipe(inputs, output, {} if method == "galore" else SAMPLING, optim, method, **train)
    return config.changed(made, {"model.frozen": frozen})


def weights(run_dir: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in run_dir.glob("*.safetensors"):
        found |= load_file(file)
    return found


METHODS = ("ows", "lisa", "badam", "hift", "lora", "galore")
FAST = [("ows", "int8", 2), ("lora", "nf4", 1)]


@pytest.mark.parametrize(
    ("method", "frozen", "world_size"),
    [
        pytest.param(method, frozen, world_size, marks=() if (method, frozen, world_size) in FAST else pytest.mark.slow)
        for method in METHODS
        for frozen in ("int8", "nf4")
        for world_size in (1, 2)
    ],
)
def test_real_weights_are_exported_and_resumed(
    pools: Pools, inputs: Path, wide: Path, tmp_path: Path, method: str, frozen: str, world_size: int
) -> None:
    """What never trained is the base model's, to the bit; a run that was cut ends as one that was not."""
    inputs = wide if frozen == "nf4" else inputs
    sharding = "replicated" if world_size == 1 else "zero3"
    pools(world_size).run(run, job(inputs, tmp_path / "whole", method, frozen, sharding=sharding), None)
    base, found = weights(inputs / "model"), weights(tmp_path / "whole" / "model")
    assert base.keys() == found.keys()
    changed = {name for name in base if not torch.equal(base[name], found[name])}
    assert any("proj" in name for name in changed)
    if method in ("ows", "lisa"):  # one of three layers at a time
        assert any("proj" in name for name in base.keys() - changed)
    resumed = cut(tmp_path / "whole", tmp_path / "cut")
    pools(world_size).run(run, job(inputs, resumed, method, frozen, sharding=sharding, resume="auto"), None)
    again = weights(resumed / "model")
    assert all(torch.equal(found[name], again[name]) for name in found)


def directions(rank: int, world_size: int, made: config.Recipe) -> dict[str, Tensor]:
    parameters = load(made, start(made)).weights.parameters()
    found = {name: frozen_of(parameter) for name, parameter in parameters.items()}
    return {name: one.directions for name, one in found.items() if one is not None and one.directions is not None}


def test_directions_are_of_the_same_rows_in_all_worlds(pools: Pools, wide: Path, tmp_path: Path) -> None:
    [expected] = pools(1).run(directions, job(wide, tmp_path, "lisa", "nf4", sharding="replicated"))
    assert len(expected) == 3 * 7
    for found in pools(2).run(directions, job(wide, tmp_path, "lora", "nf4", sharding="zero3")):
        for name, one in expected.items():
            [same] = [other for key, other in found.items() if key.replace(".base_layer", "").endswith(name)]
            assert torch.equal(one, same)


def test_a_stream_is_resumed_with_the_directions_of_its_first_rows(pools: Pools, wide: Path, tmp_path: Path) -> None:
    def streamed(output: Path, **more: Any) -> config.Recipe:
        few = {"steps": 6, "save_steps": 2, "global_batch_size": 4, "sharding": "replicated", **more}
        return config.changed(job(wide, output, "lisa", "nf4", **few), {"data.streaming": True, "data.buffer_size": 8})

    pools(1).run(run, streamed(tmp_path / "whole"), None)
    resumed = cut(tmp_path / "whole", tmp_path / "cut", 4)
    pools(1).run(run, streamed(resumed, resume="auto"), None)
    whole, again = weights(tmp_path / "whole" / "model"), weights(resumed / "model")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_resumed_in_another_format_at_another_world_size(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    pools(2).run(run, job(inputs, tmp_path / "whole", "ows", "int8", sharding="zero3"), None)
    resumed = cut(tmp_path / "whole", tmp_path / "cut")
    pools(1).run(run, job(inputs, resumed, "ows", "nf4", sharding="replicated", resume="auto"), None)
    whole, found = weights(tmp_path / "whole" / "model"), weights(resumed / "model")
    for name, value in whole.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("method", "why"), [("full", "none is frozen"), ("mezo", "none is frozen"), ("dora", "lora")])
def test_methods_that_freeze_nothing_are_refused(inputs: Path, tmp_path: Path, method: str, why: str) -> None:
    made = config.to_dict(recipe(inputs, tmp_path, method=method))
    made["model"]["frozen"] = "int8"
    with pytest.raises(UserError, match=f"model.frozen: 'int8' is invalid: expected same: .*{why}"):
        config.from_dict(made)
