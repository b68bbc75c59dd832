"""The folder of a run, read: what a report and a model card say of it. Parts not written yet are missing, not wrong."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ows_ds import checkpoint, config, files
from ows_ds.config import Recipe
from ows_ds.errors import UserError
from ows_ds.importance import probabilities
from ows_ds.importance.probabilities import METRIC_OF, importance_of
from ows_ds.importance.scores import Scores
from ows_ds.model.shapes import Model, read_model
from ows_ds.planner.choices import HOMES
from ows_ds.planner.forecast import Planner
from ows_ds.planner.memory import Memory
from ows_ds.runs import results
from ows_ds.runs.results import Result

Record = dict[str, Any]
Stretch = tuple[int, int, int, float]
"""(first step, last step, layer, a number that holds for the layer in these steps)."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: As given on the command line.
        folder: Its ``train.output_dir``.
        recipe: With all defaults.
        records: Lines of metrics.jsonl in the order of steps; that of step 0 is an evaluation.
        damaged: Lines of it that cannot be read.
        scores: What layers are sampled by, where the method needs that.
        world_size: Number of ranks, None where no checkpoint says it.
        home: Of frozen weights (`ows_ds.planner.forecast.HOMES`), None where no checkpoint says it.
    """

    name: str
    folder: Path
    recipe: Recipe
    records: tuple[Record, ...]
    damaged: int
    scores: Scores | None
    world_size: int | None
    home: str | None

    @cached_property
    def steps(self) -> tuple[Record, ...]:
        """Records of optimizer steps."""
        return tuple(record for record in self.records if record["step"] > 0)

    @property
    def state(self) -> str:
        """How far it is."""
        last = self.steps[-1]["step"] if self.steps else 0
        if (self.folder / "model").is_dir():
            return f"finished, {last:,} steps"
        total = f" of {self.recipe.train.steps:,}" if self.recipe.train.steps else ""
        return f"{last:,}{total} steps, not finished"

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, number) of all records that have a finite one under ``key``."""
        return [(record["step"], float(record[key])) for record in self.records if _is_number(record.get(key))]

    def median(self, key: str) -> float | None:
        """Of the optimizer steps that have a number under ``key``."""
        values = [value for step, value in self.series(key) if step > 0]
        return statistics.median(values) if values else None

    @cached_property
    def sent(self) -> dict[str, float]:
        """Mean bytes that a rank sends in a step, by operation; most first."""
        total: Counter[str] = Counter()
        for record in self.steps:
            sizes = record.get("comm_bytes") or {}
            total.update({operation: size for operation, size in sizes.items() if _is_number(size)})
        return {operation: size / len(self.steps) for operation, size in total.most_common() if size}

    @cached_property
    def sets(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """(first step, last step, layers) of each stretch of steps with one set of layers."""
        found: list[tuple[int, int, tuple[int, ...]]] = []
        for record in self.steps:
            first, layers = record["step"], tuple(sorted(_sampled(record)))
            if found and found[-1][1:] == (first - 1, layers):
                first = found.pop()[0]
            found.append((first, record["step"], layers))
        return found

    @cached_property
    def n_layers(self) -> int:
        """As far as it is known: by the model's configuration, the scores, or the layers that were sampled."""
        if self.model is not None:
            return len(self.model.layers.layers)
        if self.scores is not None:
            return len(self.scores.layers)
        return max((max(layers, default=-1) + 1 for _, _, layers in self.sets), default=0)

    @cached_property
    def shares(self) -> list[float]:
        """The part of the steps that each layer trained in."""
        count = Counter(layer for record in self.steps for layer in _sampled(record))
        return [count[layer] / max(1, len(self.steps)) for layer in range(self.n_layers)]

    @cached_property
    def update_norms(self) -> list[Stretch]:
        """How far each layer moved in these steps, by the record of the last of them."""
        found: list[Stretch] = []
        since: dict[int, int] = {}  # by layer: the first step that no stretch contains yet
        for record in self.steps:
            since = {layer: since.get(layer, int(record["step"])) for layer in _sampled(record)}
            for layer, norm in self._by_layer(record, "update_norm").items():
                found.append((since.pop(layer, record["step"]), record["step"], layer, norm))
        return found

    @cached_property
    def energies(self) -> list[Stretch]:
        """The part of a layer's gradient that the projectors of these steps kept when they were computed."""
        found: list[Stretch] = []
        current: dict[int, tuple[int, float]] = {}  # by layer: step, energy
        end: Record = {"step": self.steps[-1]["step"] + 1} if self.steps else {}
        for record in (*self.steps, end):
            active, new = _sampled(record), self._by_layer(record, "projector_energy")
            for layer in [layer for layer in current if layer not in active or layer in new]:
                first, energy = current.pop(layer)
                found.append((first, record["step"] - 1, layer, energy))
            current |= {layer: (record["step"], energy) for layer, energy in new.items()}
        return found

    def _by_layer(self, record: Record, key: str) -> dict[int, float]:
        """A record's numbers of layers under ``key``, such as {"3": 0.5}."""
        values = record.get(key)
        pairs = values.items() if isinstance(values, dict) else ()
        numbers = {int(name): float(one) for name, one in pairs if re.fullmatch("[0-9]{1,6}", name) and _is_number(one)}
        return {layer: one for layer, one in numbers.items() if layer < self.n_layers}

    @property
    def _ratios(self) -> Sequence[float] | None:
        return None if self.scores is None else self.scores.layers

    @cached_property
    def probabilities(self) -> list[float] | None:
        """p_l of each layer, for methods that draw layers; the last ones where they adapt."""
        kind, sampling = importance_of(self.recipe), self.recipe.sampling
        if kind == "gradient":
            found = [record["probabilities"] for record in self.steps if record.get("probabilities")]
            return found[-1] if found and len(found[-1]) == self.n_layers else None
        if self.recipe.method.name not in ("ows", "lisa", "lisa-d") or (kind in METRIC_OF and self.scores is None):
            return None
        try:
            weights = probabilities.importance(kind, self.n_layers, self._ratios)
            return probabilities.probabilities(weights, config.gamma(self.recipe, weights), sampling.tau)
        except UserError:  # somebody changed the folder by hand
            return None

    @cached_property
    def model(self) -> Model | None:
        """The model's shapes, where its configuration can still be found."""
        for path in (str(self.folder / "model"), self.recipe.model.path):
            if Path(path).is_dir():
                try:
                    return read_model(path, self.recipe.model.revision)  # without code that comes with it
                except UserError:
                    continue
        return None

    @cached_property
    def planned(self) -> Memory | None:
        """Memory of a step with new projectors, where the model's shapes and the world size are known."""
        if self.model is None or self.world_size is None:
            return None
        try:
            planner = Planner(self.recipe, self.model, self._ratios)
            return planner.expected(planner.choice(self.world_size, self.home))
        except UserError:
            return None

    @cached_property
    def samples(self) -> dict[str, dict[int, str]]:
        """Answers to the messages of ``log.samples``, by message and by the step after which they were given."""
        found: dict[str, dict[int, str]] = {}
        for record in self.records:
            some = record.get("samples")
            for pair in some if isinstance(some, list) else ():
                if isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair):
                    found.setdefault(pair[0], {})[record["step"]] = pair[1]
        return found

    @cached_property
    def evaluations(self) -> tuple[list[Result], list[str]]:
        """Results of `ows-ds eval`, oldest first, and the names of files that are none."""
        return results.of_run(self.folder)

    @cached_property
    def faults(self) -> list[tuple[int, str]]:
        """(step, what happened) of all that went wrong."""
        found = []
        for record in self.records:
            if bad := record.get("nonfinite"):
                found.append((record["step"], ", ".join(f"{name} was {value}" for name, value in bad.items())))
            if record.get("skipped"):
                found.append((record["step"], "skipped: there was nothing to train, or its numbers were not finite"))
        return found


def read(folder: Path) -> Run:
    """Raises UserError (``RUN_DIR``) for a folder that is no run, and for files in it that are not a run's."""
    if not (folder / "config.yaml").is_file():
        raise UserError("RUN_DIR", str(folder), "expected the folder of a run, with its config.yaml")
    recipe = config.from_dict(files.read_yaml(folder / "config.yaml", "RUN_DIR"))
    records, damaged = _records(folder / "metrics.jsonl")
    scores = Scores.read(folder / "scores.json") if (folder / "scores.json").is_file() else None
    return Run(str(folder), folder, recipe, tuple(records), damaged, scores, *_ranks(folder))


def _records(path: Path) -> tuple[list[Record], int]:
    """The lines of a metrics file in the order of steps, and how many cannot be read."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] >= 0:
            records.append(record)
    return sorted(records, key=lambda record: record["step"]), len(lines) - len(records)


def _ranks(run_dir: Path) -> tuple[int | None, str | None]:
    """World size, and home of the frozen weights, by the newest manifest that can be read."""
    for folder in checkpoint.checkpoints(run_dir):
        try:
            manifest = checkpoint.read_manifest(folder)
        except UserError:
            continue
        home = manifest.facts.get("sharding")
        return manifest.world_size, home if home in HOMES else None
    return None, None


def _sampled(record: Record) -> set[int]:
    return set(record.get("sampled_layers") or ())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
