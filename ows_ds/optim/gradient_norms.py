"""What adaptive sampling sees of a period's gradients: sums over its steps, which wait on the device for a draw."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ows_ds.compat.torch import squared_norms
from ows_ds.optim.active_set import ActiveSet
from ows_ds.optim.sampling import LayerSet


class GradientNorms:
    """Of each layer the mean square of its coordinates' gradients, before clipping, over the steps since the last draw.

    Per coordinate, so that large layers and small ones compare (as MISA's scaled norms, arXiv 2511.00056). Biases and
    norms are not counted.
    """

    def __init__(self, active: ActiveSet) -> None:
        self._active = active
        layers, r = active.layers.layers, active.r
        sizes = [sum(math.prod(m.side(m.long, r)) for m in block.matrices) for block in layers]
        self._sizes = torch.tensor(sizes, dtype=torch.float64).clamp(min=1)
        self._sums = torch.zeros(len(layers), dtype=torch.float64, device=active.weights.device)
        self._steps = 0

    def squares(self) -> Tensor:
        """(n_layers,) in the gradients' dtype: sums of squares of this rank's rows, after the buffer's ``reduce``."""
        found = torch.zeros(len(self._sums), dtype=self._active.dtype, device=self._sums.device)
        blocks = [(self._active.layer_of.get(name), block) for name, block in self._active.buffer.blocks.items()]
        mine = {
            layer: parameter.grad
            for layer, block in blocks
            if layer is not None
            and (parameter := block.parameters.get("matrices")) is not None
            and parameter.grad is not None
        }
        for layer, square in zip(mine, squared_norms(list(mine.values())), strict=True):
            found[layer] = square
        return found

    def add(self, squares: Tensor) -> None:
        """Count a step that was taken, with all ranks' `squares`."""
        self._sums += squares
        self._steps += 1

    def take(self, layer_set: LayerSet) -> dict[int, float]:
        """By layer of the period's set, the root mean square of a coordinate's gradient; begins again. Waits for the
        device."""
        sums, steps = self._sums.tolist(), self._steps
        self._sums.zero_()
        self._steps = 0
        return {layer: math.sqrt(sums[layer] / steps / float(self._sizes[layer])) for layer in layer_set if steps}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, the same on all ranks."""
        return {"sums": self._sums.tolist(), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where ``state`` was taken."""
        self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self._steps = state["steps"]
