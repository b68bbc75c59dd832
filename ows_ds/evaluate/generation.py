"""Text that a model generates: the same rules for every model, whatever sampling and penalties come with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    synced_gpus: bool = False,
) -> list[str]:
    """What follows each prompt, without special tokens; greedy at temperature 0.

    synced_gpus: the weights lie in shards (ZeRO-3); then collective, with as many calls on each rank.
    """
    from transformers import GenerationConfig

    own = getattr(model.generation_config, "eos_token_id", None)
    ends = sorted({*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None})
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(tokens)) + tokens for tokens in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in prompts], device=model.device)
    sampling = {"temperature": temperature, "top_k": 50, "top_p": 1.0} if temperature else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=bool(temperature), num_beams=1, repetition_penalty=1.0,
        use_cache=True, pad_token_id=pad, eos_token_id=ends or None, **sampling,
    )  # fmt: skip
    output = model.generate(ids, attention_mask=mask, generation_config=settings, synced_gpus=synced_gpus)
    return list(tokenizer.batch_decode(output[:, width:], skip_special_tokens=True))
