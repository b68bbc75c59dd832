"""Chats -> text by a chat template, and the characters of it that are trained.

A message is a dict of `role` and `content`, or of `from` and `value` as ShareGPT has it; None stands for a missing
value. Its key `train` (or `training`), true or false, or `weight`, 1 or 0, says whether it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ows_ds.errors import UserError, first_line

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""Speakers of ShareGPT's turns, and the roles that templates know."""
FLAGS = ("train", "training", "weight")
PAIRS = (("role", "from"), ("content", "value"))
MARK = "\ue000"  # of private use


@dataclass(frozen=True)
class Turn:
    """message: what the template gets: role, content, and whatever else the row has. train: None where the row does
    not say."""

    message: dict[str, Any]
    train: bool | None = None

    @property
    def role(self) -> str:
        """The speaker's role."""
        return str(self.message["role"])


def turns(messages: Sequence[dict[str, Any]]) -> list[Turn]:
    """Turns of messages without a `mistake`."""
    found = []
    for message in messages:
        flag = next((message[name] for name in FLAGS if message.get(name) is not None), None)
        kept = {k: v for k, v in message.items() if v is not None and k not in (*FLAGS, "from", "value")}
        if message.get("role") is None:
            kept = {"role": SPEAKERS[message["from"]], **kept}
        if message.get("content") is None:
            kept["content"] = message["value"]
        found.append(Turn(kept, None if flag is None else bool(flag)))
    return found


def mistake(messages: Any, column: str) -> str | None:
    """What is expected where ``messages``, of that column, are no chat; None where they are one."""
    if not isinstance(messages, list) or not messages:
        return f"expected {column} as a list of at least one message"
    for message in messages:
        if not isinstance(message, dict):
            return "expected every message a role and a content, both text"
        names = [name if message.get(name) is not None else other for name, other in PAIRS]
        if not all(is_text(message.get(name)) for name in names):
            return f"expected every message a {' and a '.join(names)}, both text"
        if names[0] == "from" and message["from"] not in SPEAKERS:
            return f"expected from as one of {', '.join(SPEAKERS)}"
        for name in FLAGS:
            if message.get(name) not in (None, True, False):  # 1 and 0 are equal to these
                return f"expected {name} as {'0 or 1' if name == 'weight' else 'true or false'}"
    return None


def is_text(value: Any) -> bool:
    """Whether a value is text that tokenizers take: JSON can also name halves of characters (\\ud83d)."""
    try:
        return isinstance(value, str) and (value.isascii() or bool(value.encode()))
    except UnicodeEncodeError:
        return False


def write(turns: Sequence[Turn], tokenizer: Any, loss_on: str, key: str) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the spans of characters, (first, past the last), that are trained.

    An assistant's span runs from where generation would start to its end mark (`_Chat.answer`). Of another turn, where
    its row says that it is trained, the content is. Under ``loss_on`` "all" there are no spans: all is trained.

    Raises UserError naming ``key`` where the template refuses the turns, data.loss_on where it does not show their end.
    """
    chat = _Chat([turn.message for turn in turns], tokenizer, key)
    if loss_on == "all":
        if any(turn.train is not None for turn in turns):
            right = "expected assistant: a row says which of its turns are trained"
            raise UserError("data.loss_on", loss_on, right)
        return chat.text, []
    spans: list[tuple[int, int]] = []
    for i, turn in enumerate(turns):
        if turn.role == "assistant" if turn.train is None else turn.train:
            span = chat.answer(i) if turn.role == "assistant" else chat.content(i)
            if span is None:
                right = f"expected all: the chat template does not show where turn {i + 1} starts and ends"
                raise UserError("data.loss_on", loss_on, right)
            spans.append(span)
    return chat.text, spans


class _Chat:
    """A conversation in a template. The template is not parsed: what it writes for parts of the conversation, or for
    one with a mark in place of a turn, shows where the turn stands."""

    def __init__(self, turns: list[dict[str, Any]], tokenizer: Any, key: str) -> None:
        self.turns, self.tokenizer, self.key = turns, tokenizer, key
        self.text = self._render(turns)

    def _render(self, turns: list[dict[str, Any]], prompt: bool = False) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # the template is a program of the model's
            right = f"expected messages that the model's chat template takes ({first_line(error)})"
            raise UserError(self.key, turns, right) from error

    def _up_to(self, turns: list[dict[str, Any]]) -> str:
        """``turns``, of which the last is an answer, without what the template writes only after a complete
        conversation (Phi-3: another end mark)."""
        text, continued = self.text if turns is self.turns else self._render(turns), self._render(turns, True)
        common = next((i for i, (a, b) in enumerate(zip(text, continued, strict=False)) if a != b), len(text))
        if common == len(text):
            return text
        # where a token ends: marks begin alike, "<|"
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text[: max((end for _, end in tokens if end <= common), default=0)]

    def answer(self, i: int) -> tuple[int, int] | None:
        """From where turn i would be generated to its end mark; None where the template does not show it."""
        if i == 0:  # an empty conversation cannot be rendered: the turn begins with its content
            shown = self.content(i)
            before = MARK if shown is None else self.text[: shown[0]]
        else:
            before = self._render(self.turns[:i], True)
        if not self.text.startswith(before):
            return None
        start, last = len(before), i + 1 == len(self.turns)
        through = self._up_to(self.turns) if last else self._render(self.turns[: i + 1])
        if not self.text.startswith(through):
            through = self._up_to(self.turns[: i + 1])
        if self.text.startswith(through) and len(through) >= start:
            # templates end a turn with a line break after its end mark; generation has stopped by then
            return start, start + len(through[start:].rstrip())
        # Qwen3 writes an answer differently when more follows: its end mark is found behind its content
        content, mark = self.content(i), self._up_to([*self.turns[:i], self._marked(i)]).partition(MARK)[2]
        if content is None or content[0] < start or not self.text.startswith(mark, content[1]):
            return None
        return start, content[1] + len(mark.rstrip())

    def content(self, i: int) -> tuple[int, int] | None:
        """Where the content of turn i stands; None where the template does not show it."""
        before, mark, after = self._render([*self.turns[:i], self._marked(i), *self.turns[i + 1 :]]).partition(MARK)
        end = len(self.text) - len(after)
        shown = mark and self.text.startswith(before) and self.text.endswith(after) and end >= len(before)
        return (len(before), end) if shown else None

    def _marked(self, i: int) -> dict[str, Any]:
        return {**self.turns[i], "content": MARK}
