"""Task accuracy: greedy answers to held-out problems, marked by reasoning-gym's verifier of their task."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ows_ds.bench.study import Accuracy
from ows_ds.config import Data
from ows_ds.data.batches import held_out_batches
from ows_ds.data.encode import encode
from ows_ds.data.rows import Row
from ows_ds.data.samples import DEFAULT_TASK
from ows_ds.distributed.communicator import fail_together
from ows_ds.distributed.weights import Weights
from ows_ds.errors import UserError
from ows_ds.model.generation import generate


def prompt(row: Row, tokenizer: Any, data: Data, key: str) -> list[int]:
    """Tokens of ``row`` before its last answer, as training shows them.

    Raises UserError naming ``key`` for a row without a prompt before its answer.
    """
    encoded = encode(row, tokenizer, sys.maxsize, "assistant", data.format, key, data.template)
    end = len(encoded)
    while end and not encoded.trained[end - 1]:  # what a template adds after the last answer
        end -= 1
    while end and encoded.trained[end - 1]:
        end -= 1
    if not end:
        raise UserError(key, row, "expected rows with a question and an answer")
    tokens: list[int] = encoded.input_ids[:end].tolist()
    return tokens


def final_answer(text: str) -> str:
    """What follows the last ``####`` on its line, or all of the text where there is none, stripped."""
    _, mark, rest = text.rpartition("####")
    return rest.partition("\n")[0].strip() if mark else rest.strip()


def check_row(row: Row, where: str) -> None:
    """Raises UserError naming ``test`` for a row that no verifier can mark."""
    from reasoning_gym.factory import DATASETS

    if not isinstance(row.get("answer"), str) or row.get("task", DEFAULT_TASK) not in DATASETS:
        written = "as `python -m ows_ds.data.samples problems` writes"
        raise UserError("test", where, f"expected rows with answer and task, {written}, or accuracy: null")


@functools.lru_cache
def _verifier(task: str) -> Any:
    from reasoning_gym.factory import get_score_answer_fn

    return get_score_answer_fn(task)


def is_right(row: Row, text: str) -> bool:
    """Whether the verifier of the row's task gives the answer in ``text`` the full mark.

    row: ``answer``, worked or alone; ``task`` of reasoning-gym, by default that of word problems, so that GSM8K's own
    rows can be marked; ``metadata`` where the verifier needs it.
    """
    task = row.get("task", DEFAULT_TASK)
    given, right = final_answer(text), final_answer(row["answer"])
    if task == DEFAULT_TASK:  # GSM8K's rows write 1,000, which its verifier reads as 1
        given, right = given.replace(",", ""), right.replace(",", "")
    return bool(_verifier(task)(given, {"question": "", "metadata": {}, **row, "answer": right}) >= 1.0)


def count_right(weights: Weights, tokenizer: Any, rows: Sequence[Row], data: Data, accuracy: Accuracy) -> int:
    """How many of ``rows``, which the ranks share, are answered right; the same on all ranks. Collective."""
    comm = weights.comm
    with fail_together(comm):
        prompts = [prompt(row, tokenizer, data, "test") for row in rows]
    weights.module.eval()
    texts: dict[int, str] = {}
    lengths = [len(tokens) for tokens in prompts]
    for mine in held_out_batches(len(rows), accuracy.batch_size, comm.world_size, comm.rank, lengths):
        if mine or weights.sharded:  # under ZeRO-3 a rank without rows takes part all the same
            some = [prompts[i] for i in mine or [0]]
            found = generate(weights.module, tokenizer, some, accuracy.max_new_tokens, synced_gpus=weights.sharded)
            texts.update(zip(mine, found, strict=False))
            weights.after_step()
    with fail_together(comm):
        right = torch.tensor(sum(is_right(rows[i], text) for i, text in texts.items()), device=weights.device)
    return int(comm.all_reduce(right, "evaluation"))
