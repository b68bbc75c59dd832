"""The chat templates that models come with: what is trained, token by token, against what their makers document.

The templates are those that TRL ships (`trl/chat_templates`, Apache License 2.0), as the models have them; Mistral's,
which it does not, is in our words. The tokenizer has one token a byte, and the special tokens of the family.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from ows_ds.data.encode import encode
from ows_ds.data.encoded import IGNORE
from ows_ds.errors import UserError
from tests.data.test_data import byte_tokenizer, lists

# White space at both ends of what is said: some families keep it.
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "sure? "},
    {"role": "assistant", "content": " yes\n"},
]
MARKS = {
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "qwen2_5": [None, "<|im_end|>", "<|im_start|>"],
    "qwen3": [None, "<|im_end|>", "<|im_start|>", "<think>", "</think>"],
}  # beginning and end of a sequence (as generation knows it), and what else is special

# What the template of v0.3 writes, tools left out.
MISTRAL_V3 = """{{ bos_token }}{% set said = messages if messages[0].role != "system" else messages[1:] %}
{%- for m in said %}{% if (m.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("roles must alternate") }}
{%- endif %}{% if m.role == "user" %}{% set first = messages[0].content + "\n\n" if said != messages and loop.last %}
{{- "[INST] " + (first or "") + m.content + "[/INST]" }}{% else %}{{ " " + m.content | trim + eos_token }}{% endif %}
{%- endfor %}"""

# Written by hand: runs of text, of which every second one is trained.
LLAMA3 = [
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "4<|eot_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\nsure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "yes<|eot_id|>",
]
MISTRAL = ["<s>[INST] 2+2?[/INST]", " 4</s>", "[INST] sure? [/INST]", " yes</s>"]
GEMMA = [
    "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n",
    "4<end_of_turn>",
    "\n<start_of_turn>user\nsure?<end_of_turn>\n<start_of_turn>model\n",
    "yes<end_of_turn>",
    "\n",
]
PHI3 = [
    "<|system|>\nBe brief.<|end|>\n<|user|>\n2+2?<|end|>\n<|assistant|>\n",
    "4<|end|>",
    "\n<|user|>\nsure? <|end|>\n<|assistant|>\n",
    " yes\n<|end|>",
    "\n<|endoftext|>",
]
QWEN = [
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
    "4<|im_end|>",
    "\n<|im_start|>user\nsure? <|im_end|>\n<|im_start|>assistant\n",
    " yes\n<|im_end|>",
    "\n",
]
# the last answer of a chat is one after thoughts, here none; those before it have lost theirs
QWEN3 = [*QWEN[:3], "<think>\n\n</think>\n\n yes\n<|im_end|>", "\n"]
EXPECTED = {"llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "phi3": PHI3, "qwen2_5": QWEN, "qwen3": QWEN3}
NO_SYSTEM = {"mistral", "gemma"}


def shipped(name: str) -> str:
    """A template that TRL ships; it is read, and TRL is not imported."""
    trl = find_spec("trl")
    if trl is None:
        pytest.skip("TRL, which ships the templates, is for Python 3.11 and newer")
    [place] = trl.submodule_search_locations or []
    return (Path(place) / "chat_templates" / f"{name}.jinja").read_text()


@functools.cache
def tokenizer(family: str) -> Any:
    """One token a byte, with the family's marks and its own template; one that adds a beginning to plain text."""
    found = byte_tokenizer(MISTRAL_V3 if family == "mistral" else shipped(family))
    begin, end, *others = MARKS[family]
    marks = {"eos_token": end} | ({"bos_token": begin} if begin else {})
    found.add_special_tokens({name: AddedToken(mark, special=True, normalized=False) for name, mark in marks.items()})
    found.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in others])
    return found


def labelled(family: str, runs: list[str]) -> tuple[list[int], list[int]]:
    """The tokens of ``runs``, and their labels: every second one's are trained."""
    parts = [tokenizer(family)(run, add_special_tokens=False)["input_ids"] for run in runs]
    ids = [token for part in parts for token in part]
    return ids, [token if i % 2 else IGNORE for i, part in enumerate(parts) for token in part]


def trains(family: str, messages: list[dict[str, Any]], runs: list[str]) -> None:
    encoded = encode({"messages": messages}, tokenizer(family), 1000)
    assert lists(encoded) == labelled(family, runs)


@pytest.mark.parametrize("family", EXPECTED)
def test_answers_and_their_end_marks_are_trained_and_nothing_else(family: str) -> None:
    talk = TALK if family in NO_SYSTEM else [SYSTEM, *TALK]
    trains(family, talk, EXPECTED[family])
    # the marks are single tokens, and the beginning is there once
    begin, end, *others = MARKS[family]
    ids = encode({"messages": talk}, tokenizer(family), 1000).input_ids.tolist()
    for mark in (end, *others):
        assert len(tokenizer(family)(mark, add_special_tokens=False)["input_ids"]) == 1
    if begin and family != "phi3":  # whose template leaves it out
        assert [i for i, token in enumerate(ids) if token == tokenizer(family).bos_token_id] == [0]


@pytest.mark.parametrize("family", EXPECTED)
def test_turns_that_say_no_are_left_out(family: str) -> None:
    """Of the first answer nothing is trained; where it is the last of a shorter chat, it is."""
    talk = [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]
    first, answer, between, *rest = EXPECTED[family]
    talk = talk if family in NO_SYSTEM else [SYSTEM, *talk]
    trains(family, talk, [first + answer + between, *rest])
    encoded = encode({"messages": talk[:-2]}, tokenizer(family), 1000)
    assert set(encoded.labels.tolist()) == {IGNORE}


@pytest.mark.parametrize("family", sorted(set(EXPECTED) - {"qwen3"}))
def test_one_turn(family: str) -> None:
    """The same answer at the end of a chat, with what the family writes behind it."""
    first, answer, *_ = EXPECTED[family]
    behind = {"gemma": "\n", "phi3": "\n<|endoftext|>", "qwen2_5": "\n"}.get(family)
    trains(family, (TALK if family in NO_SYSTEM else [SYSTEM, *TALK])[: 2 + (family not in NO_SYSTEM)],
           [first, answer, *([behind] if behind else [])])  # fmt: skip


def test_a_system_text_that_is_not_given() -> None:
    """Qwen2.5 has one of its own; Llama 3 has none."""
    own = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    trains("qwen2_5", TALK, [QWEN[0].replace("Be brief.", own), *QWEN[1:]])
    without = "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    trains("llama3", TALK, [LLAMA3[0].replace(without, ""), *LLAMA3[1:]])


def test_thoughts_are_trained_where_the_template_shows_them() -> None:
    talk = [TALK[0], {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"}]
    first = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    trains("qwen3", talk, [first, "<think>\nadd\n</think>\n\n4<|im_end|>", "\n"])
    again = [*talk, TALK[2], {"role": "assistant", "content": "<think>\nyes\n</think>\n\nyes"}]
    shown = [first, "4<|im_end|>", QWEN[2], "<think>\nyes\n</think>\n\nyes<|im_end|>", "\n"]
    trains("qwen3", again, shown)


@pytest.mark.parametrize(
    ("family", "messages", "says"),
    [
        ("gemma", [SYSTEM, *TALK], "System role not supported"),
        ("gemma", [TALK[0], TALK[2]], "Conversation roles must alternate"),
        ("mistral", [TALK[0], TALK[2]], "roles must alternate"),
        # it writes the system text only where the chat ends with a question
        ("mistral", [SYSTEM, *TALK], "leaves out turn 1, of role system"),
    ],
)
def test_what_a_family_cannot_say_is_refused(family: str, messages: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(UserError, match=says):
        encode({"messages": messages}, tokenizer(family), 1000)
