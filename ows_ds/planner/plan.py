"""The verb `plan`: what a recipe needs on a cluster, what fits, and files to start with; before anything runs."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ows_ds import config, methods
from ows_ds.config import Recipe
from ows_ds.distributed.ds_config import DEFAULT_CONFIG, check_config, read_config
from ows_ds.distributed.launch import suppress_warnings
from ows_ds.errors import UserError
from ows_ds.files import atomic_write, can_be_made
from ows_ds.importance.probabilities import METRIC_OF, importance_of
from ows_ds.importance.scores import Scores
from ows_ds.model.shapes import read_model
from ows_ds.planner.choices import HOMES, Choice, choices, scaling_sizes
from ows_ds.planner.cluster import Cluster
from ows_ds.planner.forecast import Forecast, Planner, Replays, ranked
from ows_ds.planner.step import entries
from ows_ds.tables import Table, lines, number, terminal

FILES = ("plan.json", "recipe.yaml", "scaling.png")
STATE = ("weights", "second shards", "coordinates", "gradients", "moments", "masters", "projectors", "buckets")
PARTS = {  # of what a step adds: component, and the phases of which the largest counts
    "activations": ("activations", ("forward", "loss", "backward")),
    "logits": ("logits", ("loss",)),
    "one layer's pass": ("one layer", ("forward", "backward")),
    "gathered weights": ("gathered", ("arrival", "forward", "loss", "backward", "embedding")),
}
Rows = dict[str, list[float]]


def plan(
    recipe: Recipe, cluster: Cluster, others: Sequence[str], output: Path | None, choose: str, as_json: bool
) -> None:
    """Print tables (or JSON) of ``recipe`` on ``cluster``. others: methods to compare it with.

    output: folder for a recipe with the cheapest or the fastest choice that fits (choose), its DeepSpeed file, the
    numbers and a plot; nothing in it is written over. Raises UserError for whatever the user can put right.
    """
    suppress_warnings()
    report = Report(recipe, cluster, others)
    if output is not None:
        _check_output(output)
    summary = report.summary()
    if output is not None:
        taken, chosen = report.proposal or ({}, report.cheapest if choose == "cheapest" else report.fastest)
        _write(output, report, taken, chosen, summary)
    print(json.dumps(summary, indent=2, allow_nan=False) if as_json else terminal(report.tables(), report.notes()))


class Report:
    """All forecasts of one recipe; each is made when it is first asked for."""

    def __init__(self, recipe: Recipe, cluster: Cluster, others: Sequence[str]) -> None:
        """Raises UserError for what training would refuse."""
        model = read_model(recipe.model.path, recipe.model.revision, recipe.model.trust_remote_code)
        methods.check(recipe, model.layers)
        self.recipe, self.cluster, self.others = recipe, cluster, others
        self.settings = _ds_config(recipe)
        replays = Replays(model.config, self.settings["zero_optimization"])
        self.planner = Planner(recipe, model, _ratios(recipe, len(model.layers.layers)), replays)
        self.homes = list(HOMES)[: 1 if cluster.world_size == 1 else 2 if cluster.nodes == 1 else 3]

    def _forecasts(self, planner: Planner, **changes: Any) -> list[Forecast]:
        """On the whole cluster with the recipe's micro-batch, by home."""
        found = [replace(planner.choice(self.cluster.world_size, home), **changes) for home in self.homes]
        return [planner.forecast(self.cluster, choice) for choice in found]

    @cached_property
    def columns(self) -> dict[bool, list[Forecast]]:
        """On the whole cluster, a home each, by checkpointing."""
        return {
            checkpointing: self._forecasts(self.planner, checkpointing=checkpointing) for checkpointing in (False, True)
        }

    @property
    def asked(self) -> list[Forecast]:
        """Those with the recipe's checkpointing."""
        return self.columns[self.recipe.train.gradient_checkpointing]

    @cached_property
    def compared(self) -> dict[str, list[Forecast]]:
        """The same under other methods."""
        return {name: self._forecasts(self.planner.under(name)) for name in self.others}

    @cached_property
    def all(self) -> list[Forecast]:
        """Under all that can be chosen on the cluster or a part of it."""
        found = choices(self.recipe.train.global_batch_size, self.cluster)
        return [self.planner.forecast(self.cluster, choice) for choice in found]

    @cached_property
    def cheapest(self) -> Forecast | None:
        """Of those that fit."""
        return next(iter(ranked(self.all)), None)

    @cached_property
    def fastest(self) -> Forecast | None:
        """The same with most tokens a day."""
        return max(ranked(self.all), key=lambda one: one.tokens_per_day, default=None)

    @cached_property
    def proposal(self) -> tuple[dict[str, Any], Forecast] | None:
        """Where nothing fits: the first keys that make something fit, and the cheapest of it."""
        batch = self.recipe.train.global_batch_size
        for taken, planner in self.planner.levers() if self.cheapest is None else ():
            found = list(choices(batch, self.cluster))
            lean = [one for one in found if one.micro_batch == 1 and one.checkpointing]
            if any(planner.forecast(self.cluster, one).fits for one in lean):
                return taken, ranked([planner.forecast(self.cluster, one) for one in found])[0]
        return None

    @cached_property
    def scaling(self) -> dict[str, dict[int, Forecast]]:
        """Of each home, the recipe's work of a GPU on up to 1,024 of them."""
        sizes, least = scaling_sizes(self.cluster), {"replicated": 0, "zero3": 1, "hpz": self.cluster.gpus}
        found = {
            home: {n: self.planner.scaled(self.cluster, n, home) for n in sizes if n > least[home]} for home in HOMES
        }
        return {home: some for home, some in found.items() if some}

    # ---- shown

    def tables(self) -> list[Table]:
        """For the terminal."""
        shown = [self._memory(), self._traffic(), self._times(), self._fitting()]
        return [table for table in (*shown, self._methods()) if table.rows]

    def _memory(self) -> Table:
        asked = self.recipe.train.gradient_checkpointing
        some = [one for column in self.columns.values() for one in column]
        some = [one for one in some if one.choice.home != "hpz" or one.choice.checkpointing == asked]
        rows: Rows = {name: [one.plain.state.get(name, 0) for one in some] for name in STATE}
        rows |= {f"+ {part}": [_largest(one, *PARTS[part]) for one in some] for part in PARTS}
        rows |= {
            "peak of a step": [one.plain.peak for one in some],
            "with a refresh": [one.refresh.peak for one in some],
        }
        table = _table("memory of a GPU [GB]", some, rows, lambda size: number(size / 1e9, 2, fixed=True))
        head = [f"{name}{', ckpt' * one.choice.checkpointing}" for name, one in zip(table.head[1:], some, strict=True)]
        return Table(table.title, ["", *head], [*table.rows, ["fits", *("yes" if one.fits else "no" for one in some)]])

    def _traffic(self) -> Table:
        rows: Rows = {op: [one.sent[op].sent / 1e6 if op in one.sent else 0 for one in self.asked]
                      for op in (op for one in self.asked for op in one.sent)}  # fmt: skip
        rows["all"] = [one.sent_bytes / 1e6 for one in self.asked]
        return _table("sent by a GPU in a step [MB]", self.asked, rows)

    def _times(self) -> Table:
        rows: Rows = {phase: [1e3 * one.times.work.get(phase, 0) for one in self.asked]
                      for phase in (phase for one in self.asked for phase in one.times.work)}  # fmt: skip
        rows["links"] = [1e3 * sum(one.times.links.values()) for one in self.asked]
        rows["step, no overlap"] = [1e3 * one.times.serial for one in self.asked]
        rows["step, overlapped"] = [1e3 * one.times.overlapped for one in self.asked]
        rows["Mtokens a day"] = [one.tokens_per_day / 1e6 for one in self.asked]
        return _table("time of a step at best [ms]", self.asked, rows)

    def _fitting(self) -> Table:
        groups: dict[tuple[int, str], list[Forecast]] = {}
        for one in self.all:
            groups.setdefault((one.choice.world_size, one.choice.home), []).append(one)
        rows = []
        for (world_size, home), some in groups.items():
            best = next(iter(ranked(some)), None)
            shown = best or min(some, key=lambda one: one.peak)
            mark = "too big" if best is None else "cheapest" if best is self.cheapest else ""
            mark = mark or ("fastest" if best is self.fastest else "")
            numbers = (1e3 * shown.seconds, shown.tokens_per_day / 1e6, shown.gpu_hours * (self.cluster.price or 1))
            rows.append([str(world_size), HOMES[home], str(shown.choice.micro_batch),
                         "yes" if shown.choice.checkpointing else "no", number(shown.peak / 1e9, 1, fixed=True),
                         *(number(value, 3) for value in numbers), mark])  # fmt: skip
        cost = "GPU h/Gtok" if self.cluster.price is None else "price/Gtok"
        head = ["GPUs", "weights", "micro", "ckpt", "GB", "ms", "Mtok/day", cost, ""]
        return Table("what fits: the cheapest of each", head, rows)

    def _methods(self) -> Table:
        homes = [home for home in self.homes if home != "hpz"]
        rows = []
        for name, found in ({self.recipe.method.name: self.asked} | self.compared if self.others else {}).items():
            some = found[: len(homes)]
            cells = [cell for one in some for cell in (one.peak / 1e9, one.sent_bytes / 1e6, 1e3 * one.seconds)]
            rows.append([name, *(number(cell, 3) for cell in cells)])
        units = ("[GB]", "[MB sent]", "[ms]")
        return Table("methods", ["method", *(f"{HOMES[home]} {unit}" for home in homes for unit in units)], rows)

    def notes(self) -> list[str]:
        """What a reader must know, and what to start with."""
        c, train = self.cluster, self.recipe.train
        total, active = (f"{count / 1e9:.3g} B" for count in entries(self.planner.model.layers))
        size = total if active == total else f"{total}, of which {active} work on a token"
        found = [
            f"{self.planner.model.name} ({size}), {self.recipe.method.name}, {self.recipe.model.dtype}, length "
            f"{self.recipe.data.max_length}, batch {train.global_batch_size}; {c.nodes} x {c.gpus} GPUs of "
            f"{c.memory:g} GB, of which {c.reserve:g} GB are not ours.",
            f"Times are rooflines at {100 * c.reach:.0f} % (--reach) of the data sheets' numbers, no measurements. "
            "Formulas and their sources: docs/plan.md.",
        ]
        if self.cheapest is None and self.proposal is None:
            return [*found, "Nothing of this fits: take more GPUs, a shorter data.max_length or a smaller optim.rank."]
        if self.proposal is not None:
            taken, proposed = self.proposal
            words = [f"--{key} {value}" for key, value in taken.items()]
            options = [word for pair in proposed.choice.options() for word in pair]
            command = self.command(proposed.choice, "RECIPE.yaml", *" ".join(words).split(), *options)
            return [
                *found,
                f"Nothing of this fits as it is. With {' '.join(words)} it does, in {proposed.peak / 1e9:.1f} GB of a "
                "GPU (what each of them costs: docs/quantised.md):",
                command,
            ]
        for name, one in {"Cheapest": self.cheapest, "Fastest": self.fastest}.items():
            if one is not None and (name == "Cheapest" or one is not self.cheapest):
                options = [word for pair in one.choice.options() for word in pair]
                found.append(f"{name}: {self.command(one.choice, 'RECIPE.yaml', *options)}")
        return found

    def command(self, choice: Choice, *words: str) -> str:
        """How to start it. words: the recipe, and options."""
        gpus, nodes = min(choice.world_size, self.cluster.gpus), max(1, choice.world_size // self.cluster.gpus)
        launcher = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else []), "--nproc_per_node", str(gpus)]
        program = [*launcher, "-m", "ows_ds"] if choice.world_size > 1 else ["ows-ds"]
        return shlex.join([*program, "train", "--config", *words])

    # ---- written

    def summary(self) -> dict[str, Any]:
        """JSON-able: bytes, seconds, entries."""
        found = {
            "format": 1,
            "model": self.planner.model.name,
            "parameters": dict(zip(("total", "active"), entries(self.planner.model.layers), strict=True)),
            "cluster": self.cluster.model_dump(),
            "recipe": config.to_dict(self.recipe),
            "whole cluster": [_described(one) for some in self.columns.values() for one in some],
            "choices": [_brief(one) for one in self.all],
            "cheapest": None if self.cheapest is None else asdict(self.cheapest.choice),
            "fastest": None if self.fastest is None else asdict(self.fastest.choice),
            "proposal": None if self.proposal is None else {"keys": self.proposal[0], **_brief(self.proposal[1])},
            "scaling": {
                home: {n: one.tokens_per_day for n, one in some.items()} for home, some in self.scaling.items()
            },
        }
        if self.others:
            found["methods"] = {name: [_described(one) for one in some] for name, some in self.compared.items()}
        return found

    def ds_config(self, choice: Choice) -> dict[str, Any]:
        """The DeepSpeed file of a choice: the recipe's, or ours."""
        zero = {"stage3_param_persistence_threshold": 0, **self.settings["zero_optimization"]}
        if choice.home == "hpz":
            zero["zero_hpz_partition_size"] = self.cluster.gpus
        auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        bf16 = {"bf16": {"enabled": self.recipe.model.dtype == "bfloat16"}}
        return {**bf16, **auto, **self.settings, "zero_optimization": zero}


def _largest(one: Forecast, component: str, phases: Sequence[str]) -> int:
    """Bytes of a component in the phase in which it is largest."""
    return max(one.plain.phases.get(phase, {}).get(component, 0) for phase in phases)


def _table(
    title: str, columns: Sequence[Forecast], rows: Rows, show: Callable[[float], str] = lambda value: number(value, 3)
) -> Table:
    """A column a forecast; rows without a number are left out, zeros empty."""
    shown = [[name, *(show(x) if x else "" for x in values)] for name, values in rows.items() if any(values)]
    return Table(title, ["", *(HOMES[one.choice.home] for one in columns)], shown)


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
    right = "a folder that can be written to, or a name at which one can be made" if not can_be_made(output) else None
    for name in (*FILES, "ds_config.json"):
        if right is None and (output / name).exists():
            right = f"a folder without {name}: nothing is written over"
    if right is not None:
        raise UserError("--output", str(output), f"expected {right}")


def _write(
    output: Path, report: Report, taken: dict[str, Any], chosen: Forecast | None, summary: dict[str, Any]
) -> None:
    """The numbers, the plot, and what starts the choice. taken: keys of the recipe that it changes, too."""
    texts = {"plan.json": json.dumps(summary, indent=2, allow_nan=False) + "\n"}
    if chosen is not None:
        sharded = chosen.choice.sharding == "zero3"
        ds_config = {"ds_config": str(output / "ds_config.json") if sharded else None}
        recipe = report.planner.changed(train=chosen.choice.settings() | ds_config).recipe
        recipe = config.changed(recipe, taken)
        start = report.command(chosen.choice, str(output / "recipe.yaml"))
        texts["recipe.yaml"] = f"# {start}\n{config.to_yaml(recipe)}"
        if sharded:
            texts["ds_config.json"] = json.dumps(report.ds_config(chosen.choice), indent=2) + "\n"
    for name, text in texts.items():
        with atomic_write(output / name) as partial:
            partial.write_text(text, encoding="utf-8")
    series = {
        HOMES[home]: {n: one.tokens_per_day / 1e6 for n, one in some.items()} for home, some in report.scaling.items()
    }
    lines(series, "GPUs", "million tokens a day, roofline", output / "scaling.png", log=True)
