"""A study on a tiny model over several ranks: it resumes where it was stopped, and runs share scores."""

from __future__ import annotations

import io
import json
import math
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from ows_ds import config, files
from ows_ds.bench import study
from ows_ds.bench.quality import quality
from ows_ds.errors import UserError
from ows_ds.train import log
from tests.support.pool import Pools
from tests.support.tiny_run import recipe
from tests.train.test_preference import PAIRS

pytest.importorskip("scipy")
pytest.importorskip("reasoning_gym")


def a_study(inputs: Path, folder: Path, sharding: str = "replicated", **changes: Any) -> study.Study:
    """ows at two learning rates and lisa at one, over two seeds of five steps, with answers to four problems."""
    rows = (
        {
            "messages": [{"role": "user", "content": f"{i}+{i}"}, {"role": "assistant", "content": str(2 * i)}],
            "answer": str(2 * i),
            "task": "chain_sum",
        }
        for i in range(30, 35)
    )
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = config.to_dict(recipe(inputs, folder, steps=5, save_steps=2, sharding=sharding, save_total_limit=2))
    tree["log"]["trackers"] = []
    whole = {
        "recipe": tree,
        "test": str(folder / "test.jsonl"),
        "variants": {"ows": {"lrs": [1e-3, 1e-2]}, "lisa": {"method.name": "lisa"}},
        "seeds": [0, 1],
        "baseline": "lisa",
        "accuracy": {"rows": 4, "max_new_tokens": 4, "batch_size": 3},
    }
    return study.from_dict(whole | changes)


def run(
    rank: int,
    world_size: int,
    plan: study.Study | dict[str, study.Study],
    output: Path,
    stop: tuple[str, int] | None = None,
    kept: Path | None = None,
) -> Any:
    """The result that is printed, or the refusal; None where all ranks died after a step of a run, as a machine would.

    plan: one, or several by task. stop: (a part of the run's folder, step). kept: a kept.json.
    """
    step, begin = log.RunLog.step, log.RunLog.__init__

    def opening(self: log.RunLog, run_dir: Path, *more: Any, **named: Any) -> None:
        begin(self, run_dir, *more, **named)
        self.folder = str(run_dir)  # type: ignore[attr-defined]

    def stopping(self: log.RunLog, record: dict[str, Any]) -> None:
        step(self, record)
        if stop is not None and stop[0] in self.folder and record["step"] == stop[1]:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    log.RunLog.__init__, log.RunLog.step = opening, stopping  # type: ignore[method-assign,assignment]
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            plans = plan if isinstance(plan, dict) else {"": plan}
            quality(plans, output, None, None, kept, True, "test")
        return json.loads(printed.getvalue()) if rank == 0 else printed.getvalue()
    except KeyboardInterrupt:
        return None
    except UserError as error:
        return str(error)
    finally:
        log.RunLog.__init__, log.RunLog.step = begin, step  # type: ignore[method-assign]


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what may differ between two runs of the same."""
    for variant in summary["variants"].values():
        variant.pop("seconds")
    del summary["hours"]
    return summary


@pytest.fixture(scope="module")
def straight(pools: Pools, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The output of a study that ran on 2 ranks without a stop, and its result."""
    folder = tmp_path_factory.mktemp("straight")
    [result, silence] = pools(2).run(run, a_study(inputs, folder), folder / "out")
    assert silence == ""
    return folder / "out", without_times(result)


def test_a_stopped_study_resumes_and_ends_the_same(
    pools: Pools, inputs: Path, straight: tuple[Path, dict[str, Any]]
) -> None:
    whole, expected = straight
    plan, parts = a_study(inputs, whole.parent), whole.parent / "parts"
    assert pools(2).run(run, plan, parts, ("ows/lr-0.01-seed-0", 3)) == [None, None]
    complete = parts / "runs/ows/lr-0.001-seed-0"
    assert [file.parent for file in parts.rglob("result.json")] == [complete]
    assert json.loads((parts / "quality.json").read_text())["runs_complete"] == 1
    before = {file: file.stat().st_mtime_ns for file in complete.iterdir()}
    [result, _] = pools(2).run(run, plan, parts)
    assert without_times(result) == expected
    assert {file: file.stat().st_mtime_ns for file in complete.iterdir()} == before

    assert (result["runs"], result["runs_complete"], result["processes"]) == (5, 5, 2)
    ows, lisa = result["variants"]["ows"], result["variants"]["lisa"]
    assert (ows["lr"], lisa["lr"], ows["seeds"], lisa["seeds"]) == (0.01, 0.01, [0, 1], [0, 1])
    assert ows["tokens"] == lisa["tokens"]  # the same data at the same seed
    assert ows["tokens"][0] != ows["tokens"][1]
    assert max(ows["loss"]["values"]) < result["before"]["loss"]
    assert (result["rows_answered"], ows["accuracy"]["values"]) == (4, [0.0, 0.0])
    assert ows["loss"]["t"] is not None
    for name in ("study.yaml", "base.json", "quality.json", "quality.md", "loss.png", "scores.png"):
        assert (parts / name).exists()
    # models and checkpoints are deleted; scores were computed in one run, and the others refer to them
    assert not [*parts.glob("runs/*/*/model"), *parts.glob("runs/*/*/checkpoints")]
    recipes = parts.glob("runs/ows/*/config.yaml")
    scored = {file.parent.name: files.read_yaml(file)["sampling"]["scores"] for file in recipes}
    assert scored.pop("lr-0.001-seed-0") is None
    assert set(scored.values()) == {str(complete / "scores.json")}


def test_what_is_kept_of_a_study_proves_it_elsewhere(
    pools: Pools, inputs: Path, tmp_path: Path, straight: tuple[Path, dict[str, Any]]
) -> None:
    """Nothing is trained again; another study's numbers are refused; two tasks have one file."""
    whole, expected = straight
    plan = a_study(inputs, whole.parent)
    [result] = pools(1).run(run, plan, tmp_path / "again", None, whole / "kept.json")
    assert without_times(result) == {**expected, "processes": 1}
    assert (tmp_path / "again" / "kept.json").read_text() == (whole / "kept.json").read_text()
    assert (tmp_path / "again" / "front.png").exists()
    assert not [*(tmp_path / "again").rglob("metrics.jsonl")]

    other = a_study(inputs, whole.parent, accuracy=None)
    [answer] = pools(1).run(run, other, tmp_path / "other", None, whole / "kept.json")
    assert "--resume: 'another study' is invalid: expected the kept.json of this one: it differs in accuracy" in answer
    [answer] = pools(1).run(run, plan, tmp_path / "other", None, inputs / "train.jsonl")
    assert answer.startswith("--resume: ")
    assert not (tmp_path / "other").exists()

    kept = json.loads((whole / "kept.json").read_text())["tasks"][""]
    (tmp_path / "two.json").write_text(json.dumps({"format": 1, "tasks": {"a": kept, "b": kept}}))
    [result] = pools(1).run(run, {"a": plan, "b": plan}, tmp_path / "two", None, tmp_path / "two.json")
    assert [without_times(one) for one in result.values()] == [{**expected, "processes": 1}] * 2
    assert json.loads((tmp_path / "two/kept.json").read_text()) == json.loads((tmp_path / "two.json").read_text())
    assert "| lisa | " in (tmp_path / "two/tasks.md").read_text()


@pytest.mark.ci
def test_results_do_not_depend_on_ranks_and_sharding(
    pools: Pools, inputs: Path, tmp_path: Path, straight: tuple[Path, dict[str, Any]]
) -> None:
    variants = {"lisa": {"method.name": "lisa"}}
    _, expected = straight
    for world_size, sharding in ((1, "replicated"), (2, "zero3")):
        plan = a_study(inputs, tmp_path, sharding, variants=variants, seeds=[0])
        result = pools(world_size).run(run, plan, tmp_path / sharding)[0]
        before = expected["before"]
        assert result["before"] == {**before, "loss": pytest.approx(before["loss"], rel=1e-6)}
        [loss] = result["variants"]["lisa"]["loss"]["values"]
        # bfloat16, sums in another order
        assert loss == pytest.approx(expected["variants"]["lisa"]["loss"]["values"][0], rel=0.02)


def test_a_study_is_extended_but_never_another_one(
    pools: Pools, inputs: Path, straight: tuple[Path, dict[str, Any]]
) -> None:
    output, folder = straight[0], straight[0].parent
    same: dict[str, Any] = {"variants": {"ows": {"lrs": [1e-3, 1e-2]}, "lisa": {"method.name": "lisa"}}}
    before = (output / "study.yaml").read_text()
    for changes, what in (
        ({"accuracy": None}, "accuracy"),
        ({"seeds": [1]}, "the first of seeds"),
        ({"variants": {**same["variants"], "lisa": {"method.name": "galore"}}}, "variants.lisa"),
    ):
        [answer] = pools(1).run(run, a_study(inputs, folder, **(same | changes)), output)
        assert answer.startswith("output: ")
        assert answer.endswith(f"is invalid: expected another folder: it holds a study that differs in {what}")
    assert (output / "study.yaml").read_text() == before
    more = a_study(inputs, folder, variants={**same["variants"], "b": {"method.name": "badam"}}, keep_models=True)
    [result] = pools(1).run(run, more, output)
    assert [variant["seeds"] for variant in result["variants"].values()] == [[0, 1]] * 3
    kept = sorted(str(file.parent.relative_to(output / "runs")) for file in output.glob("runs/*/*/model"))
    assert kept == ["b/lr-0.01-seed-0", "b/lr-0.01-seed-1"]


@pytest.mark.parametrize(
    ("rows", "right"),
    [("train", "expected rows that are not in data.train"), ("plain", "expected rows with answer and task")],
)
def test_rows_are_checked_before_anything_is_written(
    pools: Pools, inputs: Path, tmp_path: Path, rows: str, right: str
) -> None:
    shutil.copy(inputs / "train.jsonl", tmp_path / "train.jsonl")
    a_row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    (tmp_path / "plain.jsonl").write_text(json.dumps(a_row) + "\n")
    plan = a_study(inputs, tmp_path, test=str(tmp_path / f"{rows}.jsonl"))
    for answer in pools(2).run(run, plan, tmp_path / "out"):
        assert right in answer
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_losses_that_compare_answers(pools: Pools, inputs: Path, tmp_path: Path, name: str) -> None:
    """The loss on test is that of an evaluation of the same rows; resumed, it is compared with the same reference."""
    rows = {"eval": PAIRS, "test": [{**row, "again": True} for row in PAIRS]}
    rows["train"] = [{**row, "prompt": f"{i} {row['prompt']}"} for i, row in enumerate(PAIRS * 2)]
    for key, some in rows.items():
        (tmp_path / f"{key}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    tree = config.to_dict(recipe(inputs, tmp_path, steps=2, save_steps=None, micro_batch_size=2, global_batch_size=4))
    files_of = {key: str(tmp_path / f"{key}.jsonl") for key in ("train", "eval")}
    tree["data"] |= {**files_of, "format": "auto", "cache": str(tmp_path / "cache")}
    tree |= {"loss": {"name": name}, "log": {"trackers": []}}
    tree["model"]["dtype"] = "float32"
    tree["optim"]["lr"] = 1e-2
    given = {"recipe": tree, "test": str(tmp_path / "test.jsonl"), "variants": {"ows": {}}, "seeds": [0]}
    for seeds in ([0], [0, 1]):
        plan = study.from_dict({**given, "seeds": seeds, "baseline": None})
        result = pools(2).run(run, plan, tmp_path / "out")[0]
        shutil.rmtree(tmp_path / "cache")
    if name == "dpo":
        assert result["before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for seed, loss in enumerate(result["variants"]["ows"]["loss"]["values"]):
        [folder] = (tmp_path / "out" / "runs").glob(f"ows/*-seed-{seed}")
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert loss == pytest.approx(last["eval_loss"], rel=1e-5)
        assert loss != pytest.approx(result["before"]["loss"], rel=1e-3)
    with pytest.raises(UserError, match=f"^accuracy: .* leave it out under loss.name {name}"):
        study.from_dict({**given, "accuracy": {}})


def test_a_mistake_that_only_the_model_shows_names_the_variant(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    plan = a_study(inputs, tmp_path, variants={"big": {"optim.rank": 4000}, "lisa": {"method.name": "lisa"}})
    for answer in pools(2).run(run, plan, tmp_path / "out"):
        assert answer.startswith("variants.big: optim.rank: 4000 is invalid: expected at most ")
    assert not (tmp_path / "out" / "runs").exists()
