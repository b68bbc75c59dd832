"""The sum of a step's gradients in few numbers: after each micro-batch its leading directions, and no more.

    M = L B^T + G          what was kept of the gradients so far, and a new one (never formed)
    B = basis of M's range on the shorter side, by products with L, B and G
    L = M B

So a sum takes k (m + n) numbers in place of m n; with k = 2 r, twice as many directions as a projector has, what is
lost is small where gradients of micro-batches agree, and noise where they do not. It depends on how a batch is divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ows_ds.compat.torch import to_device
from ows_ds.optim.projection import (
    Range,
    is_tall,
    iterated,
    orthonormal,
    product,
    start_basis,
    wide,
)
from ows_ds.optim.sizes import OVERSAMPLING, kept_directions


@dataclass
class Compressed:
    """left @ right.T, of the sum with its longer side first. left: (long, k). right: (short, k), orthonormal."""

    left: Tensor
    right: Tensor

    def range(self, r: int) -> Range:
        """As `projection.find_range` gives it of a gradient; ``left`` is the sum times its basis."""
        squares = self.left.double().mT @ self.left.double()
        return Range(r, self.right, squares, torch.linalg.vector_norm(self.left, dim=(-2, -1)))


def add(
    total: Compressed | None, gradient: Tensor, r: int, seed: int | Sequence[int], previous: Tensor | None = None
) -> Compressed:
    """The sum with one more gradient (m, n), any dtype. Does not wait for the device.

    total: None at the first one. seed: of the noise that the search starts with, beside what was kept, or the
    ``previous`` projector. Of a stack, a sequence: one for each matrix.
    """
    matrix = gradient if is_tall(gradient.shape) else gradient.mT
    short, dtype = matrix.shape[-1], wide(gradient)
    width = min(kept_directions(r, short), matrix.shape[-2])
    known = previous if total is None else total.right[..., : max(0, width - OVERSAMPLING)]

    def times(x: Tensor) -> Tensor:
        found = product(matrix, x)
        return found if total is None else found + total.left @ (total.right.mT @ x)

    def transposed(y: Tensor) -> Tensor:
        found = product(matrix.mT, y)
        return found if total is None else found + total.right @ (total.left.mT @ y)

    start = to_device(start_basis(short, width, seed, known), matrix.device).to(dtype)
    right = orthonormal(iterated(times, transposed, start, known is not None))[0]
    return Compressed(times(right), right)
