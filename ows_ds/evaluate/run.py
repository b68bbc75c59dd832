"""The verb `eval`: model, tasks and judge -> a result file and a table."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ows_ds import __version__, config
from ows_ds.checkpoint import version
from ows_ds.distributed import watchdog
from ows_ds.distributed.communicator import fail_together
from ows_ds.distributed.launch import Runtime, start
from ows_ds.errors import UserError, one_line
from ows_ds.evaluate import harness, mt_bench
from ows_ds.evaluate.judge import Judge, scores
from ows_ds.evaluate.setting import BASE, Evaluation, MTBench, check
from ows_ds.evaluate.subject import Subject, base_of, facts_of, find, on_disk, refusing
from ows_ds.files import write_text
from ows_ds.model.pretrained import free_memory
from ows_ds.runs import card, results
from ows_ds.runs.results import Result, Score
from ows_ds.tables import terminal

logger = logging.getLogger(__name__)
TIMEOUT = 86400  # seconds that a rank may wait for a slower one; the watchdog asks in between whether it lives
DEAD = 600  # seconds after which a rank that has ended is noticed
Measure = Callable[[Subject], tuple[dict[str, Any], list[Score]]]


def evaluate(given: str, evaluation: Evaluation, bench: MTBench) -> None:
    """Evaluate the model that ``given`` names, write the result and print it. Collective over the launcher's ranks.

    The options have passed `setting.check`. Raises UserError for whatever the user can put right, as a rule before a
    model is loaded.
    """
    if bench.mt_bench is None:
        harness.require()
    subject = find(given, evaluation)
    before = _before(subject, evaluation)
    train = {"output_dir": "runs", "sharding": "replicated", "timeout_seconds": TIMEOUT}
    runtime = start(config.from_dict({"model": {"path": subject.path}, "train": train}), training=False)
    comm = runtime.comm
    settings = evaluation.model_dump() | ({} if bench.mt_bench is None else bench.model_dump())
    settings = {name: value for name, value in settings.items() if name not in ("output", "as_json", "judge_key")}
    settings |= {"processes": comm.world_size, "device": runtime.device.type}
    with watchdog.armed(comm, DEAD):
        with fail_together(comm), redirect_stdout(sys.stderr):
            measure = _measure_with(evaluation, bench, runtime)
        result = _result(measure, subject, settings)
        with fail_together(comm):
            # written before the comparison, which may fail
            path = _write(result, subject, evaluation) if comm.rank == 0 and result.scores else None
        if isinstance(before, Subject):
            before = _result(measure, before, settings)
        with fail_together(comm):
            if path is not None:
                _finish(path, result, before, subject, evaluation)
        comm.barrier()  # a launcher could end rank 0 as soon as another rank ends


def _before(subject: Subject, evaluation: Evaluation) -> Subject | Result | None:
    """What the model is compared with."""
    other = evaluation.compare
    if other is None:
        return None
    if Path(other).is_file():
        return replace(results.read(Path(other)), before=None)
    base = base_of(subject) if other == BASE else None
    try:
        check(other if base is None else base.path, Evaluation(tasks="any"), MTBench())
        return base or find(other, Evaluation())
    except UserError as error:
        raise UserError("--compare", other, error.right) from error


def _measure_with(evaluation: Evaluation, bench: MTBench, runtime: Runtime) -> Measure:
    """Gives facts about a model and its scores, which only rank 0 has. All that is needed of files is read now."""
    if bench.mt_bench is not None:
        return _Answers(evaluation, bench, runtime).measure
    tasks = harness.load_tasks(evaluation)
    harness.check_limit(tasks, evaluation, runtime.comm.world_size)
    return lambda subject: harness.measure(subject, tasks, evaluation, runtime)


class _Answers:
    """Answers to MT-Bench's questions, and a judge's marks."""

    def __init__(self, evaluation: Evaluation, bench: MTBench, runtime: Runtime) -> None:
        self.evaluation, self.bench, self.runtime, self.comm = evaluation, bench, runtime, runtime.comm
        self.asked = mt_bench.questions(str(bench.mt_bench))
        if (limit := evaluation.limit) is not None:
            self.asked = self.asked[: int(limit) if limit >= 1 else max(1, round(limit * len(self.asked)))]
        self.judge = None if bench.judge is None else Judge(bench)
        self.references = mt_bench.references(bench.judge_references, self.asked)
        self.given = None if bench.answers is None else self._read(Path(bench.answers))

    def _read(self, path: Path) -> dict[Any, list[str]]:
        return mt_bench.by_question(str(path), "--answers", self.asked, [one["question_id"] for one in self.asked])

    def measure(self, subject: Subject) -> tuple[dict[str, Any], list[Score]]:
        """See `_measure_with`. Collective."""
        path, facts = Path(str(self.bench.answers)), dict[str, Any]()
        if self.given is None:
            path, facts = self._answer(subject)
        found: list[Score] = []
        with fail_together(self.comm):  # rank 0 asks the judge
            if self.comm.rank == 0 and self.judge is not None:
                name = results.file_name(str(self.bench.judge_model))
                file = subject.results / "mt_bench" / "model_judgment" / f"{name}_single.jsonl"
                requests = self.judge.requests(self.asked, self.given or self._read(path), self.references, path.stem)
                try:
                    found = scores(self.asked, self.judge.judge(requests, file))
                except UserError as error:
                    right = f"{error.right}; its judgments until now are kept, and --answers {path} continues"
                    raise UserError(error.key, error.value, right) from error
        return {**subject.about, **facts, "answers": str(path)}, found

    def _answer(self, subject: Subject) -> tuple[Path, dict[str, Any]]:
        """A file of new answers, and facts about the model. Collective: ranks share the questions."""
        comm, name = self.comm, results.file_name(subject.name)
        with on_disk(subject, comm) as path:
            with fail_together(comm), refusing(subject):
                speaker = mt_bench.Speaker(path, subject, self.evaluation, self.bench, self.runtime)
                facts = {**facts_of(speaker.model), "template": speaker.template}
            with fail_together(comm):
                mine = [speaker.answer(question, name) for question in self.asked[comm.rank :: comm.world_size]]
        del speaker
        free_memory()
        lines = {line["question_id"]: line for some in comm.all_gather_object(mine, "evaluation") for line in some}
        file = subject.results / "mt_bench" / "model_answer" / f"{name}.jsonl"
        with fail_together(comm):
            if comm.rank == 0:
                text = "".join(json.dumps(lines[question["question_id"]]) + "\n" for question in self.asked)
                file = results.write(file, text)
                logger.info(one_line(f"{file}: {len(self.asked)} answers of {subject.name}"))
        return file, facts


def _result(measure: Measure, subject: Subject, settings: dict[str, Any]) -> Result:
    """The model's result, with scores on rank 0 alone. Collective."""
    begin, started = time.perf_counter(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    with redirect_stdout(sys.stderr):
        model, found = measure(subject)
    packages = (*harness.PACKAGES, "torch", "transformers", "tokenizers")
    versions: dict[str, str | None] = {"ows_ds": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in packages}
    return Result(model, tuple(found), settings, versions, started, round(time.perf_counter() - begin, 1))


def _write(result: Result, subject: Subject, evaluation: Evaluation) -> Path:
    """The result's file."""
    what = "mt_bench" if evaluation.tasks is None else "+".join(Path(name).stem for name in evaluation.names)
    words = [what] if subject.run is not None else [subject.name, what]
    if subject.step is not None:
        words.insert(0, subject.step)
    path = subject.results / f"{results.file_name(*words)}.json"
    return results.write(Path(evaluation.output) if evaluation.output else path, results.as_text(result))


def _finish(path: Path, result: Result, before: Result | None, subject: Subject, evaluation: Evaluation) -> None:
    """Print the result, and put what it is compared with into its file."""
    if before is not None:
        if os.path.isfile(str(evaluation.compare)) and (why := results.not_comparable(result, before)):
            _print(result, evaluation, path)
            raise UserError("--compare", evaluation.compare, f"expected a result of the same questions: {why}")
        result = replace(result, before=before)
        write_text(path, results.as_text(result))
    _print(result, evaluation, path)
    if subject.run is not None and subject.step is None:
        with redirect_stdout(sys.stderr):
            card.add_results(subject.run / "model", results.of_run(subject.run)[0])


def _print(result: Result, evaluation: Evaluation, path: Path) -> None:
    if evaluation.as_json:
        print(json.dumps(asdict(result), allow_nan=False), flush=True)
        return
    name = one_line(str(result.model.get("name")))
    if result.before is not None:
        name = f"{one_line(str(result.before.model.get('name')))} (before) and {name} (after)"
    print(terminal([results.table(result, name)], [one_line(str(path))]), flush=True)
