"""Text that a model generates, by the same rules for every model, and where a saved model's generation stops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The special tokens of a tokenizer, by their numbers."""
    added = {token: str(one) for token, one in tokenizer.added_tokens_decoder.items() if one.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def stop_at(model: Any, tokenizer: Any, tokens: Iterable[int]) -> str | None:
    """Let generation stop at ``tokens``, with which what was trained ends. Changes ``model.generation_config``.

    Returns a line that says what was added; None where nothing was.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return None
    now = settings.eos_token_id if settings.eos_token_id is not None else model.config.eos_token_id
    stops = [] if now is None else [now] if isinstance(now, int) else list(now)
    added = [token for token in tokens if token not in stops]
    if not added:
        return None
    settings.eos_token_id = [*stops, *added] if stops or len(added) > 1 else added[0]
    named = ", ".join(f"{token} ({tokenizer.convert_ids_to_tokens(token)})" for token in added)
    return f"generation_config.eos_token_id gets {named}: answers that are trained end there, generation did not"


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
