"""What `use_ows` refuses, in one line, before it changes the Trainer; and what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from ows_ds.errors import UserError
from ows_ds.integrations.transformers import use_ows
from tests.support.families import tiny

ROWS = [{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(8)]
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_only_model": True, "eval_steps": 500}


@pytest.fixture(autouse=True)
def _state() -> Iterator[None]:
    """Accelerate remembers settings of the last Trainer for the rest of the process."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def trainer(folder: Path, dtype: torch.dtype = torch.float32, more: Any = None, **arguments: Any) -> Any:
    args = tf.TrainingArguments(str(folder), use_cpu=True, report_to="none", **arguments)
    return tf.Trainer(tiny("llama", dtype=dtype), args, train_dataset=ROWS, eval_dataset=ROWS, **(more or {}))


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("optim", {"optim": "adafactor"}),
        ("mixed precision", {"bf16": True}),
        ("gradient_checkpointing_kwargs: use_reentrant", CHECKPOINTING),
        ("save_on_each_node", {"save_on_each_node": True}),
        ("auto_find_batch_size", {"auto_find_batch_size": True}),
        ("save_only_model", BEST),
    ],
)
def test_arguments_that_do_not_go_with_ows(tmp_path: Path, key: str, arguments: dict[str, Any]) -> None:
    one = trainer(tmp_path, **arguments)
    with pytest.raises(UserError) as caught:
        use_ows(one, scores=[1, 1, 1], gamma=1, rank=4)
    assert caught.value.key == key
    assert type(one) is tf.Trainer
    assert all(parameter.requires_grad for parameter in one.model.parameters())


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("lr", {"lr": 1e-3}),
        ("accumulation", {"accumulation": 2}),
        ("gama", {"gama": 1}),
        ("optim.rank", {"rank": 400}),
        ("sampling.scores", {"scores": [1.0, 2.0]}),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, key: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        use_ows(trainer(tmp_path), **{"scores": [1, 1, 1], "gamma": 1, "rank": 4, **settings})
    assert caught.value.key == key


def test_other_optimizers_and_models(tmp_path: Path) -> None:
    model = tiny("llama")
    for key, more in (
        ("optimizers", {"optimizers": (torch.optim.SGD(model.parameters(), 0.1), None)}),
        ("model_init", {"model": None, "model_init": lambda: tiny("llama")}),
    ):
        args = tf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        one = tf.Trainer(**{"model": model, "args": args, "train_dataset": ROWS, **more})
        with pytest.raises(UserError) as caught:
            use_ows(one, scores=[1, 1, 1], gamma=1, rank=4)
        assert caught.value.key == key


def test_a_loss_past_the_head(tmp_path: Path) -> None:
    """TRL's trainers replace the model's forward pass by one that takes the head's weight."""
    one = trainer(tmp_path)
    one.model.forward = one.model.forward
    with pytest.raises(UserError) as caught:
        use_ows(one, scores=[1, 1, 1], gamma=1, rank=4, always_on="low_rank")
    assert caught.value.key == "optim.always_on"


def test_bfloat16_by_the_model(tmp_path: Path) -> None:
    one = use_ows(trainer(tmp_path, torch.bfloat16, bf16=True, max_steps=1), scores=[1, 1, 1], gamma=1, rank=4)
    with pytest.raises(UserError, match="call use_ows once"):
        use_ows(one, scores=[1, 1, 1], gamma=1, rank=4)
    assert isinstance(one, tf.Trainer)
    assert type(one).__name__ == "OWSTrainer"
    before = one.evaluate()["eval_loss"]
    one.train()
    assert one.evaluate()["eval_loss"] != before
    assert one.optimizer is None  # and the model is a plain one
    assert all("forward" not in vars(module) for module in one.model.modules())
    one.train()  # anew
    one.save_model(str(tmp_path / "out"))
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
