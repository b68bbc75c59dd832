"""Recipe + model + cluster -> memory, traffic and time of a step; what fits, and what is cheapest.

Nothing here loads weights or knows a process group: a model is its layers' shapes (`ows_ds.model.shapes`), a cluster
its numbers (`ows_ds.planner.cluster`).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ows_ds import config
from ows_ds.config import Recipe, changed
from ows_ds.errors import UserError, first_line
from ows_ds.importance.probabilities import METRIC_OF, importance, importance_of, probabilities
from ows_ds.model.outline import Outline
from ows_ds.model.parts import gathered_at_once, tile_length
from ows_ds.model.shapes import Model, kv_copies, without_weights
from ows_ds.optim.sampling import LayerSet
from ows_ds.optim.sizes import ADAPTERS, LOW_RANK, SAMPLED
from ows_ds.planner.choices import Choice
from ows_ds.planner.cluster import Cluster
from ows_ds.planner.gathering import Gathered, Limits, Trace, replay
from ows_ds.planner.memory import Memory, memory, on_host
from ows_ds.planner.passes import passes
from ows_ds.planner.roofline import Times, times, work
from ows_ds.planner.step import StepSpec
from ows_ds.planner.traffic import Messages, messages

logger = logging.getLogger(__name__)

ITEMSIZE = {"bfloat16": 2, "float32": 4, "float64": 8}  # bytes of a weight
DEVIATIONS = 3.0  # of the number of layers that bernoulli draws, for which memory must suffice
DAY = 86400.0


@dataclass(frozen=True)
class Forecast:
    """A recipe under a choice on a cluster."""

    choice: Choice
    cluster: Cluster  # of ``choice.world_size`` GPUs
    largest: StepSpec  # with as many layers as are hardly ever exceeded: for memory
    usual: StepSpec  # with as many as are expected: for traffic and time
    refreshes: float  # of all projectors, in a step

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
        # shards over the GPUs of a node (Wang et al. 2023, ZeRO++, section 3.2)
        second = math.ceil(self.largest.size(*self.largest.parts) / self.cluster.gpus)
        return replace(found, state={**found.state, "second shards": second})

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
        return messages(self.usual, self.refreshes)

    @property
    def sent_bytes(self) -> float:
        """By a GPU in a step."""
        return sum(message.sent for message in self.sent.values())

    @cached_property
    def times(self) -> Times:
        """The roofline of a step."""
        done, host = work(self.usual, self.refreshes), on_host(self.usual) * self.usual.accumulation
        inside, shared_by = self.choice.home == "hpz", self.usual.shared_by
        return times(self.cluster, done, self.sent, inside, host=host, shared_by=shared_by)

    @property
    def on_host(self) -> int:
        """Bytes of activations in the host's memory, for each GPU."""
        return on_host(self.largest)

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


class Replays:
    """What ZeRO-3 gathers in each step, found by replaying DeepSpeed's bookkeeping once for each kind of pass."""

    def __init__(
        self, config: Callable[[], Any], settings: Mapping[str, Any] | None = None, outline: Outline | None = None
    ) -> None:
        """config: gives transformers'; asked for where ``outline`` does not say enough. settings: a DeepSpeed file's
        ``zero_optimization``."""
        self.config, self.outline, given = config, outline, settings or {}
        names = {"bucket": "prefetch_bucket_size", "live": "max_live_parameters", "reuse": "max_reuse_distance"}
        found = {key: given.get(f"stage3_{name}", "auto") for key, name in names.items()}
        self.limits = Limits(**{key: int(float(value)) for key, value in found.items() if value != "auto"})
        bucket = given.get("reduce_bucket_size", "auto")
        self.bucket = StepSpec.bucket if bucket == "auto" else int(float(bucket))
        self._traces: dict[Any, Trace | None] = {}  # None: the model does not run without numbers
        self._known: dict[Any, Gathered] = {}

    def complete(self, spec: StepSpec, adapt: Callable[[Any], Any]) -> StepSpec:
        """The step with what it gathers, where that is known: not for mezo, nor for hift, whose layers take turns, nor
        for a model whose code looks at numbers.

        adapt: adds the adapters of lora and dora to a model.
        """
        spec = replace(spec, max_live=self.limits.live, bucket=self.bucket)
        if not spec.sharded or spec.world_size == 1 or spec.method in ("mezo", "hift"):
            return spec
        adapter = spec.method if spec.method in ADAPTERS else None
        low_rank = frozenset(spec.plan.matrices)
        vectors = {vector.name for block in spec.plan.blocks for vector in block.vectors}
        trained = frozenset() if adapter else vectors.union(spec.full_rank)
        at_once = gathered_at_once(spec.layers, spec.compiled, spec.tile)
        key = (adapter, frozenset(trained), low_rank, spec.checkpointing, spec.frozen, tuple(at_once))
        if key not in self._known:
            # the uses of modules are the same for all sets with the same lowest layer
            outside = frozenset(part.name for part in spec.outside) & (trained | low_rank)
            kind = (adapter, min(spec.sampled, default=None), outside, spec.checkpointing, tuple(at_once))
            if kind not in self._traces:
                if self.outline is not None and not (adapter or at_once):
                    lowest = min(spec.sampled, default=None)
                    self._traces[kind] = passes(self.outline, lowest, bool(outside), spec.checkpointing)
                else:
                    self._traces[kind] = self._recorded(
                        spec.checkpointing, adapt if adapter else None, trained, low_rank, at_once
                    )
            trace = self._traces[kind]
            if trace is None:
                return spec
            frozen = trace.frozen if adapter else trace.numel.keys() - trained
            trace = replace(trace, frozen=frozenset(frozen)).in_few_bits(spec.formats, spec.itemsize)
            self._known[key] = replay(trace, self.limits)
        return replace(spec, gathered=self._known[key])

    def _recorded(
        self,
        checkpointing: bool,
        adapt: Callable[[Any], Any] | None,
        trained: Iterable[str],
        low_rank: Iterable[str],
        at_once: Iterable[str],
    ) -> Trace | None:
        """A pass of the model without numbers; None where its code looks at them."""
        from ows_ds.planner.recording import record

        model = without_weights(self.config())
        model = adapt(model) if adapt else model
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()
        names = [name for name, p in model.named_parameters() if p.requires_grad] if adapt else trained
        try:
            return record(model, names, low_rank, at_once=at_once)
        except (RuntimeError, NotImplementedError, ValueError, IndexError) as error:
            logger.debug("only bounds are known of what ZeRO-3 gathers: %s", first_line(error))
            return None


class Planner:
    """A recipe and what is known of its model -> forecasts. Raises UserError as `probabilities` does.

    ratios: the layers' scores; without them any layer may be drawn. replays: of what ZeRO-3 gathers; None: only bounds
    of it are known.
    """

    def __init__(
        self, recipe: Recipe, model: Model, ratios: Sequence[float] | None = None, replays: Replays | None = None
    ) -> None:
        self.recipe, self.model, self.ratios, self.replays = recipe, model, ratios, replays

    @cached_property
    def probabilities(self) -> list[float] | None:
        """Of each layer to be in the set; None where one layer trains after the other."""
        name, sampling, n_layers = self.recipe.method.name, self.recipe.sampling, len(self.model.layers.layers)
        if name in ("badam", "hift"):
            return None
        if name not in ("ows", "lisa", "lisa-d"):
            return [1.0] * n_layers
        return probabilities(self._importance, self.gamma, sampling.tau)

    @property
    def gamma(self) -> float:
        """Of layers that train at a time, the expected number, under methods that draw layers."""
        return config.gamma(self.recipe, self._importance)

    @cached_property
    def _importance(self) -> Sequence[float]:
        """Of each layer; all alike where they are not scored yet."""
        kind = importance_of(self.recipe)
        if kind in METRIC_OF and self.ratios is None:
            kind = "uniform"
        return importance(kind, len(self.model.layers.layers), self.ratios)

    def layer_set(self, deviations: float = 0.0) -> LayerSet:
        """The set that is expected, or one with some standard deviations more, where their number is drawn.

        It reaches as far down as any that can be drawn.
        """
        drawn = self.recipe.sampling.scheme == "bernoulli" and self.recipe.method.name != "galore"
        return (0,) if self.probabilities is None else likely_set(self.probabilities, deviations * drawn)

    @property
    def refreshes(self) -> float:
        """How often a sampled layer gets new projectors, in a step: when it enters the set, and every T_p steps."""
        if self.recipe.method.name not in LOW_RANK:
            return 0.0
        drawn = self.probabilities or [1.0]
        period = config.period(self.recipe, self.recipe.train.steps)
        entering = sum(p * (1 - p) for p in drawn) / sum(drawn) / period
        optim = self.recipe.optim  # auto: at most
        return entering + 1 / (optim.proj_gap_range[0] if optim.update_proj_gap == "auto" else optim.update_proj_gap)

    def choice(self, world_size: int, home: str | None = None) -> Choice:
        """What the recipe says; home: in place of ``train.sharding``."""
        train = self.recipe.train
        home = home or ("zero3" if train.sharding == "zero3" else "replicated")
        return Choice(world_size, home, train.micro_batch_size, train.gradient_checkpointing)

    def step(self, choice: Choice, layer_set: LayerSet) -> StepSpec:
        """One GPU's part of a step. Raises UserError (``train.global_batch_size``) for an uneven division."""
        recipe, shared_by = self.recipe, self.recipe.train.sequence_parallel
        share = choice.micro_batch * config.data_ranks(recipe, choice.world_size)
        if recipe.train.global_batch_size % share:
            on = f"{choice.world_size} GPUs" if shared_by == 1 else f"{choice.world_size // shared_by} groups of GPUs"
            right = f"a multiple of {share}: {choice.micro_batch} sequences on each of {on}"
            raise UserError("train.global_batch_size", recipe.train.global_batch_size, f"expected {right}")
        tokens = config.tokens_of_pass(changed(recipe, {"train.micro_batch_size": choice.micro_batch}))
        spec = StepSpec(
            self.model.layers,
            recipe.method.name,
            layer_set,
            recipe.optim.rank,
            recipe.optim.always_on,
            recipe.optim.refresh,
            recipe.optim.refresh_batch,
            recipe.method.lora_rank,
            ITEMSIZE[recipe.model.dtype],
            choice.micro_batch * (2 if recipe.loss.rows == "preference" else 1),
            recipe.data.max_length,
            shared_by,
            kv_copies(self.model.config, shared_by) if shared_by > 1 else 1,
            accumulation=recipe.train.global_batch_size // share,
            checkpointing=choice.checkpointing,
            offload=recipe.train.activation_offload,
            tile=tile_length(recipe.train.tiled_mlp, tokens, self.model.layers.embeddings[-1].shape[1]),
            fused=recipe.train.kernels in ("liger", "compile"),
            compiled=recipe.train.kernels == "compile",
            whole_logits=self.model.whole_logits,
            world_size=choice.world_size,
            sharded=choice.home != "replicated",
            expert_rank=recipe.optim.expert_rank,
            router=recipe.optim.router,
            frozen=recipe.model.frozen,
            moments=recipe.optim.moments,
            master=recipe.optim.master,
            scale=recipe.optim.scale,
            rule=recipe.optim.rule,
            watched=recipe.optim.update_proj_gap == "auto"
            or (recipe.method.name == "ows" and recipe.sampling.importance == "gradient"),
        )
        return spec if self.replays is None else self.replays.complete(spec, functools.partial(_adapted, recipe))

    def forecast(self, cluster: Cluster, choice: Choice) -> Forecast:
        """What a step needs under ``choice``, whatever the recipe says of that."""
        largest, usual = (self.step(choice, self.layer_set(deviations)) for deviations in (DEVIATIONS, 0.0))
        return Forecast(choice, cluster.of_size(choice.world_size), largest, usual, self.refreshes)

    def scaled(self, cluster: Cluster, world_size: int, home: str) -> Forecast:
        """On ``world_size`` GPUs, with as many sequences for each of them as on the whole cluster (weak scaling)."""
        micro, shared_by = self.recipe.train.micro_batch_size, self.recipe.train.sequence_parallel
        batches = max(1, self.recipe.train.global_batch_size * shared_by // (micro * cluster.world_size))
        grown = self.changed(train={"global_batch_size": micro * batches * world_size // shared_by})
        return grown.forecast(cluster, grown.choice(world_size, home))

    def changed(self, **sections: Mapping[str, Any]) -> Planner:
        """The same with other values of some of the recipe's keys."""
        changes = {f"{name}.{key}": value for name, some in sections.items() for key, value in some.items()}
        return Planner(changed(self.recipe, changes), self.model, self.ratios, self.replays)

    def under(self, method: str) -> Planner:
        """The same under another method."""
        only_full = method in SAMPLED and method not in LOW_RANK and self.recipe.optim.always_on == "low_rank"
        optim = {"always_on": "full"} if only_full else {}
        return self.changed(method={"name": method}, optim=optim | ({} if method in LOW_RANK else {"rule": "adamw"}))

    # ---- before a run

    def expected(self, choice: Choice) -> Memory:
        """Of a step of the set that is expected, with new projectors, if any."""
        return memory(self.step(choice, self.layer_set()), bool(self.refreshes))

    def peak(self, choice: Choice, deviations: float = 0.0) -> int:
        """The most bytes that a GPU needs for such a step, or for a plain one. deviations: as of `layer_set`."""
        spec = self.step(choice, self.layer_set(deviations))
        return max(memory(spec, refresh).peak for refresh in {False, bool(self.refreshes)})


def _adapted(recipe: Recipe, model: Any) -> Any:
    from ows_ds import methods  # and with them torch

    return methods.adapt(recipe, model)


def likely_set(probabilities: Sequence[float], deviations: float = 0.0) -> tuple[int, ...]:
    """A layer set to plan for: as many layers as are expected, or ``deviations`` standard deviations more.

    The likeliest ones, always with the lowest that can be drawn: it decides how far down the backward pass runs.
    """
    expected = sum(probabilities)
    count = expected + deviations * math.sqrt(sum(p * (1 - p) for p in probabilities))
    possible = [i for i, p in enumerate(probabilities) if p > 0]
    order = possible[:1] + sorted(possible[1:], key=lambda i: -probabilities[i])
    return tuple(sorted(order[: min(len(order), math.ceil(count - 1e-9))]))


def ranked(forecasts: Sequence[Forecast]) -> list[Forecast]:
    """Those that fit, the cheapest first: fewest GPU hours a token; of equal ones the one with more memory to spare."""
    return sorted((one for one in forecasts if one.fits), key=lambda one: (one.gpu_hours, one.peak))
