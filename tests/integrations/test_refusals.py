"""What a Trainer with OWS refuses, in one line; and what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from ows_ds.config import OWSConfig
from ows_ds.errors import UserError
from ows_ds.integrations.transformers import OWSTrainer
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


def trainer(folder: Path, ows: Any = None, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    args = tf.TrainingArguments(str(folder), use_cpu=True, report_to="none", **arguments)
    ows = {"gamma": 1, "rank": 4, **(ows or {})}
    scores = ows.pop("scores", [1, 1, 1])
    model = tiny("llama", dtype=dtype)
    return OWSTrainer(model, args, train_dataset=ROWS, eval_dataset=ROWS, ows=ows, scores=scores)


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
    with pytest.raises(UserError) as caught:
        trainer(tmp_path, **arguments)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("ows.lr", {"lr": 1e-3}),
        ("ows.accumulation", {"accumulation": 2}),
        ("ows.gama", {"gama": 1}),
        ("ows.refresh_gap", {"refresh_gap": 1}),
        ("optim.rank", {"rank": 400}),
        ("sampling.scores", {"scores": [1.0, 2.0]}),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, key: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        trainer(tmp_path, settings)
    assert caught.value.key == key


def test_other_optimizers_and_models(tmp_path: Path) -> None:
    model = tiny("llama")
    for key, more in (
        ("optimizers", {"optimizers": (torch.optim.SGD(model.parameters(), 0.1), None)}),
        ("model_init", {"model": None, "model_init": lambda: tiny("llama")}),
    ):
        args = tf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        with pytest.raises(UserError) as caught:
            OWSTrainer(
                **{"model": model, "args": args, "train_dataset": ROWS, **more}, ows={"rank": 4}, scores=[1, 1, 1]
            )
        assert caught.value.key == key


def test_a_loss_past_the_head(tmp_path: Path) -> None:
    """TRL's trainers replace the model's forward pass by one that takes the head's weight."""
    model = tiny("llama")
    model.forward = model.forward  # type: ignore[method-assign]
    args = tf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    ows = {"gamma": 1, "rank": 4, "always_on": "low_rank"}
    with pytest.raises(UserError) as caught:
        OWSTrainer(model, args, train_dataset=ROWS, ows=ows, scores=[1, 1, 1])
    assert caught.value.key == "optim.always_on"


def test_bfloat16_by_the_model(tmp_path: Path) -> None:
    args = tf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", bf16=True, max_steps=1)
    model, ows = tiny("llama", dtype=torch.bfloat16), OWSConfig(gamma=1, rank=4)
    one: Any = OWSTrainer(model, args, train_dataset=ROWS, eval_dataset=ROWS, ows=ows, scores=[1, 1, 1])
    before = one.evaluate()["eval_loss"]
    one.train()
    assert one.evaluate()["eval_loss"] != before
    assert one.optimizer is None  # and the model is a plain one
    assert all("forward" not in vars(module) for module in one.model.modules())
    one.train()  # again
    one.save_model(str(tmp_path / "out"))
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
