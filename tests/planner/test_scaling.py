"""benchmarks/scaling.py: the replay in time, by hand at its ends; what is written says that it is simulated."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from ows_ds.model.shapes import read_model
from ows_ds.planner.cluster import Cluster, read_cluster
from ows_ds.planner.forecast import Planner, Replays
from tests.planner.test_forecast import recipe
from tests.support.families import tiny

NODE = read_cluster("4xH100")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("m")
    made: Any = tiny("llama", False)
    made.config.save_pretrained(folder)
    return read_model(str(folder))


def one(model: Any, method: str, home: str, cluster: Cluster, world_size: int = 16) -> Any:
    asked = recipe(data={"max_length": 16}, optim={"rank": 4}, sampling={"gamma": 1}, train={"global_batch_size": 4})
    planner = Planner(asked, model, replays=Replays(lambda: model.config)).under(method)
    return planner.scaled(cluster, world_size, home)


@pytest.mark.parametrize("system", scaling.SYSTEMS)
def test_between_the_bounds(model: Any, system: str) -> None:
    """No faster than arithmetic, no slower than one thing after the other; waiting grows as the network gets slower."""
    found = one(model, *scaling.SYSTEMS[system], NODE)
    seconds, waiting = scaling.step_seconds(found)
    assert sum(found.times.work.values()) <= seconds <= found.times.serial * (1 + 1e-9)
    assert waiting == pytest.approx(seconds - sum(found.times.work.values()))
    slow = one(model, *scaling.SYSTEMS[system], NODE.model_copy(update={"network": 0.001, "network_latency": 1e4}))
    assert scaling.step_seconds(slow)[1] > 100 * waiting


def test_links_without_time(model: Any) -> None:
    """Over links that cost nothing but the start of a message, hidden as it can be, only arithmetic is left."""
    free = NODE.model_copy(
        update={"nvlink": 1e9, "network": 1e9, "nvlink_latency": 0, "network_latency": 0, "tflops": 1e-6}
    )
    found = one(model, "ows", "zero3", free)
    seconds, waiting = scaling.step_seconds(found)
    assert waiting < 1e-3 * seconds


def test_what_is_written(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "read_model", functools.partial(lambda known, path: known, model))
    monkeypatch.setattr(scaling.config, "from_dict", lambda tree, f=scaling.config.from_dict: f(
        {**tree, "optim": {"rank": 4}, "sampling": {"gamma": 1}}))  # fmt: skip
    words = ["--model", "tiny", "--cluster", "4xH100", "--largest", "16", "--length", "16"]
    scaling.main([*words, "--output", str(tmp_path / "out" / "s.md")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"s.md", "s.json", "s.png"}
    text = (tmp_path / "out" / "s.md").read_text()
    assert "simulated" in text.splitlines()[0]
    assert "SIMULATED: no GPU and no network was used" in text
    numbers = json.loads((tmp_path / "out" / "s.json").read_text())
    assert numbers["simulated"] is True
    assert set(numbers["found"]) == set(scaling.NETWORKS)
    by_world = numbers["found"]["Ethernet 100 Gb/s a node"]["OWS, replicated"]
    assert set(by_world) == {"4", "8", "16"}
    # inside a node the network does not matter
    assert len({json.dumps(systems["OWS, ZeRO-3"]["4"]) for systems in numbers["found"].values()}) == 1
