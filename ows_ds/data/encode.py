"""Rows, dicts of columns (`rows.read`), -> tokens, and which of them are trained (`encoded.Encoded`)."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

from ows_ds.data import chat
from ows_ds.data.encoded import PAIRED, Builder, Counts, Encoded, EncodedRows
from ows_ds.data.messages import BadChat, answers, read_chat
from ows_ds.data.rows import (
    COLUMNS,
    LETTERS,
    Found,
    Row,
    conversation,
    format_of,
    system_of,
    unused_columns,
)
from ows_ds.errors import UserError

# Stanford Alpaca's prompt, as the text column of vicgalle/alpaca-gpt4 has it and, but for stray indents, LLM-Adapters
ALPACA = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{task}\n\n{more}### Response:\n"
)


def encode(
    row: Row,
    tokenizer: Any,
    max_length: int,
    loss_on: str = "assistant",
    format: str = "auto",
    key: str = "data.train",
    template: str = "auto",
) -> Encoded:
    """One row that `rows.read` accepted, truncated on the right to `max_length` tokens.

    Chats go through the tokenizer's chat template. Text rows are trained as a whole. Every other row is written as
    `template` says: "chat", one user and one assistant turn; "plain", as its format has it (`_plain`); "alpaca",
    Stanford Alpaca's prompt; "auto", chat where the tokenizer has a chat template, otherwise plain. What is not a
    chat ends with an end-of-sequence token. Under `loss_on` "assistant" the answer is trained with its end mark.

    Raises UserError naming model.path for a slow tokenizer (it does not give the characters of a token),
    data.template where it does not fit tokenizer or row, `key` where the chat template refuses the row, or
    data.loss_on where the template does not show where turns end.
    """
    kept = Builder()
    made = _tokens(row, tokenizer, loss_on, format, key, template)
    kept.add(made.ids[:max_length], made.trained[:max_length])
    return kept.build()[0]


def encode_rows(
    rows: Iterable[Found],
    tokenizer: Any,
    max_length: int,
    loss_on: str = "assistant",
    format: str = "auto",
    key: str = "data.train",
    template: str = "auto",
    on_bad_row: str = "stop",
    may_be_none: bool = False,
    today: datetime | None = None,
) -> tuple[EncodedRows, Counts]:
    """`encode` every row, drop those without a trained token, and count what happened.

    The first token of a row has no prediction, so it does not count as trained. Under `on_bad_row` "skip", rows that
    are errors and those that the chat template refuses are skipped. today: see `chat.write`.

    Rows of format preference become two each, the chosen answer and the rejected one; labelled ones two as well, with
    their own answer and with the one before it, and the first with the last, at the end.
    Raises UserError as `encode` does, naming the row's place, and, unless there `may_be_none`, naming `key`
    where no row is left.
    """
    kept, counts, without = Builder(), Counts(), 0
    first: tuple[_Tokens, bool] | None = None  # of labelled rows, until the last one is known
    before: _Tokens | None = None
    for where, row in rows:
        counts.rows += 1
        try:
            if isinstance(row, UserError):
                raise row
            ones, name = (answers(row, format), "prompt_completion") if format in PAIRED else ([row], format)
            made = [_tokens(one, tokenizer, loss_on, name, key, template, today) for one in ones]
        except UserError as error:
            named = error if isinstance(row, UserError) else _placed(error, key, where)
            if error.key != key or on_bad_row == "stop":
                raise named from error
            counts.bad += 1
            counts.first_bad = counts.first_bad or f"{where}: {error.right}"
            continue
        counts.ignored |= dict.fromkeys(c for c in made[0].unused if format not in PAIRED)
        notes = [note for one in made for note in one.notes]
        for note in notes:
            counts.notes[note] = counts.notes.get(note, 0) + 1
        counts.truncated += any(len(one.ids) > max_length for one in made)
        anywhere = all(any(one.trained[1:]) for one in made)
        if all(any(one.trained[1:max_length]) for one in made):
            counts.kept += 1
            if format == "labelled":  # with the answer before it, which was given to something else
                if first is None or before is None:
                    first, before = (made[0], row["label"]), made[0]
                    continue
                made, before = [made[0], _mismatched(made[0], before)], made[0]
            for one in made:
                kept.add(one.ids[:max_length], one.trained[:max_length], row.get("label") is not False)
        else:
            without += not anywhere
            counts.dropped += 1
            reason = "its first is after data.max_length" if anywhere else _nothing_trained(row, notes)
            counts.first_dropped = counts.first_dropped or f"{where}: {reason}"
    if first is not None and before is not None:
        for one in (first[0], _mismatched(first[0], before)):
            kept.add(one.ids[:max_length], one.trained[:max_length], first[1])
    if not counts.kept and not may_be_none:
        right = f"expected rows with a token to train among the first {max_length} (data.max_length)"
        if without:
            right += f": {without} have none at any length, the first is {counts.first_dropped}"
        if counts.bad:
            right += f"; {counts.bad} are bad, the first is {counts.first_bad}"
        raise UserError(key, f"{counts.rows} rows", right)
    counts.tokens, counts.trained_tokens = len(kept.tokens), sum(kept.targets)
    return kept.build(), counts


def _placed(error: UserError, key: str, where: str) -> UserError:
    """``error`` with the row's place: as the value where the row is wrong, otherwise behind what is expected."""
    if error.key == key:
        return UserError(key, where, error.right)
    return UserError(error.key, error.value, f"{error.right} ({where})") if error.key == "data.loss_on" else error


class _Tokens(NamedTuple):
    """A row at full length. trained: of each token. notes: of `chat.NOTES`. unused: columns that mean nothing here."""

    ids: list[int]
    trained: list[bool]
    notes: list[str]
    unused: list[str]


def _tokens(
    row: Row, tokenizer: Any, loss_on: str, format: str, key: str, template: str, today: datetime | None = None
) -> _Tokens:
    name = format_of(row, format)
    if not tokenizer.is_fast:
        raise UserError(
            "model.path", type(tokenizer).__name__, "expected a model with a fast tokenizer (tokenizer.json)"
        )
    has_chat = bool(tokenizer.chat_template)
    if template == "chat" and not has_chat:
        right = "expected plain or alpaca, or data.chat_template: this model's tokenizer has no chat template"
        raise UserError("data.template", template, right)
    is_chat = name != "text" and (template == "chat" or (template == "auto" and has_chat))
    messages = conversation(row, name)
    if messages is not None and not is_chat:
        if has_chat:
            raise UserError("data.template", template, "expected auto or chat for messages")
        right = "expected rows of another format, or data.chat_template: this model's tokenizer has no chat template"
        raise UserError(key, "messages", right)
    notes, unused = list[str](), unused_columns(row, name, is_chat)
    if name == "text":
        text, spans = row["text"], [(0, len(row["text"]))]
    elif is_chat:
        if messages is None:
            task, more, answer = _question(row, name)
            said = (("user", f"{task}\n\n{more}" if more else task), ("assistant", answer))
            messages = [*system_of(row), *({"role": role, "content": content} for role, content in said)]
        try:
            given = read_chat(messages, "messages", row)
        except BadChat as error:  # `rows.read` has verified messages, not what stands beside a question
            raise UserError(key, row, str(error)) from error
        text, spans, notes = chat.write(given, tokenizer, loss_on, key, today)
    else:
        task, more, answer = _question(row, name)
        prompt, completion = (_alpaca if template == "alpaca" else _plain)(name, task, more, answer)
        text = prompt + completion
        spans = [(0 if loss_on == "all" else len(prompt), len(text))]
        if not answer.strip():
            spans, notes = [], [chat.NOTES[0]]
    # A chat template writes the special tokens itself.
    encoding = tokenizer(text, add_special_tokens=not is_chat, return_offsets_mapping=True)
    ids: list[int] = list(encoding["input_ids"])
    if is_chat and loss_on == "all":
        return _Tokens(ids, [True] * len(ids), notes, unused)
    trained = [any(start < last and first < end for first, last in spans) for start, end in encoding["offset_mapping"]]
    if not is_chat and tokenizer.eos_token_id is not None:
        if ids[-1:] == [tokenizer.eos_token_id]:  # the tokenizer has put it there
            ids.pop()
            trained.pop()
        ids.append(tokenizer.eos_token_id)
        trained.append(bool(spans))
    return _Tokens(ids, trained, notes, unused)


def _mismatched(asked: _Tokens, answered: _Tokens) -> _Tokens:
    """The prompt of one row with another's answer, from which kto estimates how far the model has moved."""
    prompt, answer = asked.trained.index(True), answered.trained.index(True)
    trained = [False] * prompt + answered.trained[answer:]
    return _Tokens(asked.ids[:prompt] + answered.ids[answer:], trained, [], [])


def _nothing_trained(row: Row, notes: list[str]) -> str:
    """Why a row has no trained token."""
    if chat.NOTES[0] in notes:
        return "an empty answer"
    given = [row[name] for name in ("messages", "conversations") if isinstance(row.get(name), list)]
    messages: list[Any] = given[0] if given else []
    roles = {str(message.get("role") or message.get("from")) for message in messages}
    return "no assistant's turn" + (f", of the roles {', '.join(sorted(roles))}" if roles else "")


def _question(row: Row, name: str | None) -> tuple[str, str, str]:
    """The task, further input (or nothing) and the answer of a row that is neither a chat nor text."""
    if name == "alpaca":
        return row["instruction"], row.get("input") or "", row["output"]
    if name == "multiple_choice":
        choices = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))
        return "\n".join([row["question"].strip(), *choices]), "", LETTERS[row["answer"]]
    task, answer = COLUMNS[str(name)]
    return row[task], "", row[answer]


def _plain(name: str | None, task: str, more: str, answer: str) -> tuple[str, str]:
    """Prompt and completion as plain text; questions as lm-evaluation-harness asks those of GSM8K and MMLU."""
    if name == "question_answer":
        return f"Question: {task}\nAnswer:", f" {answer}"
    if name == "multiple_choice":
        return f"{task}\nAnswer:", f" {answer}"
    if name == "alpaca":
        return "".join(f"{part}\n" for part in (task, more) if part), answer
    return task, answer


def _alpaca(name: str | None, task: str, more: str, answer: str) -> tuple[str, str]:
    """The same in Stanford Alpaca's words, which differ for a task with further input and one without."""
    paired = ", paired with an input that provides further context" if more else ""
    return ALPACA.format(paired=paired, task=task, more=f"### Input:\n{more}\n\n" if more else ""), answer
