"""Metrics over processes, replicated and sharded, against one process; the verb `score`; runs that sample by them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ows_ds import config, score
from ows_ds.cli.main import main
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated
from ows_ds.errors import UserError
from ows_ds.importance.metrics import measure
from ows_ds.importance.scores import Scores
from ows_ds.model.layers import find_layers
from ows_ds.train.export import export
from tests.importance.test_scores import LENGTHS, padded, sequences
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.tiny_run import recipe
from tests.support.training import home
from tests.train.test_trainer import contents, refused, run

METRICS = ["outlier", "rm", "bi", "alpha"]
BATCHES = [[0, 3], [1], [4, 2]]  # dealt in turn: in a world of 2, rank 1 has none in the second round


def batches(rank: int, world_size: int) -> list[dict[str, Tensor] | None]:
    rows = sequences()
    mine = [padded([rows[i] for i in indices]) for indices in BATCHES[rank::world_size]]
    return [*mine, *[None] * (-(-len(BATCHES) // world_size) - len(mine))]


def measured(rank: int, world_size: int, sharding: str) -> tuple[dict[str, Scores], dict[str, int]]:
    weights = home(tiny("llama", True, torch.float64), sharding, world_size)
    weights.comm.sent.clear()
    layers = find_layers(weights.module, weights.shape)
    found = measure(weights, layers, METRICS, lambda: batches(rank, world_size), tau=3.0)
    sent = dict(weights.comm.sent)
    model = getattr(weights, "engine", weights)  # a DeepSpeed engine, where there is one
    assert score(model, batches(rank, world_size), "bi") == found["bi"]
    return found, sent


@pytest.mark.parametrize(("world_size", "sharding"), [(1, "zero3"), (2, "replicated"), (2, "zero3"), (3, "zero3")])
def test_metrics_are_those_of_one_process(pools: Pools, world_size: int, sharding: str) -> None:
    model = tiny("llama", True, torch.float64)
    alone = measure(Replicated(model, Communicator()), find_layers(model), METRICS, lambda: batches(0, 1), tau=3.0)
    ranks = pools(world_size).run(measured, sharding)
    for found, sent in ranks:
        assert found == ranks[0][0]
        for metric in METRICS:
            assert found[metric].layers == pytest.approx(alone[metric].layers, rel=1e-9)
            assert (found[metric].model, found[metric].tokens) == (alone[metric].model, alone[metric].tokens)
        assert found["alpha"] == alone["alpha"]  # its bits, whatever the number of processes
        assert found["rm"].tokens == sum(LENGTHS)
        features = 3 * (6 * 32 + 48)  # outlier; rm, bi and tokens; alpha of seven matrices a layer
        sizes = [2 * features * 8, (3 + 1) * 8, (2 * 3 + 1) * 8, 3 * 7 * 8]
        expected = sum(2 * -(-size // world_size) * (world_size - 1) for size in sizes)
        assert sent.get("score", 0) == expected
        assert ("export" in sent) == (sharding == "zero3" and world_size > 1)  # alpha's gathers


def broken(rank: int, world_size: int, sharding: str, value: float) -> str:
    model = tiny("llama", True)
    for matrix in find_layers(model).layers[1].matrices:
        model.get_parameter(matrix.name).data.fill_(value)
    weights = home(model, sharding, world_size)
    try:
        measure(weights, find_layers(weights.module, weights.shape), ["alpha"], list, tau=3.0)
    except (UserError, RuntimeError) as error:
        return str(error)
    return "measured"


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
def test_all_processes_fail_together(pools: Pools, sharding: str) -> None:
    for says, value in (("no weight of model.layers.1 has", 0.0), ("q_proj.weight is not finite", float("nan"))):
        answers = pools(2).run(broken, sharding, value)
        assert says in answers[0]
        assert answers[0] == answers[1]


# ---- the verb


def verb(rank: int, world_size: int, file: Path, argv: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["score", "--config", str(file), *argv])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def file(inputs: Path, tmp_path: Path) -> Path:
    """A recipe that samples by bi."""
    path = tmp_path / "recipe.yaml"
    path.write_text(config.to_yaml(recipe(inputs, tmp_path / "run", {"importance": "bi"})))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_score_measures_what_the_recipe_needs(pools: Pools, file: Path, tmp_path: Path) -> None:
    for rank, (status, out, err) in enumerate(pools(2).run(verb, file, [])):
        assert (status, err) == (0, "")
        assert out.count("│") == (4 if rank == 0 else 0)
    assert names(tmp_path / "run") == ["scores.json", "scores.png"]
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert set(scores) == {"metric", "tau", "model", "layers", "tokens", "format"}
    assert (scores["metric"], scores["tau"], len(scores["layers"])) == ("bi", 0.0, 3)


def test_score_with_several_metrics(pools: Pools, file: Path, tmp_path: Path) -> None:
    kinds = "outlier, rm,bi,alpha,uniform,decreasing,reverse"
    [(status, out, err)] = pools(1).run(verb, file, ["--metric", kinds, "--output", str(tmp_path / "o" / "s.json")])
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    assert [line.split(":")[0].strip() for line in lines if "(layer" in line] == [
        "outlier ratio (tau 2)",
        "relative magnitude (rm)",
        "block influence (bi)",
        "alpha (sampled by 1/alpha)",
        "uniform importance",
        "decreasing importance",
        "reverse (tau 2)",
    ]
    assert names(tmp_path / "o") == ["s-alpha.json", "s-bi.json", "s-outlier.json", "s-rm.json", "s.json", "s.png"]
    found = {name: Scores.read(tmp_path / "o" / name) for name in names(tmp_path / "o") if name.endswith(".json")}
    assert {name: scores.metric for name, scores in found.items()} == {
        "s-alpha.json": "alpha",
        "s-bi.json": "bi",
        "s-outlier.json": "outlier",
        "s-rm.json": "rm",
        "s.json": "bi",  # what the recipe needs
    }
    assert found["s.json"] == found["s-bi.json"]
    tokens = found["s.json"].tokens
    assert lines[-6:] == [
        f"{tmp_path}/o/s.json: bi, {tokens} tokens",
        f"{tmp_path}/o/s-outlier.json: outlier, {tokens} tokens, tau 2",
        f"{tmp_path}/o/s-rm.json: rm, {tokens} tokens",
        f"{tmp_path}/o/s-bi.json: bi, {tokens} tokens",
        f"{tmp_path}/o/s-alpha.json: alpha",
        f"{tmp_path}/o/s.png: {kinds.replace(' ', '').replace(',', ', ')}",
    ]


def test_score_where_the_recipes_metric_is_not_asked_for(pools: Pools, file: Path, tmp_path: Path) -> None:
    [(status, _, _)] = pools(1).run(verb, file, ["--metric", "reverse,outlier"])  # one metric serves both
    assert (status, names(tmp_path / "run")) == (0, ["scores.json", "scores.png"])
    assert Scores.read(tmp_path / "run" / "scores.json").metric == "outlier"
    [(status, _, _)] = pools(1).run(verb, file, ["--metric", "uniform", "--output", str(tmp_path / "o" / "s.json")])
    assert (status, names(tmp_path / "o")) == (0, ["s.png"])  # nothing is measured


# ---- runs


@pytest.mark.parametrize(
    ("kind", "world_size", "sharding"),
    [
        ("alpha", 2, "zero3"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("rm", 2, "zero3"), ("bi", 3, "replicated")]),
    ],
)
def test_a_run_samples_by_them_and_resumes(
    pools: Pools, inputs: Path, tmp_path: Path, kind: str, world_size: int, sharding: str
) -> None:
    def of(name: str, **more: Any) -> config.Recipe:
        return recipe(inputs, tmp_path / name, {"importance": kind}, steps=5, sharding=sharding, **more)

    pools(world_size).run(run, of("whole"), None)
    pools(world_size).run(run, of("parts"), 4)
    pools(world_size).run(run, of("parts", resume="auto"), None)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert Scores.read(tmp_path / "whole" / "scores.json").metric == kind
    assert (tmp_path / "whole" / "scores.png").exists()
    export(tmp_path / "parts", tmp_path / "exported", None)
    assert (tmp_path / "exported" / "model.safetensors").exists()


def test_scores_of_another_metric_are_refused(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    pools(1).run(run, recipe(inputs, tmp_path / "a", {"importance": "rm"}, steps=2), None)
    given = {"importance": "alpha", "scores": str(tmp_path / "a" / "scores.json")}
    [answer] = pools(1).run(refused, recipe(inputs, tmp_path / "b", given))
    assert answer.startswith(
        "sampling.scores: 'scores of metric rm' is invalid: sampling.importance is alpha, which needs scores of "
        "metric alpha; compute the scores again with `ows-ds score`"
    )
    assert not (tmp_path / "b").exists()
