"""Rows, labels and batches, against literal answers from a tokenizer of one token per byte."""

import json
from pathlib import Path
from typing import Any

import pytest

from ows_ds.data.encode import encode, encode_rows
from ows_ds.data.encoded import IGNORE, Builder, Encoded
from ows_ds.data.rows import Found, load_rows
from ows_ds.errors import UserError
from tests.support.tokenizer import byte_tokenizer

# Shows earlier answers without their thoughts, so that a prefix of the messages is no prefix of the text.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'].split(':')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "two plus two?"},
    {"role": "assistant", "content": "four: 4 ✓"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
]


def lists(encoded: Encoded) -> tuple[list[int], list[int]]:
    """Tokens and labels."""
    return encoded.input_ids.tolist(), encoded.labels.tolist()


def row_of(input_ids: list[int], labels: list[int]) -> Encoded:
    builder = Builder()
    builder.add(input_ids, [label != IGNORE for label in labels])
    return builder.build()[0]


def trained(encoded: Encoded, tokenizer: Any) -> list[str]:
    """The runs of trained tokens as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(*lists(encoded), strict=True):
        assert label in (IGNORE, token)
        if label == IGNORE:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def located(*rows: Any) -> list[Found]:
    """Rows as `rows.read` gives them."""
    return [(f"r.jsonl:{number}", row) for number, row in enumerate(rows, start=1)]


def test_the_assistants_turns_are_trained_with_their_end_marks() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode({"messages": TALK}, tokenizer, 1000)
    assert trained(encoded, tokenizer) == ["four: 4 ✓<|im_end|>", "yes<|im_end|>"]
    text = tokenizer.decode(encoded.input_ids.tolist())
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\ntwo plus two?")


def test_all_tokens_are_trained_on_request() -> None:
    encoded = encode({"messages": TALK}, byte_tokenizer(), 1000, loss_on="all")
    assert encoded.labels.tolist() == encoded.input_ids.tolist()


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "add", "input": "1 1", "output": "2"},
        {"prompt": "add\n\n1 1", "completion": "2"},
        {"messages": [{"role": "user", "content": "add\n\n1 1"}, {"role": "assistant", "content": "2"}]},
    ],
)
def test_formats_become_the_same_conversation(row: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer()
    encoded = encode(row, tokenizer, 1000)
    assert trained(encoded, tokenizer) == ["2<|im_end|>"]
    assert tokenizer.decode(encoded.input_ids.tolist()).endswith(
        "<|im_start|>user\nadd\n\n1 1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    )


def test_without_a_chat_template_rows_are_plain_text() -> None:
    tokenizer = byte_tokenizer(None)
    alpaca = encode({"instruction": "add", "input": "1 1", "output": "2"}, tokenizer, 1000)
    assert tokenizer.decode(alpaca.input_ids.tolist()) == "add\n1 1\n2<|im_end|>"
    assert trained(alpaca, tokenizer) == ["2<|im_end|>"]
    pair = encode({"prompt": "a ", "completion": "b"}, tokenizer, 1000, loss_on="all")
    assert trained(pair, tokenizer) == ["a b<|im_end|>"]
    text = encode({"text": "abc"}, tokenizer, 1000)
    assert trained(text, tokenizer) == ["abc<|im_end|>"]
    with pytest.raises(UserError, match="no chat template"):
        encode({"messages": TALK}, tokenizer, 1000)


# Each with the text that the tokenizer gets, and the part of it that is trained.
GSM8K = {"question": "How many clips?", "answer": "48/2=<<48/2=24>>24 clips.\n#### 24"}
MMLU = {"question": " Which is a mammal?\n", "subject": "", "choices": ["Trout", "Bat", "Crow", "Newt"], "answer": 1}
# The example of vicgalle/alpaca-gpt4's card; what is expected is its column `text`.
ODD = {
    "instruction": "Identify the odd one out.",
    "input": "Twitter, Instagram, Telegram",
    "output": "The odd one out is Telegram.",
}
COMMONSENSE = {
    "instruction": "Please answer the following question with true or false, question: is ice cold?\n\n"
    "Answer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}


@pytest.mark.parametrize(
    ("row", "template", "text", "answer"),
    [
        (
            GSM8K,
            "plain",
            "Question: How many clips?\nAnswer: 48/2=<<48/2=24>>24 clips.\n#### 24",
            " 48/2=<<48/2=24>>24 clips.\n#### 24",
        ),
        (
            MMLU,
            "plain",
            "Which is a mammal?\nA. Trout\nB. Bat\nC. Crow\nD. Newt\nAnswer: B",
            " B",
        ),
        (
            ODD,
            "alpaca",
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nIdentify the odd one out.\n\n### Input:\nTwitter, Instagram, Telegram\n\n"
            "### Response:\nThe odd one out is Telegram.",
            "The odd one out is Telegram.",
        ),
        (
            COMMONSENSE,
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nPlease answer the following question with true or false, question: is ice "
            "cold?\n\nAnswer format: true/false\n\n### Response:\nthe correct answer is true",
            "the correct answer is true",
        ),
        (ODD, "plain", "Identify the odd one out.\nTwitter, Instagram, Telegram\nThe odd one out is Telegram.", None),
        ({"text": "as it is"}, "alpaca", "as it is", "as it is"),
    ],
)
def test_prompts_as_the_benchmarks_write_them(
    row: dict[str, Any], template: str, text: str, answer: str | None
) -> None:
    bare = byte_tokenizer(None)
    encoded = encode(row, bare, 1000, template=template)
    assert bare.decode(encoded.input_ids.tolist()) == text + "<|im_end|>"
    assert trained(encoded, bare) == [(answer or row["output"]) + "<|im_end|>"]
    whole = encode(row, bare, 1000, loss_on="all", template=template)
    assert whole.labels.tolist() == whole.input_ids.tolist() == encoded.input_ids.tolist()
    # a chat template that is there is not used against the recipe
    assert lists(encode(row, byte_tokenizer(), 1000, template=template)) == lists(encoded)


@pytest.mark.parametrize(
    ("row", "said", "answer"),
    [
        (GSM8K, "How many clips?", "48/2=<<48/2=24>>24 clips.\n#### 24"),
        (MMLU, "Which is a mammal?\nA. Trout\nB. Bat\nC. Crow\nD. Newt", "B"),
    ],
)
def test_questions_become_a_conversation(row: dict[str, Any], said: str, answer: str) -> None:
    tokenizer = byte_tokenizer()
    encoded = encode(row, tokenizer, 1000)
    assert lists(encoded) == lists(encode(row, tokenizer, 1000, template="chat"))
    assert tokenizer.decode(encoded.input_ids.tolist()).endswith(
        f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    )
    assert trained(encoded, tokenizer) == [f"{answer}<|im_end|>"]


def test_templates_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.template: 'chat' is invalid: expected plain or alpaca"):
        encode(GSM8K, byte_tokenizer(None), 1000, template="chat")
    for template in ("plain", "alpaca"):
        with pytest.raises(UserError, match=r"data\.template: .* expected auto or chat for messages"):
            encode({"messages": TALK}, byte_tokenizer(), 1000, template=template)


def test_a_template_that_rewrites_turns_is_trained_as_it_writes_them() -> None:
    forgetful = byte_tokenizer(FORGETFUL)
    assert trained(encode({"messages": TALK}, forgetful, 1000), forgetful) == [" 4 ✓<|im_end|>", "yes<|im_end|>"]


def test_templates_that_hide_turns_or_refuse_rows_are_errors() -> None:
    hiding = byte_tokenizer("{{ messages[-1]['content'] }}{% if add_generation_prompt %}?{% endif %}")
    for loss_on in ("assistant", "all"):
        with pytest.raises(UserError, match=r"it leaves out turn 1, of role user"):
            encode({"messages": TALK}, hiding, 1000, loss_on)
    upper = byte_tokenizer("{{ (messages | map(attribute='content') | join) * 2 }}")
    with pytest.raises(UserError, match=r"data\.loss_on: 'assistant' is invalid: expected all: .* turn 2"):
        encode({"messages": TALK}, upper, 1000)
    assert encode({"messages": TALK}, upper, 1000, loss_on="all").trained.all()
    strict = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"data\.eval: .*roles must alternate"):
        encode({"messages": TALK}, strict, 1000, key="data.eval")


def test_long_rows_are_cut_and_rows_without_a_target_are_dropped_and_counted() -> None:
    tokenizer = byte_tokenizer(None)
    rows = [
        {"prompt": "abc", "completion": "de"},  # 6 tokens with the end mark, 3 trained
        {"prompt": "abcdef", "completion": "g"},  # nothing of the completion is left
        {"prompt": "a", "completion": "bcdefg"},  # cut in the completion: 4 trained
    ]
    kept, counts = encode_rows(located(*rows), tokenizer, 5)
    assert [tokenizer.decode(k.input_ids.tolist()) for k in kept] == ["abcde", "abcde"]
    assert [k.targets for k in kept] == kept.targets.tolist() == [2, 4]
    assert [sum(x != IGNORE for x in k.labels[1:].tolist()) for k in kept] == [2, 4]
    assert (counts.rows, counts.kept, counts.dropped, counts.truncated) == (3, 2, 1, 3)
    assert (counts.tokens, counts.trained_tokens) == (10, 6)
    assert counts.first_dropped == "r.jsonl:2: its first is after data.max_length"
    assert counts.line(5) == (
        "2 rows, 6 trained tokens; 1 without a trained token dropped, the first is r.jsonl:2: its first is after "
        "data.max_length; 3 cut to 5 tokens"
    )
    with pytest.raises(UserError, match=r"data\.eval: '1 rows'"):
        encode_rows(located(rows[1]), tokenizer, 5, key="data.eval")
    assert len(encode_rows(located(rows[1]), tokenizer, 5, may_be_none=True)[0]) == 0


def test_bad_rows_stop_or_are_skipped_and_named() -> None:
    """Those that are none of a format, and those that the chat template refuses."""
    tokenizer = byte_tokenizer(
        "{{ raise_exception('never') if messages[0]['content'] == 'x' else messages[0]['content'] }}"
    )
    good, refused = {"text": "abc"}, {"messages": [{"role": "user", "content": "x"}]}
    broken = UserError("data.train", "r.jsonl:2", "expected text as text")
    silent = {"messages": [{"role": "user", "content": "y"}]}
    rows = [("r.jsonl:1", good), ("r.jsonl:2", broken), ("r.jsonl:3", refused), ("r.jsonl:4", silent)]
    with pytest.raises(UserError) as error:
        encode_rows(rows, tokenizer, 9)
    assert error.value is broken
    with pytest.raises(UserError) as error:
        encode_rows([rows[0], rows[2]], tokenizer, 9)
    assert str(error.value) == (
        "data.train: 'r.jsonl:3' is invalid: expected messages that the model's chat template takes (never)"
    )
    kept, counts = encode_rows(rows, tokenizer, 9, on_bad_row="skip")
    assert (len(kept), counts.bad, counts.dropped, counts.rows) == (1, 2, 1, 4)
    assert counts.first_bad == "r.jsonl:2: expected text as text"
    assert counts.first_dropped == "r.jsonl:4: no assistant's turn, of the roles user"
    assert "2 bad ones skipped, the first is r.jsonl:2: expected text as text" in counts.line(9)
    with pytest.raises(UserError, match=r"1 are bad, the first is r\.jsonl:2: expected text as text"):
        encode_rows(rows[1:2], tokenizer, 9, on_bad_row="skip")
    with pytest.raises(UserError, match=r"data\.template"):  # a setting, not a row: nothing to skip
        encode_rows(rows[2:3], tokenizer, 9, template="plain", on_bad_row="skip")


def test_rows_are_read_in_order_and_blank_lines_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"text": "é"}, "", {"prompt": "a", "completion": "b"})
    assert load_rows(path) == [{"text": "é"}, {"prompt": "a", "completion": "b"}]
    write(path, "{", {"text": "a"}, {"text": 3}, "[]")
    assert load_rows(path, on_bad_row="skip") == [{"text": "a"}]


@pytest.mark.parametrize(
    ("bad", "right"),
    [
        ('{"text": ', "expected one JSON object a line"),
        ("[1]", "expected a JSON object"),
        (
            {"question": "a"},
            "expected the columns messages or conversations or instruction, output or prompt, completion or question, "
            "choices, answer or question, answer or text",
        ),
        ({"text": 3}, "expected text as text"),
        ({"messages": []}, "expected messages as a list of at least one message"),
        ({"messages": [{"role": "user"}]}, "expected every message a role and a content"),
        ({"messages": ["hi"]}, "expected every message a role and a content"),
        ({"conversations": [{"from": "me", "value": "a"}]}, "expected from as one of human, user, gpt"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "expected every message a from and a value, both text"),
        ({"conversations": [{"from": "gpt", "value": "a", "train": "no"}]}, "expected train as true or false"),
        ({"conversations": [{"from": "gpt", "value": "a", "weight": 0.5}]}, "expected weight as 0 or 1"),
        ({"conversations": [], "system": "a"}, "expected conversations as a list of at least one message"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "expected prompt and completion as a list"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "expected system as text and history as a list"),
        ({"instruction": "a", "output": None}, "expected output as text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "expected input as text"),
        ({"question": "a", "answer": 3}, "expected answer as text"),
        ({"question": "a", "choices": ["b"], "answer": 0}, "expected choices as a list of 2 to 26 texts"),
        ({"question": "a", "choices": ["b", "c"], "answer": 2}, "expected answer as the number of the right choice"),
        ({"question": "a", "choices": ["b", "c"], "answer": "B"}, "expected answer as the number of the right choice"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, bad: object, right: str) -> None:
    path = write(tmp_path / "r.jsonl", {"text": "a"}, bad)
    with pytest.raises(UserError) as error:
        load_rows(path, key="data.eval")
    assert (error.value.key, error.value.value) == ("data.eval", f"{path}:2")
    assert error.value.right.startswith(right)


def test_files_that_cannot_serve_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a readable JSON Lines file"):
        load_rows(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="at least one row"):
        load_rows(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(UserError, match="expected prompt as text"):
        load_rows(write(tmp_path / "r.jsonl", {"text": "a"}), format="prompt_completion")
