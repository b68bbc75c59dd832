"""What is trained of seven kinds of chats under every chat template that TRL has a training template for, against the
masks of those. Each difference has a reason."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from ows_ds.data.encode import encode
from ows_ds.errors import UserError
from ows_ds.model.generation import special_tokens
from tests.data.test_data import byte_tokenizer

TRL = find_spec("trl")
pytestmark = pytest.mark.skipif(TRL is None, reason="TRL, which ships the templates, is for Python 3.11 and newer")
FOLDER = Path((TRL.submodule_search_locations or [""])[0] if TRL else "") / "chat_templates"
NAMES = sorted(file.stem.removesuffix("_training") for file in FOLDER.glob("*_training.jinja"))

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


REASONS = {
    "equal": 22,
    "TRL trains a line break at an end of the answer": 118,
    "TRL trains what the generation prompt has": 76,
    "TRL trains what follows the end of the last answer": 10,
    "TRL's template writes another text than the model's": 11,
    "ours leaves out empty answers": 26,
    "ours trains the mark at which generation stops": 2,
    "the template refuses the chat": 15,
    "the template leaves out what the chat says": 12,
}  # of 31 templates and 7 chats; a pair may have several


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calls(*cities: str) -> dict[str, Any]:
    """An assistant's calls, and the tools' answers."""
    asked = [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}} for city in cities]
    return {"role": "assistant", "content": None, "tool_calls": asked}


WET, DRY = ({"role": "tool", "name": "weather", "content": text} for text in ("wet", "dry"))
CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [user("2+2?"), said("four")]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, user("2+2?"), said("four")]},
    "multi-turn": {"messages": [user("2+2?"), said("four"), user("sure?"), said("yes")]},
    "tools": {"messages": [user("Rain?"), calls("Bonn"), WET, said("It rains.")], "tools": [WEATHER]},
    "parallel tools": {
        "messages": [user("Rain?"), calls("Bonn", "Kiel"), WET, DRY, said("It rains.")], "tools": [WEATHER],
    },
    "reasoning": {"messages": [user("2+2?"), said("four", reasoning_content="two and two")]},
    "empty content": {"messages": [user("2+2?"), said(""), user("sure?"), said("yes")]},
}  # fmt: skip
SPECIAL = re.compile(
    r"<\|[^<>{}'\"|\s]+\|>|<｜[^｜{}]+｜>|</?s>|<bos>|<(?:start|end)_of_\w+>|<turn\|>|<\|t\w+>|<\w+\|>"
)
ENDS = {"phi3": "<|endoftext|>", "phi3_5": "<|endoftext|>", "gemma": "<eos>", "llava_next": "</s>",
        "deepseekv3": "<｜end▁of▁sentence｜>", "deepseek_r1_distill": "<｜end▁of▁sentence｜>"}  # fmt: skip
USUAL = ("<|im_end|>", "<|eot_id|>", "<|return|>", "<end_of_turn>", "<end_of_utterance>", "<turn|>")


def tokenizer(name: str, template: str) -> Any:
    """One token a byte and one a mark."""
    found = byte_tokenizer((FOLDER / f"{name}.jinja").read_text())
    marks = sorted({*SPECIAL.findall(found.chat_template), *SPECIAL.findall(template)})
    end = ENDS.get(name, next((mark for mark in USUAL if mark in marks), "<|endoftext|>"))
    found.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    found.add_special_tokens(
        {
            key: AddedToken(mark, special=True, normalized=False)
            for key, mark in {"bos_token": "<s>", "eos_token": end}.items()
        }
    )
    return found


def of_trl(tokenizer: Any, template: str, row: dict[str, Any]) -> tuple[list[int], list[bool]] | None:
    """Tokens, and TRL's mask; None where its template takes the chat in no form."""
    for parts, content in itertools.product((False, True), (None, "")):
        messages = [{**message, "content": message["content"] or content} for message in row["messages"]]
        if parts:
            text = [message["content"] for message in messages]
            messages = [
                m | {"content": [{"type": "text", "text": t or ""}]} for m, t in zip(messages, text, strict=True)
            ]
        try:
            found = tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tools=row.get("tools"),
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception:
            continue
        if all(m["content"] is None or m["content"] in tokenizer.decode(found["input_ids"]) for m in row["messages"]):
            return found["input_ids"], [bool(one) for one in found["assistant_masks"]]
    return None


def runs(ours: list[bool], theirs: list[bool]) -> list[tuple[int, int, bool]]:
    """Where one trains and the other does not: (first, past the last, whether ours does)."""
    found = []
    at = 0
    for (mine, other), group in itertools.groupby(zip(ours, theirs, strict=True)):
        size = len(list(group))
        if mine != other:
            found.append((at, at + size, mine))
        at += size
    return found


def reason(name: str, row: dict[str, Any]) -> str:
    """Why a pair differs; "equal" where it does not."""
    template = (FOLDER / f"{name}_training.jinja").read_text()
    made = tokenizer(name, template)
    theirs = of_trl(made, template, row)
    try:
        encoded = encode(row, made, 10_000)
    except UserError:
        return "the template refuses the chat" if theirs is None else "the template leaves out what the chat says"
    if theirs is None:
        return "TRL's template refuses the chat"
    ids, mine = encoded.input_ids.tolist(), encoded.trained.tolist()
    if ids != theirs[0]:
        return "TRL's template writes another text than the model's"
    reasons = set()
    for first, last, is_ours in runs(mine, theirs[1]):
        text = made.decode(ids[first:last])
        before = made.decode(ids[:first])
        after = last == len(ids) or not mine[last]
        if is_ours:
            assert text in special_tokens(made).values()
            reasons.add("ours trains the mark at which generation stops")
        elif not text.strip():
            reasons.add("TRL trains a line break at an end of the answer")
        elif after and before.endswith(tuple(special_tokens(made).values())) and text.strip() == made.eos_token:
            reasons.add("TRL trains what follows the end of the last answer")
        elif not after:
            reasons.add("TRL trains what the generation prompt has")
        else:
            assert not any(message["content"] and message["content"] in text for message in row["messages"])
            reasons.add("ours leaves out empty answers")
    return "; ".join(sorted(reasons)) or "equal"


def test_masks() -> None:
    found = [reason(name, row) for name in NAMES for row in CHATS.values()]
    assert Counter(one for each in found for one in each.split("; ")) == REASONS
    assert len(found) == 31 * 7
