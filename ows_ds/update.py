"""The numbers that train: coordinates and full-rank weights, their gradients, and torch's AdamW on this process's part.

Every process holds all coordinates (the forward pass needs them) and all their gradients (the backward pass makes
them); moments exist only for the rows or entries that a process owns. A step is

    all processes' gradients --reduce_scatter--> own rows --AdamW--> own rows --all_gather--> all processes' coordinates
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ows_ds.communicate import Communicator
from ows_ds.plan import Plan, Rows, Segment
from ows_ds.weights import Piece, ReadPiece, Weights


@dataclass(frozen=True)
class Hyper:
    """AdamW's numbers in one step; lr is the scheduled learning rate, scale multiplies low-rank updates only."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    scale: float

    def matrices(self) -> dict[str, Any]:
        """For coordinates: lr * scale on the update; the decay is lr * weight_decay, as for whole weights."""
        decay = self.weight_decay / self.scale if self.scale else 0.0
        return {"lr": self.lr * self.scale, "betas": self.betas, "eps": self.eps, "weight_decay": decay}

    def vectors(self) -> dict[str, Any]:
        """For biases and norms: not decayed, as usual."""
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": 0.0}

    def full(self) -> dict[str, Any]:
        """For weights trained at full rank."""
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}


class CoordinateBuffer:
    """The coordinates of one plan.

    values, grads: (rows, r), float32 (float64 where the weights are float64), the same layout on every process.
    exp_avg, exp_avg_sq: (stride, r), this process's rows only.
    """

    def __init__(self, plan: Plan, comm: Communicator, dtype: torch.dtype, device: torch.device) -> None:
        self.plan = plan
        self.comm = comm
        self.values = torch.zeros(plan.rows, plan.rank, dtype=dtype, device=device)
        self.grads = torch.zeros_like(self.values)
        first, last = plan.part(comm.index)
        self.exp_avg = torch.zeros_like(self.values[first:last])
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.steps: dict[tuple[str, str], Tensor] = {
            (s.unit, s.kind): torch.zeros((), dtype=torch.float32) for s in plan.segments
        }
        self._adamw: torch.optim.AdamW | None = None
        self._parameters: list[tuple[Segment, nn.Parameter]] = []
        for segment in plan.local_segments(comm.index):
            parameter = nn.Parameter(self.values[slice(*segment.rows)])
            self._parameters.append((segment, parameter))
        if self._parameters:
            self._adamw = torch.optim.AdamW([{"params": [p]} for _, p in self._parameters])
            for segment, parameter in self._parameters:
                rows = slice(segment.rows[0] - first, segment.rows[1] - first)
                self._adamw.state[parameter] = {
                    "step": self.steps[segment.unit, segment.kind].clone(),
                    "exp_avg": self.exp_avg[rows],
                    "exp_avg_sq": self.exp_avg_sq[rows],
                }

    def value(self, name: str) -> Tensor:
        """(rows, r) view of a slot's values."""
        return self.values[slice(*self.plan.slots[name])]

    def grad(self, name: str) -> Tensor:
        """(rows, r) view of a slot's gradients."""
        return self.grads[slice(*self.plan.slots[name])]

    def leaf(self, name: str) -> Tensor:
        """The slot as a leaf that shares its memory and accumulates its gradient in place."""
        leaf = self.value(name).detach().requires_grad_()
        leaf.grad = self.grad(name)
        return leaf

    def reduce(self) -> Tensor:
        """(stride, r): this process's rows of the sum of all processes' gradients. One collective, none for no rows."""
        if not self.plan.rows:
            return self.grads
        return self.comm.reduce_scatter(self.grads, "gradients")

    def update(self, grads: Tensor, hyper: Hyper) -> None:
        """One AdamW step on this process's rows with their gradients (stride, r), then all rows on every process."""
        if not self.plan.rows:
            return
        first, last = self.plan.part(self.comm.index)
        for segment in self.plan.segments:
            self.steps[segment.unit, segment.kind] += 1
        if self._adamw is not None:
            for group, (segment, parameter) in zip(self._adamw.param_groups, self._parameters, strict=True):
                group.update(hyper.matrices() if segment.kind == "matrices" else hyper.vectors())
                parameter.grad = grads[segment.rows[0] - first : segment.rows[1] - first]
            self._adamw.step()
            for _, parameter in self._parameters:
                parameter.grad = None
        self.comm.all_gather(self.values[first:last], "coordinates", out=self.values)

    def adopt(self, old: CoordinateBuffer) -> None:
        """Take over values, moments and step counts of the units that stay. Collective where any stays.

        The rows of a unit move when the set changes, and with them their owner: the old moments are gathered one after
        the other. Everything else starts at zero.
        """
        stay = [s for s in self.plan.segments if (s.unit, s.kind) in old.steps]
        if not stay:
            return
        old_rows = {(s.unit, s.kind): s.rows for s in old.plan.segments}
        moves = [(old_rows[s.unit, s.kind], s.rows) for s in stay]
        for source, target in moves:
            self.values[slice(*target)] = old.values[slice(*source)]
        for mine, theirs in ((self.exp_avg, old.exp_avg), (self.exp_avg_sq, old.exp_avg_sq)):
            self.scatter(mine, self.comm.all_gather(theirs, "moments"), moves)
        self.set_steps({(s.unit, s.kind): float(old.steps[s.unit, s.kind]) for s in stay})

    def scatter(self, mine: Tensor, whole: Tensor, moves: list[tuple[Rows, Rows]]) -> None:
        """mine (stride, r) <- those rows of ``whole`` (old rows, r) that ``moves`` (old, new) bring into this part."""
        first, last = self.plan.part(self.comm.index)
        for source, target in moves:
            a, b = max(target[0], first), min(target[1], last)
            if a < b:
                mine[a - first : b - first] = whole[source[0] + a - target[0] : source[0] + b - target[0]]

    def set_steps(self, steps: Mapping[tuple[str, str], float]) -> None:
        """Set Adam's step counts of the named segments."""
        for key, count in steps.items():
            self.steps[key].fill_(count)
        for segment, parameter in self._parameters:
            assert self._adamw is not None
            self._adamw.state[parameter]["step"] = self.steps[segment.unit, segment.kind].clone()

    def local_rows(self, name: str) -> slice | None:
        """Where the slot's rows lie in this process's part, None if none do."""
        first, last = self.plan.part(self.comm.index)
        start, stop = self.plan.slots[name]
        a, b = max(start, first), min(stop, last)
        return slice(a - first, b - first) if a < b else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """This process's rows of what a checkpoint holds."""
        first, last = self.plan.part(self.comm.index)
        yield "coordinates", self.values[first:last]
        yield "exp_avg", self.exp_avg
        yield "exp_avg_sq", self.exp_avg_sq


class FullRank:
    """Weights trained at full rank: a float32 copy of this process's interval, its moments, and AdamW on it.

    Gradients are reduce-scattered from the backward pass straight into the interval, weight by weight; no whole
    gradient outlives its hook. Weights may enter and leave between steps; what leaves takes all its state along, or
    keeps it on the CPU until it returns.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        """dtype: of the copies, float32 or wider."""
        self.weights = weights
        self.dtype = dtype
        self.parameters: dict[str, nn.Parameter] = {}
        self.masters: dict[str, nn.Parameter] = {}
        self.grads: dict[str, Tensor] = {}
        self.parked: dict[str, dict[str, Tensor]] = {}
        self._handles: dict[str, RemovableHandle] = {}
        self._adamw: torch.optim.AdamW | None = None

    def enter(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Let ``parameters``, by name, train from now on: with the state that was kept for them, or moments of zero."""
        states = {}
        for name, parameter in parameters.items():
            local = self.weights.local(parameter)
            state = self.parked.pop(name, {})
            # AdamW counts steps on the CPU
            states[name] = {k: tensor if k == "step" else tensor.to(local.device) for k, tensor in state.items()}
            master = states[name].pop("master", None)
            self.parameters[name] = parameter
            self.masters[name] = nn.Parameter(local.to(self.dtype, copy=True) if master is None else master)
            self.grads[name] = torch.zeros_like(self.masters[name].data)
            parameter.requires_grad_(True)
            self._handles[name] = parameter.register_post_accumulate_grad_hook(self._hook(name))
        self._renew(states)

    def leave(self, names: Iterable[str], keep: bool = False) -> None:
        """Freeze weights and drop their state, or ``keep`` it on the CPU."""
        for name in names:
            self._handles.pop(name).remove()
            self.parameters[name].requires_grad_(False)
            if keep:
                assert self._adamw is not None
                state = self._adamw.state[self.masters[name]]
                self.parked[name] = {"master": self.masters[name].data.cpu()}
                self.parked[name] |= {kind: tensor.cpu() for kind, tensor in state.items()}
            del self.parameters[name], self.masters[name], self.grads[name]
        self._renew({})

    def _renew(self, states: Mapping[str, dict[str, Tensor]]) -> None:
        """AdamW over the masters there are now; those that stay keep their state, the others begin with ``states``."""
        old = {} if self._adamw is None else self._adamw.state
        # as usual, neither biases nor norms decay
        decayed = [m for name, m in self.masters.items() if len(self.weights.shape(self.parameters[name])) > 1]
        others = [m for name, m in self.masters.items() if len(self.weights.shape(self.parameters[name])) <= 1]
        groups = [{"params": decayed, "decayed": True}, {"params": others, "decayed": False}]
        self._adamw = torch.optim.AdamW([group for group in groups if group["params"]]) if self.masters else None
        if self._adamw is not None:
            for name, master in self.masters.items():
                self._adamw.state[master] = (
                    old.get(master)
                    or states.get(name)
                    or {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(master.data),
                        "exp_avg_sq": torch.zeros_like(master.data),
                    }
                )

    def _hook(self, name: str) -> Any:
        def reduce_scatter(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            comm = self.weights.comm
            size = math.ceil(gradient.numel() / comm.world)
            flat = gradient.reshape(-1)
            if size * comm.world != flat.numel():
                flat = torch.nn.functional.pad(flat, (0, size * comm.world - flat.numel()))
            mine = self.grads[name]
            mine += comm.reduce_scatter(flat, "full_rank_gradients")[: mine.numel()].to(mine)

        return reduce_scatter

    def squares(self) -> list[Tensor]:
        """Sum of squares of this process's part of each gradient: scalars."""
        return [gradient.square().sum().to(self.weights.device) for gradient in self.grads.values()]

    def update(self, hyper: Hyper, clip: Tensor) -> None:
        """One AdamW step with gradients times ``clip`` (scalar); every process sees the new weights. Collective."""
        if self._adamw is None:
            return
        for group in self._adamw.param_groups:
            group.update(hyper.full() if group["decayed"] else hyper.vectors())
        for name, master in self.masters.items():
            master.grad = self.grads[name].mul_(clip.to(self.grads[name]))
        self._adamw.step()
        for name, master in self.masters.items():
            master.grad = None
            self.weights.local(self.parameters[name]).copy_(master.data)
        self.weights.publish(list(self.parameters.values()))

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for gradient in self.grads.values():
            gradient.zero_()

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Of each weight that trains or is kept: master, exp_avg, exp_avg_sq (1-D, this process's interval), step."""
        found = dict(self.parked)
        for name, master in self.masters.items():
            assert self._adamw is not None
            found[name] = {"master": master.data, **self._adamw.state[master]}
        return found


STATE = ("master", "exp_avg", "exp_avg_sq")  # of a weight trained at full rank, as tensors


def pieces_of_states(
    weights: Weights, parameters: Mapping[str, nn.Parameter], states: Mapping[str, dict[str, Tensor]]
) -> list[Piece]:
    """``full/NAME/KIND``: what a checkpoint holds of the states that `FullRank.states` gives."""
    return [
        Piece(f"full/{name}/{kind}", weights.shape(parameters[name]), weights.interval(parameters[name])[0], tensor)
        for name, state in states.items()
        for kind, tensor in state.items()
        if kind in STATE
    ]


def read_states(
    weights: Weights,
    parameters: Mapping[str, nn.Parameter],
    states: Mapping[str, dict[str, Tensor]],
    steps: Mapping[str, float],
    read: ReadPiece,
) -> None:
    """Set ``states`` in place to what `pieces_of_states` gave, and Adam's step counts to ``steps``."""
    for name, state in states.items():
        for kind in STATE:
            state[kind].copy_(read(f"full/{name}/{kind}", *weights.interval(parameters[name])))
        state["step"].fill_(steps[name])


def steps_of(states: Mapping[str, dict[str, Tensor]]) -> dict[str, float]:
    """Adam's step count of each weight, JSON-able."""
    return {name: float(state["step"]) for name, state in states.items()}
