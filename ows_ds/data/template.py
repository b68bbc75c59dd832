"""A chat template as the model's makers wrote it, which tells of each of its characters which message it wrote it for.

The template's syntax tree gets marks where a loop takes up a message and where it lets go of it, and around
``{% generation %}``; what it writes is otherwise left as it is, and compared with what transformers makes of it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from ows_ds.compat.transformers import GENERATION, compiled_template, template_messages

CLOCK = "strftime_now"
BEGIN, TAKE, CLOSE, GENERATED = "marks_begin", "marks_take", "marks_close", "marks_generated"  # functions of `_Marks`


@dataclass(frozen=True)
class Rendered:
    """What a template writes for a conversation.

    Attributes:
        text: all of it.
        spans: of each message that the template writes in a loop, (first, past the last) character.
        generated: the same of what stands in ``{% generation %}``, in order.
    """

    text: str
    spans: Mapping[int, tuple[int, int]]
    generated: Sequence[tuple[int, int]]

    def after(self, message: int) -> str:
        """The text behind a message's."""
        return self.text[self.spans[message][1] :]


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Any,
    prompt: bool,
    settings: Mapping[str, Any],
    today: datetime | None = None,
) -> Rendered:
    """What the tokenizer's chat template writes.

    settings: other names that it reads (``chat_template_kwargs``). today: what is written as today's date; None: today.
    Raises whatever the template does.
    """
    plain = str(
        tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **settings
        )
    )
    marks = _Marks(template_messages(messages), unused_mark(plain))
    source = tokenizer.get_chat_template(None, tools)
    fixed = {CLOCK: today.strftime} if today is not None and CLOCK in source else {}
    marked = _instrumented(source).render(
        messages=marks.messages,
        tools=tools,
        documents=None,
        add_generation_prompt=prompt,
        **{**tokenizer.special_tokens_map, **settings, **fixed},
        **{BEGIN: marks.begin, TAKE: marks.take, CLOSE: marks.close, GENERATED: marks.generated},
    )
    found = marks.read(marked)
    return found if found.text == plain or fixed else Rendered(plain, {}, [])


def unused_mark(text: str) -> str:
    """A character of private use that is not in ``text``."""
    return next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)


class _Marks:
    """What the marks in a template write. A mark is a letter and a number between two of ``mark``."""

    def __init__(self, messages: list[Any], mark: str) -> None:
        self.messages, self._mark = messages, mark
        self._numbers = {id(message): number for number, message in enumerate(messages)}
        self._open: list[list[int | None]] = []  # [loop, message] of the loops that are being gone through

    def _write(self, letter: str, number: int | None = None) -> str:
        return f"{self._mark}{letter}{'' if number is None else number}{self._mark}"

    def begin(self, loop: int, item: Any = None) -> str:
        """An item of a loop begins."""
        written = self.close(loop)
        number = self._numbers.get(id(item))
        self._open.append([loop, number])
        return written if number is None else written + self._write("b", number)

    def take(self, item: Any) -> str:
        """A name is set within a loop: it may be how the loop takes up a message."""
        number = self._numbers.get(id(item))
        if number is None or not self._open or any(message is not None for _, message in self._open):
            return ""
        self._open[-1][1] = number
        return self._write("b", number)

    def close(self, loop: int) -> str:
        """A loop ends, or its next item begins: so do the items of the loops within it."""
        at = next((at for at, (one, _) in enumerate(self._open) if one == loop), len(self._open))
        closed, self._open = self._open[at:], self._open[:at]
        return "".join(self._write("e", number) for _, number in closed if number is not None)

    def generated(self, first: bool) -> str:
        """A ``{% generation %}`` begins, or ends."""
        return self._write("g" if first else "h")

    def read(self, marked: str) -> Rendered:
        """The text without its marks, and where they stood."""
        text, spans, generated = "", {}, []
        begun: dict[str, int] = {}
        parts = re.split(f"{self._mark}([begh])([0-9]*){self._mark}", marked)
        for at in range(0, len(parts), 3):
            text += parts[at]
            if at + 1 == len(parts):
                break
            letter, number = parts[at + 1 : at + 3]
            if letter in "bg":
                begun[number] = len(text)
            elif text[begun[number] :].strip():  # loops that only look write nothing
                span = (begun[number], len(text))
                if letter == "h":
                    generated.append(span)
                else:
                    spans[int(number)] = None if int(number) in spans else span  # written twice: it is not known where
        return Rendered(text, {number: span for number, span in spans.items() if span}, generated)


@functools.lru_cache(maxsize=8)
def _instrumented(source: str) -> Any:
    """The template with marks."""
    environment = compiled_template(source).environment
    tree = _AddMarks().visit(environment.parse(source))
    return environment.template_class.from_code(environment, environment.compile(tree), environment.make_globals(None))


class _AddMarks(NodeTransformer):
    """Writes calls of `_Marks` into a syntax tree."""

    def __init__(self) -> None:
        self._loops = self._depth = 0

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self._loops += 1
        loop = self._loops
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1
        item = [nodes.Name(node.target.name, "load")] if isinstance(node.target, nodes.Name) else []
        node.body.insert(0, _call(BEGIN, nodes.Const(loop), *item))
        return [node, _call(CLOSE, nodes.Const(loop))]

    def visit_Assign(self, node: nodes.Assign) -> Any:
        if not (self._depth and isinstance(node.target, nodes.Name) and isinstance(node.node, nodes.Getitem)):
            return node
        return [node, _call(TAKE, nodes.Name(node.target.name, "load"))]

    def visit_CallBlock(self, node: nodes.CallBlock) -> Any:
        self.generic_visit(node)
        if isinstance(node.call.node, nodes.ExtensionAttribute) and node.call.node.name == GENERATION:
            first, last = (_call(GENERATED, nodes.Const(one)) for one in (True, False))
            node.body = [first, *node.body, last]
        return node


def _call(name: str, *arguments: nodes.Expr) -> nodes.Output:
    return nodes.Output([nodes.Call(nodes.Name(name, "load"), list(arguments), [], None, None)])
