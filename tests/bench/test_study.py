"""Studies: what is refused, which runs there are, which learning rate is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ows_ds.bench import study
from ows_ds.bench.study import Accuracy, Run, Study
from ows_ds.errors import UserError


def tree(**changes: Any) -> dict[str, Any]:
    """A study of two variants; None removes a key."""
    whole = {
        "recipe": {"model": {"path": "m"}, "data": {"train": "t.jsonl", "eval": "e.jsonl"}, "optim": {"lr": "3e-4"}},
        "test": "test.jsonl",
        "variants": {"ows": None, "lisa": {"method.name": "lisa", "sampling": {"gamma": 2}}},
        **changes,
    }
    return {key: value for key, value in whole.items() if value is not None}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of `tree`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("t", "e", "test"):
        Path(f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    return tmp_path


def test_everything_is_filled_in() -> None:
    plan = study.from_dict(tree(accuracy={"rows": 3}, seeds=[7, 1], lrs=["1e-3", 1e-4], baseline="ows"))
    assert plan.variants["ows"] == study.Variant({}, (1e-4, 1e-3))
    assert plan.variants["lisa"] == study.Variant({"method.name": "lisa", "sampling.gamma": 2}, (1e-4, 1e-3))
    assert (plan.seeds, plan.baseline, plan.accuracy) == ((7, 1), "ows", Accuracy(rows=3))
    plan = study.from_dict(tree(variants={"a": {"optim.lr": 0.5}, "b": {"lrs": [2, 1]}, "c": {}}))
    assert [variant.lrs for variant in plan.variants.values()] == [(0.5,), (1.0, 2.0), (3e-4,)]
    assert (plan.seeds, plan.baseline, plan.accuracy, plan.keep_models) == ((0,), None, None, False)


def test_a_recipe_may_be_a_file(files: Path) -> None:
    Path("r.yaml").write_text("model: {path: m}\ndata: {train: t.jsonl}\n")
    assert study.from_dict(tree(recipe="r.yaml")).recipe["data"]["train"] == "t.jsonl"


def test_tasks_are_studies_of_their_own(files: Path) -> None:
    tasks = {name: {key: f"{name}-{key}.jsonl" for key in ("train", "eval", "test")} for name in ("sums", "words")}
    Path("s.yaml").write_text(json.dumps(tree(test=None, tasks=tasks)))
    found = study.read("s.yaml")
    assert list(found) == ["sums", "words"]
    alone = {**tree()["recipe"], "data": {"train": "words-train.jsonl", "eval": "words-eval.jsonl"}}
    assert found["words"] == study.from_dict(tree(test="words-test.jsonl", recipe=alone))
    for changes, expected in (
        ({"test": "t"}, "test: 't' is invalid: leave it out"),
        ({"tasks": {"a/b": tasks["sums"]}, "test": None}, "tasks.a/b: 'a/b' is invalid: expected a name of letters"),
        ({"tasks": {"a": {"train": "t"}}, "test": None}, "tasks.a.eval: None is invalid: it is required"),
    ):
        Path("s.yaml").write_text(json.dumps(tree(**{"tasks": tasks, **changes})))
        with pytest.raises(UserError) as caught:
            study.read("s.yaml")
        assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"variant": {}}, "variant: {} is invalid: there is no such key; is variants meant?"),
        ({"test": None}, "test: None is invalid: it is required: expected text"),
        ({"seeds": []}, "seeds: [] is invalid: expected a list of different"),
        ({"seeds": [0, 0]}, "seeds: [0, 0] is invalid"),
        ({"seeds": ["a"]}, "seeds: ['a'] is invalid: expected a list of different integers"),
        ({"lrs": [1e-3, "x"]}, "lrs: [0.001, 'x'] is invalid: expected a list of different numbers"),
        ({"lrs": 1e-3}, "lrs: 0.001 is invalid: expected a list of different numbers"),
        ({"lrs": [-1.0]}, "lrs: [-1.0] is invalid"),
        ({"baseline": "lora"}, "baseline: 'lora' is invalid: expected one of ows, lisa"),
        ({"variants": {}}, "variants: {} is invalid"),
        ({"variants": {"a/b": {}}}, "variants.a/b: 'a/b' is invalid: expected a name of letters"),
        ({"variants": {"a": {"optim.lrr": 1}}}, "variants.a.optim.lrr: 1 is invalid: there is no such key; is"),
        ({"variants": {"a": {"train": {"steps": 5}}}}, "variants.a.train.steps: 5 is invalid: leave it out"),
        ({"variants": {"a": {"data.train": "x"}}}, "variants.a.data.train: 'x' is invalid: leave it out"),
        ({"variants": {"a": {"train.seed": 5}}}, "variants.a.train.seed: 5 is invalid: leave it out"),
        ({"variants": {"a": {"lrs": [1], "optim.lr": 1}}}, "variants.a.lrs: [1] is invalid: expected lrs or optim.lr"),
        ({"accuracy": {"rows": 0}}, "accuracy.rows: 0 is invalid: expected an integer of at least 1"),
        ({"accuracy": {"row": 1}}, "accuracy.row: 1 is invalid: there is no such key; is accuracy.rows meant?"),
        ({"accuracy": True}, "accuracy: True is invalid: expected a section"),
        ({"recipe": 5}, "recipe: 5 is invalid"),
        ({"recipe": {"model": {"path": "m", "pth": "m"}}}, "model.pth: 'm' is invalid: there is no such key"),
        ({"recipe": {"model": {"path": "m"}, "sampling": {"seed": 1}}}, "recipe: sampling.seed: 1 is invalid"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        study.from_dict(tree(**changes))
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"test": "none.jsonl"}, "test: 'none.jsonl' is invalid: expected a file that exists"),
        ({"variants": {"a": {"method.name": "lsa"}}}, "variants.a: method.name: 'lsa' is invalid: expected one of"),
        ({"variants": {"a": {"sampling.gamma": 0}}}, "variants.a: sampling.gamma: 0 is invalid: expected a number"),
        ({"lrs": [1, 2], "recipe": {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}}, "recipe: data.eval: None"),
    ],
)
def test_every_run_is_checked_before_the_first(files: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        study.check(study.from_dict(tree(**changes)), files / "out")
    assert str(caught.value).startswith(expected)
    assert not (files / "out").exists()


def test_the_recipe_of_a_run(files: Path) -> None:
    plan = study.from_dict(tree())
    study.check(plan, files / "out")
    recipe = study.recipe_of(plan, Run("lisa", 1e-4, 5), files / "out")
    assert (recipe.method.name, recipe.sampling.gamma, recipe.optim.lr, recipe.train.seed) == ("lisa", 2.0, 1e-4, 5)
    assert recipe.train.output_dir == str(files / "out" / "runs" / "lisa" / "lr-0.0001-seed-5")
    assert (recipe.train.resume, recipe.train.save_total_limit, recipe.data.eval) == ("auto", 1, "e.jsonl")


def plan_of(lrs: dict[str, list[float]], seeds: list[int]) -> Study:
    return study.from_dict(tree(variants={name: {"lrs": rates} for name, rates in lrs.items()}, seeds=seeds))


def test_grids_come_first_and_then_seed_by_seed() -> None:
    plan = plan_of({"a": [1, 2], "b": [3]}, [5, 6, 7])
    found = {Run("a", 1, 5): 0.9, Run("a", 2, 5): 0.7, Run("b", 3, 5): 0.1}
    losses: dict[Run, float | None] = {}
    order = []
    while (run := study.next_run(plan, losses)) is not None:
        order.append((run.variant, run.lr, run.seed))
        losses[run] = found.get(run, 0.5)
    assert order == [("a", 1, 5), ("a", 2, 5), ("b", 3, 5), ("a", 2, 6), ("b", 3, 6), ("a", 2, 7), ("b", 3, 7)]
    assert len(order) == study.size(plan)
    assert len(study.all_runs(plan)) == 9


def test_a_part_of_the_study() -> None:
    plan = plan_of({"a": [1, 2], "b": [3]}, [5, 6])
    grid: dict[Run, float | None] = {Run("a", 1, 5): 1.0, Run("a", 2, 5): 2.0}
    assert study.next_run(plan, {}, ["b"]) == Run("b", 3, 5)
    assert study.next_run(plan, grid, ["a"]) == Run("a", 1, 6)
    assert study.next_run(plan, grid, ["a"], [5]) is None
    assert study.next_run(plan, {}, ["a"], [6]) == Run("a", 1, 5)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.5, 0.4, 0.6], 2),
        ([0.4, 0.4, 0.6], 1),
        ([None, 0.9, None], 2),
        ([None, None, None], 1),
        ([0.0, 0.1, 0.2], 1),
        ([0.5, 0.4], None),
    ],
)
def test_the_least_held_out_loss_chooses(losses: list[float | None], expected: float | None) -> None:
    plan = plan_of({"a": [1, 2, 3]}, [0, 1])
    found = {Run("a", lr, 0): loss for lr, loss in zip([1, 2, 3], losses, strict=False)}
    # another seed has no say
    assert study.choose(plan, "a", {**found, Run("a", 3, 1): -9.0}) == expected


def test_what_may_change_in_a_study_that_resumes() -> None:
    old = {**study.from_dict(tree(seeds=[0, 1])).tree(), "rows": {"test": "1"}}
    more = tree(seeds=[0, 1, 2], variants={**tree()["variants"], "new": {}}, baseline="new", lrs=[3e-4, 1e-3])
    assert study.conflict(old, {**study.from_dict(more).tree(), "rows": {"test": "1"}}, ["ows", "lisa"]) is None
    for changes, expected in (
        ({"seeds": [1, 0]}, "the first of seeds"),
        ({"accuracy": {}}, "accuracy"),
        ({"lrs": [1]}, "variants.ows"),
        ({"test": "other"}, "test"),
    ):
        new = {**study.from_dict(tree(**changes)).tree(), "rows": {"test": "1"}}
        assert study.conflict(old, new, ["ows"]) == expected
    assert study.conflict(old, {**old, "rows": {"test": "2"}}, []) == "the rows of test"
    assert study.conflict(old, study.from_dict(tree(lrs=[1])).tree() | {"rows": old["rows"]}, []) is None


@pytest.mark.parametrize("file", sorted(Path("launch/bench").resolve().glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_that_are_shipped(file: Path) -> None:
    for plan in study.read(file).values():
        for run in study.all_runs(plan):
            study.recipe_of(plan, run, Path("out"))
        assert plan.baseline in plan.variants
        assert plan.accuracy is not None


def test_methods_that_share_a_learning_rate_which_none_has_searched() -> None:
    """By default each has its own; a grid is a search; variants of one method may share."""
    shared = {"ows": {}, "lora": {"method.name": "lora"}, "reverse": {"sampling.importance": "reverse"}}
    base = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    plan = {"recipe": base, "test": "t.jsonl", "variants": shared}
    assert study.unsearched(study.from_dict(plan)) == []
    assert {v.lrs for v in study.from_dict(plan).variants.values()} == {(3e-4,), (2e-4,)}
    given = {**plan, "recipe": {**base, "optim": {"lr": 1e-3}}}
    assert study.unsearched(study.from_dict(given)) == [(1e-3, ["ows", "lora", "reverse"])]
    assert study.unsearched(study.from_dict({**given, "lrs": [1e-4, 1e-3]})) == []
