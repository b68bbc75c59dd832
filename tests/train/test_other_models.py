"""Checkpoints that are not one plain language model: images and text, experts; through the whole trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated
from ows_ds.train.loss import token_losses
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.tiny_run import recipe, write_inputs
from tests.support.tokenizer import byte_tokenizer
from tests.train.test_trainer import run

IDS = torch.arange(5, 25)[None]
SHARDINGS = [(1, "replicated"), (2, "zero3")]
HOMES = pytest.mark.parametrize(("world_size", "sharding"), SHARDINGS)


def gemma3(vocabulary: int) -> Any:
    """A tiny Gemma 3 of images and text."""
    text = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "max_position_embeddings": 128,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return tf.AutoModelForImageTextToText.from_config(config)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


def inputs_of(folder: Path, model: Any) -> Path:
    write_inputs(folder)
    for file in (folder / "model").glob("*.safetensors"):
        file.unlink()
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    return folder


@HOMES
def test_gemma3_trains_on_text(pools: Pools, tmp_path: Path, world_size: int, sharding: str) -> None:
    """Towers and projector keep their bits; the export is the whole checkpoint."""
    inputs = inputs_of(tmp_path, gemma3(len(byte_tokenizer())))
    given = recipe(inputs, tmp_path / "run", steps=4, sharding=sharding, global_batch_size=4)
    pools(world_size).run(run, given, None)
    before, after = weights_of(inputs / "model"), weights_of(tmp_path / "run" / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if "vision" in name or "projector" in name]
    assert (tmp_path / "run" / "model" / "preprocessor_config.json").is_file()
    model = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model", dtype=torch.bfloat16)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert torch.isfinite(model(input_ids=IDS).logits).all()


@HOMES
def test_mixtral_trains_from_and_into_files_of_single_experts(
    pools: Pools, tmp_path: Path, world_size: int, sharding: str
) -> None:
    """Its files have a tensor for each expert. The loss for the balance of experts is logged."""
    vocabulary = len(byte_tokenizer())
    config = tiny("mixtral").config
    config.update({"vocab_size": vocabulary, "output_router_logits": True, "router_aux_loss_coef": 0.1})
    torch.manual_seed(0)
    inputs = inputs_of(tmp_path, tf.AutoModelForCausalLM.from_config(config))
    given = recipe(inputs, tmp_path / "run", steps=4, sharding=sharding, global_batch_size=4)
    pools(world_size).run(run, given, None)
    before, after = weights_of(inputs / "model"), weights_of(tmp_path / "run" / "model")
    assert any("experts.3" in name for name in before)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("experts" in name for name in changed)
    assert not [name for name in changed if name.endswith("gate.weight")]  # routers
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["step"] and not line.get("skipped")]
    assert trained
    assert all(0.1 <= line["aux_loss"] <= 1 for line in trained)


METHODS = ("full", "lisa", "galore", "badam", "hift", "mezo", "lora")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@HOMES
def test_methods_train_experts(pools: Pools, tmp_path: Path, world_size: int, sharding: str, method: str) -> None:
    """Weights of experts change, and the export is a plain model; routers stay, but for mezo, which moves all."""
    config = tiny("mixtral").config
    config.update({"vocab_size": len(byte_tokenizer())})
    torch.manual_seed(0)
    inputs = inputs_of(tmp_path, tf.AutoModelForCausalLM.from_config(config))
    given = recipe(inputs, tmp_path / "run", method=method, steps=8, sharding=sharding, global_batch_size=4)
    pools(world_size).run(run, given, None)
    before, after = weights_of(inputs / "model"), weights_of(tmp_path / "run" / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("experts" in name for name in changed)
    assert method == "mezo" or not [name for name in changed if name.endswith("gate.weight")]


def test_balance_of_experts_is_in_the_loss() -> None:
    """As in the model's own loss, padding left out; not in evaluation."""
    model: Any = tiny("mixtral", dtype=torch.float64, output_router_logits=True, router_aux_loss_coef=0.1)
    model.set_experts_implementation("eager")
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    model(**batch).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    count = int((batch["labels"][:, 1:] != -100).sum())
    weights, added = Replicated(model, Communicator()), list[Tensor]()
    loss = token_losses(weights, batch, added)
    (loss / count).backward()
    for name, parameter in model.named_parameters():  # transformers takes the logits in float32
        assert float((parameter.grad - expected[name]).norm() / expected[name].norm()) < 1e-5
    with torch.no_grad():
        assert float(token_losses(weights, batch) + added[0]) == pytest.approx(float(loss), rel=1e-12)
