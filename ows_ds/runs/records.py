"""The folder of a run -> what a report says of it. Only reads; what a run has not written yet is missing, not wrong."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ows_ds import checkpoint, config, files, methods
from ows_ds.runs import results
from ows_ds.importance import probabilities
from ows_ds.config import Recipe
from ows_ds.errors import UserError
from ows_ds.planner.forecast import HOMES, Planner
from ows_ds.planner.memory import Memory
from ows_ds.runs.results import Result
from ows_ds.importance.probabilities import METRIC_OF, importance_of
from ows_ds.importance.scores import Scores
from ows_ds.model.shapes import Model, read_model

Record = dict[str, Any]
Stretch = tuple[int, int, int, float]
"""(first step, last step, layer, a number that holds for the layer in these steps)."""


@dataclass(frozen=True)
class Run:
    """One run.

    name: as given on the command line. recipe: the resolved one. records: lines of metrics.jsonl in order; that of
    step 0 is an evaluation. damaged: lines of it that cannot be read. scores: what layers are sampled by, where the
    method needs that. checkpoints: steps of the complete ones, newest first. world_size: processes, and home, of frozen
    weights (`ows_ds.planner.forecast.HOMES`): None where no checkpoint tells.
    """

    name: str
    folder: Path
    recipe: Recipe
    records: tuple[Record, ...]
    damaged: int
    scores: Scores | None
    checkpoints: tuple[int, ...]
    world_size: int | None
    home: str | None

    @cached_property
    def steps(self) -> tuple[Record, ...]:
        """Records of optimizer steps."""
        return tuple(record for record in self.records if record["step"] > 0)

    @property
    def exported(self) -> bool:
        """Whether the run is finished and its model written."""
        return (self.folder / "model").is_dir()

    @property
    def state(self) -> str:
        """How far it came."""
        last = self.steps[-1]["step"] if self.steps else 0
        total = f" of {self.recipe.train.steps:,}" if self.recipe.train.steps else ""
        return f"finished, {last:,} steps" if self.exported else f"{last:,}{total} steps, not finished"

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, number) of all records that have a finite one under ``key``."""
        return [(record["step"], float(record[key])) for record in self.records if _is_number(record.get(key))]

    def median(self, key: str) -> float | None:
        """Of the optimizer steps that have a number under ``key``."""
        values = [float(record[key]) for record in self.steps if _is_number(record.get(key))]
        return statistics.median(values) if values else None

    @cached_property
    def sent(self) -> dict[str, float]:
        """Bytes that a process sends in a step, by operation, on average; most first."""
        total: Counter[str] = Counter()
        for record in self.steps:
            for operation, size in (record.get("comm_bytes") or {}).items():
                if _is_number(size):
                    total[operation] += size
        return {operation: size / len(self.steps) for operation, size in total.most_common() if size}

    @cached_property
    def sets(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """(first step, last step, layers) of each stretch of steps with one set."""
        found: list[tuple[int, int, tuple[int, ...]]] = []
        for record in self.steps:
            layers = tuple(sorted(set(record.get("sampled_layers") or ())))
            if found and found[-1][2] == layers and found[-1][1] + 1 == record["step"]:
                found[-1] = (found[-1][0], record["step"], layers)
            else:
                found.append((record["step"], record["step"], layers))
        return found

    @cached_property
    def n_layers(self) -> int:
        """Of the model, as far as it is known: by its configuration, its scores, or the layers that were seen."""
        if self.model is not None:
            return len(self.model.layers.layers)
        seen = (max(layers, default=-1) + 1 for _, _, layers in self.sets)
        return len(self.scores.layers) if self.scores is not None else max(seen, default=0)

    @cached_property
    def shares(self) -> list[float]:
        """Of the steps that each layer trained in."""
        count = [0] * self.n_layers
        for first, last, layers in self.sets:
            for layer in layers:
                count[layer] += last - first + 1
        return [number / max(1, len(self.steps)) for number in count]

    @cached_property
    def update_norms(self) -> list[Stretch]:
        """How far a layer has moved in these steps, by the record of the last of them."""
        found: list[Stretch] = []
        since: dict[int, int] = {}  # first step, by layer, of what is not told of yet
        for record in self.steps:
            active = set(record.get("sampled_layers") or ())
            since = {layer: since[layer] if layer in since else record["step"] for layer in active}
            for layer, norm in self._by_layer(record, "update_norm").items():
                found.append((since.pop(layer, record["step"]), record["step"], layer, norm))
        return found

    @cached_property
    def energies(self) -> list[Stretch]:
        """The share of a layer's gradient that the projectors used in these steps kept when they were found."""
        found: list[Stretch] = []
        current: dict[int, tuple[int, float]] = {}  # by layer: step, share
        end: Record = {"step": self.steps[-1]["step"] + 1} if self.steps else {}
        for record in (*self.steps, end):
            active, fresh = set(record.get("sampled_layers") or ()), self._by_layer(record, "projector_energy")
            for layer in [layer for layer in current if layer not in active or layer in fresh]:
                first, share = current.pop(layer)
                found.append((first, record["step"] - 1, layer, share))
            current |= {layer: (record["step"], share) for layer, share in fresh.items()}
        return found

    def _by_layer(self, record: Record, key: str) -> dict[int, float]:
        """What a record says of layers under ``key``, such as {"3": 0.5}."""
        told = record.get(key)
        pairs = told.items() if isinstance(told, dict) else ()
        numbers = {int(name): float(one) for name, one in pairs if re.fullmatch("[0-9]{1,6}", name) and _is_number(one)}
        return {layer: one for layer, one in numbers.items() if layer < self.n_layers}

    @cached_property
    def probabilities(self) -> list[float] | None:
        """p_l of each layer, for methods that draw layers."""
        if self.recipe.method.name not in ("ows", "lisa", "lisa-d"):
            return None
        kind, n_layers = importance_of(self.recipe), self.n_layers
        if kind in METRIC_OF and self.scores is None:
            return None
        ratios = None if self.scores is None else self.scores.layers
        try:
            weights = probabilities.importance(kind, n_layers, ratios)
            return probabilities.probabilities(weights, self.recipe.sampling.gamma, self.recipe.sampling.tau)
        except UserError:  # of a folder that somebody changed by hand
            return None

    @cached_property
    def model(self) -> Model | None:
        """The model's shapes, where its configuration can still be found."""
        exported, given = self.folder / "model", self.recipe.model
        for path in (str(exported), given.path):
            if Path(path).is_dir():
                try:
                    return read_model(path, given.revision)  # without the code of others
                except UserError:
                    continue
        return None

    @cached_property
    def planned(self) -> Memory | None:
        """Memory of a step with new projectors, by component, where the model's shapes and the world are known."""
        if self.model is None or self.world_size is None:
            return None
        ratios = None if self.scores is None else self.scores.layers
        try:
            planner = Planner(self.recipe, self.model, ratios)
            return planner.expected(planner.choice(self.world_size, self.home))
        except UserError:
            return None

    @cached_property
    def evaluations(self) -> tuple[list[Result], list[str]]:
        """Results of `ows-ds eval`, oldest first, and the names of files that are none."""
        return results.of_run(self.folder)

    @cached_property
    def faults(self) -> list[tuple[int, str]]:
        """(step, what happened) of all that did not go as it should."""
        found = []
        for record in self.records:
            bad = record.get("nonfinite") or {}
            if bad:
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
    found = checkpoint.checkpoints(folder)
    steps = tuple(int(path.name.removeprefix("step-")) for path in found)
    return Run(str(folder), folder, recipe, tuple(records), damaged, scores, steps, *_spread(found))


def _records(path: Path) -> tuple[list[Record], int]:
    """The lines of a metrics file in the order of steps, and how many are none."""
    records, damaged = [], 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return [], 0
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] >= 0:
            records.append(record)
        else:
            damaged += 1
    return sorted(records, key=lambda record: record["step"]), damaged


def _spread(checkpoints: list[Path]) -> tuple[int | None, str | None]:
    """Processes, and home of the frozen weights, by the newest manifest that tells."""
    for folder in checkpoints:
        try:
            manifest = json.loads((folder / checkpoint.MANIFEST).read_text(encoding="utf-8"))
            world_size, home = manifest["world_size"], manifest.get("facts", {}).get("sharding")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if isinstance(world_size, int) and world_size > 0:
            return world_size, home if home in HOMES else None
    return None, None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
