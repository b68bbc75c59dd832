"""Who owns what, where it lies, and how many bytes move: a pure function of blocks, r and world size.

The coordinates of a block are the rows of one matrix of r columns. What is narrower, a vector of n entries or the
coordinates of a stack of experts, takes ceil(n / r) rows of it. Each rank owns an equal run of whole rows, so that one
collective moves a block, and what a rank owns does not depend on which other blocks train:

    rows      0 ....................................... rows (padded)
    slot      | q | k | v | o | gate | up | down |vec|pad|
    rank      | 0            | 1            | 2          |   stride each
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ows_ds.model.blocks import Block, Matrix
from ows_ds.optim.sizes import sketch_width

if TYPE_CHECKING:
    from torch import Tensor

Rows = tuple[int, int]
Scale = float | Literal["auto"]
"""Factor on projected updates (``optim.scale``); auto: see `scale_of`."""

COLUMNS = 128  # of a block's coordinates where they hold vectors only
CHUNK = 1 << 24  # entries that are handled at once: logits (see `ows_ds.train.loss`), weights that Adam steps on


def scale_of(matrix: Matrix, r: int, scale: Scale) -> float:
    """The factor on a matrix's projected update, in a block of low rank r; of a stack, on each of its matrices.

    auto: sqrt(short / low rank). A step of Adam moves every entry by about lr, so that one inside a subspace has
    sqrt(low rank / short) of the Frobenius norm of a full one.
    """
    return math.sqrt(matrix.short / matrix.low_rank(r)) if scale == "auto" else scale


def gram_entries(matrices: Sequence[Matrix], r: int) -> int:
    """Entries of the r x r products that ``optim.rule: muon`` sums over ranks."""
    return sum(matrix.count * matrix.low_rank(r) ** 2 for matrix in matrices)


@dataclass(frozen=True)
class Run:
    """Rows of a layout whose steps AdamW takes alike. kind: "matrices" or "vectors"; scale: see `scale_of`."""

    kind: str
    scale: float
    rows: Rows


@dataclass(frozen=True)
class Layout:
    """Where the coordinates of one block lie. Build it with `lay_out`.

    r: the low rank, the number of columns. slots: name -> rows of each matrix's coordinates and vector's entries.
    shapes: name -> of what is in these rows. segments: rows of each kind, "matrices" and "vectors", in this order: they
    share the number of Adam's steps. rows: padded to a multiple of ``world_size``.
    """

    block: Block
    r: int
    world_size: int
    slots: dict[str, Rows]
    shapes: dict[str, tuple[int, ...]]
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

    def runs(self, scale: Scale) -> tuple[Run, ...]:
        """All rows but the padding, in order: runs of neighbours of one kind and one factor."""
        scales = {matrix.name: scale_of(matrix, self.r, scale) for matrix in self.block.matrices}
        found: list[Run] = []
        for name, rows in self.slots.items():
            run = Run("matrices" if name in scales else "vectors", scales.get(name, 1.0), rows)
            if found and (found[-1].kind, found[-1].scale) == (run.kind, run.scale):
                run = replace(run, rows=(found.pop().rows[0], rows[1]))
            found.append(run)
        return tuple(found)

    def second_moments(self, rule: str) -> Rows:
        """Rows with a second moment, under ``optim.rule``: those that AdamW trains."""
        return (0, self.rows) if rule == "adamw" else self.segments.get("vectors", (0, 0))

    def local(self, rows: Rows, rank: int) -> slice | None:
        """Which of ``rank``'s rows, counted from its first, are among ``rows``; None if none are."""
        first, last = self.part(rank)
        a, b = max(rows[0], first), min(rows[1], last)
        return slice(a - first, b - first) if a < b else None


def lay_out(block: Block, r: int, world_size: int) -> Layout:
    """A matrix takes as many rows as its longer side; rows are padded to a multiple of ``world_size``."""
    slots: dict[str, Rows] = {}
    segments: dict[str, Rows] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    row = 0
    for kind, parts in (
        ("matrices", {m.name: m.side(m.long, r) for m in block.matrices}),
        ("vectors", {v.name: (v.numel,) for v in block.vectors}),
    ):
        start = row
        for name, shape in parts.items():
            size = math.ceil(math.prod(shape) / r)
            slots[name] = (row, row + size)
            row += size
        shapes |= parts
        if row > start:
            segments[kind] = (start, row)
    return Layout(block, r, world_size, slots, shapes, segments, math.ceil(row / world_size) * world_size)


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
class RefreshPart:
    """What one rank finds of one matrix's projector, or of those of some experts of a stack.

    experts: first and last + 1; None: it is no stack. rows: in the gathered buffer. shape: of what is in these rows, in
    row-major order: (side, columns), before it the number of experts.
    """

    name: str
    experts: tuple[int, int] | None
    owner: int
    rows: Rows
    shape: tuple[int, ...]

    @property
    def label(self) -> str:
        """For people, and to compare."""
        return self.name if self.experts is None else "{}[{}:{}]".format(self.name, *self.experts)

    def of(self, stack: Tensor) -> Tensor:
        """This part of a whole matrix or stack, or of anything else that has experts first."""
        return stack if self.experts is None else stack[slice(*self.experts)]


@dataclass(frozen=True)
class RefreshPlan:
    """Who computes which projector, and how the projectors travel in one all-gather (sketches: in one reduce-scatter).

    parts: in the order of the gathered buffer of ``world * stride`` rows of ``columns`` entries, to which rank i
    contributes rows [i * stride, (i + 1) * stride).
    """

    parts: tuple[RefreshPart, ...]
    stride: int
    columns: int

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of all matrices, each once."""
        return tuple(dict.fromkeys(part.name for part in self.parts))

    def parts_of(self, name: str) -> list[RefreshPart]:
        """Those of one matrix: one, or a stack's in the order of its experts."""
        return sorted((part for part in self.parts if part.name == name), key=lambda part: part.experts or (0, 0))

    def describe(self) -> dict[str, Any]:
        """What all ranks must have in common, JSON-able."""
        return {
            "columns": self.columns,
            "owners": {part.label: part.owner for part in self.parts},
            "slots": {part.label: part.rows for part in self.parts},
        }

    def bytes_of_pass(
        self, world_size: int, result: RefreshPlan, itemsize: int = 4, weight_itemsize: int = 2
    ) -> dict[str, int]:
        """Bytes that each rank sends for one pass of sketches (`optim.refresh: sketch`), by operation (ring).

        result: what the owners send, the first pass's bases (this plan) or projectors. itemsize: bytes of a coordinate;
        weight_itemsize: of a weight's entry.
        """
        found = result.stride * result.columns * weight_itemsize * (world_size - 1)
        sketches = self.stride * self.columns * itemsize * (world_size - 1)
        return {"sketches": sketches, "sketch_bases" if result is self else "projectors": found}


def plan_refresh(
    matrices: Sequence[Matrix], world_size: int, r: int, sketch: Literal["first", "second"] | None = None
) -> RefreshPlan:
    """Spread the projectors of ``matrices`` over the ranks so that the busiest has as little as possible to do.

    Longest processing time first: the costliest part left goes to the rank with least work; ties go to the lower
    rank, so that the result depends on nothing but the arguments. The cost of an exact SVD of an m x n matrix
    is m * n * min(m, n) flops up to a factor, which also orders the range finder's m * n * r. A stack is cut into runs
    of experts, one a rank where there are as many.

    r: the low rank. sketch: None, projectors of full gradients; else which of two sketches of them is spread.
    """
    columns = max((_width(matrix, r, sketch) for matrix in matrices), default=r)
    work = [0] * world_size
    owned: list[list[tuple[Matrix, tuple[int, int] | None]]] = [[] for _ in range(world_size)]
    parts = [(matrix, experts) for matrix in matrices for experts in _runs(matrix, world_size)]
    for matrix, experts in sorted(parts, key=lambda part: (-_cost(*part), part[0].name, part[1])):
        owner = min(range(world_size), key=lambda i: (work[i], i))
        work[owner] += _cost(matrix, experts)
        owned[owner].append((matrix, experts))

    def shape(matrix: Matrix, experts: tuple[int, int] | None) -> tuple[int, ...]:
        side = matrix.long if sketch == "first" else matrix.short
        return (*(() if experts is None else (experts[1] - experts[0],)), side, _width(matrix, r, sketch))

    def rows(matrix: Matrix, experts: tuple[int, int] | None) -> int:
        return math.ceil(math.prod(shape(matrix, experts)) / columns)

    stride = max((sum(rows(*part) for part in mine) for mine in owned), default=0)
    found = []
    for owner, mine in enumerate(owned):
        row = owner * stride
        for matrix, experts in mine:
            last = row + rows(matrix, experts)
            found.append(RefreshPart(matrix.name, experts, owner, (row, last), shape(matrix, experts)))
            row = last
    return RefreshPlan(tuple(found), stride, columns)


def _width(matrix: Matrix, r: int, sketch: str | None) -> int:
    """Columns of a matrix's projector, or of its sketch."""
    low_rank = matrix.low_rank(r)
    return low_rank if sketch is None else sketch_width(low_rank, matrix.short)


def _runs(matrix: Matrix, world_size: int) -> list[tuple[int, int] | None]:
    if matrix.experts is None:
        return [None]
    size = math.ceil(matrix.experts / world_size)
    return [(first, min(first + size, matrix.experts)) for first in range(0, matrix.experts, size)]


def _cost(matrix: Matrix, experts: tuple[int, int] | None) -> int:
    count = 1 if experts is None else experts[1] - experts[0]
    return count * matrix.shape[0] * matrix.shape[1] * min(matrix.shape)
