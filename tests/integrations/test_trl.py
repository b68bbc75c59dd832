"""OWS in TRL's other trainers: a few steps of each, after which what was sampled has changed and the model is plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ows_ds.integrations.transformers import OWSTrainerMixin
from tests.support.families import tiny
from tests.support.tokenizer import byte_tokenizer

ARGUMENTS: dict[str, Any] = {
    "use_cpu": True, "report_to": [], "per_device_train_batch_size": 4, "bf16": False, "max_steps": 3,
    "learning_rate": 1e-2, "gradient_checkpointing": False, "save_strategy": "no",
}  # fmt: skip
PAIRS = [{"prompt": "a b", "chosen": " c d", "rejected": f" e{i}"} for i in range(12)]
LABELLED = [{"prompt": "a b", "completion": f" c{i}", "label": i % 2 == 0} for i in range(12)]


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(one)) for one in completions]


TRAINERS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "DPO": ("DPOConfig", PAIRS, {"precompute_ref_log_probs": True}, {}),
    "KTO": ("KTOConfig", LABELLED, {"precompute_ref_log_probs": True}, {}),
    "Reward": ("RewardConfig", PAIRS, {}, {}),
    "GRPO": ("GRPOConfig", [{"prompt": "a b"}] * 12, {"num_generations": 4, "max_completion_length": 4, "beta": 0.0},
             {"reward_funcs": lengths}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINERS)
def test_a_few_steps(name: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    config, rows, settings, more = TRAINERS[name]
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model: Any = tiny("llama", False)
    model.resize_token_embeddings(len(tokenizer))
    if name == "Reward":
        model.config.num_labels, model.config.pad_token_id = 1, tokenizer.pad_token_id
        model = AutoModelForSequenceClassification.from_config(model.config)
    kind = type("Ours", (OWSTrainerMixin, getattr(trl, f"{name}Trainer")), {})
    trainer = kind(
        model,
        args=getattr(trl, config)(output_dir=str(tmp_path), **ARGUMENTS, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        ows={"gamma": 1.5, "rank": 4, "period": 2, "always_on": "none"},
        scores=[0.3, 0.1, 0.4],
        **more,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    changed = {name.split(".")[2] for name, p in model.named_parameters() if not torch.equal(p, before[name])
               and name.startswith("model.layers.")}  # fmt: skip
    assert changed
    assert torch.equal(model.get_input_embeddings().weight, before["model.embed_tokens.weight"])
    assert trainer.optimizer is None
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, torch.nn.Linear))
