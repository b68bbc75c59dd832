"""Recipe + model + cluster -> memory, traffic and time of a step; what fits, and what is cheapest.

Nothing here loads weights or knows a process group: a model is its layers' shapes (`ows_ds.model.shapes`), a cluster its
numbers (`ows_ds.planner.cluster`). Bytes are those of `ows_ds.planner.memory`, seconds those of `ows_ds.planner.roofline`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ows_ds.config import Recipe
from ows_ds.errors import UserError
from ows_ds.importance.probabilities import importance, probabilities
from ows_ds.model.shapes import Model, without_weights
from ows_ds.optim.sampling import LayerSet
from ows_ds.planner.cluster import Cluster
from ows_ds.planner.gathering import Gathered, Limits, Trace, record, replay
from ows_ds.planner.memory import ADAPTERS, SAMPLED, Job, Memory, gathers, likely_set, memory, sizes_of, traffic
from ows_ds.planner.roofline import Messages, Times, messages, times, work

ITEMSIZE = {"bfloat16": 2, "float32": 4, "float64": 8}  # bytes of a weight
HOMES = ("replicated", "zero3", "hpz")
HOME_NAMES = {"replicated": "replicated", "zero3": "ZeRO-3", "hpz": "ZeRO-3, hpZ"}
DEVIATIONS = 3.0  # of the number of layers that bernoulli draws, for which memory must suffice
DAY = 86400.0


@dataclass(frozen=True)
class Choice:
    """What may be chosen without changing what is trained.

    world_size: GPUs. home: of the frozen weights: on each GPU, in shards over all (zero3), or in these and in a second copy
    in shards over the GPUs of each node (hpz). micro_batch: sequences of a GPU's forward pass. checkpointing: of
    gradients.
    """

    world_size: int
    home: str
    micro_batch: int
    checkpointing: bool


@dataclass(frozen=True)
class Forecast:
    """A recipe under a choice on a cluster.

    largest: the job with as many layers as are hardly ever exceeded, for memory. usual: with as many as are expected,
    for traffic and time. cluster: of ``choice.world`` GPUs. refreshes: of all projectors, in a step.
    """

    choice: Choice
    cluster: Cluster
    largest: Job
    usual: Job
    refreshes: float

    @cached_property
    def plain(self) -> Memory:
        """Of a step without new projectors."""
        return self._memory(False)

    @cached_property
    def refresh(self) -> Memory:
        """Of a step with new projectors; a plain one where there are none."""
        return self._memory(True) if self.refreshes else self.plain

    def _memory(self, refresh: bool) -> Memory:
        found = memory(self.largest, refresh)
        if self.choice.home != "hpz":
            return found
        return replace(found, state={**found.state, "second shards": _second(self.largest, self.cluster.gpus)})

    @property
    def peak(self) -> int:
        """Bytes: the most at any time."""
        return max(self.plain.peak, self.refresh.peak)

    @property
    def fits(self) -> bool:
        """Whether a GPU has as much."""
        return self.peak <= self.cluster.usable

    @cached_property
    def sent(self) -> dict[str, Messages]:
        """Collectives of a step by operation; refreshes spread over the steps."""
        job = self.usual
        plain, whole = (
            traffic(job),
            traffic(job, True, job.world_size - 1),
        )  # the last process owns least, and sends most
        found = messages(job, plain, whole, self.refreshes)
        if job.gathered is not None and "weights" in found:
            found["weights"] = Messages(found["weights"].sent, job.gathered.gathers(job.accumulation))
        elif most := gathers(job)[1]:
            modules = sum(len(block.matrices) for block in job.layers.layers)
            found["weights"] = Messages(most, 3 * modules * job.accumulation)
        return found

    @cached_property
    def times(self) -> Times:
        """The roofline of a step."""
        return times(self.cluster, work(self.usual, self.refreshes), self.sent, self.choice.home == "hpz")

    @property
    def tokens(self) -> int:
        """Of a step, over all GPUs, where every sequence is full."""
        return self.usual.tokens * self.usual.accumulation * self.choice.world_size

    @property
    def seconds(self) -> float:
        """Of a step: half-way between all the overlap that there can be and none."""
        return (self.times.serial + self.times.overlapped) / 2

    @property
    def tokens_per_day(self) -> float:
        """At `seconds` a step."""
        return self.tokens / self.seconds * DAY

    @property
    def gpu_hours(self) -> float:
        """Of a GPU, for 1e9 tokens, at `seconds` a step."""
        return 1e9 / self.tokens_per_day * 24 * self.choice.world_size


def _second(job: Job, gpus: int) -> int:
    """Bytes of the weights in shards over the GPUs of a node (Wang et al. 2023, ZeRO++, section 3.2)."""
    return math.ceil(sum(sizes_of(job.layers)) * job.itemsize / gpus)


# ------------------------------------------------------------------ from a recipe


def layer_sets(recipe: Recipe, n_layers: int, ratios: Sequence[float] | None = None) -> tuple[LayerSet, LayerSet]:
    """The set that is expected, and one that is hardly ever exceeded; both reach as far down as any that can be drawn.

    ratios: the layers' scores, where they are known; without them any layer may be drawn. Raises UserError as
    `probabilities` does.
    """
    drawn = _probabilities(recipe, n_layers, ratios)
    if drawn is None:
        return (0,), (0,)
    deviations = DEVIATIONS if recipe.sampling.scheme == "bernoulli" and recipe.method.name != "galore" else 0.0
    return likely_set(drawn), likely_set(drawn, deviations)


def _probabilities(recipe: Recipe, n_layers: int, ratios: Sequence[float] | None) -> list[float] | None:
    """Of each layer to be in the set; None where one layer trains after the other."""
    name, sampling = recipe.method.name, recipe.sampling
    if name in ("badam", "hift"):
        return None
    if name not in ("ows", "lisa", "lisa-d"):
        return [1.0] * n_layers
    kind = sampling.importance if name == "ows" else "decreasing" if name == "lisa-d" else "uniform"
    if kind not in ("uniform", "decreasing") and ratios is None:
        kind = "uniform"
    return probabilities(importance(kind, n_layers, ratios), sampling.gamma, sampling.tau)


def refreshes_per_step(recipe: Recipe, n_layers: int, ratios: Sequence[float] | None = None) -> float:
    """How often a sampled layer gets new projectors, in a step: when it enters the set, and every T_p steps."""
    if recipe.method.name not in ("ows", "galore"):
        return 0.0
    drawn = _probabilities(recipe, n_layers, ratios) or [1.0]
    entering = sum(p * (1 - p) for p in drawn) / sum(drawn) / recipe.sampling.period
    return entering + 1 / recipe.optim.update_proj_gap


class Replays:
    """What ZeRO-3 gathers under each job, found by replaying DeepSpeed's bookkeeping once for each kind of pass."""

    def __init__(
        self, config: Any, settings: Mapping[str, Any] | None = None, adapt: Callable[[Any], Any] | None = None
    ) -> None:
        """config: transformers'. settings: a DeepSpeed file's ``zero_optimization``. adapt: adds adapters."""
        given = settings or {}
        names = {"bucket": "prefetch_bucket_size", "live": "max_live_parameters", "reuse": "max_reuse_distance"}
        found = {key: given.get(f"stage3_{name}", "auto") for key, name in names.items()}
        self.limits = Limits(**{key: int(float(value)) for key, value in found.items() if value != "auto"})
        bucket = given.get("reduce_bucket_size", "auto")
        self.bucket = Job.bucket if bucket == "auto" else int(float(bucket))
        self.config, self.adapt = config, adapt
        self._traces: dict[Any, Trace] = {}
        self._known: dict[Any, Gathered] = {}

    def complete(self, job: Job) -> Job:
        """The job with what it gathers, where that is known: not for mezo, nor for hift, whose layers take turns."""
        job = replace(job, max_live=self.limits.live, bucket=self.bucket)
        if not job.sharded or job.world_size == 1 or job.method in ("mezo", "hift"):
            return job
        adapted = job.method in ADAPTERS
        atomic_write, vectors = (
            frozenset(job.plan.matrices),
            [v.name for block in job.plan.blocks for v in block.vectors],
        )
        trained = frozenset() if adapted else frozenset({*job.full_rank, *vectors})
        key = (job.method if adapted else trained, atomic_write, job.checkpointing)
        if key not in self._known:
            trace = self._trace(job, trained, atomic_write)
            frozen = trace.frozen if adapted else frozenset(trace.numel) - trained
            self._known[key] = replay(replace(trace, frozen=frozen), self.limits)
        return replace(job, gathered=self._known[key])

    def _trace(self, job: Job, trained: frozenset[str], atomic_write: frozenset[str]) -> Trace:
        """The uses of modules, which are the same for all sets with the same lowest layer."""
        adapted = job.method in ADAPTERS
        outside = {one.name for one in job.layers.embeddings} | {one.name for one in job.layers.final}
        lowest = min(job.sampled, default=None)
        key = (adapted and job.method, lowest, frozenset(outside & (trained | atomic_write)), job.checkpointing)
        if key not in self._traces:
            model = without_weights(self.config)
            model = self.adapt(model) if adapted and self.adapt is not None else model
            if job.checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
                model.disable_input_require_grads()
            names = [name for name, p in model.named_parameters() if p.requires_grad] if adapted else trained
            self._traces[key] = record(model, names, atomic_write)
        return self._traces[key]


def job_of(recipe: Recipe, model: Model, choice: Choice, layer_set: LayerSet, replays: Replays | None = None) -> Job:
    """One GPU's part of a step. Raises UserError (``train.global_batch_size``) for a batch that does not divide evenly.

    replays: of what ZeRO-3 gathers; None: only bounds of it are known.
    """
    optim, share = recipe.optim, choice.micro_batch * choice.world_size
    if recipe.train.global_batch_size % share:
        right = f"expected a multiple of {share}: {choice.micro_batch} sequences on each of {choice.world_size} GPUs"
        raise UserError("train.global_batch_size", recipe.train.global_batch_size, right)
    job = Job(
        model.layers,
        recipe.method.name,
        layer_set,
        optim.rank,
        optim.always_on,
        optim.refresh,
        optim.refresh_batch,
        recipe.method.lora_rank,
        ITEMSIZE[recipe.model.dtype],
        choice.micro_batch,
        recipe.data.max_length,
        accumulation=recipe.train.global_batch_size // share,
        checkpointing=choice.checkpointing,
        whole_logits=model.whole_logits,
        world_size=choice.world_size,
        sharded=choice.home != "replicated",
    )
    return job if replays is None else replays.complete(job)


def forecast(
    recipe: Recipe,
    model: Model,
    cluster: Cluster,
    choice: Choice,
    ratios: Sequence[float] | None = None,
    replays: Replays | None = None,
) -> Forecast:
    """What a step of ``recipe`` needs under ``choice``, whatever the recipe says of that. Raises as `job_of`."""
    n_layers = len(model.layers.layers)
    usual, largest = layer_sets(recipe, n_layers, ratios)
    return Forecast(
        choice,
        cluster.of_size(choice.world_size),
        job_of(recipe, model, choice, largest, replays),
        job_of(recipe, model, choice, usual, replays),
        refreshes_per_step(recipe, n_layers, ratios),
    )


def choice_of(recipe: Recipe, world_size: int, home: str | None = None) -> Choice:
    """What the recipe says; home: in place of ``train.sharding``."""
    home = home or ("zero3" if recipe.train.sharding == "zero3" else "replicated")
    return Choice(world_size, home, recipe.train.micro_batch_size, recipe.train.gradient_checkpointing)


def choices(recipe: Recipe, cluster: Cluster) -> Iterator[Choice]:
    """All that can be chosen on the cluster or a part of it: GPUs, home, micro-batch, checkpointing."""
    batch = recipe.train.global_batch_size
    sizes = [size for size in _powers(cluster.gpus)] + [n * cluster.gpus for n in _powers(cluster.nodes) if n > 1]
    for world_size in sizes:
        for home in HOMES:
            if (world_size == 1 and home != "replicated") or (home == "hpz" and world_size <= cluster.gpus):
                continue
            for micro in _powers(batch):
                if batch % (micro * world_size) == 0:
                    yield from (Choice(world_size, home, micro, checkpointing) for checkpointing in (False, True))


def _powers(largest: int) -> list[int]:
    """1, 2, 4, ... and ``largest`` itself."""
    return sorted({2**i for i in range(largest.bit_length()) if 2**i <= largest} | {largest})


def ranked(forecasts: Sequence[Forecast]) -> list[Forecast]:
    """Those that fit, the cheapest first: fewest GPU hours a token; of equal ones the one with more memory to spare."""
    fitting = [one for one in forecasts if one.fits]
    return sorted(fitting, key=lambda one: (one.gpu_hours, one.peak))


def scaling_sizes(cluster: Cluster, largest: int = 1024) -> list[int]:
    """Numbers of GPUs up to ``largest``, each twice the one before: parts of a node, then whole nodes."""
    sizes = _powers(cluster.gpus)
    while sizes[-1] * 2 <= largest:
        sizes.append(sizes[-1] * 2)
    return sizes


def scaled(
    recipe: Recipe,
    model: Model,
    cluster: Cluster,
    world_size: int,
    home: str,
    ratios: Sequence[float] | None = None,
    replays: Replays | None = None,
) -> Forecast:
    """The recipe on ``world_size`` GPUs, with as many sequences for each of them as on the whole cluster (weak scaling)."""
    share = recipe.train.micro_batch_size * cluster.world_size
    batches = max(1, recipe.train.global_batch_size // share)
    batch = recipe.train.micro_batch_size * batches * world_size
    grown = replace(recipe, train=replace(recipe.train, global_batch_size=batch))
    return forecast(grown, model, cluster, choice_of(recipe, world_size, home), ratios, replays)


# ------------------------------------------------------------------ for the trainer


def planned(recipe: Recipe, model: Model, choice: Choice, ratios: Sequence[float] | None = None) -> int:
    """Bytes that a GPU needs for a step, one with a refresh included, of the set that is expected."""
    usual, _ = layer_sets(recipe, len(model.layers.layers), ratios)
    refreshes = bool(refreshes_per_step(recipe, len(model.layers.layers), ratios))
    job = job_of(recipe, model, choice, usual)
    return max(memory(job).peak, memory(job, refreshes).peak)


def check_memory(
    recipe: Recipe,
    model: Model,
    world_size: int,
    sharded: bool,
    free: int,
    ratios: Sequence[float] | None = None,
    margin: float = 1.0,
    place: tuple[str, str] = ("GPU", "GPUs"),
) -> None:
    """Refuse (UserError) a recipe whose step cannot fit into ``free`` bytes of a GPU, before weights are loaded.

    The set that is expected must fit, not the largest that may be drawn. margin: so many times ``free`` may be planned.
    place: what has ``free`` bytes, one and several, for the message, which says what would fit of the settings that do
    not change what is trained.
    """
    asked = choice_of(recipe, world_size, "zero3" if sharded else "replicated")
    needed = planned(recipe, model, asked, ratios)
    if needed <= free * margin:
        return
    homes = HOMES[:2] if world_size > 1 else HOMES[:1]
    others = [
        Choice(world_size, home, micro, checkpointing)
        for home in homes
        for micro in dict.fromkeys((recipe.train.micro_batch_size, 1))
        for checkpointing in (False, True)
    ]
    fitting = [choice for choice in others if planned(recipe, model, choice, ratios) <= free]
    right = f"a step needs {needed / 1e9:.1f} GB of a {place[0]} that has {free / 1e9:.1f} GB; give "
    more = f"more {place[1]} under zero3, or a smaller optim.rank"
    right += ", ".join(_settings(fitting[0], asked)) if fitting else more
    raise UserError("train.sharding", "zero3" if sharded else "replicated", right)


def _settings(choice: Choice, asked: Choice) -> list[str]:
    """Options that turn one choice into another."""
    words = {
        "--train.sharding": (choice.home, asked.home),
        "--train.micro_batch_size": (choice.micro_batch, asked.micro_batch),
        "--train.gradient_checkpointing": (choice.checkpointing, asked.checkpointing),
    }
    return [f"{name} {str(new).lower()}" for name, (new, old) in words.items() if new != old]


def under(recipe: Recipe, names: Sequence[str]) -> dict[str, Recipe]:
    """The recipe under other methods."""
    changed: dict[str, Any] = {}
    for name in names:
        always = recipe.optim.always_on
        if name in SAMPLED and name not in ("ows", "galore") and always == "low_rank":
            always = "full"
        method: Any = name
        changed[name] = replace(
            recipe, method=replace(recipe.method, name=method), optim=replace(recipe.optim, always_on=always)
        )
    return changed
