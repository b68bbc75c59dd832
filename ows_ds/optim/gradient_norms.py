"""What adaptive sampling sees of a period's gradients: sums over its steps, which wait on the device for a draw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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

    def add(self, squares: Mapping[str, Tensor]) -> None:
        """Count a step that was taken, with all ranks' sums of `CoordinateBuffer.energies`, by block."""
        for name, square in squares.items():
            if name in self._active.layer_of:
                self._sums[self._active.layer_of[name]] += square
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
