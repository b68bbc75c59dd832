"""Sixty mistakes that people make: each is one line that names the key, exit status 2, within two seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

SECONDS = 2.0
# what is typed after `ows-ds`; {d} is a folder with r.yaml (complete), rows.jsonl, an empty file and the like
MISTAKES: list[tuple[str, str]] = [
    ("trian --config {d}/r.yaml", "VERB: 'trian'"),
    ("train --config {d}/none.yaml", "config: "),
    ("train --config {d}", "config: "),
    ("train --config {d}/broken.yaml", "config: "),
    ("train --config {d}/theirs.yaml", "--config: "),
    ("train --config", "--config: "),
    ("train {d}/r.yaml", "arguments: "),
    ("train --config {d}/r.yaml --lr 1e-4", "--lr: '1e-4' is invalid: there is no such key; --optim.lr"),
    ("train --config {d}/r.yaml --learning_rate 1e-4", "--learning_rate: "),
    ("train --config {d}/r.yaml --num_train_epochs 3", "--num_train_epochs: "),
    ("train --config {d}/r.yaml --deepspeed ds.json", "--deepspeed: "),
    ("train --config {d}/r.yaml --bf16 true", "--bf16: "),
    ("train --config {d}/r.yaml --optim.ranks 8", "optim.ranks: "),
    ("train --config {d}/r.yaml --optim.rank 0", "optim.rank: 0"),
    ("train --config {d}/r.yaml --optim.rank eight", "optim.rank: 'eight'"),
    ("train --config {d}/r.yaml --optim.rank 8.5", "optim.rank: 8.5"),
    ("train --config {d}/r.yaml --optim.rank", "optim.rank: "),
    ("train --config {d}/r.yaml --optim.lr -1", "optim.lr: '-1'"),
    ("train --config {d}/r.yaml --optim.lr nan", "optim.lr: "),
    ("train --config {d}/r.yaml --optim.betas 0.9", "optim.betas: 0.9"),
    ("train --config {d}/r.yaml --optim.betas [0.9,1.5]", "optim.betas"),
    ("train --config {d}/r.yaml --optim.schedule step", "optim.schedule: 'step'"),
    ("train --config {d}/r.yaml --optim.always_on head", "optim.always_on: 'head'"),
    ("train --config {d}/r.yaml --optim.refresh sketch --optim.projector svd", "optim.projector: 'svd'"),
    ("train --config {d}/r.yaml --optim.warmup_steps 500 --train.steps 10", "optim.warmup_steps: 500"),
    ("train --config {d}/r.yaml --sampling.gamma 0", "sampling.gamma: 0"),
    ("train --config {d}/r.yaml --sampling.gamma 2.5 --sampling.scheme fixed", "sampling.gamma: 2.5"),
    ("train --config {d}/r.yaml --sampling.importance outliers", "sampling.importance: 'outliers'"),
    ("train --config {d}/r.yaml --sampling.scores {d}/none.json", "sampling.scores: "),
    ("train --config {d}/r.yaml --sampling.period never", "sampling.period: 'never'"),
    ("train --config {d}/r.yaml --method.name adalora", "method.name: 'adalora'"),
    ("train --config {d}/r.yaml --method.name lisa --optim.always_on low_rank", "optim.always_on: 'low_rank'"),
    ("train --config {d}/r.yaml --method.lora_dropout 1", "method.lora_dropout: 1"),
    ("train --config {d}/r.yaml --model.frozen int4", "model.frozen: 'int4'"),
    ("train --config {d}/r.yaml --model.frozen int8 --method.name full", "model.frozen: 'int8'"),
    ("train --config {d}/r.yaml --model.fp8_matmul always", "model.fp8_matmul: 'always'"),
    ("train --config {d}/r.yaml --model.dtype fp16", "model.dtype: 'fp16'"),
    ("train --config {d}/r.yaml --model.path {d}/nowhere/at/all", "model.path: "),
    ("train --config {d}/r.yaml --data.train {d}/none.jsonl", "data.train: "),
    ("train --config {d}/r.yaml --data.eval none.parquet", "data.eval: 'none.parquet'"),
    ("train --config {d}/r.yaml --data.max_length 1", "data.max_length: 1"),
    ("train --config {d}/r.yaml --data.template llama3", "data.template: 'llama3'"),
    ("train --config {d}/r.yaml --data.chat_template {d}/none.jinja", "data.chat_template: "),
    ("train --config {d}/r.yaml --data.train_split train[", "data.train_split: 'train['"),
    ("train --config {d}/r.yaml --data.streaming true", "train.steps: "),
    ("train --config {d}/r.yaml --data.packing yes_please", "data.packing: 'yes_please'"),
    ("train --config {d}/r.yaml --data.packing true --loss.name dpo", "data.packing: True"),
    ("train --config {d}/r.yaml --loss.name ipo", "loss.name: 'ipo'"),
    ("train --config {d}/r.yaml --loss.name reward --method.name lora", "loss.name: 'reward'"),
    ("train --config {d}/r.yaml --train.steps 0", "train.steps: 0"),
    (
        "train --config {d}/r.yaml --train.global_batch_size 16 --train.micro_batch_size 5",
        "train.global_batch_size: 16",
    ),
    ("train --config {d}/r.yaml --train.eval_steps 10", "train.eval_steps: 10"),
    ("train --config {d}/r.yaml --train.early_stopping 2", "train.early_stopping: 2"),
    ("train --config {d}/r.yaml --train.resume step-100", "train.resume: 'step-100'"),
    ("train --config {d}/r.yaml --train.output_dir {d}/file/run", "train.output_dir: "),
    ("train --config {d}/r.yaml --train.ds_config {d}/none.json --train.sharding zero3", "train.ds_config: "),
    ("train --config {d}/r.yaml --log.trackers wandbb", "log.trackers"),
    ("train --config {d}/r.yaml --preview none", "--preview: 'none'"),
    ("plan --model.path llama2-7b --cluster 8xA200", "--cluster: '8xA200'"),
    ("plan --model.path llama2-7b --choose slowest", "--choose: 'slowest'"),
    ("plan --model.path llama2-7b --methods ows,adam", "--methods: 'ows,adam'"),
    ("export {d}", "OUT_DIR: "),
    ("eval {d}", "--tasks: "),
    ("bench speed", "bench WHAT: 'speed'"),
    ("convert {d}/r.yaml", "FILE.yaml: "),
    ("recipes llama5", "NAME: 'llama5'"),
    ("completion fish", "SHELL: 'fish'"),
    ("push {d} a/b", "RUN: "),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mistakes")
    (made / "m").mkdir()
    (made / "m" / "config.json").write_text("{}")
    (made / "file").write_text("")
    (made / "rows.jsonl").write_text('{"text": "a"}\n')
    (made / "broken.yaml").write_text("model: {path: m\n")
    (made / "theirs.yaml").write_text("model_name_or_path: m\nfinetuning_type: lora\n")
    (made / "r.yaml").write_text(
        f"model: {{path: {made}/m}}\ndata: {{train: {made}/rows.jsonl}}\ntrain: {{output_dir: {made}/run}}\n"
    )
    return made


@pytest.mark.parametrize(("typed", "expected"), MISTAKES, ids=[typed.replace("{d}/", "") for typed, _ in MISTAKES])
def test_a_mistake(typed: str, expected: str, folder: Path) -> None:
    """On a machine with other work the best of three times counts."""
    words = [word.format(d=folder) for word in typed.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        found = subprocess.run(
            [sys.executable, "-m", "ows_ds", *words], env=environment, capture_output=True, text=True, check=False
        )
        seconds.append(time.monotonic() - start)
        if seconds[-1] < SECONDS:
            break
    lines = found.stderr.splitlines()
    assert found.returncode == 2, found.stderr
    assert len(lines) == 1, found.stderr
    assert lines[0].startswith(f"ows-ds: error: {expected}"), lines[0]
    assert min(seconds) < SECONDS
    assert not (folder / "run").exists()


def test_there_are_sixty() -> None:
    assert len(MISTAKES) >= 60
