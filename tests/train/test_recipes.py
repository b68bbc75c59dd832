"""Every recipe trains: two steps of a tiny model, on small files of its data set's columns, by the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ows_ds.cli.main import main
from tests.config.test_recipes import CURRENT, PAPER, RECIPES
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.tokenizer import byte_tokenizer

TASK = "Below is an instruction that describes a task"
WRITE = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
# By data set: row number i with the columns that the hub has, and the text that the tokenizer gets of row 1.
ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "commonsense": lambda i: {"instruction": f"{i}?", "input": "", "output": f"the answer is {i}", "answer": str(i)},
    "alpaca_gpt4": lambda i: {"instruction": "Add.", "input": f"{i} and {i}", "output": str(2 * i), "text": "unused"},
    "mmlu": lambda i: {"question": f"{i}+1?", "subject": "", "choices": ["0", "1", "2", "3"], "answer": i % 4},
    "gsm8k": lambda i: {"question": f"{i}+{i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"},
    "demo": lambda i: {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}]},
}
TEXTS = {
    "commonsense": f"{TASK}. {WRITE}1?\n\n### Response:\nthe answer is 1",
    "alpaca_gpt4": f"{TASK}, paired with an input that provides further context. {WRITE}Add.\n\n### Input:\n1 and 1\n\n"
    "### Response:\n2",
    "mmlu": "1+1?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: B",
    "gsm8k": "Question: 1+1?\nAnswer: It is 2.\n#### 2",
    "demo": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n1<|im_end|>\n"
    "<|im_start|>assistant\nyes<|im_end|>\n",
}
# lowered to fit 3 layers of hidden size 32; nothing of the data's format
SMALL = ["--sampling.gamma=1.5", "--sampling.tau=2", "--sampling.calibration_samples=4", "--optim.rank=4"]
SMALL += [
    "--optim.warmup_steps=0",
    "--train.steps=2",
    "--train.global_batch_size=4",
    "--log.progress=none",
    "--log.trackers=[]",
]


def command(rank: int, world_size: int, argv: list[str], cache: Path) -> tuple[int, list[str]]:
    """The command line's status, and every text that it gave to a tokenizer."""
    texts: list[str] = []
    tokenize, folder = PreTrainedTokenizerFast.__call__, datasets.config.HF_DATASETS_CACHE

    def noting(self: Any, text: str, **options: Any) -> Any:
        texts.append(text)
        return tokenize(self, text, **options)

    PreTrainedTokenizerFast.__call__ = noting  # type: ignore[method-assign,assignment]
    datasets.config.HF_DATASETS_CACHE = cache
    try:
        status = main(argv)
        assert status != 1, "the traceback is in what this rank printed"
        return status, texts
    finally:
        PreTrainedTokenizerFast.__call__ = tokenize  # type: ignore[method-assign]
        datasets.config.HF_DATASETS_CACHE = folder


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["step"]]


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem not in CURRENT], ids=lambda path: path.stem)
def test_recipes_train(pools: Pools, inputs: Path, tmp_path: Path, path: Path) -> None:
    data = next(name for name in ROWS if path.stem.endswith(name))
    rows = [ROWS[data](i) for i in range(12)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    files = ["--model.path", str(inputs / "model"), "--train.output_dir", str(tmp_path / "run")]
    files += ["--data.train", str(tmp_path / "train.parquet"), "--data.eval", str(tmp_path / "eval.jsonl")]
    [(status, texts)] = pools(1).run(command, ["train", "--config", str(path), *SMALL, *files], tmp_path)
    assert status == 0
    assert texts[1] == TEXTS[data]
    assert len(texts) == 14
    assert len(losses(tmp_path / "run")) == 2
    assert all(map(math.isfinite, losses(tmp_path / "run")))


@pytest.mark.parametrize("name", CURRENT)
def test_recipes_of_today_train(pools: Pools, inputs: Path, tmp_path: Path, name: str) -> None:
    """On a tiny model of their family, with weights in 4 bits and shards as they say."""
    tokenizer = byte_tokenizer()
    model: Any = tiny(CURRENT[name][2], False, seed=1)
    model.resize_token_embeddings(len(tokenizer))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = "".join(json.dumps(ROWS["demo"](i)) + "\n" for i in range(24))
    for file in ("train", "eval"):
        (tmp_path / f"{file}.jsonl").write_text(rows)
    files = ["--model.path", str(tmp_path / "model"), "--train.output_dir", str(tmp_path / "run")]
    files += ["--data.train", str(tmp_path / "train.jsonl"), "--data.eval", str(tmp_path / "eval.jsonl")]
    files += ["--data.train_split", "train", "--data.eval_split", "test", "--data.max_length", "64"]
    path = next(path for path in RECIPES if path.stem == name)
    world_size = 2 if "zero3" in path.read_text() else 1
    done = pools(world_size).run(command, ["train", "--config", str(path), *SMALL, *files], tmp_path)
    assert [status for status, _ in done] == [0] * world_size
    assert all(map(math.isfinite, losses(tmp_path / "run")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """GSM8K's columns in a folder that is a data set."""
    (tmp_path / "set").mkdir()
    for name, count in (("train", 12), ("test", 3)):
        rows = (json.dumps(ROWS["gsm8k"](i)) + "\n" for i in range(count))
        (tmp_path / "set" / f"{name}.jsonl").write_text("".join(rows))
    return tmp_path / "set"


def on_two(inputs: Path, folder: Path, run_dir: Path, *more: str) -> list[str]:
    [recipe] = [path for path in PAPER if path.stem == "llama2_7b_gsm8k"]
    files = ["--model.path", str(inputs / "model"), "--train.output_dir", str(run_dir)]
    files += ["--data.train", str(folder), "--data.eval", str(folder)]
    files += ["--data.train_subset", "null", "--data.eval_subset", "null"]
    return ["train", "--config", str(recipe), *SMALL, *files, *more]


def test_ranks_share_a_data_set(pools: Pools, inputs: Path, tmp_path: Path, folder: Path) -> None:
    done = pools(2).run(command, on_two(inputs, folder, tmp_path / "run"), tmp_path / "cache")
    assert [status for status, _ in done] == [0, 0]
    texts = [text for _, some in done for text in some]  # of both sets, tokenized by one rank each
    assert len(texts) == 15
    assert texts.count(TEXTS["gsm8k"]) == 2
    assert len(losses(tmp_path / "run")) == 2


def test_ranks_fail_together_before_anything_is_written(
    pools: Pools, inputs: Path, tmp_path: Path, folder: Path
) -> None:
    argv = on_two(inputs, folder, tmp_path / "run", "--data.eval_split", "dev")
    assert [status for status, _ in pools(2).run(command, argv, tmp_path / "cache")] == [2, 2]
    argv = on_two(inputs, folder, tmp_path / "run", "--data.train_subset", "main")
    assert [status for status, _ in pools(2).run(command, argv, tmp_path / "cache")] == [2, 2]
    assert not (tmp_path / "run").exists()
