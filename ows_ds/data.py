"""Rows -> tokens and labels -> batches.

A row is a dict of columns (`rows.load_rows`); encoded, it is `{"input_ids": [...], "labels": [...]}`, two lists of
equal length, with label -100 where a token is not trained. Which rows make up an optimizer step is a pure
function of seed, step and batch size; ranks and micro-batches only cut it into parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy
import torch

from ows_ds.errors import UserError, first_line
from ows_ds.rows import COLUMNS, LETTERS, Row, format_of

MULTIPLE = 8  # tokens: rows of a batch are padded to a multiple of it
IGNORE = -100  # the label that torch's cross entropy leaves out
# Stanford Alpaca's prompt, as the text column of vicgalle/alpaca-gpt4 has it and, but for stray indents, LLM-Adapters
ALPACA = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{task}\n\n{more}### Response:\n"
)
Encoded = dict[str, list[int]]


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a file or data set.

    Attributes:
        rows: rows read.
        kept: rows with at least one trained token.
        dropped: rows without one, after cutting to the largest length.
        truncated: rows that were cut, kept or dropped.
        tokens: tokens of the kept rows.
        trained_tokens: those of them with a label.
    """

    rows: int
    kept: int
    dropped: int
    truncated: int
    tokens: int
    trained_tokens: int


def encode(
    row: Row,
    tokenizer: Any,
    max_length: int,
    loss_on: str = "assistant",
    format: str = "auto",
    key: str = "data.train",
    template: str = "auto",
) -> Encoded:
    """Tokens and labels of one row that `load_rows` let through, cut to `max_length` tokens from the right.

    Messages go through the tokenizer's chat template. Text rows are trained whole. Every other row is written as
    `template` says: "chat", one user and one assistant turn; "plain", as its format has it (`_plain`); "alpaca",
    Stanford Alpaca's prompt; "auto", chat where the tokenizer has a chat template, otherwise plain. What is not a
    chat ends with an end-of-sequence token. Under `loss_on` "assistant" the answer is trained with its end mark.

    Raises UserError naming model.path when the tokenizer is a slow one (it does not tell which characters a
    token covers), data.template when it does not fit tokenizer or row, `key` when the chat template refuses the
    row, or data.loss_on when it hides where turns end.
    """
    ids, labels = _tokens(row, tokenizer, loss_on, format, key, template)
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    loss_on: str = "assistant",
    format: str = "auto",
    key: str = "data.train",
    template: str = "auto",
) -> tuple[list[Encoded], Counts]:
    """`encode` every row, drop those without a trained token, and count what happened.

    The first token of a row has no prediction, so it does not count as trained.
    Raises UserError as `encode` does, and naming `key` when no row is left.
    """
    kept: list[Encoded] = []
    truncated = tokens = trained = without = 0
    for row in rows:
        ids, labels = _tokens(row, tokenizer, loss_on, format, key, template)
        truncated += len(ids) > max_length
        without += all(label == IGNORE for label in labels[1:])
        ids, labels = ids[:max_length], labels[:max_length]
        targets = sum(label != IGNORE for label in labels[1:])
        if targets:
            kept.append({"input_ids": ids, "labels": labels})
            tokens += len(ids)
            trained += targets
    if not kept:
        right = f"give rows with a token to train among the first {max_length} (data.max_length)"
        if without:
            right += f": {without} have none at any length, as without an assistant's turn or with an empty answer"
        raise UserError(key, f"{len(rows)} rows", right)
    return kept, Counts(len(rows), len(kept), len(rows) - len(kept), truncated, tokens, trained)


def _tokens(
    row: Row, tokenizer: Any, loss_on: str, format: str, key: str, template: str
) -> tuple[list[int], list[int]]:
    """Tokens and labels of one row at full length."""
    name = format_of(row, format)
    if not tokenizer.is_fast:
        raise UserError("model.path", type(tokenizer).__name__, "give a model with a fast tokenizer (tokenizer.json)")
    has_chat = bool(tokenizer.chat_template)
    if template == "chat" and not has_chat:
        raise UserError("data.template", template, "give plain or alpaca: this model's tokenizer has no chat template")
    chat = name != "text" and (template == "chat" or (template == "auto" and has_chat))
    if name == "messages" and not chat:
        if has_chat:
            raise UserError("data.template", template, "give auto or chat for messages")
        raise UserError(key, "messages", "give rows of another format: this model's tokenizer has no chat template")
    if name == "text":
        text, spans = row["text"], [(0, len(row["text"]))]
    elif name == "messages":
        text, spans = _chat(list(row["messages"]), tokenizer, loss_on, key)
    else:
        task, more, answer = _said(row, name)
        if chat:
            said = f"{task}\n\n{more}" if more else task
            messages = [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
            text, spans = _chat(messages, tokenizer, loss_on, key)
        else:
            write = _alpaca if template == "alpaca" else _plain
            prompt, completion = write(name, task, more, answer)
            text = prompt + completion
            spans = [(0 if loss_on == "all" else len(prompt), len(text))]
    # A chat template writes the special tokens itself.
    encoding = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True)
    ids: list[int] = list(encoding["input_ids"])
    if chat and loss_on == "all":
        return ids, list(ids)
    labels = [
        token if any(start < last and first < end for first, last in spans) else IGNORE
        for token, (start, end) in zip(ids, encoding["offset_mapping"], strict=True)
    ]
    if not chat and tokenizer.eos_token_id is not None:
        if ids[-1:] == [tokenizer.eos_token_id]:  # the tokenizer has put it there
            ids.pop()
            labels.pop()
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return ids, labels


def _said(row: Row, name: str | None) -> tuple[str, str, str]:
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
    """The same in Stanford Alpaca's words, which tell a task with further input from one without."""
    paired = ", paired with an input that provides further context" if more else ""
    return ALPACA.format(paired=paired, task=task, more=f"### Input:\n{more}\n\n" if more else ""), answer


def _chat(messages: list[dict[str, str]], tokenizer: Any, loss_on: str, key: str) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the spans of characters, (first, past the last), that are trained.

    An assistant's span runs from where generation would start to its end mark. Both are found by rendering
    the messages before it and those up to it, so that no template has to be understood.
    """

    def render(until: int, prompt: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages[:until], tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # the template is a program of the model's
            right = f"give messages that the model's chat template takes ({first_line(error)})"
            raise UserError(key, messages[:until], right) from error

    text = render(len(messages), False)
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if loss_on == "all" or message["role"] != "assistant":
            continue
        before, through = render(i, True), render(i + 1, False)
        if not (text.startswith(before) and text.startswith(through) and len(before) <= len(through)):
            raise UserError(
                "data.loss_on",
                loss_on,
                f"give all: the chat template does not show where turn {i + 1} starts and ends",
            )
        # Templates end a turn with a line break after its end mark; generation has stopped by then.
        spans.append((len(before), len(before) + len(through[len(before) :].rstrip())))
    return text, spans


class Batches:
    """Which rows each optimizer step trains on, and how a rank's share is cut into micro-batches.

    Rows are shuffled anew in every epoch; the rows that do not fill a last batch are left out of that epoch.
    The rows of a step depend on seed, step and batch size alone, so a run may go on with another number of
    ranks.
    """

    def __init__(
        self, rows: Sequence[Any], batch_size: int, micro_batch_size: int, world: int, rank: int, seed: int
    ) -> None:
        """`batch_size` counts sequences over all ranks, `micro_batch_size` those of a rank and forward pass.

        Raises UserError naming train.batch_size when it exceeds the number of rows or does not divide evenly.
        """
        if len(rows) < batch_size:
            raise UserError("train.batch_size", batch_size, f"give at most the number of rows, {len(rows)}")
        if batch_size % (micro_batch_size * world):
            raise UserError("train.batch_size", batch_size, f"give a multiple of {micro_batch_size * world}")
        self.n_rows, self.batch_size, self.micro_batch_size = len(rows), batch_size, micro_batch_size
        self.world, self.rank, self.seed = world, rank, seed
        self.steps_per_epoch = len(rows) // batch_size
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> numpy.ndarray:
        generator = numpy.random.Generator(numpy.random.PCG64(numpy.random.SeedSequence([self.seed, epoch])))
        order = generator.permutation(self.n_rows)
        order.flags.writeable = False  # it is cached
        return order

    def order(self, epoch: int) -> numpy.ndarray:
        """The order of rows in an epoch (from 0): int64, shape (rows,), read-only."""
        return self._order(epoch)

    def global_step(self, k: int) -> list[int]:
        """Indices of all rows of optimizer step `k` (from 0), over all ranks, in order."""
        epoch, i = divmod(k, self.steps_per_epoch)
        return [int(row) for row in self.order(epoch)[i * self.batch_size : (i + 1) * self.batch_size]]

    def step(self, k: int) -> list[list[int]]:
        """Indices of this rank's rows in optimizer step `k` (from 0), one list per micro-batch."""
        rows = self.global_step(k)
        size = self.micro_batch_size
        stride = size * self.world
        return [rows[i : i + size] for i in range(self.rank * size, len(rows), stride)]


def held_out_batches(
    n_rows: int, batch_size: int, world: int, rank: int, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """This rank's batches of row indices, such that over all ranks every row comes exactly once.

    Every rank has the same number of batches, as collectives in the forward pass need it; where rows run out
    a batch is the empty list, for which `collate` makes a batch that counts nothing. With `lengths` (tokens
    of each row), rows of like length share a batch, the longest first, so that padding and the last wait are
    small.
    """
    order = list(range(n_rows)) if lengths is None else sorted(range(n_rows), key=lambda i: (-lengths[i], i))
    batches = [order[i : i + batch_size] for i in range(0, n_rows, batch_size)]
    batches += [[]] * (-len(batches) % world)
    return batches[rank::world]


def collate(rows: Sequence[Encoded], pad_id: int, multiple: int = MULTIPLE) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` of encoded rows: int64, shape (rows, tokens).

    Padded on the right with `pad_id`, mask 0 and label -100, to the next `multiple` of tokens above the
    longest row. No rows give one row of padding, so that a rank without rows can take part in a forward pass.
    """
    longest = max((len(row["input_ids"]) for row in rows), default=1)
    shape = (max(len(rows), 1), -(-longest // multiple) * multiple)
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n] = torch.tensor(row["input_ids"])
        labels[i, :n] = torch.tensor(row["labels"])
        mask[i, :n] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
