"""How many draws a run has, and how many layers they reach."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ows_ds import config
from tests.support.pool import Pools
from tests.support.tiny_run import cut, recipe
from tests.train.test_trainer import contents, run


def test_a_run_says_how_many_layers_it_reaches_and_has_reached(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    """9 steps: a draw before each, of one of three layers, as the folder's recipe says; a resumed run too."""
    auto = {"period": "auto", "gamma": "auto", "scheme": "fixed"}
    [lines] = pools(1).run(run, recipe(inputs, tmp_path / "run", auto), None)
    assert "9 steps, 9 draws of layers: about 3 of 3 layers will train" in lines
    assert lines[-1] == f"done: {tmp_path / 'run' / 'model'}, 3 of 3 layers trained"
    said = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["sampling"]
    assert (said["period"], said["gamma"]) == (1, 1.0)
    resumed = cut(tmp_path / "run", tmp_path / "cut")
    [lines] = pools(1).run(run, recipe(inputs, resumed, auto, resume="auto"), None)
    assert lines[-1].endswith("3 of 3 layers trained")
    assert contents(resumed)[1]["model/model.safetensors"] == contents(tmp_path / "run")[1]["model/model.safetensors"]


def test_one_draw_reaches_what_it_has_drawn(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    sampling = {"period": 50, "gamma": 1, "scheme": "fixed"}
    [lines] = pools(1).run(run, recipe(inputs, tmp_path / "run", sampling), None)
    assert "9 steps, 1 draw of layers: about 1 of 3 layers will train" in lines
    assert lines[-1].endswith("1 of 3 layers trained")


@pytest.mark.parametrize(("method", "trained"), [("galore", 3), ("hift", 3), ("full", 3), ("badam", 1)])
def test_other_methods_say_what_has_trained(
    pools: Pools, inputs: Path, tmp_path: Path, method: str, trained: int
) -> None:
    made = config.changed(recipe(inputs, tmp_path / "run", {"period": 50}, method=method), {"train.steps": 5})
    [lines] = pools(1).run(run, made, None)
    assert lines[-1].endswith(f"{trained} of 3 layers trained")
    assert not any("draws" in line for line in lines)
