"""plan.py: layouts, owners and bytes, by hand and as properties."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ows_ds.model.blocks import Block, Matrix, Vector
from ows_ds.optim.layout import Run, lay_out, make_plan, pack, plan_refresh


def matrix(name: str, rows: int, columns: int) -> Matrix:
    return Matrix(name, (rows, columns), (name,))


# At rank 2: 6 and 3 rows of matrices, ceil(5 / 2) = 3 and 1 rows of vectors. The other: ceil(3 / 2) = 2 rows.
LAYER = Block("layer", (matrix("q", 4, 6), matrix("v", 3, 2)), (Vector("bias", 5), Vector("norm", 2)))
ALWAYS = Block("always", (), (Vector("final", 3),))
SLOTS = {"q": (0, 6), "v": (6, 9), "bias": (9, 12), "norm": (12, 13)}


# ---- layout of the coordinates


@pytest.mark.parametrize(
    ("world_size", "rows", "parts", "local"),
    [
        (1, 13, [(0, 13)], [(slice(0, 9), slice(9, 13))]),
        (2, 14, [(0, 7), (7, 14)], [(slice(0, 7), None), (slice(0, 2), slice(2, 6))]),
        (3, 15, [(0, 5), (5, 10), (10, 15)],
         [(slice(0, 5), None), (slice(0, 4), slice(4, 5)), (None, slice(0, 3))]),
        (
            18,
            18,
            [(row, row + 1) for row in range(18)],
            [
                *((slice(0, 1), None) for _ in range(9)),
                *((None, slice(0, 1)) for _ in range(4)),
                *((None, None) for _ in range(5)),  # processes that own nothing but padding
            ],
        ),
    ],
)  # fmt: skip
def test_layout_by_hand(
    world_size: int, rows: int, parts: list[tuple[int, int]], local: list[tuple[slice | None, slice | None]]
) -> None:
    layout = lay_out(LAYER, r=2, world_size=world_size)
    assert layout.slots == SLOTS
    assert layout.segments == {"matrices": (0, 9), "vectors": (9, 13)}
    assert (layout.rows, layout.stride, layout.used) == (rows, rows // world_size, 13)
    assert [layout.part(index) for index in range(world_size)] == parts
    found = [tuple(layout.local(segment, index) for segment in layout.segments.values()) for index in range(world_size)]
    assert found == local


def test_runs_by_hand() -> None:
    """Neighbours with one factor are one run; experts' matrices have their own rank; vectors are not scaled."""
    stack = replace(matrix("experts", 4, 8), experts=3, rank=1)
    block = Block("b", (matrix("q", 8, 6), matrix("k", 2, 8), matrix("v", 2, 8), stack), (Vector("norm", 2),))
    layout = lay_out(block, r=2, world_size=1)
    assert layout.runs("auto") == (
        Run("matrices", math.sqrt(3), (0, 8)),
        Run("matrices", 1.0, (8, 24)),
        Run("matrices", 2.0, (24, 36)),
        Run("vectors", 1.0, (36, 37)),
    )
    assert layout.runs(0.25) == (Run("matrices", 0.25, (0, 36)), Run("vectors", 1.0, (36, 37)))


def test_plan_by_hand() -> None:
    plan = make_plan([LAYER, ALWAYS], 2, 3)
    assert plan.layouts == (lay_out(LAYER, 2, 3), lay_out(ALWAYS, 2, 3))
    assert plan.blocks == (LAYER, ALWAYS)
    assert (plan.rows, plan.stride) == (15 + 3, 5 + 1)
    assert list(plan.matrices) == ["q", "v"]
    assert plan.matrices["q"] is LAYER.matrices[0]


def test_a_layout_does_not_depend_on_the_other_units() -> None:
    """So that what stays in the set stays where it is, and its moments with their owners."""
    assert make_plan([ALWAYS, LAYER], 2, 3).layouts[1] == make_plan([LAYER], 2, 3).layouts[0]


@pytest.mark.parametrize(("world_size", "elements"), [(1, 0), (2, 8 * 2 * 1), (3, 6 * 2 * 2), (18, 2 * 2 * 17)])
def test_bytes_by_hand(world_size: int, elements: int) -> None:
    plan = make_plan([LAYER, ALWAYS], 2, world_size)
    assert plan.bytes_per_step() == {"gradients": 4 * elements, "coordinates": 4 * elements}
    assert plan.bytes_per_step(8, 2) == {"gradients": 8 * elements, "coordinates": 2 * elements}


def test_bytes_are_within_the_budget() -> None:
    """At most r * sum(max(m, n)) elements each way, where the padding is negligible."""
    block = Block("0", (matrix("a", 4096, 4096), matrix("b", 1024, 4096), matrix("c", 4096, 11008)), ())
    for world_size in (1, 2, 3, 8):
        for sent in make_plan([block], 128, world_size).bytes_per_step().values():
            assert sent <= 128 * (4096 + 4096 + 11008) * 4


@pytest.mark.parametrize("blocks", [[], [Block("bare", (), ())]])
def test_empty_set(blocks: list[Block]) -> None:
    plan = make_plan(blocks, r=4, world_size=3)
    assert (plan.rows, plan.stride, plan.matrices) == (0, 0, {})
    assert [(layout.slots, layout.segments, layout.used) for layout in plan.layouts] == [({}, {}, 0)] * len(blocks)
    assert plan.bytes_per_step() == {"gradients": 0, "coordinates": 0}


def test_pack_by_hand() -> None:
    assert pack({}, 10) == []
    assert pack({"a": 4, "b": 6, "c": 1, "d": 25, "e": 5, "f": 0}, 10) == [
        [("a", 0, 4), ("b", 0, 6)], [("c", 0, 1)], [("d", 0, 10)], [("d", 10, 20)], [("d", 20, 25), ("e", 0, 5)],
    ]  # fmt: skip


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 50), max_size=6), st.integers(1, 20))
def test_pack_covers_every_entry_once(sizes: dict[str, int], limit: int) -> None:
    runs = pack(sizes, limit)
    assert all(0 < sum(stop - start for _, start, stop in run) <= limit for run in runs)
    entries = [(name, index) for run in runs for name, start, stop in run for index in range(start, stop)]
    assert entries == [(name, index) for name, size in sizes.items() for index in range(size)]


sides = st.integers(1, 20)


@st.composite
def blocks(draw: st.DrawFn) -> list[Block]:
    result = []
    for index in range(draw(st.integers(0, 4))):
        shapes = draw(st.lists(st.tuples(sides, sides), max_size=4))
        sizes = draw(st.lists(sides, max_size=3))
        result.append(
            Block(
                f"{index}",
                tuple(matrix(f"{index}.m{i}", *shape) for i, shape in enumerate(shapes)),
                tuple(Vector(f"{index}.v{i}", size) for i, size in enumerate(sizes)),
            )
        )
    return result


@settings(deadline=None)
@given(blocks(), st.integers(1, 6), st.integers(1, 7))
def test_every_row_of_a_slot_has_one_owner(blocks: list[Block], rank: int, world_size: int) -> None:
    for layout in make_plan(blocks, rank, world_size).layouts:
        sizes = {m.name: max(m.shape) for m in layout.block.matrices}
        kinds = dict.fromkeys(sizes, "matrices")
        sizes |= {v.name: math.ceil(v.numel / rank) for v in layout.block.vectors}
        kinds = dict.fromkeys(sizes, "vectors") | kinds
        assert {name: last - first for name, (first, last) in layout.slots.items()} == sizes

        owners: list[list[tuple[int, str]]] = [[] for _ in range(layout.rows)]
        for index in range(world_size):
            first, last = layout.part(index)
            for kind, segment in layout.segments.items():
                own = layout.local(segment, index)
                for row in range(0) if own is None else range(first + own.start, first + own.stop):
                    assert first <= row < last
                    owners[row].append((index, kind))
        rows_seen = []
        for name, (first, last) in layout.slots.items():
            for row in range(first, last):
                rows_seen.append(row)
                assert owners[row] == [(row // layout.stride, kinds[name])]
        used = sum(sizes.values())
        assert sorted(rows_seen) == list(range(used))  # no two slots overlap, and no hole is between them
        assert layout.used == used
        assert all(not owners[row] for row in range(used, layout.rows))
        assert layout.rows == layout.stride * world_size
        assert 0 <= layout.rows - used < world_size


def test_describe() -> None:
    said = make_plan([LAYER, ALWAYS], 2, 3).describe()
    assert json.loads(json.dumps(said)) == {
        "r": 2, "world_size": 3, "order": ["layer", "always"],
        "slots": {
            "layer": {"rows": 15, "slots": {name: list(rows) for name, rows in SLOTS.items()}},
            "always": {"rows": 3, "slots": {"final": [0, 2]}},
        },
    }  # fmt: skip
    assert make_plan([LAYER, ALWAYS], 2, 3).describe() == said
    for other in (make_plan([LAYER], 2, 3), make_plan([ALWAYS, LAYER], 2, 3), make_plan([LAYER, ALWAYS], 3, 3),
                  make_plan([LAYER, ALWAYS], 2, 5)):  # fmt: skip
        assert other.describe() != said


# ---- who computes which projector

#            cost    128 (d)            96 (e)             64 (a)             32 (b)              10 (f)
REFRESHED = [matrix("a", 4, 4), matrix("b", 2, 8), matrix("d", 8, 4), matrix("e", 4, 6), matrix("f", 1, 10)]


@pytest.mark.parametrize(
    ("world_size", "owners", "slots", "stride"),
    [
        (
            1,
            {"d": 0, "e": 0, "a": 0, "b": 0, "f": 0},
            {"d": (0, 4), "e": (4, 8), "a": (8, 12), "b": (12, 14), "f": (14, 15)},
            15,
        ),
        # d | e, then a to the 96, b to the 128, f at 160 : 160 to the first
        (
            2,
            {"d": 0, "e": 1, "a": 1, "b": 0, "f": 0},
            {"d": (0, 4), "b": (4, 6), "f": (6, 7), "e": (8, 12), "a": (12, 16)},
            8,
        ),
        # d | e | a, then b and f to the 64: 96 : 96 goes to the lower process
        (
            3,
            {"d": 0, "e": 1, "a": 2, "b": 2, "f": 1},
            {"d": (0, 4), "e": (6, 10), "f": (10, 11), "a": (12, 16), "b": (16, 18)},
            6,
        ),
        # more processes than matrices: the last two have nothing to do
        (
            7,
            {"d": 0, "e": 1, "a": 2, "b": 3, "f": 4},
            {"d": (0, 4), "e": (4, 8), "a": (8, 12), "b": (12, 14), "f": (16, 17)},
            4,
        ),
    ],
)
def test_owners_by_hand(
    world_size: int, owners: dict[str, int], slots: dict[str, tuple[int, int]], stride: int
) -> None:
    plan = plan_refresh(REFRESHED, world_size, 2)
    said = plan.describe()
    assert (said["owners"], said["slots"]) == (owners, slots)
    assert [part.shape for part in plan.parts] == [(last - first, 2) for first, last in slots.values()]
    assert (plan.stride, plan.columns) == (stride, 2)


def test_first_sketches_take_the_longer_side() -> None:
    """At rank 2 a sketch is as wide as the shorter side where that is below 12: 4, 2, 4, 4 and 1 columns; rows of 4."""
    plan = plan_refresh(REFRESHED, 2, 2, "first")
    said = plan.describe()
    assert said["owners"] == plan_refresh(REFRESHED, 2, 2).describe()["owners"]
    assert said["slots"] == {"d": (0, 8), "b": (8, 12), "f": (12, 15), "e": (15, 21), "a": (21, 25)}
    assert {part.name: part.shape for part in plan.parts} == {
        "d": (8, 4), "b": (8, 2), "f": (10, 1), "e": (6, 4), "a": (4, 4)
    }  # fmt: skip
    assert (plan.stride, plan.columns) == (15, 4)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bytes_of_sketches_by_hand(world_size: int) -> None:
    """Two matrices at rank 2: 4 columns of 4 bytes reduced, 4 or 2 columns of 2 bytes gathered."""
    matrices = [matrix("d", 8, 4), matrix("e", 4, 6)]
    stride = {1: (14, 8), 2: (8, 4), 3: (8, 4)}[world_size]
    rows = [(world_size - 1) * one for one in stride]
    first, second = (plan_refresh(matrices, world_size, 2, sketch) for sketch in ("first", "second"))
    assert first.bytes_of_pass(world_size, first) == {"sketches": rows[0] * 16, "sketch_bases": rows[0] * 8}
    projectors = plan_refresh(matrices, world_size, 2)
    assert second.bytes_of_pass(world_size, projectors) == {"sketches": rows[1] * 16, "projectors": rows[1] * 4}


# E = 5 experts of 4 x 6 at rank 1, beside a matrix of 4 x 4 at rank 2
STACK = Matrix("experts", (4, 6), ("experts",), experts=5, rank=1)


def test_a_stack_is_cut_into_runs_of_experts() -> None:
    """Costs 3 x 96 and 2 x 96 of the stack, 64 of the matrix. A run of n projectors (4, 1) takes n * 4 / 2 rows."""
    plan = plan_refresh([matrix("a", 4, 4), STACK], 2, 2)
    assert plan.names == ("experts", "a")
    assert plan.describe() == {
        "columns": 2,
        "owners": {"experts[0:3]": 0, "experts[3:5]": 1, "a": 1},
        "slots": {"experts[0:3]": (0, 6), "experts[3:5]": (8, 12), "a": (12, 16)},
    }
    assert [part.shape for part in plan.parts] == [(3, 4, 1), (2, 4, 1), (4, 2)]
    assert plan.stride == 8
    # costs 392, 384 and 288 + 192: the first run goes to the second rank
    other = plan_refresh([matrix("a", 2, 98), matrix("b", 2, 96), STACK], 2, 2)
    assert [(part.owner, part.experts) for part in other.parts_of("experts")] == [(1, (0, 3)), (0, (3, 5))]
    [alone] = plan_refresh([STACK], 1, 2).parts
    assert (alone.experts, alone.shape) == ((0, 5), (5, 4, 1))


def test_coordinates_of_a_stack_lie_side_by_side() -> None:
    """Of 5 * 6 rows of 1 entry, two are a row of the block's."""
    layout = lay_out(Block("0", (matrix("a", 4, 4), STACK), (Vector("norm", 3),)), 2, 2)
    assert layout.slots == {"a": (0, 4), "experts": (4, 19), "norm": (19, 21)}
    assert layout.shapes == {"a": (4, 2), "experts": (5, 6, 1), "norm": (3,)}
    assert layout.rows == 22


def test_nothing_to_refresh() -> None:
    plan = plan_refresh([], 3, 2)
    assert (plan.parts, plan.stride) == ((), 0)


def test_equal_matrices_take_turns() -> None:
    plan = plan_refresh([matrix(name, 3, 3) for name in "dcba"], 3, 2)
    assert plan.describe()["owners"] == {"a": 0, "b": 1, "c": 2, "d": 0}


shapes = st.lists(st.tuples(sides, sides), min_size=1, max_size=12)


def loads(shapes: Sequence[tuple[int, int]], owners: Sequence[int], world_size: int) -> list[int]:
    work = [0] * world_size
    for shape, owner in zip(shapes, owners, strict=True):
        work[owner] += shape[0] * shape[1] * min(shape)
    return work


@settings(deadline=None)
@given(shapes, st.integers(1, 5), st.randoms())
def test_every_projector_has_one_owner_and_its_own_rows(
    shapes: list[tuple[int, int]], world_size: int, shuffle: random.Random
) -> None:
    matrices = [matrix(f"{i:02}", *shape) for i, shape in enumerate(shapes)]
    plan = plan_refresh(matrices, world_size, 1)
    parts = {part.name: part for part in plan.parts}
    assert parts.keys() == {m.name for m in matrices}
    taken: list[int] = []
    for m in matrices:
        first, last = parts[m.name].rows
        owner = parts[m.name].owner
        assert last - first == min(m.shape)
        assert owner * plan.stride <= first
        assert last <= (owner + 1) * plan.stride
        taken += range(first, last)
    assert len(taken) == len(set(taken))

    work = loads(shapes, [parts[m.name].owner for m in matrices], world_size)
    assert max(work) - min(work) <= max(loads([shape], [0], 1)[0] for shape in shapes)

    shuffled = list(matrices)
    shuffle.shuffle(shuffled)
    again = plan_refresh(shuffled, world_size, 1)
    assert again == plan
    assert json.dumps(again.describe()) == json.dumps(plan.describe())


@settings(max_examples=40, deadline=None)
@given(shapes.filter(lambda s: len(s) <= 6), st.integers(2, 3))
def test_busiest_is_within_grahams_bound(shapes: list[tuple[int, int]], world_size: int) -> None:
    plan = plan_refresh([matrix(f"{i}", *shape) for i, shape in enumerate(shapes)], world_size, 1)
    owners = plan.describe()["owners"]
    work = loads(shapes, [owners[f"{i}"] for i in range(len(shapes))], world_size)
    best = min(
        max(loads(shapes, choice, world_size)) for choice in itertools.product(range(world_size), repeat=len(shapes))
    )
    assert max(work) * 3 * world_size <= best * (4 * world_size - 1)


def test_describe_of_a_refresh() -> None:
    said = plan_refresh(REFRESHED, 2, 2).describe()
    assert json.loads(json.dumps(said)) == {
        "columns": 2,
        "owners": {"d": 0, "e": 1, "a": 1, "b": 0, "f": 0},
        "slots": {"d": [0, 4], "b": [4, 6], "f": [6, 7], "e": [8, 12], "a": [12, 16]},
    }
    assert plan_refresh(REFRESHED, 3, 2).describe() != said
    assert plan_refresh(REFRESHED[1:], 2, 2).describe() != said
