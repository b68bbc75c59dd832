"""Chats as rows have them -> turns as chat templates take them.

A message is a dict of `role` and `content`, or of `from` and `value` as ShareGPT has it; None stands for a missing
value, at any depth, as Arrow writes it. Its key `train`, `training` or `loss`, true or false, or `weight`, 1 or 0, says
whether it is trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "assistant": "assistant", "model": "assistant", "function_call": "assistant",
    "system": "system", "developer": "developer", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""Speakers of ShareGPT's turns, and the roles that templates know."""
FLAGS = ("train", "training", "loss", "weight")
PAIRS = (("role", "from"), ("content", "value"))
REASONING = ("reasoning_content", "thinking", "reasoning")


class BadChat(ValueError):
    """What is expected where a row is no chat."""


@dataclass(frozen=True)
class Turn:
    """message: what the template gets: role, content (none beside tool calls alone), and whatever else the row has.
    train: None where the row does not say."""

    message: dict[str, Any]
    train: bool | None = None

    @property
    def role(self) -> str:
        """The speaker's role."""
        return str(self.message["role"])

    @property
    def text(self) -> str:
        """What is said; "" where there are tool calls alone."""
        content = self.message.get("content") or ""
        return content if isinstance(content, str) else "".join(part["text"] for part in content)

    @property
    def calls(self) -> list[Mapping[str, Any]]:
        """Functions that are called: name and arguments."""
        return [call.get("function", call) for call in self.message.get("tool_calls", ())]

    @property
    def reasoning(self) -> str:
        """What is thought before the answer, wherever the row has it."""
        named = next((self.message[name] for name in REASONING if self.message.get(name)), "")
        return str(named or self.text.rpartition("</think>")[0].rpartition("<think>")[2]).strip()

    @property
    def empty(self) -> bool:
        """Whether nothing is said, thought or called."""
        return not (self.text.strip() or self.calls or self.reasoning)


@dataclass(frozen=True)
class Chat:
    """tools: JSON schemas of functions. settings: what else the template reads (``chat_template_kwargs``)."""

    turns: list[Turn]
    tools: list[Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def read_chat(messages: Any, column: str, row: Mapping[str, Any]) -> Chat:
    """The chat of a row. messages: of that column. Raises BadChat."""
    if not isinstance(messages, list) or not messages:
        raise BadChat(f"expected {column} as a list of at least one message")
    tools, settings = (_without_nulls(_parsed(row.get(name))) for name in ("tools", "chat_template_kwargs"))
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadChat("expected tools as a list of JSON schemas, or as the text of one")
    if settings and not isinstance(settings, dict):
        raise BadChat("expected chat_template_kwargs as a name and a value each")
    return Chat([_turn(message) for message in messages], tools or None, settings or {})


def is_text(value: Any) -> bool:
    """Whether a value is text that tokenizers take: JSON can also name halves of characters (\\ud83d)."""
    try:
        return isinstance(value, str) and (value.isascii() or bool(value.encode()))
    except UnicodeEncodeError:
        return False


def _turn(message: Any) -> Turn:
    if not isinstance(message, dict):
        raise BadChat("expected every message a role and a content, both text")
    given = _without_nulls(message)
    if "tool_calls" in given:
        given["tool_calls"] = [_call(call) for call in _parsed(given["tool_calls"]) or []]
        if not given["tool_calls"]:
            del given["tool_calls"]
    if "content" in given:
        given["content"] = _text_of_parts(given["content"])
    elif given.get("tool_calls") and "value" not in given:
        given["content"] = ""
    shown = [name if name in given or other not in given else other for name, other in PAIRS]
    if not all(is_text(given.get(name)) for name in shown):
        raise BadChat(f"expected every message a {' and a '.join(shown)}, both text")
    if shown[0] == "from":
        if given["from"] not in SPEAKERS:
            raise BadChat(f"expected from as one of {', '.join(SPEAKERS)}")
        if given["from"] == "function_call":
            given |= {"tool_calls": _calls(given[shown[1]]), "content": ""}
        given = {"role": SPEAKERS[given["from"]], **given}
    for name in FLAGS:
        if given.get(name) not in (None, True, False):  # 1 and 0 are equal to these
            raise BadChat(f"expected {name} as {'0 or 1' if name == 'weight' else 'true or false'}")
    given.setdefault("content", given.get("value"))
    if given.get("tool_calls") and not given["content"]:
        del given["content"]  # null, "" or absent: which one a template takes is tried
    flag = next((given[name] for name in FLAGS if name in given), None)
    kept = {name: value for name, value in given.items() if name not in (*FLAGS, "from", "value")}
    return Turn(kept, None if flag is None else bool(flag))


def _text_of_parts(content: Any) -> Any:
    """A content of text parts as one text."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    if not all(map(is_text, texts)):
        raise BadChat("expected content as text, or as a list of parts that are all text")
    return "".join(map(str, texts))


def _calls(text: str) -> list[dict[str, Any]]:
    """Function calls as LLaMA-Factory writes them: JSON of one, or of a list of several."""
    calls = _without_nulls(_parsed(text))
    return [_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Any) -> dict[str, Any]:
    """A call of a function in OpenAI's form, with arguments as a dict."""
    function = call.get("function", call) if isinstance(call, dict) else None
    arguments = _without_nulls(_parsed(function.get("arguments") or {})) if isinstance(function, dict) else None
    if not isinstance(function, dict) or not is_text(function.get("name")) or not isinstance(arguments, dict):
        raise BadChat("expected every call of a function a name and arguments, a JSON object")
    named = {name: value for name, value in call.items() if name not in ("function", "name", "arguments")}
    return {"type": "function", **named, "function": {"name": function["name"], "arguments": arguments}}


def _parsed(value: Any) -> Any:
    """A value, of JSON as text what it says."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadChat(f"expected tools, calls and their arguments as valid JSON ({error})") from error


def _without_nulls(value: Any) -> Any:
    """Without the keys whose value is None: where other rows have a key, Arrow has it everywhere."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return (
        [_without_nulls(one) for one in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
    )


def answers(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A row of ``name`` preference, or of labelled, as rows of prompt and completion: the chosen one and the rejected
    one, or its only one.

    Where chosen and rejected are whole chats, or texts without a prompt, what both begin with is the prompt, as TRL has
    it. Raises BadChat where they are not both texts or both lists of messages, or the same.
    """
    more = {key: row[key] for key in ("system", "tools", "chat_template_kwargs") if row.get(key) is not None}
    if name == "labelled":
        return [more | {"prompt": row.get("prompt"), "completion": row.get("completion")}]
    prompt: Any = row.get("prompt")
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    if not any(isinstance(chosen, kind) and isinstance(rejected, kind) and chosen for kind in (str, list)):
        raise BadChat("expected chosen and rejected as texts, or both as lists of messages")
    if isinstance(chosen, list) and isinstance(prompt, str):
        first = chosen[0]
        asked = isinstance(first, dict) and first.get("role", first.get("from")) in ("user", "human", "system")
        prompt = None if asked else [{"role": "user", "content": prompt}]
    if not prompt:
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        if shared is None and chosen == rejected:
            raise BadChat("expected chosen and rejected to differ")
        shared = min(len(chosen), len(rejected)) - 1 if shared is None else shared
        if isinstance(chosen, str):  # a word is not cut
            shared = len(chosen[:shared].rstrip()) if chosen[:shared][-1:].isspace() else chosen.rfind(" ", 0, shared)
            shared = max(0, shared)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return [more | {"prompt": prompt, "completion": one} for one in (chosen, rejected)]
