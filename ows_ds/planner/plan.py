"""The verb `plan`: what a recipe needs on a cluster, what fits, and files to start with; before anything runs."""

from __future__ import annotations

import functools
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ows_ds import config, files, methods
from ows_ds.config import Recipe
from ows_ds.distributed.ds_config import DEFAULT_CONFIG, check_config, read_config
from ows_ds.distributed.launch import suppress_warnings
from ows_ds.errors import UserError
from ows_ds.files import atomic_write
from ows_ds.importance.probabilities import METRIC_OF, importance_of
from ows_ds.importance.scores import Scores
from ows_ds.model.shapes import Model, read_model
from ows_ds.planner.cluster import Cluster
from ows_ds.planner.forecast import (
    HOME_NAMES,
    HOMES,
    Choice,
    Forecast,
    Replays,
    choice_of,
    choices,
    forecast,
    ranked,
    scaled,
    scaling_sizes,
    under,
)
from ows_ds.planner.memory import Memory
from ows_ds.tables import Table, lines, number, terminal

FILES = ("plan.json", "recipe.yaml", "scaling.png")
STATE = ("weights", "second shards", "coordinates", "gradients", "moments", "masters", "projectors", "buckets")
PARTS = {  # of what a step adds: where it is largest
    "activations": ("forward", "loss", "backward"),
    "logits": ("loss",),
    "one layer's pass": ("forward", "backward"),
    "gathered weights": ("arrival", "forward", "loss", "backward", "embedding"),
}
Column = tuple[str, Forecast]


def plan(
    recipe: Recipe, cluster: Cluster, others: Sequence[str], output: Path | None, choose: str, as_json: bool
) -> None:
    """Print tables (or JSON) of ``recipe`` on ``cluster``. others: methods to compare it with.

    output: folder for a recipe with the cheapest or the fastest choice that fits (choose), its DeepSpeed file, the
    numbers and a plot; nothing in it is written over. Raises UserError for whatever the user can put right.
    """
    suppress_warnings()
    model = read_model(recipe.model.path, recipe.model.revision, recipe.model.trust_remote_code)
    methods.check(recipe, model.layers)
    settings = _ds_config(recipe)
    if output is not None:
        _check_output(output)
    planner = _Planner(recipe, model, cluster, settings)
    summary = planner.summary(others)
    if output is not None:
        _write(output, planner, choose, summary)
    print(
        json.dumps(summary, indent=2, allow_nan=False) if as_json else terminal(planner.tables(others), planner.notes())
    )


class _Planner:
    """All forecasts of one recipe; each is made when it is first asked for."""

    def __init__(self, recipe: Recipe, model: Model, cluster: Cluster, settings: dict[str, Any]) -> None:
        self.recipe, self.model, self.cluster, self.settings = recipe, model, cluster, settings
        self.ratios = _ratios(recipe, len(model.layers.layers))
        self.replays = self._replays(recipe)

    def _replays(self, recipe: Recipe) -> Replays:
        return Replays(self.model.config, self.settings["zero_optimization"], functools.partial(methods.adapt, recipe))

    def forecast(self, choice: Choice, recipe: Recipe | None = None) -> Forecast:
        """Of the recipe, or of another one, under a choice."""
        if recipe is None or recipe is self.recipe:
            return forecast(self.recipe, self.model, self.cluster, choice, self.ratios, self.replays)
        return forecast(recipe, self.model, self.cluster, choice, self.ratios, self._replays(recipe))

    @functools.cached_property
    def homes(self) -> list[str]:
        """Homes of the weights that the whole cluster offers."""
        return list(HOMES[: 1 if self.cluster.world_size == 1 else 2 if self.cluster.nodes == 1 else 3])

    @functools.cached_property
    def columns(self) -> dict[bool, list[Column]]:
        """(name, forecast) on the whole cluster with the recipe's micro-batch, by checkpointing."""
        return {
            checkpointing: [
                (HOME_NAMES[home], self.forecast(replace(choice_of(self.recipe, self.cluster.world_size, home),
                                                         checkpointing=checkpointing)))
                for home in self.homes
            ]
            for checkpointing in (False, True)
        }  # fmt: skip

    @property
    def asked(self) -> list[Column]:
        """The columns with the recipe's checkpointing."""
        return self.columns[self.recipe.train.gradient_checkpointing]

    @functools.cached_property
    def all(self) -> list[Forecast]:
        """Under all that can be chosen on the cluster or a part of it."""
        return [self.forecast(choice) for choice in choices(self.recipe, self.cluster)]

    @functools.cached_property
    def cheapest(self) -> Forecast | None:
        """Of those that fit."""
        return next(iter(ranked(self.all)), None)

    @functools.cached_property
    def fastest(self) -> Forecast | None:
        """The same with most tokens a day."""
        return max(ranked(self.all), key=lambda one: one.tokens_per_day, default=None)

    def ds_config(self, choice: Choice) -> dict[str, Any]:
        """The DeepSpeed file of a choice: the recipe's, or ours."""
        zero = dict(self.settings["zero_optimization"])
        if choice.home == "hpz":
            zero["zero_hpz_partition_size"] = self.cluster.gpus
        auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        bf16 = {"bf16": {"enabled": self.recipe.model.dtype == "bfloat16"}}
        return {**bf16, **auto, **self.settings, "zero_optimization": {"stage3_param_persistence_threshold": 0, **zero}}

    @functools.cached_property
    def scaling(self) -> dict[str, dict[int, Forecast]]:
        """Of each home, the recipe's work of a GPU on up to 1,024 of them."""
        homes = HOMES if max(scaling_sizes(self.cluster)) > self.cluster.gpus else HOMES[:2]
        found: dict[str, dict[int, Forecast]] = {}
        for home in homes:
            for world_size in scaling_sizes(self.cluster):
                if home == "replicated" or world_size > (self.cluster.gpus if home == "hpz" else 1):
                    one = scaled(self.recipe, self.model, self.cluster, world_size, home, self.ratios, self.replays)
                    found.setdefault(home, {})[world_size] = one
        return found

    # ---- shown

    def tables(self, others: Sequence[str]) -> list[Table]:
        """For the terminal."""
        shown = [self._memory(), self._traffic(), self._times(), self._fitting()]
        return [*shown, self._methods(others)] if others else shown

    def _memory(self) -> Table:
        columns = [
            (f"{name}{', ckpt' if checkpointing else ''}", one)
            for checkpointing in (False, True)
            for name, one in self.columns[checkpointing]
            if one.choice.home != "hpz" or checkpointing == self.recipe.train.gradient_checkpointing
        ]
        rows = _rows({name: [one.plain.state.get(name, 0) for _, one in columns] for name in STATE})
        parts = {part: [_largest(one.plain, part) for _, one in columns] for part in PARTS}
        rows += _rows(parts, "+ ")
        rows += _rows({"peak of a step": [one.plain.peak for _, one in columns]}, always=True)
        rows += _rows({"with a refresh": [one.refresh.peak for _, one in columns]})
        rows.append(["fits", *("yes" if one.fits else "no" for _, one in columns)])
        return Table("memory of a GPU [GB]", ["", *(name for name, _ in columns)], rows)

    def _traffic(self) -> Table:
        operations = list(dict.fromkeys(op for _, one in self.asked for op in one.sent))
        rows = [
            [op, *(_or_nothing(one.sent[op].sent / 1e6) if op in one.sent else "" for _, one in self.asked)]
            for op in operations
        ]
        totals = [sum(message.sent for message in one.sent.values()) / 1e6 for _, one in self.asked]
        rows.append(["all", *map(_or_nothing, totals)])
        return Table("sent by a GPU in a step [MB]", ["", *(name for name, _ in self.asked)], rows)

    def _times(self) -> Table:
        phases = list(dict.fromkeys(phase for _, one in self.asked for phase in one.times.work))
        rows = [[p, *(_or_nothing(1e3 * one.times.work.get(p, 0)) for _, one in self.asked)] for p in phases]
        rows.append(["links", *(_or_nothing(1e3 * sum(one.times.links.values())) for _, one in self.asked)])
        rows.append(["step, no overlap", *(_or_nothing(1e3 * one.times.serial) for _, one in self.asked)])
        rows.append(["step, overlapped", *(_or_nothing(1e3 * one.times.overlapped) for _, one in self.asked)])
        rows.append(["Mtokens a day", *(number(one.tokens_per_day / 1e6, 3) for _, one in self.asked)])
        return Table("time of a step at best [ms]", ["", *(name for name, _ in self.asked)], rows)

    def _fitting(self) -> Table:
        head = ["GPUs", "weights", "micro", "ckpt", "GB", "ms", "Mtok/day", "GPU h/Gtok", ""]
        if self.cluster.price is not None:
            head[-2] = "price/Gtok"
        rows = []
        for world_size, home in dict.fromkeys((one.choice.world_size, one.choice.home) for one in self.all):
            some = [one for one in self.all if (one.choice.world_size, one.choice.home) == (world_size, home)]
            best = next(iter(ranked(some)), None)
            shown = best or min(some, key=lambda one: one.peak)
            mark = "too big" if best is None else ""
            mark = "cheapest" if best is self.cheapest and best else mark
            mark = "fastest" if best is self.fastest and best and best is not self.cheapest else mark
            cost = shown.gpu_hours * (self.cluster.price or 1)
            rows.append([str(world_size), HOME_NAMES[home], str(shown.choice.micro_batch),
                         "yes" if shown.choice.checkpointing else "no", number(shown.peak / 1e9, 1, fixed=True),
                         number(1e3 * shown.seconds, 3), number(shown.tokens_per_day / 1e6, 3),
                         number(cost, 3), mark])  # fmt: skip
        return Table("what fits: the cheapest of each", head, rows)

    def _methods(self, others: Sequence[str]) -> Table:
        homes = [home for home in self.homes if home != "hpz"]
        recipes = under(self.recipe, list(dict.fromkeys([self.recipe.method.name, *others])))
        head = ["method", *(f"{HOME_NAMES[h]} {what}" for h in homes for what in ("[GB]", "[MB sent]", "[ms]"))]
        rows = []
        for name, recipe in recipes.items():
            cells = []
            for home in homes:
                one = self.forecast(choice_of(recipe, self.cluster.world_size, home), recipe)
                sent = sum(message.sent for message in one.sent.values()) / 1e6
                cells += [one.peak / 1e9, sent, 1e3 * one.seconds]
            rows.append([name, *(number(cell, 3) for cell in cells)])
        return Table("methods", head, rows)

    def notes(self) -> list[str]:
        """What a reader must know, and what to start with."""
        c = self.cluster
        found = [
            f"{self.model.name}, {self.recipe.method.name}, {self.recipe.model.dtype}, length "
            f"{self.recipe.data.max_length}, batch {self.recipe.train.global_batch_size}; {c.nodes} x {c.gpus} GPUs of "
            f"{c.memory:g} GB, of which {c.reserve:g} GB are not ours.",
            f"Times are rooflines at {100 * c.reach:.0f} % (--reach) of the data sheets' numbers, no measurements. "
            "Formulas and their sources: docs/plan.md.",
        ]
        if self.cheapest is None:
            return [*found, "Nothing of this fits: take more GPUs, a shorter data.max_length or a smaller optim.rank."]
        found.append("Cheapest: " + self.command(self.cheapest.choice))
        if self.fastest is not None and self.fastest is not self.cheapest:
            found.append("Fastest: " + self.command(self.fastest.choice))
        return found

    def command(self, choice: Choice, recipe: str = "RECIPE.yaml") -> str:
        """How to start it."""
        gpus, nodes = min(choice.world_size, self.cluster.gpus), max(1, choice.world_size // self.cluster.gpus)
        words = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else []), "--nproc_per_node", str(gpus)]
        words = [*words, "-m", "ows_ds"] if choice.world_size > 1 else ["ows-ds"]
        words += ["train", "--config", recipe]
        if recipe == "RECIPE.yaml":
            words += ["--train.sharding", "replicated" if choice.home == "replicated" else "zero3",
                      "--train.micro_batch_size", str(choice.micro_batch),
                      "--train.gradient_checkpointing", str(choice.checkpointing).lower()]  # fmt: skip
        return shlex.join(words)

    # ---- written

    def summary(self, others: Sequence[str]) -> dict[str, Any]:
        """JSON-able: bytes, seconds, entries."""
        found = {
            "format": 1,
            "model": self.model.name,
            "cluster": asdict(self.cluster),
            "recipe": config.to_dict(self.recipe),
            "whole cluster": [_described(one) for some in self.columns.values() for _, one in some],
            "choices": [_brief(one) for one in self.all],
            "cheapest": None if self.cheapest is None else asdict(self.cheapest.choice),
            "fastest": None if self.fastest is None else asdict(self.fastest.choice),
            "scaling": {
                home: {world_size: one.tokens_per_day for world_size, one in some.items()}
                for home, some in self.scaling.items()
            },
        }
        if others:
            found["methods"] = {
                name: [
                    _described(self.forecast(choice_of(recipe, self.cluster.world_size, home), recipe))
                    for home in self.homes
                ]
                for name, recipe in under(self.recipe, others).items()
            }
        return found


def _largest(memory: Memory, part: str) -> int:
    """Bytes of a part in the phase in which it is largest."""
    name = {"one layer's pass": "one layer", "gathered weights": "gathered"}.get(part, part)
    return max(memory.phases.get(phase, {}).get(name, 0) for phase in PARTS[part])


def _rows(parts: Mapping[str, Sequence[float]], before: str = "", always: bool = False) -> list[list[str]]:
    """A row a part, in GB; parts that are nowhere are left out."""
    return [
        [before + name, *(_or_nothing(size / 1e9, 2) for size in sizes)]
        for name, sizes in parts.items()
        if always or any(sizes)
    ]


def _or_nothing(value: float, digits: int | None = None) -> str:
    if not value:
        return ""
    return number(value, 3) if digits is None else number(value, digits, fixed=True)


def _brief(one: Forecast) -> dict[str, Any]:
    return {**asdict(one.choice), "peak": one.peak, "fits": one.fits, "seconds": one.seconds,
            "tokens_per_day": one.tokens_per_day, "gpu_hours_per_1e9_tokens": one.gpu_hours}  # fmt: skip


def _described(one: Forecast) -> dict[str, Any]:
    return {
        **_brief(one),
        "layers": {"expected": len(one.usual.sampled), "planned for": len(one.largest.sampled)},
        "state": one.plain.state,
        "phases": one.plain.phases,
        "refresh phases": one.refresh.phases,
        "sent": {name: asdict(message) for name, message in one.sent.items()},
        "seconds of work": one.times.work,
        "seconds of links": one.times.links,
        "seconds without overlap": one.times.serial,
        "seconds overlapped": one.times.overlapped,
    }


# ------------------------------------------------------------------ files


def _ratios(recipe: Recipe, n_layers: int) -> tuple[float, ...] | None:
    """The layers' scores, if they are named or the recipe's run has them already, and its method needs them."""
    metric = METRIC_OF.get(importance_of(recipe))
    path = Path(recipe.sampling.scores or Path(recipe.train.output_dir) / "scores.json")
    if metric is None or (recipe.sampling.scores is None and not os.path.isfile(path)):
        return None
    scores = Scores.read(path)
    scores.check(scores.model, n_layers)
    return scores.layers if scores.metric == metric else None


def _ds_config(recipe: Recipe) -> dict[str, Any]:
    """The recipe's DeepSpeed file, or ours. Raises UserError for what training would refuse."""
    if recipe.train.ds_config is None:
        return dict(DEFAULT_CONFIG)
    found = read_config(recipe.train.ds_config)
    check_config(found)
    return found


def _check_output(output: Path) -> None:
    if not files.can_be_made(output):
        raise UserError(
            "--output", str(output), "expected a folder that can be written to, or a name at which one can be made"
        )
    for name in (*FILES, "ds_config.json"):
        if (output / name).exists():
            raise UserError("--output", str(output), f"expected a folder without {name}: nothing is written over")


def _write(output: Path, planner: _Planner, choose: str, summary: dict[str, Any]) -> None:
    """The numbers, the plot, and what starts the choice."""
    texts = {"plan.json": json.dumps(summary, indent=2, allow_nan=False) + "\n"}
    chosen = planner.cheapest if choose == "cheapest" else planner.fastest
    if chosen is not None:
        choice, recipe = chosen.choice, planner.recipe
        sharded = choice.home != "replicated"
        train = replace(
            recipe.train,
            sharding="zero3" if sharded else "replicated",
            micro_batch_size=choice.micro_batch,
            gradient_checkpointing=choice.checkpointing,
            ds_config=str(output / "ds_config.json") if sharded else None,
        )
        start = planner.command(choice, str(output / "recipe.yaml"))
        texts["recipe.yaml"] = f"# {start}\n{config.to_yaml(replace(recipe, train=train))}"
        if sharded:
            texts["ds_config.json"] = json.dumps(planner.ds_config(choice), indent=2) + "\n"
    for name, text in texts.items():
        with atomic_write(output / name) as partial:
            partial.write_text(text, encoding="utf-8")
    series = {
        HOME_NAMES[home]: {world_size: one.tokens_per_day / 1e6 for world_size, one in some.items()}
        for home, some in planner.scaling.items()
    }
    lines(series, "GPUs", "million tokens a day, roofline", output / "scaling.png", log=True)
