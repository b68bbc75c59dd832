"""`ows-ds eval` over lm-evaluation-harness: the scores that it gives itself, on one rank and on several."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ows_ds.cli.main import main
from ows_ds.runs import results
from ows_ds.runs.results import Score
from ows_ds.train.trainer import train
from tests.runs.test_report import Page
from tests.support.offline_tasks import write_tasks
from tests.support.pool import Pools
from tests.support.tiny_run import recipe
from tests.test_bad_input import within

pytest.importorskip("lm_eval")
pytest.importorskip("reasoning_gym")
ALL = "ows_test_sums,ows_test_answers"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def directly(model: Path, tasks: Path, names: str, **more: Any) -> dict[str, Any]:
    """What lm-evaluation-harness says of a model without us."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    arguments = {"pretrained": str(model), "device": "cpu", "dtype": "auto"}
    found = simple_evaluate(model="hf", model_args=arguments, tasks=names.split(","), task_manager=manager, **more)
    assert found is not None
    return dict(found)


def evaluate(model: Path, tasks: Path, names: str, output: Path, *more: str) -> results.Result:
    words = ["eval", str(model), "--tasks", names, "--include-path", str(tasks), "--output", str(output), *more]
    assert main(words) == 0
    return results.read(output)


def assert_the_same(ours: results.Result, theirs: dict[str, Any], names: str) -> None:
    """To the last digit, and nothing is left out."""
    count = 0
    for task in names.split(","):
        for key, value in theirs["results"][task].items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            label = metric if kind == "none" else f"{metric} ({kind})"
            [score] = [one for one in ours.scores if one.key == (task, label)]
            error = theirs["results"][task][f"{metric}_stderr,{kind}"]
            expected = float(error) if isinstance(error, float) and math.isfinite(error) else None
            assert (score.value, score.stderr) == (float(value), expected), (task, key)
            assert score.shots == theirs["n-shot"][task]
            assert score.samples == theirs["n-samples"][task]["effective"]
            assert score.version == str(theirs["versions"][task])
            count += 1
    assert count == len(ours.scores)


@pytest.fixture(scope="module")
def alone(inputs: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> results.Result:
    """All tasks on one rank."""
    return evaluate(inputs / "model", tasks, ALL, tmp_path_factory.mktemp("alone") / "r.json")


@pytest.mark.parametrize(
    ("options", "more"),
    [((), {}), (("--num_fewshot", "2", "--limit", "5", "--batch_size", "3"),
                {"num_fewshot": 2, "limit": 5, "batch_size": 3})],
)  # fmt: skip
def test_agrees_with_the_harness_itself(
    options: tuple[str, ...], more: dict[str, Any], alone: results.Result, inputs: Path, tasks: Path, tmp_path: Path
) -> None:
    ours = evaluate(inputs / "model", tasks, ALL, tmp_path / "r.json", *options) if options else alone
    assert_the_same(ours, directly(inputs / "model", tasks, ALL, **more), ALL)
    assert [score.task for score in ours.scores] == [*["ows_test_sums"] * 2, "ows_test_answers"]
    assert {score.samples for score in ours.scores} == {more.get("limit", 12)}
    assert {score.shots for score in ours.scores} == {more.get("num_fewshot", 0)}
    assert ours.settings["limit"] == more.get("limit")
    assert ours.versions["lm_eval"]
    assert ours.model["dtype"] == "bfloat16"
    assert len(ours.model["fingerprint"]) == 64


@pytest.mark.slow
def test_agrees_with_the_harness_itself_on_a_real_model(smollm2: Path, tasks: Path, tmp_path: Path) -> None:
    names = f"{ALL},ows_test_words"
    ours = evaluate(smollm2, tasks, names, tmp_path / "r.json", "--num-fewshot", "3", "--batch-size", "4")
    assert_the_same(ours, directly(smollm2, tasks, names, num_fewshot=3, batch_size=4), names)
    ours = evaluate(smollm2, tasks, ALL, tmp_path / "c.json", "--num-fewshot", "3", "--apply-chat-template")
    assert_the_same(ours, directly(smollm2, tasks, ALL, num_fewshot=3, apply_chat_template=True), ALL)
    values = [score.value for score in ours.scores]
    assert max(value for value in values if value is not None) > 0  # it can add


def evaluating(rank: int, world_size: int, words: list[str], folder: Path) -> int:
    with within(folder):
        return main(words)


def test_ranks_share_the_questions(
    pools: Pools, alone: results.Result, inputs: Path, tasks: Path, tmp_path: Path
) -> None:
    """The same answers: of a batch of one, no number depends on what else is asked."""
    words = ["eval", str(inputs / "model"), "--tasks", ALL, "--include-path", str(tasks), "--output", "both.json"]
    assert pools(2).run(evaluating, words, tmp_path) == [0, 0]
    both = results.read(tmp_path / "both.json")
    assert (both.settings["processes"], alone.settings["processes"]) == (2, 1)
    assert [score.key for score in both.scores] == [score.key for score in alone.scores]
    for one, other in zip(both.scores, alone.scores, strict=True):
        assert one.samples == other.samples
        assert one.value == pytest.approx(other.value, rel=1e-9)  # summed up in another order
    assert both.model["fingerprint"] == alone.model["fingerprint"]
    assert not list(tmp_path.glob("both.*.json"))  # rank 1 wrote none


def train_tiny(rank: int, world_size: int, inputs: Path, output: Path) -> None:
    train(recipe(inputs, output, save_total_limit=3))


def test_a_run_and_its_base(
    pools: Pools, inputs: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    pools(1).run(train_tiny, inputs, run)
    readme = run / "model" / "README.md"
    assert "Not evaluated" in readme.read_text()
    words = ["eval", str(run), "--tasks", "ows_test", "--include-path", str(tasks), "--limit", "6"]
    assert main([*words, "--compare", "base"]) == 0
    printed = capsys.readouterr().out
    assert "before" in printed
    assert str(run / "eval" / "ows_test.json") in printed.replace("\n", "")
    result = results.read(run / "eval" / "ows_test.json")
    assert [(score.task, score.depth) for score in result.scores][:2] == [("ows_test", 0), ("ows_test_sums", 1)]
    assert result.before is not None
    assert result.before.model["fingerprint"] != result.model["fingerprint"]
    base = evaluate(inputs / "model", tasks, "ows_test", tmp_path / "base.json", "--limit", "6")
    assert base.scores == result.before.scores
    assert "| ows_test | acc |" in readme.read_text()

    # a checkpoint, exported for as long as it is evaluated; the last one has the run's weights
    capsys.readouterr()
    assert main([*words, "--checkpoint", "step-9", "--compare", str(tmp_path / "base.json"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["before"]["scores"] == json.loads(results.as_text(result))["before"]["scores"]
    assert shown["model"]["checkpoint"] == "step-9"
    first = evaluate(run, tasks, "ows_test", tmp_path / "first.json", "--limit", "6", "--checkpoint", "step-3")
    assert first.model["fingerprint"] not in (shown["model"]["fingerprint"], base.model["fingerprint"])
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["ows_test.json", "step-9-ows_test.json"]

    assert main(["report", str(run)]) == 0
    page = Page((run / "report.html").read_text())
    assert len(page.row("ows_test_sums, acc, 0 shots")) == 1
    assert len(page.row("step-9, ows_test_sums, acc, 0 shots")) == 1


def test_what_cannot_be_evaluated(
    inputs: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    other = tmp_path.parent / f"{tmp_path.name}-other.json"
    evaluate(inputs / "model", tasks, "ows_test_sums", other, "--limit", "3")
    capsys.readouterr()

    def refused(*words: str) -> str:
        assert main(["eval", str(inputs / "model"), "--include-path", str(tasks), *words]) == 2
        error = capsys.readouterr().err
        [line] = [line for line in error.splitlines() if line.startswith("ows-ds: error")]
        assert error.endswith(f"{line}\n")
        return line

    assert "--tasks: 'ows_test_nowhere' is invalid: expected tasks whose data sets can be loaded" in refused(
        "--tasks", "ows_test_nowhere"
    )
    assert "expected each task once" in refused("--tasks", "ows_test,ows_test_sums")
    assert "expected a result of the same questions: samples of ows_test_sums are 3" in refused(
        "--tasks", "ows_test_sums", "--limit", "4", "--compare", str(other), "--output", str(other)
    )
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'ows_ds[eval]'" in refused("--tasks", "ows_test_sums")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_unknown_task(inputs: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of the harness's tasks are looked through."""
    assert main(["eval", str(inputs / "model"), "--include-path", str(tasks), "--tasks", "ows_test_sum"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("ows-ds: error: --tasks: 'ows_test_sum' is invalid")
    assert "ows_test_sums" in line


@pytest.mark.slow
def test_groups_of_ours_name_tasks_that_are_there() -> None:
    """The index of the harness knows all parts; their data sets are on the hub."""
    from lm_eval.tasks import TaskManager

    from ows_ds.evaluate.harness import TASKS

    manager = TaskManager(include_path=str(TASKS))
    for name, count in (("ows_commonsense", 8), ("ows_mmlu", 1), ("ows_gsm8k", 1)):
        parts = manager.task_index[name].cfg["task"]
        assert len(parts) == count
        for part in parts:
            known = part if isinstance(part, str) else part.get("task") or part["group"]
            assert known in manager.all_tasks


def test_only_safetensors_are_read(
    inputs: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(inputs / "model", tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    words = ["eval", str(tmp_path / "m"), "--include-path", str(tasks), "--output", str(tmp_path / "r.json"), "--tasks"]
    assert main([*words, "ows_test_sums"]) == 2
    assert "MODEL: " in capsys.readouterr().err
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert main([*words, "ows_test_sums", "--limit", "2"]) == 0
    assert isinstance(results.read(tmp_path / "r.json").scores[0], Score)
