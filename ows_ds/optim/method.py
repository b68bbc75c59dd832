"""What every method of training offers, and its state in one place.

`state_dict` holds everything, the same on every rank, as ``accelerate.save_state``, Lightning, ``torch.save`` and
``torch.distributed.checkpoint`` expect of an optimizer. Which tensors there are depends on the layers that train now,
and those tools ask for the keys of what is to be loaded before they load. So the keys are fixed: the tensors are one
bytes object in the safetensors format, under one key. ``ows_ds.checkpoint`` writes `shards` and `state_values` instead.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import ReadShard, Shard, Weights
from ows_ds.errors import UserError
from ows_ds.optim.sampling import LayerSet
from ows_ds.optim.update import Accept, always


class Method(torch.optim.Optimizer, ABC):
    """The interface, and what methods without projectors have in common.

    Attributes:
        weights: The model's weights, on ``device``; ``comm`` joins the ranks.
        layer_set: The layers that train in the coming step.
        steps: Optimizer steps so far; ``skipped`` of them took no update.
        grad_norm: Global norm of the last step's gradient before clipping, ().
    """

    weights: Weights
    comm: Communicator
    device: torch.device
    layer_set: LayerSet
    steps: int
    skipped: int
    grad_norm: Tensor | None

    @property
    def lr(self) -> float:
        """The learning rate of the coming step."""
        return float(self.param_groups[0]["lr"])

    @property
    def nothing_to_train(self) -> bool:
        """Whether nothing trains in the coming step."""
        return False

    @abstractmethod
    def train_step(self, losses: Iterable[Callable[[], Tensor]], accept: Accept = always) -> Tensor:
        """A whole optimizer step with this rank's losses, one a micro-batch, the sum of which is its mean.

        accept: is asked once, before anything changes, whether the step is taken: not where the norm is not finite.
        Returns the sum: float64, (). Collective.
        """

    @property
    def new_probabilities(self) -> list[float] | None:
        """Where sampling adapts, in the first step of a period: what the coming set was drawn with, by layer."""
        return None

    @property
    def trained_layers(self) -> frozenset[int]:
        """The layers that have trained so far, or do now."""
        return frozenset(self.layer_set)

    def projector_energy(self) -> dict[int, Tensor]:
        """Of each layer that gets new projectors in this step: see `ows_ds.optim.ows.OWS.projector_energy`."""
        return {}

    def update_norm(self, all_layers: bool = False) -> dict[int, Tensor]:
        """Of each layer that was merged after the last step: see `ows_ds.optim.ows.OWS.update_norm`."""
        return {}

    def close(self) -> None:
        """Leave a plain model in ``weights.module`` that is what was trained. Collective."""

    # ------------------------------------------------------------------ state

    @abstractmethod
    def shards(self) -> list[Shard]:
        """This rank's part of all tensors that a checkpoint needs beside the base model. Between two steps only."""

    @abstractmethod
    def state_values(self) -> dict[str, Any]:
        """The rest of the state, JSON-able; rank 0's is the one to keep."""

    @abstractmethod
    def load_shards(self, values: dict[str, Any], read: ReadShard) -> None:
        """Continue from where `shards` and `state_values` were taken, at any world size, over any kind of weights.

        read: (name, first, last + 1) -> these entries of the flattened tensor. The model must be the same base model.
        Raises UserError for a state of other settings, before anything is changed. Collective.
        """

    def state_dict(self) -> dict[str, Any]:
        """``values``, JSON text, and ``tensors``, safetensors bytes; the same on all ranks. Collective.

        It holds all weights that have ever trained, whole: for large models ``ows_ds.checkpoint`` is lighter.
        """
        from safetensors.torch import save

        tensors = save(_gathered(self.comm, self.shards(), self.device))
        values = self.comm.broadcast_object(self.state_values(), "state_dict")
        return {"values": json.dumps(values), "tensors": tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, of any world size. Raises UserError as `load_shards`. Collective."""
        from safetensors.torch import load

        if not {"values", "tensors"} <= state_dict.keys():
            raise UserError("state_dict", sorted(state_dict), "expected what state_dict of the same class returned")
        tensors = load(state_dict["tensors"])
        self.load_shards(json.loads(state_dict["values"]), lambda name, a, b: tensors[name].reshape(-1)[a:b])


def _gathered(comm: Communicator, shards: Sequence[Shard], device: torch.device) -> dict[str, Tensor]:
    """The whole tensors, on the CPU. Collective: all ranks have shards of the same tensors in the same order."""
    places = comm.all_gather_object([[shard.start, shard.tensor.numel()] for shard in shards], "state_dict")
    found = {}
    for shard, *parts in zip(shards, *places, strict=True):
        run = shard.tensor.new_zeros(max(count for _, count in parts), device=device)
        run[: shard.tensor.numel()] = shard.tensor
        runs = comm.all_gather(run, "state_dict").view(comm.world_size, -1).cpu()
        whole = torch.empty(math.prod(shard.shape), dtype=run.dtype)
        for one, (start, count) in zip(runs, parts, strict=True):
            whole[start : start + count] = one[:count]
        found[shard.name] = whole.view(shard.shape)
    return found
