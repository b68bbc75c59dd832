"""Where a saved model's generation stops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


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
