"""The file of an evaluation: which model, which scores, by what.

{"format": 1, "model": {...}, "scores": [{"task", "metric", "value", ...}, ...], "settings": {...},
 "versions": {...}, "started": "2026-01-31T12:00:00+00:00", "seconds": 12.5, "before": null or another such object}
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ows_ds.files import parse_json, read_text
from ows_ds.errors import UserError, one_line
from ows_ds.files import atomic_write
from ows_ds.tables import Table

FORMAT = 1
FOLDER = "eval"  # in the folder of a run


@dataclass(frozen=True)
class Score:
    """One number of one task.

    task: or group of tasks. metric: as the harness names it, with the filter of answers where there is one. value:
    None where it is no finite number. stderr: its standard error, where one can be told. shots: examples before each
    question, where all had as many. samples: questions. depth: 0 for what was asked for, 1 for a part of it, ...
    version: of the task. higher_is_better: None where it is not known.
    """

    task: str
    metric: str
    value: float | None
    stderr: float | None = None
    shots: int | None = None
    samples: int | None = None
    depth: int = 0
    version: str | None = None
    higher_is_better: bool | None = True

    @property
    def key(self) -> tuple[str, str]:
        """What it is called."""
        return self.task, self.metric

    @property
    def label(self) -> str:
        """The metric, with the examples."""
        return self.metric if self.shots is None else f"{self.metric}, {self.shots} shots"


@dataclass(frozen=True)
class Result:
    """An evaluation.

    model: name, path, checkpoint, commit, fingerprint (of the weights), dtype, parameters. settings: of `ows-ds eval`,
    and the number of processes. versions: of packages. started: ISO 8601. before: the same of another model, with
    which it is compared.
    """

    model: dict[str, Any]
    scores: tuple[Score, ...]
    settings: dict[str, Any]
    versions: dict[str, str | None]
    started: str
    seconds: float
    before: Result | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"format": FORMAT, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}

    def of_before(self, score: Score) -> Score | None:
        """The same number of the model before."""
        found = () if self.before is None else self.before.scores
        return next((one for one in found if one.key == score.key), None)


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_json()
    return [asdict(score) for score in value] if isinstance(value, tuple) else value


def number(value: Any) -> float | None:
    """A finite number of any library as a float; None for all else."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def file_name(*words: str) -> str:
    """A name of a file that tells of ``words``."""
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
        rewrite(chosen, text)
        return chosen
    raise AssertionError


def rewrite(path: Path, text: str) -> None:
    """The same over a file of one's own, at once or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def as_text(result: Result) -> str:
    """The content of a result's file."""
    return json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n"


def read(path: Path, key: str = "--compare") -> Result:
    """Raises UserError naming ``key`` for a file that is no result."""
    try:
        return _result(parse_json(read_text(path)))
    except (OSError, ValueError, TypeError, KeyError) as error:
        right = f"expected a result file of `ows-ds eval` ({type(error).__name__}: {error})"
        raise UserError(key, str(path), right) from error


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
    head = ["task", "metric", "shots", "n", "score", "±"]
    if result.before is not None:
        head[4:5] = ["before", "after"]
        head.append("change")
    rows = []
    for score in result.scores:
        row = ["  " * score.depth + one_line(score.task), one_line(score.metric)]
        row += [_count(score.shots), _count(score.samples)]
        if result.before is not None:
            old = result.of_before(score)
            row.append(_written(None if old is None else old.value))
        row += [_written(score.value), _written(score.stderr)]
        if result.before is not None:
            known = old is not None and None not in (old.value, score.value)
            row.append(f"{score.value - old.value:+.4f}" if known else "n/a")  # type: ignore[operator, union-attr]
        rows.append(row)
    return Table(title, head, rows)


def told_alike(first: Result, second: Result) -> str | None:
    """What keeps two results from being compared, in words; None: nothing."""
    theirs = {score.key: score for score in second.scores}
    for score in first.scores:
        other = theirs.get(score.key)
        if other is None:
            return f"it has no {score.metric} of {score.task}"
        marks = first.settings.get("mt_bench") is not None  # a judge may leave one out
        for name in ("shots", "version") if marks else ("shots", "samples", "version"):
            if getattr(score, name) != getattr(other, name):
                return f"{name} of {score.task} are {getattr(other, name)} in it, here {getattr(score, name)}"
    return None


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _written(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _result(tree: Any) -> Result:
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ValueError(f"format is not {FORMAT}")
    model, settings, versions = (_mapping(tree, name) for name in ("model", "settings", "versions"))
    if not isinstance(tree["scores"], list) or not isinstance(model.get("name"), str):
        raise ValueError("scores or the model's name are missing")
    scores = tuple(_score(entry) for entry in tree["scores"])
    started, seconds = tree["started"], number(tree["seconds"])
    if not isinstance(started, str) or seconds is None:
        raise ValueError("started or seconds are missing")
    before = tree.get("before")
    if before is not None and isinstance(before, dict) and before.get("before") is not None:
        raise ValueError("before has a before")
    result = Result(model, scores, settings, versions, started, seconds)
    return result if before is None else replace(result, before=_result(before))


def _mapping(tree: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(tree[name], dict):
        raise ValueError(f"{name} is no object")
    return dict(tree[name])


KINDS: dict[str, Any] = {
    "task": str, "metric": str, "value": (int, float, type(None)), "stderr": (int, float, type(None)),
    "shots": (int, type(None)), "samples": (int, type(None)), "depth": int, "version": (str, type(None)),
    "higher_is_better": (bool, type(None)),
}  # fmt: skip


def _score(entry: Any) -> Score:
    if not isinstance(entry, dict) or not entry.keys() <= KINDS.keys():
        raise ValueError("a score is none")
    for name, value in entry.items():
        if not isinstance(value, KINDS[name]) or (isinstance(value, bool) and name != "higher_is_better"):
            raise ValueError(f"{name} of a score is {value!r}")
    if not 0 <= entry.get("depth", 0) < 20:
        raise ValueError("depth of a score")
    return Score(**{**entry, **{name: number(entry.get(name)) for name in ("value", "stderr")}})


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
