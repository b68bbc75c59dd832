"""Rows that are chats, in every way that people write them, and which of their turns are trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ows_ds.data.encode import encode, encode_rows
from ows_ds.data.rows import load_rows
from ows_ds.errors import UserError
from tests.data.test_data import located, trained
from tests.support.tokenizer import CHATML, byte_tokenizer

SAID = "<|im_start|>{}\n{}<|im_end|>\n".format
# What every row of `SAME` becomes; its last turn is trained, and the one before where the row does not say no.
TEXT = (
    SAID("system", "Be brief.")
    + SAID("user", "2+2?")
    + SAID("assistant", "4")
    + SAID("user", "sure?")
    + SAID("assistant", "yes")
)
SHAREGPT = [
    {"from": "human", "value": "2+2?"},
    {"from": "gpt", "value": "4"},
    {"from": "human", "value": "sure?"},
    {"from": "gpt", "value": "yes"},
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
]
BOTH, LAST = ["4<|im_end|>", "yes<|im_end|>"], ["yes<|im_end|>"]
SAME: dict[str, tuple[dict[str, Any], list[str]]] = {
    "OpenAI": ({"messages": MESSAGES}, BOTH),
    "ShareGPT": ({"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT]}, BOTH),
    "ShareGPT, a system column": ({"conversations": SHAREGPT, "system": "Be brief."}, BOTH),
    "conversations of roles": ({"conversations": MESSAGES}, BOTH),
    "empty columns of Arrow": (
        {"messages": [{**m, "train": None, "weight": None, "from": None, "value": None} for m in MESSAGES]},
        BOTH,
    ),
    "Alpaca with a history": (
        {"instruction": "sure?", "input": "", "output": "yes", "system": "Be brief.", "history": [["2+2?", "4"]]},
        BOTH,
    ),
    "TRL's prompt and completion": ({"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]}, LAST),
    "train: false": ({"messages": [*MESSAGES[:2], MESSAGES[2] | {"train": False}, *MESSAGES[3:]]}, LAST),
    "training: false": ({"messages": [*MESSAGES[:2], MESSAGES[2] | {"training": False}, *MESSAGES[3:]]}, LAST),
    "weight: 0": (
        {
            "conversations": [
                SHAREGPT[0],
                SHAREGPT[1] | {"weight": 0},
                SHAREGPT[2],
                SHAREGPT[3] | {"weight": 1},
            ],
            "system": "Be brief.",
        },
        LAST,
    ),
    "weight: 0.0": ({"messages": [*MESSAGES[:2], MESSAGES[2] | {"weight": 0.0}, *MESSAGES[3:]]}, LAST),
    "loss: false": ({"messages": [*MESSAGES[:2], MESSAGES[2] | {"loss": False}, *MESSAGES[3:]]}, LAST),
    "messages, a system column": ({"messages": MESSAGES[1:], "system": "Be brief."}, BOTH),
    "content in parts": (
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]},
        BOTH,
    ),
    "a developer": ({"messages": [{**MESSAGES[0], "role": "developer"}, *MESSAGES[1:]]}, BOTH),
    "a question with a system column": ({"question": "2+2?", "answer": "4", "system": "Be brief."}, ["4<|im_end|>"]),
    "the user is trained too": (
        {"messages": [*MESSAGES[:3], MESSAGES[3] | {"train": True}, MESSAGES[4]]},
        ["4<|im_end|>", "sure?", "yes<|im_end|>"],
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_ways_to_write_a_chat(name: str) -> None:
    row, expected = SAME[name]
    tokenizer = byte_tokenizer(CHATML.replace("}<|im", "}{{ m['role'] == 'developer' and m.nothing.x or '' }}<|im", 1))
    encoded = encode(row, tokenizer, 1000)
    text = tokenizer.decode(encoded.input_ids.tolist())
    assert text == (TEXT if "question" not in row else "".join(TEXT.partition("4<|im_end|>\n")[:2]))
    assert trained(encoded, tokenizer) == expected


def test_a_user_who_says_what_the_template_says() -> None:
    """The content is found where it stands, not where the same letters stand before it."""
    tokenizer = byte_tokenizer()
    row = {"messages": [{"role": "user", "content": "user", "train": True}, {"role": "assistant", "content": "no"}]}
    encoded = encode(row, tokenizer, 1000)
    labels = encoded.labels.tolist()
    [start] = [i for i, (a, b) in enumerate(zip([-100, *labels], labels, strict=False))
               if a == -100 != b][:1]  # fmt: skip
    text = tokenizer.decode(encoded.input_ids.tolist()[:start])
    assert text.endswith("<|im_start|>user\n")
    assert trained(encoded, tokenizer) == ["user", "no<|im_end|>"]


def test_what_the_template_gets_of_a_turn() -> None:
    """Other keys reach it, those about training do not."""
    template = "{% for m in messages %}[{% for key in m %}{{ key }}={{ m[key] }},{% endfor %}]{% endfor %}"
    tokenizer = byte_tokenizer(template)
    turn = {"from": "gpt", "value": "hi", "name": "Ann", "weight": 1, "train": None}
    encoded = encode({"conversations": [turn]}, tokenizer, 1000)
    assert tokenizer.decode(encoded.input_ids.tolist()) == "[role=assistant,name=Ann,content=hi,]"


def test_masks_that_cannot_be_heeded_are_refused() -> None:
    row = {"messages": [*MESSAGES[:2], MESSAGES[2] | {"train": False}, *MESSAGES[3:]]}
    with pytest.raises(UserError, match=r"data\.loss_on: 'all' is invalid: expected assistant: a row says which"):
        encode(row, byte_tokenizer(), 1000, loss_on="all")
    hides = byte_tokenizer("{% for m in messages if m['role'] != 'user' %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(UserError, match="it leaves out turn 1, of role user"):
        encode({"messages": [{"role": "user", "content": "a", "train": True}]}, hides, 1000)


# ------------------------------------------------------------------ calls of functions

WITH_CALLS = (
    "{% if tools %}{{ tools[0]['function']['name'] }}: {{ tools[0]['function']['parameters'] | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] %}[{{ c['function']['name'] }} {{ c['function']['arguments'] | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARGUMENTS = {"city": "Bonn", "days": [1, {"at": "noon"}]}
TOOL = {
    "type": "function",
    "function": {"name": "rain", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def asking(call: dict[str, Any], **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Rain?"}, call, {"role": "tool", "content": "wet"}]
    return {"messages": [*messages, {"role": "assistant", "content": "yes"}], "tools": [TOOL], **more}


CALL = {"type": "function", "function": {"name": "rain", "arguments": ARGUMENTS}}
PADDED = {"name": "rain", "arguments": {**ARGUMENTS, "days": [1, {"at": "noon", "x": None}], "y": None}}
CALLS: dict[str, dict[str, Any]] = {
    "content null": asking({"role": "assistant", "content": None, "tool_calls": [CALL]}),
    "no content": asking({"role": "assistant", "tool_calls": [CALL]}),
    "content empty": asking({"role": "assistant", "content": "", "tool_calls": [CALL]}),
    "arguments as text": asking(
        {"role": "assistant", "tool_calls": [{"function": {"name": "rain", "arguments": json.dumps(ARGUMENTS)}}]}
    ),
    "nulls of Arrow": asking({"role": "assistant", "tool_calls": [{"id": None, "function": PADDED}]}),
    "tools as text": asking({"role": "assistant", "tool_calls": [CALL]}, tools=json.dumps([TOOL])),
    "LLaMA-Factory": {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": json.dumps({"name": "rain", "arguments": ARGUMENTS})},
            {"from": "observation", "value": "wet"},
            {"from": "gpt", "value": "yes"},
        ],
        "tools": json.dumps([TOOL]),
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_ways_to_write_a_call(name: str) -> None:
    tokenizer = byte_tokenizer(WITH_CALLS)
    encoded = encode(CALLS[name], tokenizer, 1000)
    call = '[rain {"city": "Bonn", "days": [1, {"at": "noon"}]}]<|im_end|>'
    assert trained(encoded, tokenizer) == [call, "yes<|im_end|>"]
    assert tokenizer.decode(encoded.input_ids.tolist()).startswith('rain: {"type": "object"')


def test_files_of_calls_give_the_same_tokens(tmp_path: Path) -> None:
    """Arrow has every key of any row in all rows."""
    import datasets

    rows = [CALLS["no content"], asking({"role": "assistant", "tool_calls": [
        {"type": "function", "function": {"name": "rain", "arguments": {"city": "Kiel", "wind": 3}}}]})]  # fmt: skip
    rows = json.loads(json.dumps(rows).replace('"days": [1, {"at": "noon"}]', '"days": [1, 2]'))
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "r.parquet")
    made.save_to_disk(tmp_path / "saved")
    tokenizer = byte_tokenizer(WITH_CALLS)
    found = [
        [encode(row, tokenizer, 1000).input_ids.tolist() for row in load_rows(tmp_path / name)]
        for name in ("r.jsonl", "r.parquet", "saved")
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            asking({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}),
            "every call of a function a name",
        ),
        (asking({"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}), "valid JSON"),
        (asking({"role": "assistant", "content": "x"}, tools="{}x"), "valid JSON"),
        (asking({"role": "assistant", "content": "x"}, tools=[3]), "tools as a list of JSON schemas"),
        (asking({"role": "assistant", "content": "x"}, chat_template_kwargs=[3]), "a name and a value each"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a list of parts that are all text"),
        ({"messages": MESSAGES, "system": "Be long."}, "expected one system text"),
    ],
)
def test_what_is_no_call_is_refused(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=says):
        load_rows(tmp_path / "r.jsonl")


def test_what_stands_beside_a_question_is_used_or_named() -> None:
    row = {"prompt": "a", "completion": "b", "system": "s", "tools": "["}
    with pytest.raises(UserError, match="valid JSON"):
        encode(row, byte_tokenizer(), 1000)
    _, counts = encode_rows(located(row), byte_tokenizer(), 1000, template="plain")
    assert list(counts.ignored) == ["system", "tools"]


def test_tools_that_the_template_does_not_show_are_refused() -> None:
    with pytest.raises(UserError, match="it leaves out the tool rain"):
        encode({"messages": MESSAGES[1:], "tools": [TOOL]}, byte_tokenizer(), 1000)


# ------------------------------------------------------------------ where generation stops


def test_a_template_whose_end_mark_is_the_head_of_the_next_turn() -> None:
    """The kind of GLM: what follows an answer stops generation, so it is trained, and written behind the last one."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' if m['role'] == 'user' else '<|im_end|>' }}{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_end|>{% endif %}"
    )
    tokenizer = byte_tokenizer(template)
    encoded = encode({"messages": MESSAGES[1:]}, tokenizer, 1000)
    assert trained(encoded, tokenizer) == ["4<|im_start|>", "yes<|im_start|>"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # what the template marks is trained, to the mark at which generation stops
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
            "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}",
            BOTH,
        ),
        # messages are looked up by their numbers, in a loop that looks at some before
        (
            "{% for i in range(messages | length) %}{% set last = messages[-1] %}{% endfor %}"
            "{% for i in range(messages | length) %}{% set m = messages[i] %}<|im_start|>{{ m['role'] }}\n"
            "{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            BOTH,
        ),
        # a loop that is left early, and begins again within another
        (
            "{% for m in messages %}{% if loop.first %}{% for other in messages %}{% break %}{% endfor %}{% endif %}"
            "{% if m.role == 'system' %}<|im_start|>{{ m.content }}{% continue %}{% endif %}"
            "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            BOTH,
        ),
        # no loop: the content, and the mark behind it
        (
            "{{ messages[0].content }}{{ messages[1].content }}{{ messages[2].content }}<|im_end|>"
            "{{ messages[3].content }}{{ messages[4].content }}<|im_end|>",
            BOTH,
        ),
        # no mark at all, and another turn is refused: the content alone
        (
            "{% if messages | length > 5 %}{{ raise_exception('long') }}{% endif %}"
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            ["4", "yes"],
        ),
    ],
)
def test_where_answers_stand(template: str, expected: list[str]) -> None:
    tokenizer = byte_tokenizer(template)
    assert trained(encode({"messages": MESSAGES}, tokenizer, 1000), tokenizer) == expected


def test_empty_answers_are_not_trained_and_counted() -> None:
    empty = [MESSAGES[1], {"role": "assistant", "content": " "}]
    rows = [{"messages": [*empty, *MESSAGES[3:]], "id": 3}, {"messages": empty, "source": "x"}]
    kept, counts = encode_rows(located(*rows), byte_tokenizer(), 1000)
    assert trained(kept[0], byte_tokenizer()) == LAST
    assert counts.line(1000) == (
        "1 rows, 4 trained tokens; 1 without a trained token dropped, the first is r.jsonl:2: an empty answer; "
        "2 empty answers are not trained; ignored columns: id, source"
    )
    _, counts = encode_rows(located({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}),
                            byte_tokenizer(None), 1000)  # fmt: skip
    assert (counts.kept, counts.notes) == (1, {"empty answers are not trained": 1})


def test_reasoning_that_the_template_leaves_out_is_counted() -> None:
    row = {"messages": [MESSAGES[1], MESSAGES[2] | {"reasoning_content": "two and two"}]}
    assert encode_rows(located(row), byte_tokenizer(), 1000)[1].notes == {
        "answers whose reasoning the chat template leaves out": 1
    }
