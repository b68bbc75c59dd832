"""Files and settings of any content: they are read, or refused as the user's mistake in one line. Nothing else."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from ows_ds import checkpoint, config, files
from ows_ds.bench import study
from ows_ds.checkpoint.manifest import seal
from ows_ds.cli.main import main
from ows_ds.config import recipe_keys
from ows_ds.data.encode import encode_rows
from ows_ds.data.rows import read
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.ds_config import read_config, resolve_config
from ows_ds.distributed.weights import Shard
from ows_ds.errors import UserError, one_line
from ows_ds.evaluate import judge, mt_bench
from ows_ds.evaluate.setting import MTBench
from ows_ds.importance.scores import Scores
from ows_ds.planner import cluster
from ows_ds.runs import page, results
from ows_ds.slurm import job
from tests.data.test_data import byte_tokenizer

TOKENIZER = byte_tokenizer()
WORDS = [
    "",
    "auto",
    "never",
    "model",
    "rows.jsonl",
    "train[:1%]",
    "../x",
    "nan",
    "3e-4",
    "a\0b",
    "\x1b[31m",
    "\u202e",
    "n" * 300,
]
TEXTS = st.sampled_from(WORDS) | st.text(st.characters(), max_size=12)  # halves of characters included
NUMBERS = st.integers(-2, 40) | st.integers(-(10**40), 10**40) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS, lambda more: st.lists(more, max_size=4) | st.dictionaries(TEXTS, more, max_size=3), max_leaves=8
)
SYNTAX = st.text("ab01 :-?,[]{}#&*!|>'\"%@`~<.\n\t\\\0\x1b\x85\u2028", max_size=40)

RECIPE = {
    "model": {"path": "model"},
    "data": {"train": [{"path": "rows.jsonl", "weight": 2}, "rows.jsonl"], "max_length": 8},
    "optim": {"rank": 4, "betas": [0.9, 0.99]},
    "sampling": {"gamma": 2},
    "train": {"output_dir": "run", "global_batch_size": 4},
    "log": {"trackers": ["tensorboard"]},
}
SCORES = {"metric": "outlier", "tau": 2.0, "model": "f" * 64, "layers": [0.1, 0.2], "tokens": 9, "format": 1}
CLUSTER = {"nodes": 2, "processes_per_node": 2, "sbatch": ["--exclusive"], "environment": ["A=1"], "port": 20000,
           "inside": ["apptainer", "exec"], "gpu_memory": 80.0, "time": "1:00:00", "modules": ["cuda"]}  # fmt: skip
GPUS = {"like": "2x8xH100", "memory": 80.0, "price": 2, "nodes": 2}
DEEPSPEED = {
    "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "zero_hpz_partition_size": 2},
    "bf16": {"enabled": "auto"},
    "train_batch_size": "auto",
}
STUDY = {"recipe": RECIPE, "test": "rows.jsonl", "variants": {"a": {"method.name": "lisa"}, "b": None}, "seeds": [0, 1],
         "lrs": [1e-4], "baseline": "a", "accuracy": {"rows": 2}}  # fmt: skip
TASKS = {**STUDY, "tasks": {"a": {"train": "rows.jsonl", "eval": "rows.jsonl", "test": "rows.jsonl"}}}
del TASKS["test"]
RESULT = {"format": 1, "model": {"name": "a", "checkpoint": "step-3"}, "settings": {"limit": 3}, "versions": {"a": "1"},
          "started": "2026-01-31", "seconds": 1.5, "scores": [
              {"task": "a", "metric": "acc", "value": 0.5, "stderr": 0.1, "shots": 5, "samples": 8, "depth": 1,
               "version": "1", "higher_is_better": True}]}  # fmt: skip
QUESTION = {"question_id": 81, "category": "math", "turns": ["a", "b"], "reference": ["c", "d"]}
ANSWER = {"question_id": 81, "choices": [{"index": 0, "turns": ["a", "b"]}]}
PROMPT = {"name": "a", "type": "single", "system_prompt": "b", "prompt_template": "{question} {answer}",
          "output_format": "[[rating]]"}  # fmt: skip
ROWS: list[Any] = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}], "system": "c"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"question": "a?", "choices": ["b", "c"], "answer": 1},
    {"prompt": "a", "completion": "b"},
    {"text": "ab"},
]


@st.composite
def spoiled(draw: Any, good: Any, more: list[str] | None = None) -> Any:
    """A tree of dicts and lists like ``good``, in which up to three places are other values, gone, or new.

    more: keys that may be new, beside any text.
    """
    tree = copy.deepcopy(good)
    for _ in range(draw(st.integers(0, 3))):
        place: Any = tree
        while True:
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys or draw(st.integers(0, 3)) == 0:
                key = draw(st.sampled_from(more) if more and draw(st.booleans()) else TEXTS)
                if isinstance(place, dict):
                    place[key] = draw(VALUES)
                else:
                    place.append(draw(VALUES))
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.integers(0, 3)):
                place = place[key]
                continue
            if draw(st.integers(0, 4)) == 0:
                del place[key]
            else:
                place[key] = draw(VALUES)
            break
    return tree


def as_yaml(strategy: SearchStrategy[Any]) -> SearchStrategy[bytes]:
    """Files of YAML, and of something like it."""
    dumped = strategy.map(lambda tree: yaml.safe_dump(tree).encode())
    return dumped | SYNTAX.map(str.encode) | st.binary(max_size=30)


def as_json(strategy: SearchStrategy[Any]) -> SearchStrategy[bytes]:
    """Files of JSON, and of something like it."""
    return strategy.map(lambda tree: json.dumps(tree).encode()) | SYNTAX.map(str.encode) | st.binary(max_size=30)


def read_recipe(folder: Path, content: bytes) -> None:
    (folder / "r.yaml").write_bytes(content)
    made = config.from_dict(files.read_yaml(folder / "r.yaml"))
    config.check(made)
    assert config.from_dict(yaml.safe_load(config.to_yaml(made))) == made


def type_options(folder: Path, given: tuple[str, str]) -> None:
    """A setting on the command line: it is printed, or refused, or it asks for help."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            words = ["train", "--model.path", "m", "--train.output_dir", "run", "--print_config"]
            code = main([*words, f"--{given[0]}", given[1]])
        except SystemExit as leave:
            code = int(leave.code or 0)
    assert (code, err.getvalue().count("\n")) in ((0, 0), (2, 1)), err.getvalue()
    assert err.getvalue().removesuffix("\n").isprintable()


def read_scores(folder: Path, content: bytes) -> None:
    (folder / "s.json").write_bytes(content)
    Scores.read(folder / "s.json").check("f" * 64, 2, "outlier", 2.0)


def save(folder: Path) -> Path:
    """A checkpoint's manifest."""
    place = checkpoint.folder_of(folder, 3)
    shards = [Shard("a", (2, 2), 0, torch.ones(4))]
    checkpoint.save(place, shards, {"method": {"steps": 3}}, Communicator())
    return place / checkpoint.MANIFEST


@functools.cache
def manifest() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return json.loads(save(Path(folder)).read_text())


def read_manifest(folder: Path, content: bytes) -> None:
    """As the newest of a run, where it may be skipped, and as the checkpoint that is named."""
    place = checkpoint.folder_of(folder, 3)
    if not place.exists():
        save(folder)
    with contextlib.suppress(ValueError):
        tree = json.loads(content)
        if isinstance(tree, dict):  # one whose digest is wrong would be read no further
            tree.pop("sha256", None)
            content = seal(tree)
    (place / checkpoint.MANIFEST).write_bytes(content)
    checkpoint.find(folder, "auto", Communicator())
    checkpoint.open_checkpoint(place, Communicator())


def read_rows(folder: Path, content: bytes) -> None:
    (folder / "rows.jsonl").write_bytes(content)
    source = config.Source(path=str(folder / "rows.jsonl"))
    encode_rows(read(source, "data.train"), TOKENIZER, 16, on_bad_row="skip")
    encode_rows(read(source, "data.train"), TOKENIZER, 16)


def read_allocation(folder: Path, content: bytes) -> None:
    (folder / "c.yaml").write_bytes(content)
    job.render(job.read(folder / "c.yaml"), ["a note"], "r.yaml", {}, folder)


def read_cluster(folder: Path, content: bytes) -> None:
    (folder / "c.yaml").write_bytes(content)
    cluster.read_cluster(str(folder / "c.yaml"))


def read_deepspeed(folder: Path, content: bytes) -> None:
    (folder / "ds.json").write_bytes(content)
    resolve_config(read_config(str(folder / "ds.json")), "bfloat16", 1, 2, 4)


def read_study(folder: Path, content: bytes) -> None:
    (folder / "s.yaml").write_bytes(content)
    for one in study.read(folder / "s.yaml").values():
        study.check(one, folder / "out")


def read_result(folder: Path, content: bytes) -> None:
    (folder / "s.json").write_bytes(content)
    found = results.read(folder / "s.json")
    both = dataclasses.replace(found, before=found)
    tables = [results.table(one) for one in (found, both)]
    assert all(cell.isprintable() for table in tables for row in table.rows for cell in row)
    for score, before in results.newest([both]).values():
        assert one_line(page._score(score, before)).isprintable()


JUDGE = judge.Judge(MTBench(judge="http://localhost", judge_model="j"))


def read_talk(folder: Path, content: tuple[bytes, bytes, bytes]) -> None:
    """Questions, answers, and a judge's prompts."""
    for name, text in zip(("q", "a", "p"), content, strict=True):
        (folder / f"{name}.jsonl").write_bytes(text)
    asked = mt_bench.questions("q.jsonl")
    mt_bench.references(None, asked)
    said = mt_bench.by_question("a.jsonl", "--answers", asked, [one["question_id"] for one in asked])
    list(JUDGE.requests(asked, said, {}, "model"))
    with contextlib.suppress(UserError):  # for want of the other three
        judge.prompts("p.jsonl")


FILES = {
    "q.jsonl",
    "a.jsonl",
    "p.jsonl",
    "r.yaml",
    "s.json",
    "checkpoints",
    "rows.jsonl",
    "c.yaml",
    "ds.json",
    "s.yaml",
}  # what the tests themselves write
SETTINGS = list(recipe_keys())
LINES = st.lists(st.sampled_from(ROWS).flatmap(lambda row: st.just(row) | spoiled(row)), max_size=3)
HUNTS: dict[str, tuple[SearchStrategy[Any], Callable[[Path, Any], None]]] = {
    "recipe": (as_yaml(spoiled(RECIPE, [key.split(".")[1] for key in SETTINGS])), read_recipe),
    "option": (st.tuples(st.sampled_from(SETTINGS), SYNTAX | TEXTS), type_options),
    "scores": (as_json(spoiled(SCORES)), read_scores),
    "manifest": (st.deferred(lambda: as_json(spoiled(manifest()))), read_manifest),
    "rows": (LINES.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()) | st.binary(max_size=30), read_rows),
    "allocation": (as_yaml(spoiled(CLUSTER)), read_allocation),
    "cluster": (as_yaml(spoiled(GPUS)), read_cluster),
    "ds_config": (as_json(spoiled(DEEPSPEED)), read_deepspeed),
    "study": (as_yaml(spoiled(STUDY)), read_study),
    "studies": (as_yaml(spoiled(TASKS)), read_study),
    "result": (as_json(spoiled(RESULT)), read_result),
    "talk": (st.tuples(*(as_json(spoiled(one)) for one in (QUESTION, ANSWER, PROMPT))), read_talk),
}


@pytest.mark.parametrize("examples", [150, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", HUNTS)
def test_nothing_but_mistakes_in_one_line(
    name: str, examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, read = HUNTS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    outcomes = set()

    def look(content: Any) -> None:
        line = ""
        try:
            read(tmp_path, content)
        except UserError as error:
            line = str(error)
        outcomes.add("refused" if line else "read")
        for one in line.splitlines():  # a line a mistake
            assert one.isprintable()
            assert len(one) < 3000
        assert {path.name for path in tmp_path.iterdir()} <= FILES

    if name == "option":  # parsers are made each time
        examples //= 5
    # the few of every day are always the same
    often = settings(max_examples=examples, derandomize=examples < 1000, database=None, deadline=None,
                     suppress_health_check=list(HealthCheck))  # fmt: skip
    given(strategy)(often(look))()
    assert outcomes == {"read", "refused"} or name == "option"
