"""Answers of the model in training to the messages of ``log.samples``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ows_ds.data.encode import ALPACA
from ows_ds.model.generation import generate
from ows_ds.train.context import RunContext


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
