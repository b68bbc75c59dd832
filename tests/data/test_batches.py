"""Which sequences a step has, and how they become tensors."""

import contextlib
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ows_ds.data import mix
from ows_ds.data.batches import Batches, collate, held_out_batches
from ows_ds.data.encoded import IGNORE, Builder
from ows_ds.data.pack import Sequences
from ows_ds.data.read_ahead import ReadAhead
from ows_ds.errors import UserError
from tests.data.test_data import lists, row_of

ORDER = [9, 6, 0, 2, 1, 4, 7, 5, 3, 8]


def test_batches_of_a_known_order() -> None:
    batches = Batches(range(10), 4, 1, 2, 0, 3)
    assert batches.steps_per_epoch == 2
    # From numpy's PCG64 with the seed sequence [3, 0]: a change here would break resuming older runs.
    assert batches.order(0).tolist() == ORDER
    assert batches.global_step(0).tolist() == ORDER[:4]
    assert batches.own(0) == [[ORDER[0]], [ORDER[2]]]
    assert Batches(range(10), 4, 1, 2, 1, 3).own(1) == [[ORDER[5]], [ORDER[7]]]
    assert sorted(batches.order(1)) == list(range(10))
    assert batches.order(1).tolist() != ORDER
    assert batches.global_step(2).tolist() == batches.order(1)[:4].tolist()


@given(
    micro=st.integers(1, 3),
    accumulation=st.sampled_from([1, 2, 4]),
    extra=st.integers(0, 30),
    seed=st.integers(0, 2**40),
    k=st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_a_step_has_the_same_rows_at_any_world_size(
    micro: int, accumulation: int, extra: int, seed: int, k: int
) -> None:
    size = micro * accumulation * 4
    rows = range(size + extra)
    one = Batches(rows, size, size, 1, 0, seed).global_step(k).tolist()
    assert len(set(one)) == size
    for world_size in (1, 2, 4):
        parts = [Batches(rows, size, micro, world_size, rank, seed).own(k) for rank in range(world_size)]
        assert {len(p) for p in parts} == {size // (micro * world_size)}
        assert {len(batch) for p in parts for batch in p} == {micro}
        # Micro-batch after micro-batch, rank after rank, it is even the same order.
        assert [row for at in zip(*parts, strict=True) for batch in at for row in batch] == one


def test_an_epoch_visits_every_row_at_most_once() -> None:
    batches = Batches(range(11), 2, 1, 1, 0, 0)
    seen = [row for k in range(batches.steps_per_epoch) for row in batches.global_step(k).tolist()]
    assert len(seen) == len(set(seen)) == 10


def test_batches_that_cannot_be_made() -> None:
    with pytest.raises(
        UserError, match=r"train\.global_batch_size: 4 is invalid: expected at most the number of rows, 3"
    ):
        Batches(range(3), 4, 1, 1, 0, 0)
    with pytest.raises(UserError, match=r"train\.global_batch_size: 4 is invalid: expected a multiple of 3"):
        Batches(range(9), 4, 1, 3, 0, 0)


@given(
    lengths=st.lists(st.integers(1, 99), max_size=40),
    size=st.integers(1, 5),
    world_size=st.integers(1, 5),
    sort=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_held_out_rows_come_exactly_once(lengths: list[int], size: int, world_size: int, sort: bool) -> None:
    parts = [
        held_out_batches(len(lengths), size, world_size, rank, lengths if sort else None) for rank in range(world_size)
    ]
    assert len({len(p) for p in parts}) == 1
    assert sorted(row for p in parts for batch in p for row in batch) == list(range(len(lengths)))
    assert all(len(batch) <= size for p in parts for batch in p)


def test_held_out_batches_by_hand() -> None:
    assert held_out_batches(5, 2, 2, 0) == [[0, 1], [4]]
    assert held_out_batches(5, 2, 2, 1) == [[2, 3], []]
    assert held_out_batches(3, 2, 1, 0, lengths=[5, 9, 7]) == [[1, 2], [0]]


def test_collate_pads_on_the_right() -> None:
    sequences = [[row_of([1, 2, 3], [IGNORE, 2, 3])], [row_of([4], [4])]]
    batch = collate(sequences, pad_id=9, multiple=4)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100], [-100, -100, -100, -100]]
    assert {t.dtype for t in batch.values()} == {torch.int64}
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert collate(sequences, 9)["input_ids"].shape == (2, 8)
    nothing = collate([], pad_id=9)
    assert nothing["input_ids"].tolist() == [[9] * 8]
    assert (int(nothing["attention_mask"].sum()), set(nothing["labels"].flatten().tolist())) == (0, {IGNORE})


def test_packed_rows_are_kept_apart() -> None:
    a, b = row_of([1, 2, 3], [1, 2, 3]), row_of([4, 5], [4, 5])
    batch = collate([[a, b], [b]], pad_id=9, packed=True, multiple=4)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9], [4, 5, 9, 9, 9, 9, 9, 9]]
    # no token is trained that would be predicted from another row
    assert batch["labels"].tolist() == [
        [-100, 2, 3, -100, 5, -100, -100, -100],
        [-100, 5, -100, -100, -100, -100, -100, -100],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert batch["row_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1]]
    assert batch["row_ends"].tolist() == [0, 3, 5, 8, 10, 16]
    assert (batch["row_ends"].dtype, int(batch["longest"])) == (torch.int32, 6)
    nothing = collate([], pad_id=9, packed=True)
    assert (nothing["row_ids"].tolist(), nothing["row_ends"].tolist()) == ([[0] * 8], [0, 8])


def test_shares_by_hand() -> None:
    assert mix.shares(10, [3, 1]) == [8, 2]  # 7.5 and 2.5: the first of equals
    assert mix.shares(7, [1, 1, 1]) == [3, 2, 2]
    assert mix.shares(5, [1e-9, 1.0]) == [0, 5]


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_mix_has_its_shares_and_goes_through_every_source_evenly(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 9), min_size=len(sizes), max_size=len(sizes)))
    shares, starts = mix.shares(sum(sizes), weights), [sum(sizes[:i]) for i in range(len(sizes))]
    seen: list[int] = []
    for number in range(4):
        epoch = mix.epoch(sizes, weights, seed, number).tolist()
        assert len(epoch) == sum(sizes)
        seen += epoch
        for start, size, share in zip(starts, sizes, shares, strict=True):
            assert sum(start <= row < start + size for row in epoch) == share
            counts = [seen.count(row) for row in range(start, start + size)]
            assert max(counts) - min(counts) <= 1
        assert epoch == mix.epoch(sizes, weights, seed, number).tolist()


def test_batches_of_a_mix() -> None:
    """Three quarters of every epoch are of the second source, though it has fewer rows."""
    batches = Batches(range(8), 4, 2, 2, 0, 1, parts=([6, 2], [1.0, 3.0]))
    assert batches.steps_per_epoch == 2
    for epoch in range(3):
        rows = [row for k in (0, 1) for row in batches.global_step(2 * epoch + k)]
        assert sum(row >= 6 for row in rows) == 6
    assert batches.own(5) == [batches.global_step(5)[:2].tolist()]


def test_a_step_has_its_counts_and_this_ranks_rows() -> None:
    """Tokens and targets are those of all ranks' sequences, packed or not."""
    builder = Builder()
    for length in range(1, 9):
        builder.add([length] * length, [True, False, *[True] * 6][:length])
    rows = builder.build()
    assert rows.targets.tolist() == [max(0, length - 2) for length in range(1, 9)]
    for largest in (None, 8):
        sequences = Sequences([rows], largest)
        batches = Batches(sequences, 4, 1, 2, 1, 0)
        step = batches.take(0)
        everyones = [sequences[i] for i in batches.global_step(0)]
        assert step.tokens == sum(len(row) for some in everyones for row in some)
        assert step.targets == sum(row.targets for some in everyones for row in some)
        assert [[lists(row) for row in some] for [some] in step.micro_batches] == [
            [lists(row) for row in everyones[i]] for i in (1, 3)
        ]
    assert not rows[3].input_ids.flags.owndata  # a view


def test_steps_are_read_one_ahead() -> None:
    """In order, in a thread, the next one while this one is in hand; errors come where their step is due."""
    read: list[tuple[int, str]] = []
    second = threading.Event()

    def reading(k: int) -> int:
        read.append((k, threading.current_thread().name))
        if k == 6:
            second.set()
        if k == 7:
            raise OSError("the disk is gone")
        return 10 * k

    with contextlib.closing(ReadAhead(reading, 9, torch.device("cpu"))) as steps:
        assert read == []
        assert steps.take(5) == 50
        assert second.wait(10)
        assert steps.take(6) == 60
        with pytest.raises(OSError, match="the disk is gone"):
            steps.take(7)
    assert [k for k, _ in read] == [5, 6, 7]
    assert all(name.startswith("read-ahead") for _, name in read)
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
    with contextlib.closing(ReadAhead(reading, 2, torch.device("cpu"))) as steps:
        assert [steps.take(k) for k in (0, 1)] == [0, 10]
    assert [k for k, _ in read[3:]] == [0, 1]  # nothing after the last one
