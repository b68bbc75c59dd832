"""Rows that are chats, in every way that people write them, and which of their turns are trained."""

from __future__ import annotations

from typing import Any

import pytest

from ows_ds.data.encode import encode
from ows_ds.errors import UserError
from tests.data.test_data import byte_tokenizer, trained

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
    "the user is trained too": (
        {"messages": [*MESSAGES[:3], MESSAGES[3] | {"train": True}, MESSAGES[4]]},
        ["4<|im_end|>", "sure?", "yes<|im_end|>"],
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_ways_to_write_a_chat(name: str) -> None:
    row, expected = SAME[name]
    tokenizer = byte_tokenizer()
    encoded = encode(row, tokenizer, 1000)
    assert tokenizer.decode(encoded.input_ids.tolist()) == TEXT
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
