"""Who owns what, where it lies, and how many bytes move: a pure function of units, rank and world size.

All coordinates of a period are the rows of one float32 matrix of r columns, unit after unit; a vector of n entries
takes ceil(n / r) rows of it. One collective then moves everything, and one process's part is a run of whole rows:

    rows      0 ........................................................................ rows (padded)
    unit      | layer 3                              | layer 7                   | always    |pad|
    slot      | q | k | v | o | gate | up | down |vec| q | k | ...           |vec| vec       |   |
    process   | 0                      | 1                       | 2                             |   stride each
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ows_ds.layers import Matrix, Unit

Rows = tuple[int, int]

COLUMNS = 128  # of the coordinate buffer where it holds vectors only
CHUNK = 1 << 24  # logits alive at a time (see `ows_ds.loss`)


@dataclass(frozen=True)
class Segment:
    """A unit's rows of one kind, which Adam treats as one tensor (they share their number of steps)."""

    unit: str
    kind: str  # "matrices" or "vectors"
    rows: Rows


@dataclass(frozen=True)
class Plan:
    """Layout of the coordinates of one layer set. Build it with `make_plan`.

    rank: r, the number of columns. world: processes. slots: name -> rows of each matrix's coordinates and vector's
    entries. segments: in row order. rows: padded to a multiple of ``world``.
    """

    rank: int
    world: int
    units: tuple[Unit, ...]
    slots: dict[str, Rows]
    segments: tuple[Segment, ...]
    rows: int

    @property
    def stride(self) -> int:
        """Rows of one process's part."""
        return self.rows // self.world

    def part(self, index: int) -> Rows:
        """Rows of process ``index``."""
        return index * self.stride, (index + 1) * self.stride

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """The matrices by name, in row order."""
        return {matrix.name: matrix for unit in self.units for matrix in unit.matrices}

    def local_segments(self, index: int) -> list[Segment]:
        """The segments, or parts of them, in process ``index``'s rows; empty ones left out."""
        first, last = self.part(index)
        cut = (Segment(s.unit, s.kind, (max(s.rows[0], first), min(s.rows[1], last))) for s in self.segments)
        return [s for s in cut if s.rows[0] < s.rows[1]]

    def bytes_per_step(self, itemsize: int = 4) -> dict[str, int]:
        """Bytes that each process sends in a step without refresh, by operation (ring).

        itemsize: bytes of a coordinate, 8 under float64 weights.
        """
        part = self.stride * self.rank * itemsize * (self.world - 1)
        return {"gradients": part, "coordinates": part}

    def describe(self) -> dict[str, Any]:
        """What all processes must have in common, JSON-able."""
        return {"rank": self.rank, "world": self.world, "rows": self.rows, "slots": dict(self.slots)}


def make_plan(units: Sequence[Unit], rank: int, world: int) -> Plan:
    """Lay out ``units`` (sampled layers in ascending order, then what is always trained).

    A matrix takes as many rows as its longer side; rows are padded to a multiple of ``world``.
    """
    slots: dict[str, Rows] = {}
    segments: list[Segment] = []
    row = 0
    for unit in units:
        for kind, sizes in (
            ("matrices", [(m.name, m.long) for m in unit.matrices]),
            ("vectors", [(v.name, math.ceil(v.numel / rank)) for v in unit.vectors]),
        ):
            start = row
            for name, size in sizes:
                slots[name] = (row, row + size)
                row += size
            if row > start:
                segments.append(Segment(unit.name, kind, (start, row)))
    return Plan(rank, world, tuple(units), slots, tuple(segments), math.ceil(row / world) * world)


@dataclass(frozen=True)
class RefreshPlan:
    """Who computes which projector, and how the projectors travel in one all-gather (sketches: in one reduce-scatter).

    owners: matrix name -> process. slots: matrix name -> rows in the gathered buffer of ``world * stride`` rows, to
    which process i contributes rows [i * stride, (i + 1) * stride).
    """

    owners: dict[str, int]
    slots: dict[str, Rows]
    stride: int

    def describe(self) -> dict[str, Any]:
        """What all processes must have in common, JSON-able."""
        return {"owners": self.owners, "slots": self.slots}

    def bytes_of_pass(
        self, world: int, width: int, rank: int | None = None, itemsize: int = 4, weight_itemsize: int = 2
    ) -> dict[str, int]:
        """Bytes that each process sends for one pass of sketches (`optim.refresh: sketch`), by operation (ring).

        width: columns of the sketches. rank: r in the second pass, None in the first. itemsize: bytes of a coordinate.
        weight_itemsize: bytes of a weight's entry.
        """
        sent = self.stride * (world - 1)
        found = {"sketch_bases": width} if rank is None else {"projectors": rank}
        return {"sketches": sent * width * itemsize, **{n: sent * c * weight_itemsize for n, c in found.items()}}


def plan_refresh(matrices: Sequence[Matrix], world: int, long: bool = False) -> RefreshPlan:
    """Spread the projectors of ``matrices`` over the processes so that the busiest has as little as possible to do.

    Longest processing time first: the costliest matrix left goes to the process with least work; ties go to the lower
    process, so that the result depends on nothing but the arguments. The cost of an exact SVD of an m x n matrix
    is m * n * min(m, n) flops up to a factor, which also orders the range finder's m * n * r.

    long: a slot has as many rows as the matrix's longer side (what a first sketch takes), else as its shorter one.
    """

    def rows(matrix: Matrix) -> int:
        return matrix.long if long else matrix.short

    work = [0] * world
    owned: list[list[Matrix]] = [[] for _ in range(world)]
    for matrix in sorted(matrices, key=lambda m: (-_cost(m), m.name)):
        owner = min(range(world), key=lambda i: (work[i], i))
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
