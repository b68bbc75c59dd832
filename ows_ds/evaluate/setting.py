"""What `ows-ds eval` does: its options, and what is wrong with them. Pure.

Nothing here imports torch, so that mistakes and `--help` answer at once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ows_ds.config import HUB_NAME
from ows_ds.errors import UserError
from ows_ds.files import can_be_made

BASE = "base"  # in place of a model: that which the run began with
WORDS = re.compile(r"[\w.:@+\[\]() /-]+")  # of a judge's name


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how.

    Attributes:
        tasks: Tasks and groups of lm-evaluation-harness, with commas between them, and ows_commonsense, ows_mmlu and
            ows_gsm8k; files of tasks as well.
        include_path: Folder of tasks of one's own, in lm-evaluation-harness's form. They may name Python code, which
            is run.
        num_fewshot: Examples before each question; null: as each task says.
        limit: Of each task, only its first questions, or a share of them if below 1; null: all. For trying.
        batch_size: Questions of a forward pass on each process, or auto.
        max_length: Tokens of a question with its examples; null: as many as the model takes.
        apply_chat_template: Ask as a user would, in the model's chat template.
        checkpoint: Checkpoint of the run to evaluate, such as step-20, exported into a folder that is removed
            afterwards; null: the run's model/.
        compare: What stood before: base (the model that the run began with), a model or a run, or the result file of
            an earlier evaluation; null: nothing.
        output: File of the result, .json; null: TASKS.json in eval/ of the run, for other models in runs/eval/. A
            file that is there is kept, and the new one numbered.
        json: Print the result as JSON and nothing else.
        dtype: Number format of the weights; auto: that of the model's files.
        revision: Branch, tag or commit of a model on the hub.
        trust_remote_code: Run Python code that comes with the model.
        parallelize: Spread one model's layers over all GPUs of the process.
    """

    tasks: str | None = None
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: str = "1"
    max_length: int | None = None
    apply_chat_template: bool = False
    checkpoint: str | None = None
    compare: str | None = None
    output: str | None = None
    json: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    parallelize: bool = False

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        return [word.strip() for word in (self.tasks or "").split(",") if word.strip()]


@dataclass(frozen=True)
class MTBench:
    """Answers that a judge marks (MT-Bench).

    Attributes:
        mt_bench: File of questions in FastChat's form (question.jsonl), in place of --tasks. The answers are written
            as FastChat writes them.
        answers: File of answers that are there already, in place of new ones.
        template: How questions are written; auto: the tokenizer's chat template, else that of the run's rows.
        max_new_tokens: Of an answer, at most.
        judge: Address of an OpenAI-compatible server, such as http://localhost:8000/v1; null: answers only.
        judge_model: Name of the judge on that server.
        judge_prompts: File of prompts in FastChat's form (judge_prompts.jsonl); null: our own.
        judge_references: File of reference answers in FastChat's form, for mathematics, reasoning and coding.
        judge_key: Name of the environment variable that holds the server's key.
        judge_retries: Of a question to the judge that has failed, at most.
        judge_parallel: Questions to the judge at a time.
    """

    mt_bench: str | None = None
    answers: str | None = None
    template: Literal["auto", "chat", "plain", "alpaca"] = "auto"
    max_new_tokens: int = 1024
    judge: str | None = None
    judge_model: str | None = None
    judge_prompts: str | None = None
    judge_references: str | None = None
    judge_key: str = "OPENAI_API_KEY"
    judge_retries: int = 6
    judge_parallel: int = 1


def check(model: str, evaluation: Evaluation, bench: MTBench) -> None:
    """Raises UserError for the first option that is wrong, as far as that shows without model and tasks."""
    for key, value, right in (*_of_model(model, evaluation, bench), *_of_tasks(evaluation, bench), *_of_judge(bench)):
        raise UserError(key, value, right)


Wrong = Iterator[tuple[str, Any, str]]


def _of_model(model: str, evaluation: Evaluation, bench: MTBench) -> Wrong:
    run = os.path.isfile(os.path.join(model, "config.yaml"))
    if not os.path.isdir(model) and (os.path.lexists(model) or not re.fullmatch(HUB_NAME, model)):
        yield "MODEL", model, "expected the folder of a run or of a model, or a name on the hub"
    if evaluation.checkpoint is not None and not run:
        yield "--checkpoint", evaluation.checkpoint, "leave it out, or give the folder of a run, with its config.yaml"
    if evaluation.compare is not None and bench.answers is not None:
        yield "--compare", evaluation.compare, "leave it out under --answers, and judge twice"
    if evaluation.compare == BASE and not run:
        yield "--compare", BASE, "expected a model, or the folder of a run as MODEL: only a run knows its base"
    if evaluation.output is not None:
        if not evaluation.output.endswith(".json") or os.path.isdir(evaluation.output):
            yield "--output", evaluation.output, "expected a file whose name ends in .json"
        if not can_be_made(Path(evaluation.output).parent):
            yield "--output", evaluation.output, "expected a file in a folder that can be written to, or can be made"


def _of_tasks(evaluation: Evaluation, bench: MTBench) -> Wrong:
    if bench.mt_bench is None and not evaluation.names:
        yield (
            "--tasks",
            evaluation.tasks,
            "it is required: expected tasks with commas, such as ows_commonsense, or --mt-bench",
        )
    if bench.mt_bench is not None and evaluation.tasks is not None:
        yield "--tasks", evaluation.tasks, "leave it out under --mt-bench: evaluate twice"
    if evaluation.include_path is not None and not os.path.isdir(evaluation.include_path):
        yield "--include-path", evaluation.include_path, "expected a folder that exists"
    limit, size = evaluation.limit, evaluation.batch_size
    if limit is not None and not (0 < limit < 1 or (math.isfinite(limit) and limit >= 1 and limit == int(limit))):
        yield "--limit", limit, "expected a number of questions, or a share above 0 and below 1"
    if size != "auto" and not (size.isascii() and size.isdecimal() and 0 < int(size) < 2**31):
        yield "--batch-size", size, "expected an integer of at least 1, or auto"
    for name, least in (("num_fewshot", 0), ("max_length", 1)):
        value = getattr(evaluation, name)
        if value is not None and not least <= value < 2**31:
            yield f"--{name.replace('_', '-')}", value, f"expected an integer of at least {least}"


def _of_judge(bench: MTBench) -> Wrong:
    given = {name: value for name, value in asdict(bench).items() if value != getattr(MTBench, name)}
    if bench.mt_bench is None:
        for name, value in given.items():
            yield f"--{name.replace('_', '-')}", value, "leave it out, or give --mt-bench FILE with it"
        return
    for name in ("mt_bench", "answers", "judge_prompts", "judge_references"):
        path = getattr(bench, name)
        if path is not None and not os.path.isfile(path):
            yield f"--{name.replace('_', '-')}", path, "expected a file that exists"
    for name, least in (("max_new_tokens", 1), ("judge_retries", 0), ("judge_parallel", 1)):
        if not least <= getattr(bench, name) < 2**16:
            yield f"--{name.replace('_', '-')}", getattr(bench, name), f"expected an integer of at least {least}"
    if bench.judge is None:
        for name, value in given.items():
            if name.startswith("judge") or name == "answers":
                yield f"--{name.replace('_', '-')}", value, "leave it out, or give --judge URL with it"
        return
    try:
        address = urlsplit(bench.judge)
        whole = address.scheme in ("http", "https") and bool(address.hostname) and not address.username
        address.port  # noqa: B018 (raises ValueError)
    except ValueError:
        whole = False
    if not whole:
        yield (
            "--judge",
            "***" if "@" in bench.judge else bench.judge,
            "expected an address such as http://localhost:8000/v1",
        )
    if not bench.judge_model or not WORDS.fullmatch(bench.judge_model):
        yield "--judge-model", bench.judge_model, "expected the name of a model on the judge's server"
