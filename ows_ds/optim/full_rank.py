"""Weights trained at full rank: float32 masters, moments, and torch's AdamW on this rank's interval of each.

    gradients of some weights, a bucket --reduce_scatter--> own intervals --AdamW--> own intervals of masters --> weights

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
from ows_ds.distributed.weights import ReadShard, Shard, Weights
from ows_ds.optim.layout import pack
from ows_ds.optim.update import STATE, AdamWSettings

BUCKET = 1 << 23  # entries of a bucket of gradients; a larger weight has one to itself
IN_FLIGHT = 2  # buckets that are being reduced at a time, at most


@dataclass
class _Part:
    """Some entries of a weight's interval, which AdamW steps on together."""

    name: str
    entries: slice
    master: nn.Parameter


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

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        """dtype: of the copies, float32 or wider."""
        self.weights = weights
        self.dtype = dtype
        self.parameters: dict[str, nn.Parameter] = {}
        self.grads: dict[str, Tensor] = {}
        self.parked: dict[str, dict[str, Tensor]] = {}
        self._states: dict[str, dict[str, Tensor]] = {}
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
                master = local.to(self.dtype, copy=True)
                moments = {kind: torch.zeros_like(master) for kind in ("exp_avg", "exp_avg_sq")}
                state = {"master": master, **moments, "step": torch.zeros((), dtype=torch.float32)}
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
                self.parked[name] = {kind: tensor.cpu() for kind, tensor in state.items()}
        self._renew()

    def _renew(self) -> None:
        """An AdamW over each run of the masters there are now, and the buckets of their gradients."""
        self._runs, self._buckets, self._started, self._received = [], [], 0, 0
        for run in pack({name: state["master"].numel() for name, state in self._states.items()}):
            parts = [_Part(name, slice(*rows), nn.Parameter(self._states[name]["master"][slice(*rows)]))
                     for name, *rows in run]  # fmt: skip
            # as usual, neither biases nor norms decay
            groups = [
                {"params": [p.master for p in parts if (len(self._shape(p.name)) > 1) == decayed], "decayed": decayed}
                for decayed in (True, False)
            ]
            adamw = torch.optim.AdamW(groups)
            for part in parts:
                state = self._states[part.name]
                moments = {kind: state[kind][part.entries] for kind in ("exp_avg", "exp_avg_sq")}
                adamw.state[part.master] = {"step": torch.zeros((), dtype=torch.float32), **moments}
            self._runs.append((adamw, parts))
        world_size, room = self.weights.comm.world_size, 0
        for name in reversed(self.parameters):  # about the order of the backward pass
            entries = math.prod(self._shape(name))
            if entries > room:
                self._buckets.append(_Bucket({}))
                room = BUCKET
            room -= entries
            self._buckets[-1].sizes[name] = math.ceil(entries / world_size)
        self._bucket_of = {name: bucket for bucket in self._buckets for name in bucket.sizes}

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
            master = self._states[name]["master"]
            self._add(name, part[: master.numel()].to(master.device))
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
                adamw.state[part.master]["step"].copy_(self._states[part.name]["step"])
                gradient = self.grads.get(part.name)
                part.master.grad = (
                    torch.zeros_like(part.master)  # its module was not used
                    if gradient is None
                    else gradient[part.entries].to(self.dtype).mul_(clip.to(gradient.device))
                )
            adamw.step()
            adamw.zero_grad()
            for part in parts:
                self.weights.local(self.parameters[part.name])[part.entries].copy_(part.master.data)
        for state in self._states.values():
            state["step"] += 1
        self.zero_grad()
        self.weights.publish(list(self.parameters.values()))

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.grads.clear()

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Of each weight that trains or is kept: master, exp_avg, exp_avg_sq (1-D, this rank's interval), step."""
        return {**self.parked, **self._states}


def state_shards(
    weights: Weights, parameters: Mapping[str, nn.Parameter], states: Mapping[str, dict[str, Tensor]]
) -> list[Shard]:
    """``full/NAME/KIND``: what a checkpoint holds of the states that `FullRank.states` gives."""
    return [
        Shard(f"full/{name}/{kind}", weights.shape(parameters[name]), weights.interval(parameters[name])[0], tensor)
        for name, state in states.items()
        for kind, tensor in state.items()
        if kind in STATE
    ]


def load_states(
    weights: Weights,
    parameters: Mapping[str, nn.Parameter],
    states: Mapping[str, dict[str, Tensor]],
    steps: Mapping[str, float],
    read: ReadShard,
) -> None:
    """Set ``states`` in place to what `state_shards` gave, and Adam's step counts to ``steps``."""
    for name, state in states.items():
        for kind in STATE:
            state[kind].copy_(read(f"full/{name}/{kind}", *weights.interval(parameters[name])))
        state["step"].fill_(steps[name])


def adam_steps(states: Mapping[str, dict[str, Tensor]]) -> dict[str, float]:
    """Adam's step count of each weight, JSON-able."""
    return {name: float(state["step"]) for name, state in states.items()}
