"""communicate.py over processes: results against a plain computation, bytes as documented, and failing together."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ows_ds.distributed.communicator import Communicator, Distributed, RankMismatchError, join
from ows_ds.distributed.weights import Replicated
from ows_ds.errors import Failed, UserError, UserErrors
from ows_ds.optim.ows import OWS
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import RATIOS

WORLDS = [2, 3]
SOON = 30.0  # seconds, on a machine that is busy with other things; a collective's own limit in these worlds is 60


def contribution(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers, so that sums are exact; different on every rank."""
    numbers = torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(1 + rank))
    return numbers.to(dtype)


def everyones(world_size: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.stack([contribution(rank, *shape, dtype=dtype) for rank in range(world_size)])


def operate(
    rank: int, world_size: int, calls: list[tuple[str, int]], shape: tuple[int, ...], dtype: torch.dtype
) -> list[tuple[Tensor, int, int]]:
    """Operations (name, owner): the result of each, what was counted under its name, and all that was counted."""
    results = []
    for what, owner in calls:
        comm = Distributed("cpu")
        assert (comm.rank, comm.world_size) == (rank, world_size)
        tensor = contribution(rank, *shape, dtype=dtype)
        if what == "broadcast":
            result = comm.broadcast(tensor, "name")
            assert result is tensor
        elif what == "reduce":
            comm.reduce(tensor, owner, "name")
            result = tensor
        elif what == "reduce_scatter":
            result = comm.reduce_scatter(tensor, "name")
        elif what == "all_gather":
            result = comm.all_gather(tensor, "name")
        elif what == "start_reduce_scatter":
            result = tensor.new_zeros(shape[0] // world_size, *shape[1:])
            comm.start_reduce_scatter(tensor, result, "name").wait()
        elif what == "start_all_gather":
            result = tensor.new_zeros(world_size * shape[0], *shape[1:])
            comm.start_all_gather(tensor, result, "name").wait()
        elif what == "start_all_gather in place":
            result = tensor.new_zeros(world_size * shape[0], *shape[1:])
            part = result[rank * shape[0] : (rank + 1) * shape[0]]
            part.copy_(tensor)
            comm.start_all_gather(part, result, "name").wait()
        else:
            result = comm.all_reduce(tensor, "name")
            assert result is tensor
        comm.barrier()
        results.append((result, comm.sent["name"], sum(comm.sent.values())))
    return results


@pytest.mark.parametrize("world_size", WORLDS)
def test_operations(pools: Pools, world_size: int) -> None:
    shape = (2 * world_size, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        size = 2 * world_size * 5 * dtype.itemsize  # N: bytes of the tensor
        every = everyones(world_size, *shape, dtype=dtype)
        total = every.sum(0)
        # by (operation, owner): result by rank (None: not defined), bytes by rank
        expected: dict[tuple[str, int], tuple[list[Tensor | None], list[int]]] = {
            ("broadcast", 0): ([every[0]] * world_size, [size] + [0] * (world_size - 1)),
            **{
                (how, 0): (list(total.chunk(world_size)), [size // world_size * (world_size - 1)] * world_size)
                for how in ("reduce_scatter", "start_reduce_scatter")
            },
            ("all_reduce", 0): ([total] * world_size, [2 * size // world_size * (world_size - 1)] * world_size),
        }
        for how in ("all_gather", "start_all_gather", "start_all_gather in place"):
            expected[how, 0] = ([every.flatten(0, 1)] * world_size, [size * (world_size - 1)] * world_size)
        for owner in range(world_size):
            mine = [rank == owner for rank in range(world_size)]
            expected["reduce", owner] = ([total if own else None for own in mine], [0 if own else size for own in mine])

        by_rank = pools(world_size).run(operate, list(expected), shape, dtype)
        for rank, results in enumerate(by_rank):
            for (call, (values, sent)), (result, named, counted) in zip(expected.items(), results, strict=True):
                wanted = values[rank]
                assert wanted is None or (result.dtype == dtype and torch.equal(result, wanted)), (call, rank)
                assert named == counted == sent[rank], (call, rank)


def several_at_once(rank: int, world_size: int) -> list[Tensor]:
    """Three reductions under way while others come and go, waited for in another order."""
    comm = Distributed("cpu")
    tensors = [contribution(rank, world_size * rows, 3) for rows in (1, 4, 2)]
    parts = [torch.zeros(rows, 3) for rows in (1, 4, 2)]
    pending = []
    for tensor, part in zip(tensors, parts, strict=True):
        pending.append(comm.start_reduce_scatter(tensor, part))
        comm.all_reduce(torch.ones(1))
    for one in reversed(pending):
        one.wait()
    return parts


@pytest.mark.parametrize("world_size", WORLDS)
def test_several_at_once(pools: Pools, world_size: int) -> None:
    for rank, parts in enumerate(pools(world_size).run(several_at_once)):
        for rows, part in zip((1, 4, 2), parts, strict=True):
            assert torch.equal(part, everyones(world_size, world_size * rows, 3).sum(0).chunk(world_size)[rank])


def bytes_of_the_legend(rank: int, world_size: int) -> dict[str, int]:
    """60 bytes (float32, 15 entries) through every operation, under its default name."""
    comm = Distributed("cpu")
    tensor = torch.zeros(15)
    comm.broadcast(tensor)
    comm.reduce(tensor, 1)
    comm.reduce_scatter(tensor[:6])
    comm.all_gather(tensor)
    comm.all_reduce(tensor)
    comm.all_reduce(tensor)  # counts add up
    comm.all_reduce(tensor[:1], "scalar")
    return dict(comm.sent)


def test_bytes_by_hand(pools: Pools) -> None:
    assert pools(3).run(bytes_of_the_legend) == [
        {"broadcast": b, "reduce": r, "reduce_scatter": 16, "all_gather": 120, "all_reduce": 160, "scalar": 8}
        for b, r in ((60, 60), (0, 0), (0, 60))  # a scalar's third of 4 bytes is rounded up to 2
    ]


# ---- JSON

VALUES: list[Any] = [
    {"layers": [3, 17], "text": "größer ✓"},
    None,
    [1.5, -2, True, "x" * 3000, {"nested": {"empty": []}}],
]


def exchange(rank: int, world_size: int) -> tuple[list[Any], list[Any], dict[str, int]]:
    comm = Distributed("cpu")
    shared = [comm.broadcast_object(VALUES[i] if rank == 0 else object(), "s") for i in range(3)]
    collected = [comm.all_gather_object(VALUES[(rank + shift) % 3], "c") for shift in range(3)]
    return shared, collected, dict(comm.sent)


@pytest.mark.parametrize("world_size", WORLDS)
def test_share_and_collect_of_uneven_lengths(pools: Pools, world_size: int) -> None:
    longest = [len(b'{"layers": [3, 17], "text": "gr\\u00f6\\u00dfer \\u2713"}'), 4, 3000 + 46]
    lengths = 3 * 8 * (world_size - 1)  # one int64 each time
    # rank 0 has value s the shift s, process 1 the next one; in a world of two one of the three stays away
    taken = [max(longest[(rank + shift) % 3] for rank in range(world_size)) for shift in range(3)]
    for shared, collected, sent in pools(world_size).run(exchange):
        assert shared == VALUES
        assert collected == [[VALUES[(rank + shift) % 3] for rank in range(world_size)] for shift in range(3)]
        # the others contribute null, 4 bytes, to what rank 0 shares
        assert sent == {
            "s": lengths + sum(longest) * (world_size - 1),
            "c": lengths + sum(taken) * (world_size - 1),
        }


# ---- agreeing

AGREED: dict[str, Any] = {"layers": [1, 3], "plan": {"rank": 8, "slots": {"a": [0, 4], "b": [4, 9]}}}
OTHER: dict[str, Any] = {"layers": [1, 3], "plan": {"rank": 8, "slots": {"a": [0, 4], "b": [4, 8]}}}


def agree(rank: int, world_size: int, cases: list[tuple[int, ...]]) -> list[tuple[str, float]]:
    """For each case (processes that differ): what was said, and after how many seconds."""
    comm = Distributed("cpu")
    comm.assert_consistent("the beginning", AGREED)
    assert comm.sent["agree"] == 32 * (world_size - 1)  # a digest
    results = []
    for different in cases:
        start = time.monotonic()
        said = ""
        try:
            comm.assert_consistent("the plan of step 4", OTHER if rank in different else AGREED)
        except RankMismatchError as error:
            said = str(error)
        results.append((said, time.monotonic() - start))
    return results


@pytest.mark.parametrize("world_size", WORLDS)
def test_agree(pools: Pools, world_size: int) -> None:
    others = range(1, world_size)
    cases: dict[tuple[int, ...], list[str]] = {
        (): [],
        (0,): [f"rank {i} has plan: slots: b: [4, 9] where rank 0 has plan: slots: b: [4, 8]" for i in others],
        tuple(range(world_size)): [],
    }
    for i in others:
        cases[(i,)] = [f"rank {i} has plan: slots: b: [4, 8] where rank 0 has plan: slots: b: [4, 9]"]
    for results in pools(world_size).run(agree, list(cases)):
        for says, (said, seconds) in zip(cases.values(), results, strict=True):
            if says:
                assert said == f"the ranks do not agree on the plan of step 4: {'; '.join(says)}"
            else:
                assert said == ""
            assert seconds < SOON


class OwnMind(Distributed):
    """A process that takes another layer set than the one it is sent."""

    def broadcast_object(self, value: Any, name: str = "broadcast_object") -> Any:
        shared = super().broadcast_object(value, name)
        return [0, 1, 2] if name == "layer_set" and self.rank == 1 else shared


MISTAKES = {
    "none": "",
    "layers": "rank 1 has layers: [0, 1, 2] where rank 0 has layers: [",
    "rank": "rank 1 has plan: r: 5 where rank 0 has plan: r: 6",
    "always_on": 'rank 1 has plan: order: ["model.layers.0", "model.layers.',
}


def train(rank: int, world_size: int) -> dict[str, tuple[str, float]]:
    """For each mistake of process 1: what OWS said, and after how many seconds."""
    results = {}
    for mistake in MISTAKES:
        comm = OwnMind("cpu") if mistake == "layers" else Distributed("cpu")
        settings = {"rank": 5 if mistake == "rank" and rank == 1 else 6, "gamma": 2, "scheme": "fixed", "seed": 1}
        if mistake == "always_on" and rank == 1:
            settings["always_on"] = "none"
        weights = Replicated(tiny("llama"), comm)
        start = time.monotonic()
        said = ""
        try:
            OWS(weights, RATIOS, **settings)
        except RankMismatchError as error:
            said = str(error)
        results[mistake] = (said, time.monotonic() - start)
    return results


def test_a_process_with_a_mind_of_its_own_stops_all(pools: Pools) -> None:
    for results in pools(3).run(train):
        assert results["none"][0] == ""
        for mistake, (said, seconds) in results.items():
            if mistake != "none":
                expected = f"the ranks do not agree on the layers and the plan of step 1: {MISTAKES[mistake]}"
                assert said.startswith(expected)
                assert said.count("rank ") == 2  # nobody else differs
                assert seconds < SOON


def waits_for_the_other(rank: int, world_size: int) -> tuple[str, float]:
    group = dist.new_group(timeout=timedelta(seconds=1))
    comm = Distributed("cpu", group)
    start = time.monotonic()
    said = ""
    if rank == 0:
        try:
            comm.assert_consistent("what the other never says", AGREED)
        except RuntimeError as error:
            said = str(error)
    seconds = time.monotonic() - start
    Distributed("cpu").barrier()
    return said, seconds


def test_a_process_that_never_comes_is_not_waited_for_for_ever(pools: Pools) -> None:
    (said, seconds), _ = pools(2).run(waits_for_the_other)
    assert "imed out" in said
    assert 0.5 < seconds < SOON


# ---- failing together


Said = tuple[str, str, Any]


def fail(rank: int, world_size: int, cases: list[dict[int, BaseException]]) -> list[Said]:
    """For each case (errors by process): type, text, and the fields of a UserError, or "own" for the process's own."""
    comm = Distributed("cpu")
    results = []
    for errors in cases:
        mine = errors.get(rank)
        said: Said = ("", "", None)
        try:
            comm.raise_if_any_failed(mine)
        except UserError as error:
            said = ("UserError", str(error), "own" if error is mine else fields(error))
        except Exception as error:
            said = (type(error).__name__, str(error), "own" if error is mine else None)
        results.append(said)
    return results


def fields(error: UserError) -> tuple[str, object, str]:
    return error.key, error.value, error.right


class Portable(UserError):
    """A UserError that can travel to the processes of the pool."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), fields(self)


def test_all_good(pools: Pools) -> None:
    mistake = Portable("data.train", "rows.jsonl", "expected a file that exists")
    several = UserErrors((UserError("a", "1", "expected 2"), UserError("b", "3", "expected 4")))
    others: Said = ("UserError", str(mistake), fields(mistake))
    own: Said = ("UserError", str(mistake), "own")
    luck: Said = ("ValueError", "bad luck", "own")
    stopped: Said = ("RankMismatchError", "rank 1: ValueError: bad luck", None)
    cases: list[tuple[dict[int, BaseException], list[Said]]] = [
        ({}, [("", "", None)] * 3),
        # a user's mistake is one everywhere
        ({0: mistake}, [own, others, others]),
        ({2: mistake}, [others, others, own]),
        # other errors name the process
        ({1: ValueError("bad luck")}, [stopped, luck, stopped]),
        ({0: ValueError("bad luck"), 2: OSError("disk")},
         [luck, ("RankMismatchError", "rank 0: ValueError: bad luck; rank 2: OSError: disk", None),
          ("OSError", "disk", "own")]),
        # who has no error of its own hears of what can be put right
        ({0: ValueError("bad luck"), 2: mistake}, [luck, others, own]),
        # what no rank is to blame for is the same everywhere
        ({0: Failed("the disk is full")},
         [("Failed", "the disk is full", "own"), *[("Failed", "the disk is full", None)] * 2]),
        # several mistakes are several everywhere
        ({1: several}, [("UserError", str(several), fields(several)), ("UserError", str(several), "own"),
                        ("UserError", str(several), fields(several))]),
    ]  # fmt: skip
    by_rank = pools(3).run(fail, [errors for errors, _ in cases])
    for index, (errors, expected) in enumerate(cases):
        assert [results[index] for results in by_rank] == expected, errors


# ---- joining


def joined(rank: int, world_size: int) -> tuple[bool, int, int]:
    comm = join("cpu")
    return isinstance(comm, Distributed), comm.rank, comm.world_size


def test_join(pools: Pools) -> None:
    assert pools(2).run(joined) == [(True, 0, 2), (True, 1, 2)]
    assert issubclass(Distributed, Communicator)


def meeting(rank: int, world_size: int, absent: int | None) -> bool | None:
    """Whether all came; None for the one that did not."""
    comm = join("cpu")
    return None if rank == absent else comm.meets(f"here without {absent}", 0.5 if absent is not None else 20.0)


def test_ranks_that_meet_without_a_collective(pools: Pools) -> None:
    assert pools(3).run(meeting, None) == [True, True, True]
    assert pools(3).run(meeting, 1) == [False, None, False]
    assert Communicator().meets("alone", 0.0)
