"""What the options of `ows-ds eval` refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ows_ds.cli.options import read_settings
from ows_ds.errors import UserError
from ows_ds.evaluate.setting import Evaluation, MTBench, check


def refused(model: str = "model", **options: Any) -> list[str]:
    """What is said of options, which are MT-Bench's or of tasks."""
    with pytest.raises(UserError) as caught:
        check(model, *read_settings(options, Evaluation, MTBench))
    return str(caught.value).splitlines()


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and questions in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("q.jsonl").write_text("{}\n")


def test_what_is_right() -> None:
    check("model", *read_settings({"tasks": "piqa, boolq", "limit": 0.5, "num_fewshot": 0}, Evaluation, MTBench))
    judged = {"mt_bench": "q.jsonl", "judge": "http://a:1/v1", "judge_model": "j (new)"}
    check("org/model", *read_settings(judged, Evaluation, MTBench))
    assert Evaluation(tasks="piqa, boolq", batch_size="auto").names == ["piqa", "boolq"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 0}, "--limit: 0 is invalid: expected a number of questions, or a share"),
        ({"limit": 2.5}, "--limit: 2.5 is invalid: expected a number of questions, or a share"),
        ({"limit": "nan"}, "--limit: 'nan' is invalid: expected a finite number"),
        ({"batch_size": "0"}, "--batch-size: '0' is invalid: expected an integer of at least 1, or auto"),
        ({"num_fewshot": "some"}, "--num-fewshot: 'some' is invalid: expected an integer of at least 0, or null"),
        ({"num_fewshot": -1}, "--num-fewshot: -1 is invalid"),
        ({"max_length": 0}, "--max-length: 0 is invalid"),
        ({"include_path": "none"}, "--include-path: 'none' is invalid: expected a folder that exists"),
        ({"output": "r.txt"}, "--output: 'r.txt' is invalid: expected a file whose name ends in .json"),
        ({"output": "q.jsonl/r.json"}, "--output: 'q.jsonl/r.json' is invalid: expected a file in a folder"),
        ({"checkpoint": "step-3"}, "--checkpoint: 'step-3' is invalid: leave it out, or give the folder of a run"),
        ({"compare": "base"}, "--compare: 'base' is invalid: expected a model, or the folder of a run as MODEL"),
        ({"mt_bench": "q.jsonl"}, "--tasks: 'piqa' is invalid: leave it out under --mt-bench"),
        ({"judge": "http://a"}, "--judge: 'http://a' is invalid: leave it out, or give --mt-bench FILE with it"),
    ],
)
def test_tasks(options: dict[str, Any], said: str) -> None:
    [line] = refused(tasks="piqa", **options)
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mt_bench": "none"}, "--mt-bench: 'none' is invalid: expected a file that exists"),
        ({"judge_prompts": "q.jsonl"}, "--judge-prompts: 'q.jsonl' is invalid: leave it out, or give --judge URL"),
        ({"answers": "q.jsonl"}, "--answers: 'q.jsonl' is invalid: leave it out, or give --judge URL with it"),
        ({"judge": "http://a"}, "--judge-model: None is invalid: expected the name of a model on the judge's server"),
        ({"judge": "a:b", "judge_model": "j"}, "--judge: 'a:b' is invalid: expected an address such as http://"),
        ({"judge": "http://a:x", "judge_model": "j"}, "--judge: 'http://a:x' is invalid"),
        ({"judge": "http://me:secret@a", "judge_model": "j"}, "--judge: '***' is invalid"),
        ({"judge": "http://a", "judge_model": "a\nb"}, "--judge-model: 'a\\nb' is invalid"),
        ({"max_new_tokens": 0}, "--max-new-tokens: 0 is invalid: expected an integer of at least 1"),
        ({"judge_retries": -1}, "--judge-retries: -1 is invalid: expected an integer of at least 0"),
    ],
)
def test_judges(options: dict[str, Any], said: str) -> None:
    [line] = refused(**{"mt_bench": "q.jsonl", **options})
    assert line.startswith(said)


def test_all_at_once() -> None:
    assert len(refused("./none", limit=0, num_fewshot=-1, judge_retries=-1)) == 3
    assert len(refused("./none", include_path="none", output="r.txt")) == 4  # and there are no tasks
