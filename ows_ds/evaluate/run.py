"""The verb `eval`: model, tasks and judge -> a result file and a table."""

from __future__ import annotations

import json
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
from ows_ds.evaluate import harness, judge, mt_bench
from ows_ds.evaluate.setting import BASE, Evaluation, MTBench, check
from ows_ds.evaluate.subject import Subject, base_of, facts_of, find, on_disk, refusing
from ows_ds.files import write_text
from ows_ds.model.pretrained import free_memory
from ows_ds.runs import card, results
from ows_ds.runs.results import Result, Score
from ows_ds.tables import terminal

LONGEST = 86400  # seconds that a process may wait for a slower one; whether it lives is asked in between
DEAD = 600  # seconds after which a process that has ended is missed
Measure = Callable[[Subject], tuple[dict[str, Any], list[Score]]]


def evaluate(given: str, evaluation: Evaluation, bench: MTBench) -> None:
    """Evaluate the model that ``given`` names, write the result and print it. Collective over the launcher's processes.

    What `setting.check` lets through. Raises UserError for whatever the user can put right, as a rule before a model is
    loaded.
    """
    judged = bench.mt_bench is not None
    if not judged:
        harness.require()
    subject = find(given, evaluation)
    before = _before(subject, evaluation)
    tree = {"model": {"path": subject.path}, "train": {"output_dir": "runs", "sharding": "replicated"}}
    recipe = config.from_dict(tree)
    runtime = start(config.changed(recipe, {"train.timeout_seconds": LONGEST}))
    comm = runtime.comm
    with watchdog.armed(comm, DEAD):
        with fail_together(comm), redirect_stdout(sys.stderr):
            measure = _judged(evaluation, bench, runtime) if judged else _by_harness(evaluation, runtime)
        result = _measured(measure, subject, evaluation, bench, runtime)
        with fail_together(comm):
            # it was work: it is kept, whatever becomes of the comparison
            path = _write(result, subject, evaluation) if comm.rank == 0 and result.scores else None
        if isinstance(before, Subject):
            before = _measured(measure, before, evaluation, bench, runtime)
        with fail_together(comm):
            if path is not None:
                _finish(path, result, before, subject, evaluation)
        comm.barrier()  # not before rank 0 is done, or a launcher could end it


def _finish(path: Path, result: Result, before: Result | None, subject: Subject, evaluation: Evaluation) -> None:
    """Print the result, and put what is compared with it into its file."""
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


def _by_harness(evaluation: Evaluation, runtime: Runtime) -> Measure:
    tasks = harness.load_tasks(evaluation)
    harness.check_limit(tasks, evaluation, runtime.comm.world_size)
    return lambda subject: harness.measure(subject, tasks, evaluation, runtime)


def _judged(evaluation: Evaluation, bench: MTBench, runtime: Runtime) -> Measure:
    """All that is needed of files is read before a model is loaded."""
    comm, asked = runtime.comm, mt_bench.questions(str(bench.mt_bench))
    if evaluation.limit is not None:
        limit = evaluation.limit
        asked = asked[: int(limit) if limit >= 1 else max(1, round(limit * len(asked)))]
    names = [one["question_id"] for one in asked]
    using, given = judge.prompts(bench.judge_prompts), mt_bench.references(bench.judge_references, asked)
    there = None if bench.answers is None else mt_bench.by_question(bench.answers, "--answers", asked, names)

    def measure(subject: Subject) -> tuple[dict[str, Any], list[Score]]:
        folder, found = subject.results / "mt_bench", []
        facts: dict[str, Any] = {}
        path = Path(str(bench.answers))
        if there is None:
            path, facts = _answer(subject, asked, evaluation, bench, runtime, folder)
        with fail_together(comm):  # the judge is asked by rank 0
            if comm.rank == 0 and bench.judge is not None:
                answers = there or mt_bench.by_question(str(path), "--answers", asked, names)
                file = folder / "model_judgment" / f"{results.file_name(str(bench.judge_model))}_single.jsonl"
                try:
                    found = judge.judge(asked, answers, given, using, bench, path.stem, file, _tell)
                except UserError as error:
                    right = f"{error.right}; what it has judged is kept, and --answers {path} goes on"
                    raise UserError(error.key, error.value, right) from error
        return {**subject.about, **facts, "answers": str(path)}, judge.scores(asked, found) if found else []

    return measure


def _answer(
    subject: Subject, asked: list[mt_bench.Line], evaluation: Evaluation, bench: MTBench, runtime: Runtime,
    folder: Path,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """A file of new answers, and what the model says of itself. Collective: processes share the questions."""
    comm = runtime.comm
    name = results.file_name(subject.name)
    with on_disk(subject, comm) as path:
        with fail_together(comm), refusing(subject), redirect_stdout(sys.stderr):
            speaker = mt_bench.Speaker(path, subject, evaluation, bench, runtime)
            facts = {**facts_of(speaker.model), "template": speaker.template}
        with fail_together(comm):
            mine = [speaker.answer(question, name) for question in asked[comm.rank :: comm.world_size]]
    del speaker
    free_memory()
    by_name = {line["question_id"]: line for lines in comm.all_gather_object(mine, "evaluation") for line in lines}
    text = "".join(json.dumps(by_name[question["question_id"]]) + "\n" for question in asked)
    written: Path | None = None
    with fail_together(comm):
        if comm.rank == 0:
            written = results.write(folder / "model_answer" / f"{name}.jsonl", text)
            _tell(f"{written}: {len(asked)} answers of {subject.name}")
    return written or folder, facts


def _measured(measure: Measure, subject: Subject, evaluation: Evaluation, bench: MTBench, runtime: Runtime) -> Result:
    """The result, with scores on rank 0 alone. Collective."""
    comm, begin = runtime.comm, time.perf_counter()
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    model, scores = measure(subject)
    settings: dict[str, Any] = evaluation.model_dump()
    if bench.mt_bench is not None:
        settings |= bench.model_dump()
    for name in ("output", "as_json", "judge_key"):
        settings.pop(name, None)
    settings |= {"processes": comm.world_size, "device": runtime.device.type}
    packages = (*harness.PACKAGES, "torch", "transformers", "tokenizers")
    versions = {
        "ows_ds": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
    return Result(model, tuple(scores), settings, versions, started, round(time.perf_counter() - begin, 1))


def _write(result: Result, subject: Subject, evaluation: Evaluation) -> Path:
    """The result's file."""
    what = "mt_bench" if evaluation.tasks is None else "+".join(Path(name).stem for name in evaluation.names)
    words = [what] if subject.run is not None else [subject.name, what]
    if subject.step is not None:
        words.insert(0, subject.step)
    path = subject.results / f"{results.file_name(*words)}.json"
    return results.write(Path(evaluation.output) if evaluation.output else path, results.as_text(result))


def _print(result: Result, evaluation: Evaluation, path: Path) -> None:
    if evaluation.as_json:
        print(json.dumps(asdict(result), allow_nan=False), flush=True)
        return
    name = one_line(str(result.model.get("name")))
    if result.before is not None:
        name = f"{one_line(str(result.before.model.get('name')))} (before) and {name} (after)"
    print(terminal([results.table(result, name)], [one_line(str(path))]), flush=True)


def _tell(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)
