"""Trainers of TRL whose model has a head of its own, or whose callbacks read the weights during training."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.support.pool import Pools

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed (extra: trl)")
OWS: dict[str, Any] = {"gamma": 2, "rank": 8, "period": 2}
ROWS = [{"prompt": f"q{i}", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(16)]


def loaded(folder: Path, kind: str, **more: Any) -> tuple[Any, Any, Any]:
    """Model, tokenizer, rows."""
    import datasets
    import transformers as tf

    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|im_end|>"
    model = getattr(tf, kind).from_pretrained(folder, dtype="float32", **more)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, datasets.Dataset.from_list(ROWS)


def arguments(output: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output), "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2,
        "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, **more,
    }  # fmt: skip


def reward(rank: int, world_size: int, folder: Path, output: Path) -> tuple[float, int]:
    """How far the head moved, and how many layers did."""
    from trl import RewardConfig, RewardTrainer

    from ows_ds.integrations.transformers import OWSTrainerMixin

    class Trainer(OWSTrainerMixin, RewardTrainer):
        pass

    model, tokenizer, rows = loaded(folder, "AutoModelForSequenceClassification", num_labels=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = RewardConfig(**arguments(output))
    settings = {**OWS, "always_on": "none"}
    trainer = Trainer(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer, ows=settings, scores=[1.0] * 3
    )
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    return float((model.score.weight - before["score.weight"]).abs().max()), len([n for n in moved if "layers" in n])


def test_a_new_head_trains(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    [(head, layers)] = pools(1).run(reward, inputs / "model", tmp_path)
    assert head > 0.005
    assert layers


def synced(rank: int, world_size: int, folder: Path, output: Path) -> list[float]:
    """How far the reference is from the policy right after it was copied."""
    import torch
    import transformers as tf
    from trl import DPOConfig, DPOTrainer

    from ows_ds.integrations.transformers import OWSTrainerMixin

    class Trainer(OWSTrainerMixin, DPOTrainer):
        pass

    class Compares(tf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (2, 3):
                policy, reference = (dict(m.named_parameters()) for m in (trainer.model, trainer.ref_model))
                apart.append(max(float((policy[n] - reference[n]).abs().max()) for n in reference))
                trainer.save_model(str(output / "now"))  # which merges, too
                saved = dict(tf.AutoModelForCausalLM.from_pretrained(output / "now").named_parameters())
                assert all(torch.equal(saved[name], policy[name]) for name in saved)

    apart: list[float] = []
    model, tokenizer, rows = loaded(folder, "AutoModelForCausalLM")
    sync = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}
    args = DPOConfig(**arguments(output, **sync))
    trainer = Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, ows=OWS, scores=[1.0] * 3)
    trainer.add_callback(Compares())
    trainer.train()
    assert not any(torch.isnan(p).any() for p in model.parameters())
    return apart


def test_a_reference_that_is_copied_in_the_middle_is_what_was_trained(
    pools: Pools, inputs: Path, tmp_path: Path
) -> None:
    [[at_once, a_step_later]] = pools(1).run(synced, inputs / "model", tmp_path)
    assert at_once == 0
    assert a_step_later > 0


def without_scores(rank: int, world_size: int, folder: Path, output: Path) -> str:
    from transformers import Trainer, TrainingArguments

    from ows_ds.errors import UserError
    from ows_ds.integrations.transformers import OWSTrainerMixin

    class Prompts(OWSTrainerMixin, Trainer):
        pass

    model, _, rows = loaded(folder, "AutoModelForCausalLM")
    args = TrainingArguments(**arguments(output), remove_unused_columns=False)
    try:
        Prompts(model=model, args=args, train_dataset=rows, data_collator=list, ows=OWS)
    except UserError as error:
        return str(error)
    return ""


def test_a_trainer_of_prompts_asks_for_scores(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    """As GRPO's, whose batches are rows and no tokens."""
    [said] = pools(1).run(without_scores, inputs / "model", tmp_path)
    assert said.startswith("scores: None is invalid: expected a file of `ows-ds score`, or one number a layer")
