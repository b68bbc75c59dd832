"""AdamW on whole weights, for a run's length or group by group: full fine-tuning, adapters, HiFT.

The gradients' way is that of `ows_ds.optim.update.FullRank`, or DeepSpeed's own where it brings the optimizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ows_ds.distributed.weights import ReadShard, Shard, Weights, load_weights, weight_shards
from ows_ds.distributed.zero3 import Zero3AdamW
from ows_ds.errors import UserError
from ows_ds.optim.full_rank import FullRank, Lean, State, adam_steps, load_states, state_shards
from ows_ds.optim.method import Method
from ows_ds.optim.sampling import LayerSet
from ows_ds.optim.update import Accept, AdamWSettings, always, clip_factor


@dataclass(frozen=True)
class Group:
    """What trains together. names: of weights; layers: the transformer layers among them, for the record."""

    names: tuple[str, ...]
    layers: LayerSet


class BlockAdamW(Method):
    """torch's AdamW on one group of weights a step, the groups taking turns; moments of a group are kept.

    With several groups the learning rate is that at the beginning of the round: it changes when each had its turn.
    Interface: `ows_ds.methods.Method`.
    """

    def __init__(
        self,
        weights: Weights,
        groups: Sequence[Group],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float | None,
        lean: Lean | None = None,
        close: Callable[[Weights], None] | None = None,
    ) -> None:
        """Collective. All weights are frozen but those of the current group.

        weights: where DeepSpeed brings the optimizer (`Zero3AdamW`) there is one group, all that it trains.
        close: what is left to do with the weights after training, such as merging adapters.
        """
        self.weights, self.groups = weights, tuple(groups)
        self.comm, self.device = weights.comm, weights.device
        self._named = weights.parameters()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([{"params": [self._named[name] for g in groups for name in g.names]}], defaults)
        self.max_grad_norm = max_grad_norm
        self.steps = self.skipped = 0
        self.grad_norm: Tensor | None = None
        self._round_lr = lr
        self._accept: Callable[[Tensor], bool] = lambda norm: True
        self._close = close
        self._full: FullRank | None = None
        if not isinstance(weights, Zero3AdamW):
            for parameter in self._named.values():
                parameter.requires_grad_(False)
            dtype = torch.promote_types(next(iter(self._named.values())).dtype, torch.float32)
            self._full = FullRank(weights, dtype, lean)
            self._enter()

    @property
    def group(self) -> Group:
        """What trains in the coming step."""
        return self.groups[self.steps % len(self.groups)]

    @property
    def layer_set(self) -> LayerSet:  # type: ignore[override]
        """The layers that train in the coming step."""
        return self.group.layers

    @property
    def trained_layers(self) -> frozenset[int]:
        """See `Method.trained_layers`."""
        return frozenset(layer for group in self.groups[: self.steps] for layer in group.layers)

    @property
    def lr(self) -> float:
        """The learning rate of the coming step: the schedule's at the beginning of the round."""
        return float(self.param_groups[0]["lr"]) if self.steps % len(self.groups) == 0 else self._round_lr

    def train_step(self, losses: Iterable[Callable[[], Tensor]], accept: Accept = always) -> Tensor:
        """A whole optimizer step, as `ows_ds.optim.ows.OWS.train_step`. Collective.

        DeepSpeed's own optimizer skips what is not finite by itself, and is not asked: ``accept`` must say the same.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for compute in losses:
            loss = compute()
            self.weights.backward(loss)
            if self._full is not None:
                self._full.end_pass()
            total += loss.detach()
        self._accept = functools.partial(accept, total)
        self.step()
        return total

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """AdamW's step with the gradients that the backward passes have brought; the next group enters. Collective."""
        group = self.param_groups[0]
        self._round_lr = self.lr
        settings = AdamWSettings(self._round_lr, group["betas"], group["eps"], group["weight_decay"])
        if isinstance(self.weights, Zero3AdamW):
            self.grad_norm = self.weights.step(settings.full_rank(), settings.vectors())
            taken = self._accept(self.grad_norm)
            self.weights.after_step()
        else:
            taken = self._step_on_shards(settings)
        self.skipped += not taken
        self.steps += 1
        if self._full is not None and len(self.groups) > 1:
            self._leave()
            self._enter()

    def _step_on_shards(self, settings: AdamWSettings) -> bool:
        """Whether the step was taken."""
        assert self._full is not None
        self.weights.after_step()
        self.grad_norm = norm = self.comm.all_reduce(torch.stack(self._full.squares()).sum(), "grad_norm").sqrt()
        taken = self._accept(norm)
        if taken:
            self._full.update(settings, clip_factor(norm, self.max_grad_norm))
        else:
            self._full.zero_grad()
        return taken

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: `step` spends the gradients."""

    @torch.no_grad()
    def close(self) -> None:
        """Freeze all weights, and do what is left to do with them. Collective."""
        self.weights.after_step()
        if self._full is not None:
            self._leave(keep=False)
        if self._close is not None:
            self._close(self.weights)

    def _enter(self, names: Sequence[str] | None = None) -> None:
        """Let the weights of the current group train, or others for a moment. Collective."""
        assert self._full is not None
        entering = {name: self._named[name] for name in (self.group.names if names is None else names)}
        self.weights.thaw(entering.values())
        self._full.enter(entering)

    def _leave(self, keep: bool = True) -> None:
        """Freeze what trains, and keep its state on the CPU. Collective."""
        assert self._full is not None
        leaving = list(self._full.parameters)
        self._full.leave(leaving, keep=keep)
        self.weights.freeze(self._named[name] for name in leaving)

    # ------------------------------------------------------------------ state

    @property
    def _states(self) -> dict[str, State]:
        return self.weights.states if isinstance(self.weights, Zero3AdamW) else self._full.states()  # type: ignore[union-attr]

    def shards(self) -> list[Shard]:
        """This rank's part of all tensors that a checkpoint needs beside the base model. Between two steps only."""
        self.weights.after_step()
        names = [name for name in self._named if name in self._states]
        states = {name: self._states[name] for name in names}
        return state_shards(self.weights, self._named, states) + weight_shards(self.weights, self._named, names)

    def state_values(self) -> dict[str, Any]:
        """The rest of the state, JSON-able."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "lr": self.param_groups[0]["lr"],
            "round_lr": self._round_lr,
            "groups": [list(group.names) for group in self.groups],
            "full_rank_steps": adam_steps(self._states),
            "full_rank_kept": None if self._full is None else self._full.describe(),
        }

    @torch.no_grad()
    def load_shards(self, values: dict[str, Any], read: ReadShard) -> None:
        """Continue from where `shards` and `state_values` were taken, at any world size, over any kind of weights."""
        if values["groups"] != [list(group.names) for group in self.groups]:
            raise UserError("method.name", "other weights", "resume with the method and model of the checkpoint")
        self.weights.after_step()
        names, steps = list(values["full_rank_steps"]), values["full_rank_steps"]
        self.steps, self.skipped = values["steps"], values["skipped"]
        self.param_groups[0]["lr"], self._round_lr = values["lr"], values["round_lr"]
        if self._full is None:
            load_weights(self.weights, self._named, names, read)
            load_states(self.weights, self._named, self._states, steps, read, values.get("full_rank_kept"))
            return
        self._leave(keep=False)
        load_weights(self.weights, self._named, names, read)
        # those of other groups one after the other: their state rests on the CPU
        for some in (*([name] for name in names if name not in self.group.names), None):
            self._enter(some)
            states = {
                name: state for name, state in self._states.items() if name in names and name in self._full.parameters
            }
            load_states(self.weights, self._named, states, steps, read, values.get("full_rank_kept"))
            if some is not None:
                self._leave()
