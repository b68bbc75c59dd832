"""All forecasts of one recipe on one cluster, and what is chosen of them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ows_ds import config
from ows_ds.config import Recipe
from ows_ds.distributed.ds_config import DEFAULT_CONFIG, check_config, read_config
from ows_ds.importance.probabilities import METRIC_OF, importance_of
from ows_ds.model.shapes import check_shared, read_model
from ows_ds.optim.sizes import check
from ows_ds.planner.choices import HOMES, Choice, choices, scaling_sizes
from ows_ds.planner.cluster import Cluster
from ows_ds.planner.fit import Fitted, by_speed, fit
from ows_ds.planner.forecast import Forecast, Planner, Replays, ranked
from ows_ds.planner.lengths import by_length
from ows_ds.planner.step import entries


class Report:
    """All forecasts of one recipe; each is made when it is first asked for."""

    def __init__(
        self, recipe: Recipe, cluster: Cluster, others: Sequence[str] = (), lengths: Sequence[int] = ()
    ) -> None:
        """others: methods to compare with. lengths: of rows, planned for as well.

        Raises UserError for what training would refuse.
        """
        model = read_model(recipe.model.path, recipe.model.revision, recipe.model.trust_remote_code)
        check(recipe, model.layers)
        config.data_ranks(recipe, cluster.world_size)
        if recipe.train.sequence_parallel > 1:
            check_shared(model.config, recipe.train.sequence_parallel)
        self.cluster, self.others, self.lengths = cluster, others, lengths
        self.settings = _ds_config(recipe)
        replays = Replays(lambda: model.config, self.settings["zero_optimization"], model.outline)
        asked = Planner(recipe, model, _ratios(recipe, len(model.layers.layers)), replays)
        self.homes = list(HOMES)[: 1 if cluster.world_size == 1 else 2 if cluster.nodes == 1 else 3]
        self.fitted = self._fit(asked)
        shown = self.fitted if self.fitted.fits else replace(self.fitted, planner=asked)  # `proposal` changes it
        self.recipe, self.auto = shown.recipe, recipe.auto
        self.planner = Planner(self.recipe, model, asked.ratios, replays)

    def _fit(self, planner: Planner) -> Fitted:
        """What is ``auto`` in a recipe, chosen for the whole cluster."""
        auto = planner.recipe.auto
        homes = self.homes if planner.recipe.train.sharding == "auto" else [planner.recipe.train.sharding]
        return fit(planner, by_speed(planner, self.cluster.world_size, homes), self.cluster.usable, auto)

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
    def compared(self) -> dict[str, Forecast]:
        """Each method at the fastest setting that fits the whole cluster; where none does, at the leanest."""
        found = {}
        for name in (self.recipe.method.name, *self.others):
            planner = self.planner.under(name)
            free = [*self.choices()]
            some = [planner.forecast(self.cluster, one) for one in free if one.world_size == self.cluster.world_size]
            best = max(ranked(some), key=lambda one: one.tokens_per_day, default=None)
            found[name] = best or min(some, key=lambda one: one.peak)
        return found

    @cached_property
    def by_length(self) -> dict[int, Forecast]:
        """See `ows_ds.planner.lengths.by_length`."""
        return by_length(self.planner, self.cluster, self.homes, self.lengths)

    def choices(self) -> Iterator[Choice]:
        """What can be chosen."""
        train = self.recipe.train
        return choices(train.global_batch_size, self.cluster, train.sequence_parallel)

    @cached_property
    def all(self) -> list[Forecast]:
        """Under all that can be chosen on the cluster or a part of it."""
        found = self.choices()
        return [self.planner.forecast(self.cluster, choice) for choice in found]

    @cached_property
    def cheapest(self) -> Forecast | None:
        """Of those that fit, under `proposal` where there is one."""
        return next(iter(ranked(self.proposed)), None)

    @cached_property
    def fastest(self) -> Forecast | None:
        """The same with most tokens a day."""
        return max(ranked(self.proposed), key=lambda one: one.tokens_per_day, default=None)

    @cached_property
    def proposal(self) -> Fitted | None:
        """Where nothing fits as it is: what makes something fit, or comes nearest."""
        if any(one.fits for one in self.all):
            return None
        found = self.choices()
        return fit(
            self.planner, [one for one in found if one.micro_batch == 1 and one.checkpointing], self.cluster.usable
        )

    @cached_property
    def proposed(self) -> list[Forecast]:
        """As `all`, under `proposal` where there is one."""
        if self.proposal is None:
            return self.all
        found = self.choices()
        return [self.proposal.planner.forecast(self.cluster, one) for one in found] if self.proposal.fits else []

    @cached_property
    def scaling(self) -> dict[str, dict[int, Forecast]]:
        """Of each home, the recipe's work of a GPU on up to 1,024 of them."""
        shared_by = self.recipe.train.sequence_parallel
        sizes = [n for n in scaling_sizes(self.cluster) if n % shared_by == 0]
        least = {"replicated": 0, "zero3": 1, "hpz": self.cluster.gpus}
        found = {
            home: {n: self.planner.scaled(self.cluster, n, home) for n in sizes if n > least[home]} for home in HOMES
        }
        return {home: some for home, some in found.items() if some}

    def command(self, choice: Choice, *words: str) -> str:
        """How to start it. words: the recipe, and options."""
        gpus, nodes = min(choice.world_size, self.cluster.gpus), max(1, choice.world_size // self.cluster.gpus)
        launcher = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else []), "--nproc_per_node", str(gpus)]
        program = [*launcher, "-m", "ows_ds"] if choice.world_size > 1 else ["ows-ds"]
        return shlex.join([*program, "train", "--config", *words])

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
            "chosen": {key: config.value_of(self.recipe, key) for key in sorted(self.auto)},
            "proposal": None
            if self.proposal is None or self.cheapest is None
            else {"keys": dict(self.proposal.changes), **_brief(self.cheapest)},
            "lengths": {length: _described(one) for length, one in self.by_length.items()},
            "scaling": {
                home: {n: one.tokens_per_day for n, one in some.items()} for home, some in self.scaling.items()
            },
        }
        if self.others:
            found["methods"] = {name: _described(one) for name, one in self.compared.items()}
        return found

    def ds_config(self, choice: Choice) -> dict[str, Any]:
        """The DeepSpeed file of a choice: the recipe's, or ours."""
        zero = {"stage3_param_persistence_threshold": 0, **self.settings["zero_optimization"]}
        if choice.home == "hpz":
            zero["zero_hpz_partition_size"] = self.cluster.gpus
        auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        bf16 = {"bf16": {"enabled": self.recipe.model.dtype == "bfloat16"}}
        return {**bf16, **auto, **self.settings, "zero_optimization": zero}


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


def _ratios(recipe: Recipe, n_layers: int) -> tuple[float, ...] | None:
    """The layers' scores, if they are named or the recipe's run has them already, and its method needs them."""
    metric = METRIC_OF.get(importance_of(recipe))
    path = Path(recipe.sampling.scores or Path(recipe.train.output_dir) / "scores.json")
    if metric is None or (recipe.sampling.scores is None and not os.path.isfile(path)):
        return None
    from ows_ds.importance.scores import Scores  # and with it torch

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
