"""Weights trained at full rank: float32 masters, moments, and torch's AdamW on this process's interval of each.

gradient of a weight --reduce_scatter--> own interval --AdamW--> own interval of the master --> weights
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ows_ds.distributed.weights import ReadShard, Shard, Weights
from ows_ds.optim.layout import pack
from ows_ds.optim.update import STATE, AdamWSettings


@dataclass
class _Part:
    """Some entries of a weight's interval, which AdamW steps on together."""

    name: str
    entries: slice
    master: nn.Parameter


class FullRank:
    """Weights trained at full rank: a float32 copy of this process's interval, its moments, and AdamW on it.

    Gradients are reduce-scattered from the backward pass straight into the interval, weight by weight, and kept in the
    weights' dtype, or in float32 where micro-batches add up; no whole gradient outlives its hook. AdamW works on at
    most `CHUNK` entries at a time, so that neither float32 gradients nor its temporaries exist for all. Weights may
    enter and leave between steps; what leaves takes all its state along, or keeps it on the CPU until it returns.
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
        """An AdamW over each run of the masters there are now."""
        self._runs = []
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

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(self.parameters[name])

    def _hook(self, name: str) -> Any:
        def reduce_scatter(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            comm, master = self.weights.comm, self._states[name]["master"]
            size = math.ceil(gradient.numel() / comm.world_size)
            flat = gradient.reshape(-1)
            if size * comm.world_size != flat.numel():
                flat = torch.nn.functional.pad(flat, (0, size * comm.world_size - flat.numel()))
            mine = comm.reduce_scatter(flat, "full_rank_gradients")[: master.numel()].to(master.device)
            if name in self.grads:
                self.grads[name] = self.grads[name].to(self.dtype).add_(mine)
            else:
                self.grads[name] = mine

        return reduce_scatter

    def squares(self) -> list[Tensor]:
        """Sum of squares of this process's part of each gradient: scalars; a zero where no module was used."""
        norms = [torch.linalg.vector_norm(gradient, dtype=self.dtype) for gradient in self.grads.values()]
        found = [norm.square().to(self.weights.device) for norm in norms]
        return found or [torch.zeros((), dtype=self.dtype, device=self.weights.device)]

    def update(self, hyper: AdamWSettings, clip: Tensor) -> None:
        """One AdamW step with gradients times ``clip`` (scalar), which are spent; every process sees the new weights.

        Collective.
        """
        for adamw, parts in self._runs:
            for group in adamw.param_groups:
                group.update(hyper.full() if group["decayed"] else hyper.vectors())
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
        """Of each weight that trains or is kept: master, exp_avg, exp_avg_sq (1-D, this process's interval), step."""
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
    """Set ``states`` in place to what `pieces_of_states` gave, and Adam's step counts to ``steps``."""
    for name, state in states.items():
        for kind in STATE:
            state[kind].copy_(read(f"full/{name}/{kind}", *weights.interval(parameters[name])))
        state["step"].fill_(steps[name])


def steps_of(states: Mapping[str, dict[str, Tensor]]) -> dict[str, float]:
    """Adam's step count of each weight, JSON-able."""
    return {name: float(state["step"]) for name, state in states.items()}
