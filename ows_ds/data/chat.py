"""Chats -> text by a chat template, and the characters of it that are trained."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from ows_ds.data.messages import Chat, Turn
from ows_ds.data.template import Rendered, render, unused_mark
from ows_ds.errors import UserError, first_line
from ows_ds.model.generation import special_tokens

Span = tuple[int, int]
NOTES = ("empty answers are not trained", "answers whose reasoning the chat template leaves out")


def write(
    chat: Chat, tokenizer: Any, loss_on: str, key: str, today: datetime | None = None
) -> tuple[str, list[Span], list[str]]:
    """The conversation as text; the spans of characters, (first, past the last), that are trained; and of `NOTES` what
    is to be noted.

    An assistant's span runs from where generation would start to the mark at which it stops, also where that is the
    head of the next turn; or it is what the template has in ``{% generation %}``. Of another turn, where its row says
    that it is trained, the content is. Empty answers are not trained. Under ``loss_on`` "all" there are no spans: all
    is trained.

    today: what the template writes as today's date; None: today.
    Raises UserError naming ``key`` where the template refuses the turns, or leaves out what they say; data.loss_on
    where it does not show where a turn stands.
    """
    if loss_on == "all" and any(turn.train is not None for turn in chat.turns):
        raise UserError("data.loss_on", loss_on, "expected assistant: a row says which of its turns are trained")
    shown = _Shown(chat, tokenizer, key, today)
    notes: list[str] = []
    spans: list[Span] = []
    for i, turn in enumerate(shown.turns if loss_on != "all" else ()):
        if not (turn.role == "assistant" if turn.train is None else turn.train):
            continue
        if turn.empty:
            notes.append(NOTES[0])
            continue
        found = shown.answer(i) if turn.role == "assistant" else [shown.content(i)]
        if None in found or not found:
            right = f"expected all: the chat template does not show where turn {i + 1} starts and ends"
            raise UserError("data.loss_on", loss_on, right)
        if turn.reasoning and turn.reasoning not in shown.text and i > shown.last_question:
            notes.append(NOTES[1])
        spans += [span for span in found if span]
    return shown.text, spans, notes


def _variants(turns: Sequence[Turn]) -> Iterator[list[Turn]]:
    """Turns in the forms that templates know: a call without content or with "", its arguments as a dict or as JSON; a
    developer's text as it is or as the system's; content as text or as a list of parts."""

    def changed(turn: Turn, parts: bool, developer: str, as_text: bool, content: str | None) -> Turn:
        message = dict(turn.message)
        if turn.role == "developer":
            message["role"] = developer
        if content is not None:
            message.setdefault("content", content)
        if as_text and turn.calls:
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        if parts and "content" in message:
            message["content"] = [{"type": "text", "text": message["content"]}]
        return dataclasses.replace(turn, message=message)

    calls = any(turn.calls for turn in turns)
    developers = ("developer", "system") if any(turn.role == "developer" for turn in turns) else ("developer",)
    for form in itertools.product(
        (False, True), developers, (False, True) if calls else (False,), (None, "") if calls else (None,)
    ):
        yield [changed(turn, *form) for turn in turns]


@functools.lru_cache(maxsize=4)
def _end_marks(tokenizer: Any, size: int) -> tuple[str, ...]:
    """A tokenizer's special tokens, the longest first. size: how many tokens it has."""
    return tuple(sorted(special_tokens(tokenizer).values(), key=lambda mark: (-len(mark), mark)))


class _Shown:
    """A conversation in the first of its forms that the template writes in full."""

    def __init__(self, chat: Chat, tokenizer: Any, key: str, today: datetime | None) -> None:
        self.tokenizer, self.chat, self.key, self.today = tokenizer, chat, key, today
        refusals: list[UserError] = []
        for turns in _variants(chat.turns):
            if isinstance(turns[-1].message.get("content"), list) and any(map(_on_purpose, refusals)):
                break  # another form of content may get by what the template refuses
            self.turns = turns
            try:
                self.whole = self._render(self.turns)
            except UserError as error:
                refusals.append(error)
                continue
            if (missing := self._missing()) is None:
                self.text = self.whole.text
                return
            said = [turn.message for turn in chat.turns]
            right = f"expected messages that the model's chat template takes: {missing}"
            refusals.insert(0, UserError(key, said, right))
        raise refusals[0]

    @property
    def last_question(self) -> int:
        """The number of the last turn of a user; templates leave out reasoning before it."""
        return max((i for i, turn in enumerate(self.turns) if turn.role == "user"), default=-1)

    def _render(self, turns: Sequence[Turn], prompt: bool = False) -> Rendered:
        messages = [turn.message for turn in turns]
        try:
            return render(self.tokenizer, messages, self.chat.tools, prompt, self.chat.settings, self.today)
        except Exception as error:  # the template is a program of the model's
            right = f"expected messages that the model's chat template takes ({first_line(error)})"
            raise UserError(self.key, messages, right) from error

    def _missing(self) -> str | None:
        """What the text does not say of the chat, in words."""
        text = self.whole.text

        def there(said: str) -> bool:
            said = said.strip()
            return said in text or any(json.dumps(said, ensure_ascii=ascii)[1:-1] in text for ascii in (True, False))

        for number, turn in enumerate(self.turns, start=1):
            said = turn.text.rpartition("</think>")[2]
            if turn.role == "assistant" and number <= self.last_question:  # of which templates may show a part
                said = " ".join(said.split()[-1:])
            if not there(said):
                return f"it leaves out turn {number}, of role {turn.role}"
            first, last = self.whole.spans.get(number - 1, (0, len(text)))
            if any(call["name"] not in text[first:last] for call in turn.calls):
                return f"it leaves out the tool calls of turn {number}"
        names = [tool.get("function", tool).get("name") for tool in self.chat.tools or ()]
        return f"it leaves out the tool {names[0]}" if names and not all(str(name) in text for name in names) else None

    def answer(self, i: int) -> list[Span | None]:
        """What of an assistant's turn is trained: nothing where the template does not show it."""
        where = self.whole.spans.get(i)
        if where is None:
            said = self.content(i)
            return [said and self._ended(i, said)]
        if self.whole.generated:
            blocks = [(a, b) for a, b in self.whole.generated if where[0] <= a and b <= where[1]]
            return [*blocks[:-1], *(self._ended(i, span) for span in blocks[-1:])]
        start, end = where
        prompt, inside = self._prompt(i), self.text[start:end]
        at = start + inside.find(prompt) + len(prompt)
        if not inside.startswith(prompt) and prompt in inside and at <= (self.content(i) or (0,))[0]:
            start = at  # the template has something to say before
        else:
            start += _alike(inside, prompt)
        follows = next((j for j in range(i + 1, len(self.turns)) if self.turns[j].role != "tool"), len(self.turns))
        if any(j not in self.whole.spans for j in range(i + 1, follows)):
            # the template writes the tools' answers within the turn that asks for them
            alone = self._render(self.turns[: i + 1])
            first, last = alone.spans.get(i, (0, 0))
            end = where[0] + _alike(self.text[where[0] : end], alone.text[first:last])
        return [self._ended(i, (start, end))]

    def _ended(self, i: int, span: Span) -> Span:
        """The span up to the mark at which generation stops. Where the template writes none behind the last turn, as
        it begins the next one with it, the text gets it."""
        start, end = span
        said, marks = self.text[start:end].rstrip(), _end_marks(self.tokenizer, len(self.tokenizer))
        if said.endswith(marks):
            return start, start + len(said)
        behind, is_last = self.text[end:], i + 1 == len(self.turns)
        if is_last and not behind:
            behind = self._next_head(i)
        mark = next((mark for mark in marks if behind.startswith(mark)), None)
        if mark is None:
            return start, start + len(said)
        if is_last and len(self.text) == end:
            self.text += mark
        return start, end + len(mark)

    def _next_head(self, i: int) -> str:
        """What the template would write behind turn i, the last one, if another one came."""
        following = Turn({"role": "tool" if self.turns[i].calls else "user", "content": "?"})
        try:
            return self._render([*self.turns, following]).after(i)
        except (UserError, KeyError):  # it does not take another one, or does not show where it stands
            return ""

    def _prompt(self, i: int) -> str:
        """What the template writes for turn i to be generated."""
        for before in (self.turns[:i], [Turn({"role": "user", "content": "?"})]):
            try:
                return self._render(before, True).after(len(before) - 1)
            except (UserError, KeyError):  # of no turn, or of one that stands apart
                continue
        return ""

    def content(self, i: int) -> Span | None:
        """Where the content of turn i stands; None where the template does not show it."""
        text = self.whole.text
        held = text + json.dumps([turn.message for turn in self.turns], ensure_ascii=False)
        mark = unused_mark(held)
        parts = isinstance(self.turns[i].message.get("content"), list)
        content = [{"type": "text", "text": mark}] if parts else mark
        marked = dataclasses.replace(self.turns[i], message={**self.turns[i].message, "content": content})
        before, there, after = self._render([*self.turns[:i], marked, *self.turns[i + 1 :]]).text.partition(mark)
        end = len(text) - len(after)
        shown = there and text.startswith(before) and text.endswith(after) and end >= len(before)
        return (len(before), end) if shown else None


def _on_purpose(refusal: UserError) -> bool:
    """Whether the template itself refuses a chat (``raise_exception``)."""
    return type(refusal.__cause__) is TemplateError


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
