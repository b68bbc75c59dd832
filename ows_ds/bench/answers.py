"""Task accuracy: greedy answers to held-out problems, marked by reasoning-gym's verifier of their task."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ows_ds.config import Data
from ows_ds.data.batches import held_out_batches
from ows_ds.data.encode import encode
from ows_ds.data.rows import Row
from ows_ds.data.samples import DEFAULT_TASK
from ows_ds.distributed.communicator import fail_together
from ows_ds.distributed.weights import Weights
from ows_ds.errors import UserError


def prompt(row: Row, tokenizer: Any, data: Data, key: str) -> list[int]:
    """Tokens of ``row`` before its last answer: what training shows the model there, template and all.

    Raises UserError naming ``key`` for a row without a prompt before its answer.
    """
    encoded = encode(row, tokenizer, sys.maxsize, "assistant", data.format, key, data.template)
    end = len(encoded)
    while end and not encoded.trained[end - 1]:  # what a template puts behind the last answer
        end -= 1
    while end and encoded.trained[end - 1]:
        end -= 1
    if not end:
        raise UserError(key, row, "expected rows with a question and an answer")
    tokens: list[int] = encoded.input_ids[:end].tolist()
    return tokens


def final_answer(text: str) -> str:
    """What follows the last ``####``, or the whole text where there is none, stripped."""
    return text.rpartition("####")[2].strip()


def check_row(row: Row, where: str) -> None:
    """Raises UserError naming ``test`` for a row that no verifier can mark."""
    from reasoning_gym.factory import DATASETS

    if not isinstance(row.get("answer"), str) or row.get("task", DEFAULT_TASK) not in DATASETS:
        right = (
            "expected rows with answer and task, as `python -m ows_ds.data.samples problems` writes, or accuracy: null"
        )
        raise UserError("test", where, right)


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


@torch.no_grad()
def generate(weights: Weights, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy answers, one a prompt, cut at ``max_new_tokens``. Under ZeRO-3 collective, as many calls on each process.

    Sampling and penalties that come with the model are not used, so that all models answer in the same way.
    """
    from transformers import GenerationConfig

    module: Any = weights.module
    ends = getattr(module.generation_config, "eos_token_id", None)
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    pad = next((i for i in (tokenizer.pad_token_id, *sorted(ends)) if i is not None), 0)
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=weights.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=weights.device)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
    )
    output = module.generate(ids, attention_mask=mask, generation_config=greedy, synced_gpus=weights.sharded)
    return list(tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True))


def count_right(
    weights: Weights, tokenizer: Any, rows: Sequence[Row], data: Data, max_new_tokens: int, batch_size: int
) -> int:
    """How many of ``rows`` are answered right, the same on all processes, which share the rows. Collective."""
    comm = weights.comm
    with fail_together(comm):
        prompts = [prompt(row, tokenizer, data, "test") for row in rows]
    weights.module.eval()
    texts: dict[int, str] = {}
    for share in held_out_batches(len(rows), batch_size, comm.world_size, comm.rank, [len(p) for p in prompts]):
        if share or weights.sharded:  # under ZeRO-3 a process without rows takes part all the same
            found = generate(weights, tokenizer, [prompts[i] for i in share or [0]], max_new_tokens)
            texts.update(zip(share, found, strict=False))
            weights.after_step()
    with fail_together(comm):
        right = torch.tensor(sum(is_right(rows[i], text) for i, text in texts.items()), device=weights.device)
    return int(comm.all_reduce(right, "evaluation"))
