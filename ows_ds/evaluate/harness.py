"""lm-evaluation-harness: its tasks and ours, its scores of a model, as it gives them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ows_ds.compat.lm_eval import forget_answers, set_ranks, without_git
from ows_ds.distributed.communicator import Communicator, fail_together
from ows_ds.distributed.launch import Runtime
from ows_ds.errors import UserError, first_line
from ows_ds.evaluate.setting import Evaluation
from ows_ds.evaluate.subject import Subject, facts_of, on_disk, refusing
from ows_ds.model.pretrained import free_memory, suppress_output
from ows_ds.runs.results import Score, number

TASKS = Path(__file__).with_name("tasks")  # ows_commonsense, ows_mmlu, ows_gsm8k
PACKAGES = ("lm_eval", "datasets", "accelerate")  # that scores depend on, besides torch and transformers


class Tasks(NamedTuple):
    """asked: tasks and groups (lm_eval's), in the order that was given. every: the tasks in them, by name."""

    manager: Any
    asked: list[Any]
    every: dict[str, Any]


def require() -> None:
    """Raises UserError where lm-evaluation-harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        right = f"install lm-evaluation-harness with it: pip install 'ows_ds[eval]' ({error})"
        raise UserError("ows-ds eval", "without its packages", right) from error


def load_tasks(evaluation: Evaluation) -> Tasks:
    """The tasks with their data sets. Raises UserError (``--tasks``) for one that is unknown or lacks its data."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    paths = [TASKS, *([evaluation.include_path] if evaluation.include_path else [])]  # later ones win
    manager = TaskManager(include_path=paths, include_defaults=False)
    files = {name for name in evaluation.names if name.endswith(".yaml") and Path(name).is_file()}
    if not all(name in files or _complete(name, manager.task_index) for name in evaluation.names):
        manager = TaskManager(include_path=paths)  # thousands of files, which take a while
    for name in evaluation.names:
        if name not in files.union(manager.all_tasks):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"is one of {', '.join(near)} meant?" if near else "`lm-eval ls tasks` lists those there are"
            raise UserError("--tasks", name, f"expected tasks that are known: {hint}")
    asked: list[Any] = []
    for name in dict.fromkeys(evaluation.names):
        try:
            found = manager.load(name)
        except Exception as error:  # whatever a task's code and a data set's raise
            right = f"expected tasks whose data sets can be loaded here ({type(error).__name__}: {first_line(error)})"
            raise UserError("--tasks", name, right) from error
        inside = {child for group in found.get("groups", {}).values() for child in group.child_names}
        tops = {**found.get("groups", {}), **found["tasks"]}
        asked += [one for key, one in tops.items() if key not in inside]
    every: dict[str, Any] = {}
    for one in asked:
        for task in _leaves(one):
            if task.task_name in every:
                raise UserError("--tasks", task.task_name, "expected each task once: it is in two of those given")
            every[task.task_name] = task
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError("--tasks", task.task_name, "expected tasks that do not run what the model writes")
            if getattr(task, "MULTIMODAL", False):
                raise UserError("--tasks", task.task_name, "expected tasks of text alone")
    return Tasks(manager, asked, every)


def _complete(name: Any, index: dict[str, Any]) -> bool:
    """Whether ``index`` has a task, or a group with all its parts."""
    entry = index.get(name) if isinstance(name, str) else None
    parts = (entry.cfg or {}).get("task") if entry is not None else None
    if not isinstance(parts, list):
        return entry is not None and isinstance(parts, str)
    names = [part.get("task") or part.get("group") if isinstance(part, dict) else part for part in parts]
    return all(part != name and _complete(part, index) for part in names)


def check_limit(tasks: Tasks, evaluation: Evaluation, world_size: int) -> None:
    """Refuse (UserError) fewer questions than ranks: lm-evaluation-harness fails on a rank without any."""
    from lm_eval.evaluator_utils import get_sample_size

    for name, task in tasks.every.items():
        count = min(len(task.eval_docs), get_sample_size(task, evaluation.limit) or len(task.eval_docs))
        if count < world_size:
            right = f"start fewer processes: {name} has {count} questions" + (" of --limit" if evaluation.limit else "")
            raise UserError("processes", world_size, right)


def measure(
    subject: Subject, tasks: Tasks, evaluation: Evaluation, runtime: Runtime
) -> tuple[dict[str, Any], list[Score]]:
    """Facts about the model, and its scores, which only rank 0 has. Collective.

    Every rank loads the model and takes its part of the questions.
    """
    from lm_eval import evaluator

    comm = runtime.comm
    with on_disk(subject, comm) as path:
        with fail_together(comm), refusing(subject):
            model = _model(path, subject, evaluation, runtime)
            facts = facts_of(model.model)
        with suppress_output(), without_git():
            found = evaluator.simple_evaluate(
                model=model,
                tasks=list(tasks.asked),
                num_fewshot=evaluation.num_fewshot,
                batch_size=evaluation.batch_size,
                limit=evaluation.limit,
                apply_chat_template=evaluation.apply_chat_template,
                log_samples=False,
                task_manager=tasks.manager,  # its own would read all files of tasks there are
            )
    del model
    free_memory()
    for task in tasks.every.values():  # they keep the answers of this model
        forget_answers(task)
    return {**subject.about, **facts}, [] if found is None else list(scores(found, tasks.asked))


def scores(found: dict[str, Any], asked: Sequence[Any]) -> Iterator[Score]:
    """The numbers in what `lm_eval.simple_evaluate` returns, those of a group before those of its parts."""
    for one, depth in _walk(asked):
        name = getattr(one, "task_name", None) or one.name
        numbers = {**found["results"].get(name, {}), **found.get("groups", {}).get(name, {})}
        better = found.get("higher_is_better", {}).get(name) or {}
        counts = found.get("n-samples", {}).get(name) or {}
        parts = [found["n-samples"][task.task_name]["effective"] for task in _leaves(one)]
        version = found.get("versions", {}).get(name)
        for key, value in numbers.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            yield Score(
                name,
                metric if filtered == "none" else f"{metric} ({filtered})",
                number(value),
                number(numbers.get(f"{metric}_stderr,{filtered}")),
                found["n-shot"].get(name),
                counts.get("effective", sum(parts)),
                depth,
                None if version is None or version == "N/A" else str(version),
                better.get(metric),
            )


def _walk(items: Sequence[Any], depth: int = 0) -> Iterator[tuple[Any, int]]:
    """Tasks and groups (lm_eval's), each group before its parts, with their depth."""
    for one in items:
        yield one, depth
        if not hasattr(one, "task_name"):
            yield from _walk(list(one), depth + 1)


def _leaves(one: Any) -> list[Any]:
    return [one] if hasattr(one, "task_name") else list(one.get_all_tasks())


def _model(path: str, subject: Subject, evaluation: Evaluation, runtime: Runtime) -> Any:
    """lm_eval's model of the files at ``path``, on this rank's device."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        """Takes its ranks from the launcher, on CPUs and over hosts too; results are gathered as JSON."""

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            return runtime.comm.all_gather(tensor.reshape(-1))

        def gather_object(self, obj: Any, dst: int = 0) -> Any:
            return _gathered(obj, runtime.comm)

        def barrier(self) -> None:
            runtime.comm.barrier()

    model = Model(
        pretrained=path,
        backend="causal",
        revision=subject.revision or "main",
        device=str(runtime.device),
        dtype=evaluation.dtype,
        batch_size=evaluation.batch_size,
        max_length=evaluation.max_length,
        trust_remote_code=evaluation.trust_remote_code,
        parallelize=evaluation.parallelize,
        use_safetensors=True,  # other files would be unpickled
    )
    set_ranks(model, runtime.comm.rank, runtime.comm.world_size)
    return model


def _gathered(metrics: dict[str, dict[tuple[str, str], list[Any]]], comm: Communicator) -> list[Any]:
    """All ranks' numbers: {task: {(metric, filter): [of each question]}}, as JSON. Collective."""
    rows = [[task, [[*key, _plain(values)] for key, values in found.items()]] for task, found in metrics.items()]
    return [
        {task: {(metric, kind): values for metric, kind, values in found} for task, found in one}
        for one in comm.all_gather_object(rows, "evaluation")
    ]


def _plain(value: Any) -> Any:
    """Numbers of other libraries as Python's, to the last bit."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.item() if hasattr(value, "item") else value
