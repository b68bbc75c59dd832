"""The scripts of docs/examples are what docs/python.md shows, and they train."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers as tf

from ows_ds.distributed.rendezvous import free_port
from tests.conftest import ROOT
from tests.data.test_data import byte_tokenizer
from tests.integrations.test_transformers import needs_trl
from tests.launch.test_launchers import BIN, LIMIT
from tests.support.pool import Pools

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
SLOW = [needs_trl, pytest.mark.slow]
parametrize = pytest.mark.parametrize(
    "path", [pytest.param(path, marks=SLOW if path.stem == "sft" else (), id=path.stem) for path in EXAMPLES]
)


def test_the_page_names_the_scripts() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    assert len(EXAMPLES) == 5
    for path in EXAMPLES:
        assert f"(examples/{path.name})" in page


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for the defaults of OWS, rank 128 among them, and with outliers."""
    folder = tmp_path_factory.mktemp("example") / "model"
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    made = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=160,
            num_hidden_layers=6,
            num_attention_heads=2,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():
        for layer in made.model.layers:
            layer.mlp.up_proj.weight[:40, 0] *= 100
    made.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(rank: int, world_size: int, path: Path, model: Path, out: Path) -> None:
    # Accelerate's end_training would leave later tests of this process without their groups
    keep = patch.object(torch.distributed, "destroy_process_group")
    with keep, patch.object(sys, "argv", [str(path), str(model), str(out)]):
        runpy.run_path(str(path), run_name="__main__")


@torch.no_grad()
def loss(folder: Path) -> float:
    """On what all examples train on."""
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("21 plus 21 is 42.", return_tensors="pt")["input_ids"]
    return float(model(input_ids=ids, labels=ids).loss)


@parametrize
def test_an_example_trains(pools: Pools, model: Path, tmp_path: Path, path: Path) -> None:
    pools(1 if path.stem == "plain" else 2).run(run, path, model, tmp_path / "out")
    assert loss(tmp_path / "out") < loss(model) - 0.05


@parametrize
@pytest.mark.slow
def test_an_example_starts_as_it_says(model: Path, tmp_path: Path, path: Path) -> None:
    words = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())]
    words = [sys.executable] if path.stem == "plain" else words
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*words, str(path), str(model), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert loss(tmp_path / "out") < loss(model) - 0.05
