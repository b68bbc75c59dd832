"""What `ows-ds eval` does: its options, and what is wrong with them. Pure.

Nothing here imports torch, so that mistakes and `--help` answer at once.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from ows_ds.config import HUB_NAME, MOST, Settings, Wrong
from ows_ds.config.settings import Count, Expected, Number
from ows_ds.errors import UserError, raise_all
from ows_ds.files import can_be_made

BASE = "base"  # in place of a model: that which the run began with


class Evaluation(Settings):
    """What is evaluated, and how."""

    tasks: str | None = None
    """Tasks and groups of lm-evaluation-harness, with commas between them, and ows_commonsense, ows_mmlu and ows_gsm8k;
    files of tasks as well."""
    include_path: str | None = None
    """Folder of tasks of one's own, in lm-evaluation-harness's form. They may name Python code, which is run."""
    num_fewshot: int | None = Field(None, ge=0, le=MOST)
    """Examples before each question; null: as each task says."""
    limit: Annotated[Number, Expected("a number of questions, or a share above 0 and below 1")] | None = Field(
        None, gt=0
    )
    """Of each task, only its first questions, or a share of them if below 1; null: all. For trying."""
    batch_size: Annotated[str, Expected("an integer of at least 1, or auto")] = Field(
        "1", pattern="^(auto|0*[1-9][0-9]{0,8})$"
    )
    """Questions of a forward pass on each rank, or auto."""
    max_length: Count | None = None
    """Tokens of a question with its examples; null: as many as the model takes."""
    apply_chat_template: bool = False
    """Ask as a user would, in the model's chat template."""
    checkpoint: str | None = None
    """Checkpoint of the run to evaluate, such as step-20, exported into a folder that is removed afterwards; null: the
    run's model/."""
    compare: str | None = None
    """What stood before: base (the model that the run began with), a model or a run, or the result file of an earlier
    evaluation; null: nothing."""
    output: str | None = None
    """File of the result, .json; null: TASKS.json in eval/ of the run, for other models in runs/eval/. A file that is
    there is kept, and the new one numbered."""
    as_json: bool = Field(False, alias="json")
    """Print the result as JSON and nothing else."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto: that of the model's files."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    parallelize: bool = False
    """Spread one model's layers over all GPUs of the process."""

    def contradictions(self) -> Iterator[Wrong]:
        if self.limit is not None and self.limit > 1 and self.limit != int(self.limit):
            yield Wrong("limit", "expected a number of questions, or a share above 0 and below 1")

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        return [word.strip() for word in (self.tasks or "").split(",") if word.strip()]


class MTBench(Settings):
    """Answers that a judge marks (MT-Bench)."""

    mt_bench: str | None = None
    """File of questions in FastChat's form (question.jsonl), in place of --tasks. The answers are written as FastChat
    writes them."""
    answers: str | None = None
    """File of answers that are there already, in place of new ones."""
    template: Literal["auto", "chat", "plain", "alpaca"] = "auto"
    """How questions are written; auto: the tokenizer's chat template, else that of the run's rows."""
    max_new_tokens: int = Field(1024, ge=1, lt=2**16)
    """Of an answer, at most."""
    judge: str | None = None
    """Address of an OpenAI-compatible server, such as http://localhost:8000/v1; null: answers only."""
    judge_model: Annotated[str, Expected("the name of a model on the judge's server")] | None = Field(
        None, pattern=r"^[\w.:@+\[\]() /-]+$"
    )
    """Name of the judge on that server."""
    judge_prompts: str | None = None
    """File of prompts in FastChat's form (judge_prompts.jsonl); null: our own."""
    judge_references: str | None = None
    """File of reference answers in FastChat's form, for mathematics, reasoning and coding."""
    judge_key: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the server's key."""
    judge_retries: int = Field(6, ge=0, lt=2**16)
    """Of a question to the judge that has failed, at most."""
    judge_parallel: int = Field(1, ge=1, lt=2**16)
    """Questions to the judge at a time."""


class Chat(Settings):
    """A talk with a model."""

    system: str | None = None
    """System prompt."""
    prompt: str | None = None
    """One message, whose answer is printed; null: messages are read from the terminal."""
    compare: bool = False
    """Answer with the model that the run began with, too."""
    max_new_tokens: int = Field(512, ge=1, lt=2**16)
    """Of an answer, at most."""
    temperature: Annotated[Number, Expected("a number of at least 0")] = Field(0.7, ge=0)
    """0 takes the likeliest token each time."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Of the answers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto: that of the files."""
    checkpoint: str | None = None
    """Checkpoint of the run, such as step-20; null: the run's model/."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model."""


def check(model: str, evaluation: Evaluation, bench: MTBench) -> None:
    """Raises UserError naming every option that is wrong, as far as that shows without model and tasks."""
    found = (*_of_model(model, evaluation, bench), *_of_tasks(evaluation, bench), *_of_judge(bench))
    raise_all(UserError(*one) for one in found)


Mistakes = Iterator[tuple[str, Any, str]]


def _of_model(model: str, evaluation: Evaluation, bench: MTBench) -> Mistakes:
    run, output = os.path.isfile(os.path.join(model, "config.yaml")), evaluation.output
    if not os.path.isdir(model) and (os.path.lexists(model) or not re.fullmatch(HUB_NAME, model)):
        yield "MODEL", model, "expected the folder of a run or of a model, or a name on the hub"
    if evaluation.checkpoint is not None and not run:
        yield "--checkpoint", evaluation.checkpoint, "leave it out, or give the folder of a run, with its config.yaml"
    if evaluation.compare is not None and bench.answers is not None:
        yield "--compare", evaluation.compare, "leave it out under --answers, and judge twice"
    if evaluation.compare == BASE and not run:
        yield "--compare", BASE, "expected a model, or the folder of a run as MODEL: only a run knows its base"
    if output is not None and (not output.endswith(".json") or os.path.isdir(output)):
        yield "--output", output, "expected a file whose name ends in .json"
    if output is not None and not can_be_made(Path(output).parent):
        yield "--output", output, "expected a file in a folder that can be written to, or can be made"


def _of_tasks(evaluation: Evaluation, bench: MTBench) -> Mistakes:
    if bench.mt_bench is None and not evaluation.names:
        right = "it is required: expected tasks with commas, such as ows_commonsense, or --mt-bench"
        yield "--tasks", evaluation.tasks, right
    if bench.mt_bench is not None and evaluation.tasks is not None:
        yield "--tasks", evaluation.tasks, "leave it out under --mt-bench: evaluate twice"
    if evaluation.include_path is not None and not os.path.isdir(evaluation.include_path):
        yield "--include-path", evaluation.include_path, "expected a folder that exists"


def _of_judge(bench: MTBench) -> Mistakes:
    given = bench.model_dump(exclude_defaults=True)
    needs = "--mt-bench FILE" if bench.mt_bench is None else "--judge URL"
    for name, value in given.items() if bench.mt_bench is None or bench.judge is None else ():
        if bench.mt_bench is None or name.startswith("judge") or name == "answers":
            yield f"--{name.replace('_', '-')}", value, f"leave it out, or give {needs} with it"
    if bench.mt_bench is None:
        return
    for name in ("mt_bench", "answers", "judge_prompts", "judge_references"):
        if name in given and not os.path.isfile(given[name]):
            yield f"--{name.replace('_', '-')}", given[name], "expected a file that exists"
    if bench.judge is None:
        return
    try:
        address = urlsplit(bench.judge)
        whole = address.scheme in ("http", "https") and bool(address.hostname) and not address.username
        address.port  # noqa: B018 (raises ValueError)
    except ValueError:
        whole = False
    if not whole:
        shown = "***" if "@" in bench.judge else bench.judge  # there may be a password in it
        yield "--judge", shown, "expected an address such as http://localhost:8000/v1"
    if not bench.judge_model:
        yield "--judge-model", bench.judge_model, "expected the name of a model on the judge's server"
