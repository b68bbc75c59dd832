"""MeZO: all weights, by two forward passes a step and no backward pass (Malladi et al. 2023, Algorithm 1).

    g = (L(W + epsilon z) - L(W - epsilon z)) / (2 epsilon),    W <- W - lr g z,    z ~ N(0, 1) for every entry

z is never stored: it is drawn again from the step's seed, block by block, so that a rank can draw the part of it
that its shard needs, and the whole is the same for any number of ranks. Weights are changed in place on what each
rank holds. They are rounded to their own format three times a step (the authors' code: four).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ows_ds.config import Recipe
from ows_ds.distributed.merging import entries_at_once, stream
from ows_ds.distributed.weights import ReadShard, Shard, Weights, load_weights, weight_shards
from ows_ds.model.blocks import ModelLayers
from ows_ds.optim.method import Method
from ows_ds.optim.sampling import LayerSet
from ows_ds.optim.update import Accept, always

BLOCK = 1 << 16  # entries that a CPU draws at once


def noise(
    seed: int, step: int, name: str, start: int, stop: int, numel: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """z of the entries [start, stop) of the flattened weight ``name``, which has ``numel``, in runs.

    Yields (first entry of the run, float32 1-D on ``device``). Every entry's value depends on seed, step, name, the
    entry's position and the device alone: on GPUs also on their model, which draws long runs in its own order.
    """
    size = entries_at_once(device, BLOCK)
    for block in range(start // size, -(-stop // size)):
        count, generator = min(size, numel - block * size), stream(f"{seed}/{step}/{name}/{block}", device)
        drawn = torch.randn(count, generator=generator, device=device)
        first, last = max(start, block * size), min(stop, (block + 1) * size)
        yield first, drawn[first - block * size : last - block * size]


class MeZO(Method):
    """Two-point steps on all weights of a model. Interface: `ows_ds.methods.Method`."""

    def __init__(
        self, weights: Weights, *, n_layers: int, lr: float, epsilon: float, weight_decay: float,
        max_grad_norm: float | None, seed: int,
    ) -> None:  # fmt: skip
        """Collective. Freezes all weights: nothing is differentiated.

        max_grad_norm: largest |g|; None: no clipping. weight_decay: decoupled, not for biases and norms.
        """
        self.weights, self.comm, self.device = weights, weights.comm, weights.device
        weights.module.requires_grad_(False)
        self._named = weights.parameters()
        super().__init__([{"params": list(self._named.values())}], {"lr": lr, "weight_decay": weight_decay})
        self.epsilon, self.max_grad_norm, self.seed = epsilon, max_grad_norm, seed
        self.layer_set: LayerSet = tuple(range(n_layers))
        self.steps = self.skipped = 0
        self.grad_norm: Tensor | None = None

    @torch.no_grad()
    def train_step(self, losses: Iterable[Callable[[], Tensor]], accept: Accept = always) -> Tensor:
        """A whole step, as `ows_ds.optim.ows.OWS.train_step`, without dropout. Returns the mean of the two points.

        A step that is not taken leaves the weights as they were but for two roundings: there is no copy of them.
        """
        losses = list(losses)
        self.weights.module.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for point, way in enumerate((1.0, -2.0)):
            self._move(way * self.epsilon, way * self.epsilon)
            for compute in losses:
                sums[point] += compute()
                self.weights.after_step()  # what is gathered must not outlive the next move
        mine = sums.mean()
        plus, minus = (self.comm.all_reduce(sums, "losses") / self.comm.world_size).tolist()
        slope = (plus - minus) / (2 * self.epsilon)
        self.grad_norm = torch.tensor(abs(slope), dtype=torch.float64)
        if self.max_grad_norm is not None:
            slope = max(-self.max_grad_norm, min(self.max_grad_norm, slope))
        if accept(mine, self.grad_norm):
            # from W - epsilon z to decay * W - lr * slope * z, at once
            decay = 1 - self.lr * self.param_groups[0]["weight_decay"]
            self._move(self.epsilon - self.lr * slope, self.epsilon * decay - self.lr * slope, decay)
        else:
            self._move(self.epsilon, self.epsilon)
            self.skipped += 1
        self.step()
        return mine

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Count a step; `train_step` is what takes it."""
        self.steps += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """There are no gradients."""

    def _move(self, vectors: float, matrices: float, decay: float = 1.0) -> None:
        """W <- W + vectors * z for biases and norms, W <- decay * W + matrices * z for the rest, where they lie."""
        for name, parameter in self._named.items():
            start, resident_slice = self.weights.resident_slice(parameter)
            shape, stop = self.weights.shape(parameter), start + len(resident_slice)
            flat, numel = len(shape) <= 1, math.prod(shape)
            for first, z in noise(self.seed, self.steps, name, start, stop, numel, resident_slice.device):
                run = resident_slice[first - start : first - start + len(z)]
                wide = torch.promote_types(run.dtype, torch.float32)
                run.copy_(run.to(wide).mul_(1.0 if flat else decay).add_(z, alpha=vectors if flat else matrices))

    def shards(self) -> list[Shard]:
        """This rank's part of the weights. Between two steps only."""
        self.weights.after_step()
        return weight_shards(self.weights, self._named, self._named)

    def state_values(self) -> dict[str, Any]:
        """The rest of the state, JSON-able."""
        return {"steps": self.steps, "skipped": self.skipped, "lr": self.lr}

    @torch.no_grad()
    def load_shards(self, values: dict[str, Any], read: ReadShard) -> None:
        """Continue from where `shards` and `state_values` were taken, at any world size, over any kind of weights."""
        self.weights.after_step()
        load_weights(self.weights, self._named, self._named, read)
        self.steps, self.skipped, self.param_groups[0]["lr"] = values["steps"], values["skipped"], values["lr"]


def build(recipe: Recipe, weights: Weights, layers: ModelLayers) -> MeZO:
    """Two-point steps of length ``method.epsilon``; the noise is seeded by ``train.seed``."""
    optim = recipe.optim
    return MeZO(
        weights,
        n_layers=len(layers.layers),
        lr=float(optim.lr),
        epsilon=recipe.method.epsilon,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        seed=recipe.train.seed,
    )
