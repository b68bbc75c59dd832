"""Who owns what, where it lies, and how many bytes move: a pure function of blocks, r and world size.

The coordinates of a block are the rows of one matrix of r columns; a vector of n entries takes ceil(n / r) rows of it.
Each rank owns an equal run of whole rows, so that one collective moves a block, and what a rank owns does not depend
on which other blocks train:

    rows      0 ....................................... rows (padded)
    slot      | q | k | v | o | gate | up | down |vec|pad|
    rank      | 0            | 1            | 2          |   stride each
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ows_ds.model.layers import Block, Matrix

Rows = tuple[int, int]

COLUMNS = 128  # of a block's coordinates where they hold vectors only
CHUNK = 1 << 24  # entries that are handled at once: logits (see `ows_ds.train.loss`), weights that Adam steps on


@dataclass(frozen=True)
class Layout:
    """Where the coordinates of one block lie. Build it with `lay_out`.

    r: the low rank, the number of columns. slots: name -> rows of each matrix's coordinates and vector's
    entries. segments: rows of each kind, "matrices" and "vectors", in this order; Adam treats one as one tensor (they
    share their number of steps). rows: padded to a multiple of ``world_size``.
    """

    block: Block
    r: int
    world_size: int
    slots: dict[str, Rows]
    segments: dict[str, Rows]
    rows: int

    @property
    def stride(self) -> int:
        """Rows of one rank's part."""
        return self.rows // self.world_size

    @property
    def used(self) -> int:
        """Rows without the padding."""
        return max((last for _, last in self.segments.values()), default=0)

    def part(self, rank: int) -> Rows:
        """Rows of ``rank``."""
        return rank * self.stride, (rank + 1) * self.stride

    def local(self, rows: Rows, rank: int) -> slice | None:
        """Which of ``rank``'s rows, counted from its first, are among ``rows``; None if none are."""
        first, last = self.part(rank)
        a, b = max(rows[0], first), min(rows[1], last)
        return slice(a - first, b - first) if a < b else None


def lay_out(block: Block, r: int, world_size: int) -> Layout:
    """A matrix takes as many rows as its longer side; rows are padded to a multiple of ``world_size``."""
    slots: dict[str, Rows] = {}
    segments: dict[str, Rows] = {}
    row = 0
    for kind, sizes in (
        ("matrices", [(m.name, m.long) for m in block.matrices]),
        ("vectors", [(v.name, math.ceil(v.numel / r)) for v in block.vectors]),
    ):
        start = row
        for name, size in sizes:
            slots[name] = (row, row + size)
            row += size
        if row > start:
            segments[kind] = (start, row)
    return Layout(block, r, world_size, slots, segments, math.ceil(row / world_size) * world_size)


@dataclass(frozen=True)
class Plan:
    """The layouts of all that trains in a period, in the model's order, and last what is always trained."""

    r: int
    world_size: int
    layouts: tuple[Layout, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What the layouts are of."""
        return tuple(layout.block for layout in self.layouts)

    @property
    def rows(self) -> int:
        """Of all blocks."""
        return sum(layout.rows for layout in self.layouts)

    @property
    def stride(self) -> int:
        """Rows that one rank owns, of all blocks."""
        return sum(layout.stride for layout in self.layouts)

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """The matrices by name, in row order."""
        return {matrix.name: matrix for block in self.blocks for matrix in block.matrices}

    def bytes_per_step(self, itemsize: int = 4, weight_itemsize: int = 4) -> dict[str, int]:
        """Bytes that each rank sends in a step without refresh, by operation (ring).

        itemsize: bytes of a gradient of coordinates, 8 under float64 weights. weight_itemsize: of a weight's entry:
        coordinates travel as the forward pass uses them.
        """
        part = self.stride * self.r * (self.world_size - 1)
        return {"gradients": part * itemsize, "coordinates": part * weight_itemsize}

    def describe(self) -> dict[str, Any]:
        """What all ranks must have in common, JSON-able."""
        slots = {layout.block.name: {"rows": layout.rows, "slots": dict(layout.slots)} for layout in self.layouts}
        return {"r": self.r, "world_size": self.world_size, "order": list(slots), "slots": slots}


def make_plan(blocks: Sequence[Block], r: int, world_size: int) -> Plan:
    """Lay out ``blocks`` (sampled layers in ascending order, then what is always trained)."""
    return Plan(r, world_size, tuple(lay_out(block, r, world_size) for block in blocks))


def group_in_order(sizes: Sequence[int], limit: int = CHUNK) -> list[list[int]]:
    """``sizes`` in order, in groups of at most ``limit`` in sum where none is larger."""
    groups: list[list[int]] = []
    for size in sizes:
        if groups and sum(groups[-1]) + size <= limit:
            groups[-1].append(size)
        else:
            groups.append([size])
    return groups


def pack(sizes: Mapping[str, int], limit: int = CHUNK) -> list[list[tuple[str, int, int]]]:
    """Runs of (name, first, last + 1) that together cover every entry of every tensor once, in order.

    sizes: entries by name. A run has at most ``limit`` entries; a tensor of more is cut.
    """
    runs: list[list[tuple[str, int, int]]] = []
    room = 0
    for name, size in sizes.items():
        for start in range(0, size, limit):
            stop = min(start + limit, size)
            if stop - start > room:
                runs.append([])
                room = limit
            runs[-1].append((name, start, stop))
            room -= stop - start
    return runs


@dataclass(frozen=True)
class RefreshPlan:
    """Who computes which projector, and how the projectors travel in one all-gather (sketches: in one reduce-scatter).

    owners: matrix name -> rank. slots: matrix name -> rows in the gathered buffer of ``world * stride`` rows, to
    which rank i contributes rows [i * stride, (i + 1) * stride).
    """

    owners: dict[str, int]
    slots: dict[str, Rows]
    stride: int

    def describe(self) -> dict[str, Any]:
        """What all ranks must have in common, JSON-able."""
        return {"owners": self.owners, "slots": self.slots}

    def bytes_of_pass(
        self, world_size: int, width: int, r: int | None = None, itemsize: int = 4, weight_itemsize: int = 2
    ) -> dict[str, int]:
        """Bytes that each rank sends for one pass of sketches (`optim.refresh: sketch`), by operation (ring).

        width: columns of the sketches. r: the low rank in the second pass, None in the first. itemsize: bytes of a
        coordinate; weight_itemsize: of a weight's entry.
        """
        sent = self.stride * (world_size - 1)
        found = {"sketch_bases": width} if r is None else {"projectors": r}
        return {"sketches": sent * width * itemsize, **{n: sent * c * weight_itemsize for n, c in found.items()}}


def plan_refresh(matrices: Sequence[Matrix], world_size: int, long: bool = False) -> RefreshPlan:
    """Spread the projectors of ``matrices`` over the ranks so that the busiest has as little as possible to do.

    Longest processing time first: the costliest matrix left goes to the rank with least work; ties go to the lower
    rank, so that the result depends on nothing but the arguments. The cost of an exact SVD of an m x n matrix
    is m * n * min(m, n) flops up to a factor, which also orders the range finder's m * n * r.

    long: a slot has as many rows as the matrix's longer side (what a first sketch takes), else as its shorter one.
    """

    def rows(matrix: Matrix) -> int:
        return matrix.long if long else matrix.short

    work = [0] * world_size
    owned: list[list[Matrix]] = [[] for _ in range(world_size)]
    for matrix in sorted(matrices, key=lambda m: (-_cost(m), m.name)):
        owner = min(range(world_size), key=lambda i: (work[i], i))
        work[owner] += _cost(matrix)
        owned[owner].append(matrix)
    stride = max((sum(rows(m) for m in mine) for mine in owned), default=0)
    owners: dict[str, int] = {}
    slots: dict[str, Rows] = {}
    for owner, mine in enumerate(owned):
        row = owner * stride
        for matrix in mine:
            owners[matrix.name] = owner
            slots[matrix.name] = (row, row + rows(matrix))
            row += rows(matrix)
    return RefreshPlan(owners, slots, stride)


def _cost(matrix: Matrix) -> int:
    return matrix.shape[0] * matrix.shape[1] * min(matrix.shape)
