"""A tiny model with its tokenizer and data in files, and a recipe that trains it in seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ows_ds import config
from tests.support.families import tiny
from tests.support.tokenizer import byte_tokenizer


def write_inputs(folder: Path, **shape: Any) -> Path:
    """A folder with a model of 3 layers (with dropout) in bfloat16, its tokenizer, and rows to train on. shape: what
    its configuration has in place of the tiny one's."""
    tokenizer = byte_tokenizer()
    model: Any = tiny("llama", True, **shape)
    model.resize_token_embeddings(len(tokenizer))
    model.config.attention_dropout = 0.1
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "preprocessor_config.json").write_text("{}")  # as one that takes images has it
    for name, count in (("train", 20), ("eval", 3)):
        rows = (
            {"messages": [{"role": "user", "content": f"{i}+{i}"}, {"role": "assistant", "content": str(2 * i)}]}
            for i in range(count)
        )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(
    inputs: Path, output: Path, sampling: Any = None, optim: Any = None, method: str = "ows", **train: Any
) -> config.Recipe:
    """9 steps with a checkpoint every 3; the arguments replace keys of their section."""
    return config.from_dict(
        {
            "model": {"path": str(inputs / "model")},
            "data": {"train": str(inputs / "train.jsonl"), "eval": str(inputs / "eval.jsonl"), "max_length": 64},
            "method": {"name": method},
            "sampling": {"gamma": 1.5, "period": 4, "tau": 2.0, "calibration_samples": 4} | (sampling or {}),
            "optim": {"rank": 4, "lr": 1e-2, "update_proj_gap": 3, "warmup_steps": 2, "weight_decay": 0.01}
            | (optim or {}),
            "train": {
                "output_dir": str(output),
                "global_batch_size": 12,
                "micro_batch_size": 2,
                "steps": 9,
                "save_steps": 3,
            }
            | train,
            "log": {"progress": "none"},
        }
    )


def cut(whole: Path, run_dir: Path, step: int = 6) -> Path:
    """Make ``run_dir`` of the run ``whole``, as if it had died before its next checkpoint after ``step``."""
    shutil.copytree(whole, run_dir, ignore=shutil.ignore_patterns("model"))
    for checkpoint in (run_dir / "checkpoints").iterdir():
        if int(checkpoint.name.partition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    return run_dir
