"""How tokens are multiplied with a matrix, or with those of a stack that their experts have.

A stack of experts' weights is E matrices, and a token is multiplied with those of its own experts. Which, a model says
by how it uses the stack: `Use`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ows_ds.compat.torch import add_product, grouped_product, has_grouped_product
from ows_ds.distributed.formats import Format, Scaled


@dataclass(frozen=True)
class Experts:
    """A stack of matrices in few bits, each of which is made when it is asked for: (E, C_in, C_out)."""

    format: Format
    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
    flipped: bool = False

    @property
    def mT(self) -> Experts:
        """As a tensor's."""
        return replace(self, flipped=not self.flipped)

    @property
    def shape(self) -> tuple[int, ...]:
        """As a tensor's."""
        experts, *sides = self.format.full_shape
        return (experts, *(sides[::-1] if self.flipped else sides))

    def __getitem__(self, expert: int) -> Tensor | Scaled:
        found = self.format.factor(self.codes, self.scales, self.dtype, expert)
        return found.mT if self.flipped else found


def times(x: Tensor, matrix: Tensor | Scaled) -> Tensor:
    """x matrix."""
    return x @ matrix if isinstance(matrix, Tensor) else matrix.product(x)


class Use:
    """How tokens (n, C_in) are multiplied with a matrix (C_in, C_out). Subclasses: with a stack of matrices."""

    def flat(self, x: Tensor) -> Tensor:
        """Tokens as the other methods take them."""
        return x.reshape(-1, x.shape[-1])

    def product(self, x: Tensor, matrix: Any) -> Tensor:
        """x (n, i) matrix (i, o) -> (n, o). matrix: a tensor, `Scaled`, or `Experts`."""
        return times(x, matrix)

    def add_product(self, total: Tensor, x: Tensor, matrix: Tensor) -> None:
        """The same, added to ``total`` in place."""
        total.addmm_(x, matrix)

    def add_outer(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """``total`` (i, o), perhaps of a wider dtype, <- total + a^T b, for tokens a (n, i) and b (n, o)."""
        add_product(total, a.t(), b)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """a^T b alone."""
        return a.t() @ b

    def inputs(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """Which tokens go to which matrix."""
        return [(0, self.flat(x))]


@dataclass(frozen=True)
class OneExpert(Use):
    """All tokens with the matrix of one expert."""

    index: int

    def inputs(self, x: Tensor) -> list[tuple[int, Tensor]]:
        return [(self.index, self.flat(x))]

    def product(self, x: Tensor, matrix: Any) -> Tensor:
        return times(x, matrix[self.index])

    def add_product(self, total: Tensor, x: Tensor, matrix: Tensor) -> None:
        total.addmm_(x, matrix[self.index])

    def add_outer(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        add_product(total[self.index], a.t(), b)


@dataclass(frozen=True, eq=False)
class Grouped(Use):
    """Tokens in the order of their experts. ends: (E,), int, where each expert's tokens end; what comes after the last
    of them belongs to no expert, and its products are zero."""

    ends: Tensor

    def _groups(self) -> list[tuple[int, slice]]:
        ends = self.ends.tolist()
        return [(e, slice(a, b)) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if a < b]

    def inputs(self, x: Tensor) -> list[tuple[int, Tensor]]:
        return [(expert, x[rows]) for expert, rows in self._groups()]

    def product(self, x: Tensor, matrix: Any) -> Tensor:
        if isinstance(matrix, Tensor) and has_grouped_product(x, matrix):
            return grouped_product(x, matrix, self.ends)
        y = x.new_zeros(x.shape[0], matrix.shape[-1])
        for expert, rows in self._groups():
            y[rows] = times(x[rows], matrix[expert])
        return y

    def add_product(self, total: Tensor, x: Tensor, matrix: Tensor) -> None:
        if has_grouped_product(x, matrix):
            total += grouped_product(x, matrix, self.ends)
            return
        for expert, rows in self._groups():
            total[rows].addmm_(x[rows], matrix[expert])

    def add_outer(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        if has_grouped_product(a.t(), b):
            total += grouped_product(a.t(), b, self.ends)
            return
        for expert, rows in self._groups():
            add_product(total[expert], a[rows].t(), b[rows])

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        if has_grouped_product(a.t(), b):
            return grouped_product(a.t(), b, self.ends)
        total = a.new_zeros(len(self.ends), a.shape[-1], b.shape[-1])
        for expert, rows in self._groups():
            torch.mm(a[rows].t(), b[rows], out=total[expert])
        return total


class Batched(Use):
    """Tokens (E, n, C_in): some for each expert."""

    def flat(self, x: Tensor) -> Tensor:
        return x

    def inputs(self, x: Tensor) -> list[tuple[int, Tensor]]:
        return list(enumerate(x))

    def product(self, x: Tensor, matrix: Any) -> Tensor:
        if isinstance(matrix, Tensor):
            return x @ matrix
        y = x.new_empty(*x.shape[:-1], matrix.shape[-1])
        for expert, tokens in enumerate(x):
            y[expert] = times(tokens, matrix[expert])
        return y

    def add_product(self, total: Tensor, x: Tensor, matrix: Tensor) -> None:
        total.baddbmm_(x, matrix)

    def add_outer(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        total += a.mT @ b

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        return a.mT @ b


EVERY = Use()
