"""The lowest loss of a run's evaluations: which checkpoint is the best, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ows_ds.config import Train
from ows_ds.data.encode import ALPACA
from ows_ds.model.generation import generate
from ows_ds.train.context import RunContext


@dataclass
class Best:
    """step: of the lowest loss, None before the first evaluation. since: evaluations after it. stopped: by `Train`."""

    loss: float = math.inf
    step: int | None = None
    since: int = 0
    stopped: bool = False

    def add(self, loss: float, step: int, settings: Train) -> bool:
        """Count an evaluation; whether it is the best one."""
        if loss < self.loss:
            self.loss, self.step, self.since = loss, step, 0
            return True
        self.since += 1
        self.stopped = settings.early_stopping is not None and self.since >= settings.early_stopping
        return False

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        found = asdict(self)
        return found | {"loss": None if math.isinf(self.loss) else self.loss}


def restored(state: dict[str, Any] | None) -> Best:
    """What `Best.state` gave."""
    if state is None:
        return Best()
    return Best(**{**state, "loss": math.inf if state["loss"] is None else state["loss"]})


def sample(context: RunContext, messages: Sequence[str]) -> list[list[str]]:
    """[message, answer] of each, greedily, with low-rank updates attached. Collective under ZeRO-3."""
    if not messages:
        return []
    recipe, tokenizer, weights = context.recipe, context.tokenizer, context.weights
    prompts = [_tokens(tokenizer, recipe.data.template, one) for one in messages]
    training = weights.module.training
    weights.module.eval()
    length = recipe.log.sample_tokens
    answers = [
        generate(weights.module, tokenizer, [one], length, synced_gpus=weights.sharded)[0].strip() for one in prompts
    ]
    weights.after_step()
    weights.module.train(training)
    return [[message, answer] for message, answer in zip(messages, answers, strict=True)]


def _tokens(tokenizer: Any, template: str, message: str) -> list[int]:
    if template in ("auto", "chat") and tokenizer.chat_template:
        said = [{"role": "user", "content": message}]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    text = ALPACA.format(paired="", task=message, more="") if template == "alpaca" else message
    return list(tokenizer(text)["input_ids"])
