"""Weights trained at full rank: float32 masters, moments, and torch's AdamW on this rank's interval of each.

Lean (`Lean`), moments are in 8 bits between steps, and there is no master: a bfloat16 weight is rounded stochastically.

    gradients of a bucket --reduce_scatter--> own intervals --AdamW--> own intervals of masters --> weights

The buckets are the same on all ranks and leave in one order, each as soon as its last gradient is there, while the
backward pass runs on:

    bucket      row 0 | interval 0 of a | interval 0 of b | ...     rank i receives the sum of all ranks' rows i
                row 1 | interval 1 of a | interval 1 of b | ...
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ows_ds.distributed.communicator import Communicator, Pending
from ows_ds.distributed.formats import require_bitsandbytes
from ows_ds.distributed.merging import draw_bits, round_stochastically
from ows_ds.distributed.weights import ReadShard, Shard, Weights
from ows_ds.optim.layout import pack
from ows_ds.optim.moments import Moment8, moment_map
from ows_ds.optim.sizes import MOMENT_BLOCK
from ows_ds.optim.update import STATE, AdamWSettings

BUCKET = 1 << 23  # entries of a bucket of gradients; a larger weight has one to itself
State = dict[str, Any]
"""Of a weight: master (if there is one), exp_avg, exp_avg_sq (1-D, this rank's interval; perhaps `Moment8`), step."""

MOMENTS = ("exp_avg", "exp_avg_sq")
IN_FLIGHT = 2  # buckets that are being reduced at a time, at most


@dataclass(frozen=True)
class Lean:
    """What a weight that trains at full rank keeps. moments: float32 or int8. master: whether there is one."""

    moments: str = "float32"
    master: bool = True
    seed: int = 0  # of the rounding of weights without a master


@dataclass
class _Part:
    """Some entries of a weight's interval, which AdamW steps on together. master: empty between steps without one."""

    name: str
    entries: slice
    master: nn.Parameter
    step: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float32))  # AdamW's count, on the CPU


@dataclass
class _Bucket:
    """Weights whose gradients are reduced together. sizes: of a rank's interval, the longest, by name."""

    sizes: dict[str, int]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    received: Tensor | None = None
    pending: Pending | None = None

    def start(self, comm: Communicator, like: Tensor) -> None:
        """Begin to reduce what has come; what has not is 0. like: a tensor of the gradients' dtype. Collective."""
        world, [*names] = comm.world_size, self.sizes
        alone = self.gradients.get(names[0]) if len(names) == 1 else None
        if alone is not None and alone.numel() == self.sizes[names[0]] * world:
            rows = alone.reshape(world, -1)  # as it lies: no copy
        else:
            rows = like.new_zeros(world, sum(self.sizes.values()))
            at = 0
            for name, size in self.sizes.items():
                if name in self.gradients:
                    flat = self.gradients[name].reshape(-1)
                    whole, rest = divmod(flat.numel(), size)
                    rows[:whole, at : at + size] = flat[: whole * size].view(whole, size)
                    if rest:
                        rows[whole, at : at + rest] = flat[whole * size :]
                at += size
        self.gradients = {}
        self.received = rows.new_empty(rows.shape[1])
        self.pending = comm.start_reduce_scatter(rows.view(-1), self.received, "full_rank_gradients")


class FullRank:
    """Weights trained at full rank: a float32 copy of this rank's interval, its moments, and AdamW on it.

    Gradients are reduce-scattered in buckets straight into the intervals, and kept in the weights' dtype, or in float32
    where micro-batches add up. AdamW works on at most `CHUNK` entries at a time, so that neither float32 gradients nor
    its temporaries exist for all. Weights may enter and leave between steps; what leaves takes all its state along, or
    keeps it on the CPU until it returns.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype, lean: Lean | None = None) -> None:
        """dtype: of the copies, float32 or wider. Raises UserError for 8-bit moments without bitsandbytes."""
        self.weights = weights
        self.dtype = dtype
        self.lean = lean or Lean()
        if self.lean.moments == "int8":
            require_bitsandbytes("optim.moments", "int8")
        self.parameters: dict[str, nn.Parameter] = {}
        self.grads: dict[str, Tensor] = {}
        self.parked: dict[str, State] = {}
        self._states: dict[str, State] = {}
        self._handles: dict[str, RemovableHandle] = {}
        self._runs: list[tuple[torch.optim.AdamW, list[_Part]]] = []
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[str, _Bucket] = {}
        self._started = 0  # of the buckets, in this backward pass
        self._received = 0  # of those, whose sums are in `grads`

    def enter(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Let ``parameters``, by name, train from now on: with the state that was kept for them, or moments of zero."""
        for name, parameter in parameters.items():
            local = self.weights.local(parameter)
            if name in self.parked:
                kept = self.parked.pop(name)
                # AdamW counts steps on the CPU
                state = {kind: t if kind == "step" else t.to(local.device) for kind, t in kept.items()}
            else:
                state = {"step": torch.zeros((), dtype=torch.float32)}
                if self.lean.master:
                    state["master"] = local.to(self.dtype, copy=True)
                for kind in MOMENTS:
                    if self.lean.moments == "int8":
                        state[kind] = Moment8.zeros(len(local), kind == "exp_avg", local.device)
                    else:
                        state[kind] = torch.zeros(len(local), dtype=self.dtype, device=local.device)
            self.parameters[name], self._states[name] = parameter, state
            parameter.requires_grad_(True)
            self._handles[name] = parameter.register_post_accumulate_grad_hook(self._hook(name))
        self._renew()

    def leave(self, names: Iterable[str], keep: bool = False) -> None:
        """Freeze weights and drop their state, or ``keep`` it on the CPU."""
        for name in names:
            self._handles.pop(name).remove()
            self.parameters.pop(name).requires_grad_(False)
            self.grads.pop(name, None)
            state = self._states.pop(name)
            if keep:
                self.parked[name] = {kind: one.to("cpu") for kind, one in state.items()}
        self._renew()

    def _renew(self) -> None:
        """An AdamW over each run of the masters there are now, and the buckets of their gradients."""
        self._runs, self._buckets, self._started, self._received = [], [], 0, 0
        for run in pack({name: self._own(name) for name in self._states}):
            parts = [_Part(name, slice(*rows), nn.Parameter(self._master(name)[slice(*rows)])) for name, *rows in run]
            # as usual, neither biases nor norms decay
            groups = [
                {"params": [p.master for p in parts if (len(self._shape(p.name)) > 1) == decayed], "decayed": decayed}
                for decayed in (True, False)
            ]
            self._runs.append((torch.optim.AdamW(groups), parts))
        world_size, room = self.weights.comm.world_size, 0
        for name in reversed(self.parameters):  # about the order of the backward pass
            entries = math.prod(self._shape(name))
            if entries > room:
                self._buckets.append(_Bucket({}))
                room = BUCKET
            room -= entries
            self._buckets[-1].sizes[name] = math.ceil(entries / world_size)
        self._bucket_of = {name: bucket for bucket in self._buckets for name in bucket.sizes}

    def _own(self, name: str) -> int:
        """Entries of this rank's interval."""
        start, stop = self.weights.interval(self.parameters[name])
        return stop - start

    def _master(self, name: str) -> Tensor:
        """What there is of it between steps."""
        found: Tensor = self._states[name].get("master", torch.empty(0, dtype=self.dtype, device=self.weights.device))
        return found

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(self.parameters[name])

    # ------------------------------------------------------------------ gradients

    def _hook(self, name: str) -> Any:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if self.weights.comm.world_size == 1:
                self._add(name, gradient.reshape(-1))
                return
            self._bucket_of[name].gradients[name] = gradient
            while self._started < len(self._buckets):
                bucket = self._buckets[self._started]
                if bucket.gradients.keys() != bucket.sizes.keys():
                    break
                self._start(bucket)

        return take

    def _start(self, bucket: _Bucket) -> None:
        if self._started - self._received == IN_FLIGHT:
            self._receive()
        like = next(iter(self.parameters.values()))
        bucket.start(self.weights.comm, torch.empty(0, dtype=like.dtype, device=self.weights.device))
        self._started += 1

    def _receive(self) -> None:
        """Wait for the next bucket and add its sums to `grads`."""
        bucket = self._buckets[self._received]
        self._received += 1
        assert bucket.pending is not None
        assert bucket.received is not None
        bucket.pending.wait()
        for (name, _), part in zip(
            bucket.sizes.items(), bucket.received.split(list(bucket.sizes.values())), strict=True
        ):
            self._add(name, part[: self._own(name)].to(self._device(name)))
        bucket.pending = bucket.received = None

    def _add(self, name: str, mine: Tensor) -> None:
        self.grads[name] = self.grads[name].to(self.dtype).add_(mine) if name in self.grads else mine

    def end_pass(self) -> None:
        """After each backward pass: send what waits for gradients that have not come, and receive all. Collective."""
        if self.weights.comm.world_size > 1:
            for bucket in self._buckets[self._started :]:
                self._start(bucket)
            while self._received < self._started:
                self._receive()
            self._started = self._received = 0

    def squares(self) -> list[Tensor]:
        """Sum of squares of this rank's part of each gradient: scalars; a zero where no module was used."""
        norms = [torch.linalg.vector_norm(gradient, dtype=self.dtype) for gradient in self.grads.values()]
        found = [norm.square().to(self.weights.device) for norm in norms]
        return found or [torch.zeros((), dtype=self.dtype, device=self.weights.device)]

    def update(self, settings: AdamWSettings, clip: Tensor) -> None:
        """One AdamW step with gradients times ``clip`` (scalar), which are spent; every rank sees the new weights.

        Collective.
        """
        for adamw, parts in self._runs:
            for group in adamw.param_groups:
                group.update(settings.full_rank() if group["decayed"] else settings.vectors())
            for part in parts:
                state, gradient = self._states[part.name], self.grads.get(part.name)
                if not self.lean.master:
                    part.master.data = self.weights.local(self.parameters[part.name])[part.entries].to(self.dtype)
                moments = {kind: self._moment(state[kind], part.entries) for kind in MOMENTS}
                adamw.state[part.master] = {"step": part.step.copy_(state["step"]), **moments}
                part.master.grad = (
                    torch.zeros_like(part.master)  # its module was not used
                    if gradient is None
                    else gradient[part.entries].to(self.dtype).mul_(clip.to(gradient.device))
                )
            adamw.step()
            adamw.zero_grad()
            for part in parts:
                self._keep(part, adamw.state.pop(part.master))
        for state in self._states.values():
            state["step"] += 1
        self.zero_grad()
        self.weights.publish(list(self.parameters.values()))

    def _moment(self, moment: Tensor | Moment8, entries: slice) -> Tensor:
        """As AdamW works on it: a view, or a copy of what is in 8 bits."""
        return moment.read(entries).to(self.dtype) if isinstance(moment, Moment8) else moment[entries]

    def _keep(self, part: _Part, state: Mapping[str, Tensor]) -> None:
        """After a step: weights, and what is not a view of what is kept."""
        local, value, own = self.weights.local(self.parameters[part.name]), part.master.data, self._states[part.name]
        if not self.lean.master:
            if local.dtype == torch.bfloat16 and len(value):
                start = self.weights.interval(self.parameters[part.name])[0] + part.entries.start
                key = f"{self.lean.seed}/{part.name}/{start}/{int(own['step'])}"
                value = round_stochastically(value, draw_bits(len(value), key, value.device))
            part.master.data = value.new_empty(0)
        local[part.entries].copy_(value)
        for kind in MOMENTS:
            if isinstance(own[kind], Moment8):
                own[kind].write(part.entries, state[kind])

    def _device(self, name: str) -> torch.device:
        """Where this rank's interval lies: DeepSpeed may keep it on the CPU."""
        found: torch.device = self.weights.local(self.parameters[name]).device
        return found

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.grads.clear()

    def describe(self) -> dict[str, Any]:
        """How the state is kept, JSON-able: `load_states` needs it."""
        ranks = {"ranks": self.weights.comm.world_size} if self.lean.moments == "int8" else {}  # of which blocks are
        return {"moments": self.lean.moments, "master": self.lean.master, **ranks}

    def states(self) -> dict[str, State]:
        """Of each weight that trains or is kept: master, exp_avg, exp_avg_sq (1-D, this rank's interval), step."""
        return {**self.parked, **self._states}


def state_shards(weights: Weights, parameters: Mapping[str, nn.Parameter], states: Mapping[str, State]) -> list[Shard]:
    """``full/NAME/KIND``: what a checkpoint holds of the states that `FullRank.states` gives; of a moment in 8 bits its
    codes, and ``full/NAME/KIND/scales``, all ranks' one after the other."""
    found = []
    for name, state in states.items():
        shape, (start, _) = weights.shape(parameters[name]), weights.interval(parameters[name])
        for kind in STATE:
            one = state.get(kind)
            if isinstance(one, Moment8):
                blocks = _blocks(math.prod(shape), weights.comm.world_size)
                scales = torch.zeros(blocks, device=one.scales.device)
                scales[: len(one.scales)] = one.scales
                found.append(Shard(f"full/{name}/{kind}", shape, start, one.codes))
                size, first = blocks * weights.comm.world_size, blocks * weights.comm.rank
                found.append(Shard(f"full/{name}/{kind}/scales", (size,), first, scales))
            elif one is not None:
                found.append(Shard(f"full/{name}/{kind}", shape, start, one))
    return found


def _blocks(numel: int, ranks: int) -> int:
    """Blocks of a rank's interval, at most."""
    return math.ceil(math.ceil(numel / ranks) / MOMENT_BLOCK)


def load_states(
    weights: Weights,
    parameters: Mapping[str, nn.Parameter],
    states: Mapping[str, State],
    steps: Mapping[str, float],
    read: ReadShard,
    kept: Mapping[str, Any] | None = None,
) -> None:
    """Set ``states`` in place to what `state_shards` gave, and Adam's step counts to ``steps``. kept: what
    `FullRank.describe` said of it. Weights come first: where there was no master, they are it."""
    kept = kept or {"moments": "float32", "master": True}
    for name, state in states.items():
        own = weights.interval(parameters[name])
        if "master" in state:
            state["master"].copy_(
                read(f"full/{name}/master", *own) if kept["master"] else weights.local(parameters[name])
            )
        for kind in MOMENTS:
            _load_moment(state[kind], f"full/{name}/{kind}", weights, parameters[name], read, kept)
        state["step"].fill_(steps[name])


def _load_moment(
    moment: Tensor | Moment8,
    key: str,
    weights: Weights,
    parameter: nn.Parameter,
    read: ReadShard,
    kept: Mapping[str, Any],
) -> None:
    """``moment`` <- what lies under ``key``. In 8 bits, and of as many ranks, to the bit."""
    own = weights.interval(parameter)
    values = read(key, *own)
    if kept["moments"] == "int8":  # the blocks are those of the ranks that wrote them
        numel = math.prod(weights.shape(parameter))
        size, blocks = math.ceil(numel / kept["ranks"]), _blocks(numel, kept["ranks"])
        scales = read(f"{key}/scales", 0, blocks * kept["ranks"])
        entries = torch.arange(*own)
        places = entries // size * blocks + entries % size // MOMENT_BLOCK
        if isinstance(moment, Moment8) and kept["ranks"] == weights.comm.world_size:
            moment.codes.copy_(values)
            moment.scales.copy_(scales[places[::MOMENT_BLOCK]])
            return
        signed = key.endswith("exp_avg")
        values = moment_map(signed, torch.device("cpu"))[values.cpu().long()] * scales.cpu()[places]
    if isinstance(moment, Moment8):
        moment.write(slice(0, len(values)), values.to(moment.codes.device))
    else:
        moment.copy_(values)


def adam_steps(states: Mapping[str, State]) -> dict[str, float]:
    """Adam's step count of each weight, JSON-able."""
    return {name: float(state["step"]) for name, state in states.items()}
