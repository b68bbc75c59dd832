"""Files of evaluations: a model, its scores, and what measured them, in a folder of the run."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from ows_ds.errors import UserError, one_line
from ows_ds.files import parse_json, read_text, write_text
from ows_ds.tables import Table
from ows_ds.tables import number as decimal

FOLDER = "eval"  # in the folder of a run
_Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Count = Annotated[int, Field(strict=True)]
_Bool = Annotated[bool, Field(strict=True)]


@dataclass(frozen=True)
class Score:
    """One number of one task.

    Attributes:
        task: A task or a group of tasks.
        metric: As the harness names it, with its answer filter where there is one.
        value: None where it is not a finite number.
        stderr: Its standard error, where it is known.
        shots: Examples before each question, where all had as many.
        samples: Number of questions.
        depth: 0 for a task that was asked for, 1 for a part of it, ...
        version: Of the task.
        higher_is_better: None where it is not known.
    """

    task: str
    metric: str
    value: _Float | None
    stderr: _Float | None = None
    shots: _Count | None = None
    samples: _Count | None = None
    depth: Annotated[_Count, Field(ge=0, lt=20)] = 0
    version: str | None = None
    higher_is_better: _Bool | None = True

    @property
    def key(self) -> tuple[str, str]:
        """Task and metric."""
        return self.task, self.metric

    @property
    def label(self) -> str:
        """The metric, with the number of examples."""
        return self.metric if self.shots is None else f"{self.metric}, {self.shots} shots"


@dataclass(frozen=True)
class Result:
    """An evaluation, the content of its file.

    Attributes:
        model: name, path, checkpoint, commit, fingerprint (of the weights), dtype, parameters.
        scores: What was measured.
        settings: Of `ows-ds eval`, and the number of ranks.
        versions: Of packages.
        started: ISO 8601.
        seconds: How long it took.
        before: The same of another model, with which it is compared.
        format: Version of the file.
    """

    model: dict[str, Any]
    scores: tuple[Score, ...]
    settings: dict[str, Any]
    versions: dict[str, Any]
    started: str
    seconds: _Float
    before: Result | None = None
    format: Literal[1] = 1

    def of_before(self, score: Score) -> Score | None:
        """The same number of the model before."""
        found = () if self.before is None else self.before.scores
        return next((one for one in found if one.key == score.key), None)


def number(value: Any) -> float | None:
    """A finite number of any library as a float; None for all else."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def file_name(*words: str) -> str:
    """A name of a file made of ``words``."""
    return re.sub(r"[^\w.+-]+", "_", "-".join(words)).strip("._")[:120] or "result"


def write(path: Path, text: str) -> Path:
    """Write ``path``, or where it is taken NAME.1, NAME.2, ... with its ending. Returns the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for count in itertools.count():
        chosen = path.with_name(f"{path.stem}.{count}{path.suffix}") if count else path
        try:
            chosen.touch(exist_ok=False)
        except FileExistsError:
            continue
        write_text(chosen, text)
        return chosen
    raise AssertionError


def as_text(result: Result) -> str:
    """The content of a result's file."""
    return json.dumps(asdict(result), indent=1, allow_nan=False) + "\n"


def read(path: Path, key: str = "--compare") -> Result:
    """Raises UserError naming ``key`` for a file that is no result."""
    try:
        tree = parse_json(read_text(path))
        result = TypeAdapter(Result).validate_python(tree)
        if "format" not in tree or not isinstance(result.model.get("name"), str):
            raise ValueError("format or the model's name are missing")
        if result.before is not None and result.before.before is not None:
            raise ValueError("before has a before")
    except (OSError, ValueError) as error:
        right = f"expected a result file of `ows-ds eval` ({type(error).__name__}: {error})"
        raise UserError(key, str(path), right) from error
    return result


def of_run(folder: Path) -> tuple[list[Result], list[str]]:
    """The results in a run's folder, oldest first, and the names of files there that are none."""
    found, broken = [], []
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            found.append(read(path))
        except UserError:
            broken.append(f"{FOLDER}/{path.name}")
    return sorted(found, key=lambda result: result.started), broken


def table(result: Result, title: str = "") -> Table:
    """A line a number; with the model before, where there is one."""
    rows = []
    for score in result.scores:
        counts = ["" if count is None else f"{count:,}" for count in (score.shots, score.samples)]
        row = ["  " * score.depth + one_line(score.task), one_line(score.metric), *counts]
        values = [decimal(score.value, 4, fixed=True), decimal(score.stderr, 4, fixed=True)]
        if result.before is None:
            rows.append(row + values)
            continue
        earlier = result.of_before(score)
        old = None if earlier is None else earlier.value
        change = "n/a" if old is None or score.value is None else f"{score.value - old:+.4f}"
        rows.append([*row, decimal(old, 4, fixed=True), *values, change])
    middle, end = (["score"], []) if result.before is None else (["before", "after"], ["change"])
    return Table(title, ["task", "metric", "shots", "n", *middle, "±", *end], rows)


def not_comparable(first: Result, second: Result) -> str | None:
    """Why two results cannot be compared; None: they can."""
    theirs = {score.key: score for score in second.scores}
    judged = first.settings.get("mt_bench") is not None  # a judge may leave a question out
    for score in first.scores:
        other = theirs.get(score.key)
        if other is None:
            return f"it has no {score.metric} of {score.task}"
        for name in ("shots", "version") if judged else ("shots", "samples", "version"):
            if getattr(score, name) != getattr(other, name):
                return f"{name} of {score.task} are {getattr(other, name)} in it, here {getattr(score, name)}"
    return None


def newest(results: Sequence[Result]) -> dict[tuple[str, str, str, int | None], tuple[Score, Score | None]]:
    """Of each (checkpoint or "", task, metric, shots) its newest number, with that of the model before.

    Numbers of a part of the questions give way to those of all.
    """
    found: dict[tuple[str, str, str, int | None], tuple[Score, Score | None]] = {}
    for result in sorted(results, key=lambda one: (one.settings.get("limit") is None, one.started)):
        checkpoint = result.model.get("checkpoint")
        for score in result.scores:
            name = checkpoint if isinstance(checkpoint, str) else ""
            found[name, score.task, score.metric, score.shots] = score, result.of_before(score)
    return found
