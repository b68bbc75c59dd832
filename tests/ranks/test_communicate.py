"""communicate.py over processes: results against a plain computation, bytes as documented, and failing together."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ows_ds.communicate import Communicator, Disagreement, Distributed, join
from ows_ds.errors import UserError
from ows_ds.optimizer import OWS
from ows_ds.weights import Replicated
from tests.ranks.pool import Pools
from tests.ranks.training import RATIOS
from tests.unit.families import tiny

WORLDS = [2, 3]
SOON = 10.0  # seconds; a collective's own limit in these worlds is 60


def contribution(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers, so that sums are exact; different on every rank."""
    numbers = torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(1 + rank))
    return numbers.to(dtype)


def everyones(world: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.stack([contribution(rank, *shape, dtype=dtype) for rank in range(world)])


def operate(rank: int, world: int, what: str, shape: tuple[int, ...], dtype: torch.dtype, owner: int) -> Any:
    """One operation: its result, what was counted under its name, and all that was counted."""
    comm = Distributed("cpu")
    assert (comm.index, comm.world) == (rank, world)
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
    elif what == "all_gather out":
        out = tensor.new_zeros(world * shape[0], *shape[1:])
        result = comm.all_gather(tensor, "name", out=out)
        assert result is out
    elif what == "all_gather in place":
        out = tensor.new_zeros(world, *shape)
        out[rank] = tensor
        flat = out.view(-1, *shape[1:])
        result = comm.all_gather(flat[rank * shape[0] : (rank + 1) * shape[0]], "name", out=flat)
    else:
        result = comm.all_reduce(tensor, "name")
        assert result is tensor
    comm.barrier()
    return result, comm.sent["name"], sum(comm.sent.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("world", WORLDS)
def test_operations(pools: Pools, world: int, dtype: torch.dtype) -> None:
    rows, shape = 2 * world, (2 * world, 5)
    item = dtype.itemsize
    size = rows * 5 * item  # N: bytes of the tensor

    def check(what: str, expected: Callable[[int], Tensor | None], sent: Callable[[int], int], owner: int = 0) -> None:
        for rank, (result, named, total) in enumerate(pools(world).run(operate, what, shape, dtype, owner)):
            wanted = expected(rank)
            assert wanted is None or (result.dtype == dtype and torch.equal(result, wanted)), (what, rank)
            assert named == total == sent(rank), (what, rank)

    every = everyones(world, *shape, dtype=dtype)
    total = every.sum(0)
    check("broadcast", lambda _: every[0], lambda rank: size if rank == 0 else 0)
    for owner in range(world):
        check("reduce", lambda r, o=owner: total if r == o else None, lambda r, o=owner: 0 if r == o else size, owner)
    check("reduce_scatter", lambda rank: total[2 * rank : 2 * rank + 2], lambda _: size // world * (world - 1))
    for what in ("all_gather", "all_gather out", "all_gather in place"):
        check(what, lambda _: every.flatten(0, 1), lambda _: size * (world - 1))
    check("all_reduce", lambda _: total, lambda _: 2 * size // world * (world - 1))


def bytes_of_the_legend(rank: int, world: int) -> dict[str, int]:
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


def exchange(rank: int, world: int) -> tuple[list[Any], list[Any], dict[str, int]]:
    comm = Distributed("cpu")
    shared = [comm.share(VALUES[i] if rank == 0 else object(), "s") for i in range(3)]
    collected = [comm.collect(VALUES[(rank + shift) % 3], "c") for shift in range(3)]
    return shared, collected, dict(comm.sent)


@pytest.mark.parametrize("world", WORLDS)
def test_share_and_collect_of_uneven_lengths(pools: Pools, world: int) -> None:
    longest = [len(b'{"layers": [3, 17], "text": "gr\\u00f6\\u00dfer \\u2713"}'), 4, 3000 + 49]
    lengths = 3 * 8 * (world - 1)  # one int64 each time
    # process 0 has value s the shift s, process 1 the next one; in a world of two one of the three stays away
    taken = [max(longest[(rank + shift) % 3] for rank in range(world)) for shift in range(3)]
    for shared, collected, sent in pools(world).run(exchange):
        assert shared == VALUES
        assert collected == [[VALUES[(rank + shift) % 3] for rank in range(world)] for shift in range(3)]
        # the others contribute null, 4 bytes, to what process 0 shares
        assert sent == {
            "s": lengths + sum(longest) * (world - 1),
            "c": lengths + sum(taken) * (world - 1),
        }


# ---- agreeing

AGREED: dict[str, Any] = {"layers": [1, 3], "plan": {"rank": 8, "slots": {"a": [0, 4], "b": [4, 9]}}}
OTHER: dict[str, Any] = {"layers": [1, 3], "plan": {"rank": 8, "slots": {"a": [0, 4], "b": [4, 8]}}}


def agree(rank: int, world: int, different: list[int]) -> tuple[str, float]:
    comm = Distributed("cpu")
    comm.agree("the beginning", AGREED)
    before = comm.sent["agree"]
    assert before == (8 + 66) * (world - 1)  # a digest in quotes
    start = time.monotonic()
    try:
        comm.agree("the plan of step 4", OTHER if rank in different else AGREED)
    except Disagreement as error:
        said = str(error)
    else:
        said = ""
    seconds = time.monotonic() - start
    comm.agree("the end", AGREED)  # the processes are in step afterwards
    return said, seconds


@pytest.mark.parametrize(
    ("world", "different", "says"),
    [
        (2, [], ""),
        (2, [1], "process 1 has plan: slots: b: [4, 8] where process 0 has plan: slots: b: [4, 9]"),
        (3, [2], "process 2 has plan: slots: b: [4, 8] where process 0 has plan: slots: b: [4, 9]"),
        (
            3,
            [0],
            "process 1 has plan: slots: b: [4, 9] where process 0 has plan: slots: b: [4, 8]; "
            "process 2 has plan: slots: b: [4, 9] where process 0 has plan: slots: b: [4, 8]",
        ),
        (3, [0, 1, 2], ""),
    ],
)
def test_agree(pools: Pools, world: int, different: list[int], says: str) -> None:
    for said, seconds in pools(world).run(agree, different):
        assert said == (says and f"the processes do not agree on the plan of step 4: {says}")
        assert seconds < SOON


class OwnMind(Distributed):
    """A process that takes another layer set than the one it is sent."""

    def share(self, value: Any, name: str = "share") -> Any:
        shared = super().share(value, name)
        return [0, 1, 2] if name == "layer_set" and self.index == 1 else shared


def train(rank: int, world: int, mistake: str) -> tuple[str, float]:
    start = time.monotonic()
    comm = OwnMind("cpu") if mistake == "layers" else Distributed("cpu")
    settings = {"rank": 5 if mistake == "rank" and rank == 1 else 6, "gamma": 2, "scheme": "fixed", "seed": 1}
    if mistake == "always_on" and rank == 1:
        settings["always_on"] = "none"
    try:
        OWS(Replicated(tiny("llama"), comm), scores=RATIOS, **settings)
    except Disagreement as error:
        return str(error), time.monotonic() - start
    return "", time.monotonic() - start


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("none", ""),
        ("layers", "process 1 has layers: [0, 1, 2] where process 0 has layers: ["),
        ("rank", "process 1 has plan: rank: 5 where process 0 has plan: rank: 6"),
        ("always_on", "process 1 has plan: rows: "),
    ],
)
@pytest.mark.parametrize("world", WORLDS)
def test_a_process_with_a_mind_of_its_own_stops_all(pools: Pools, world: int, mistake: str, says: str) -> None:
    for said, seconds in pools(world).run(train, mistake):
        assert bool(said) == bool(says)
        assert says in said
        assert said.count("has plan") + said.count("has layers") == 2 * bool(says)
        if says:
            assert "the layers and the plan of step 1: " in said
        assert seconds < SOON


def waits_for_the_other(rank: int, world: int) -> tuple[str, float]:
    group = dist.new_group(timeout=timedelta(seconds=1))
    comm = Distributed("cpu", group)
    start = time.monotonic()
    said = ""
    if rank == 0:
        try:
            comm.agree("what the other never says", AGREED)
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


def fail(rank: int, world: int, errors: dict[int, BaseException]) -> tuple[str, str, Any]:
    comm = Distributed("cpu")
    comm.all_good(None)
    mine = errors.get(rank)
    said: tuple[str, str, Any] = ("", "", None)
    try:
        comm.all_good(mine)
    except UserError as error:
        said = ("UserError", str(error), "own" if error is mine else (error.key, error.value, error.right))
    except Exception as error:
        said = (type(error).__name__, str(error), "own" if error is mine else None)
    comm.all_good(None)
    return said


def test_nobody_fails(pools: Pools) -> None:
    assert pools(2).run(fail, {}) == [("", "", None)] * 2


@pytest.mark.parametrize("who", [0, 2])
def test_a_users_mistake_is_one_everywhere(pools: Pools, who: int) -> None:
    error = UserError("data.train", "rows.jsonl", "give a file that exists")
    results = pools(3).run(fail, {who: UnpickledUserError(*error_fields(error))})
    for rank, (kind, text, fields) in enumerate(results):
        assert (kind, text) == ("UserError", str(error))
        assert fields == ("own" if rank == who else error_fields(error))


def error_fields(error: UserError) -> tuple[str, object, str]:
    return error.key, error.value, error.right


class UnpickledUserError(UserError):
    """A UserError that can travel to the processes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), error_fields(self)


def test_other_errors_name_the_process(pools: Pools) -> None:
    results = pools(3).run(fail, {1: ValueError("bad luck")})
    others = ("Disagreement", "process 1: ValueError: bad luck", None)
    assert results == [others, ("ValueError", "bad luck", "own"), others]


def test_several_errors(pools: Pools) -> None:
    results = pools(3).run(fail, {0: ValueError("a"), 2: OSError("b")})
    assert results[0] == ("ValueError", "a", "own")
    assert results[1] == ("Disagreement", "process 0: ValueError: a; process 2: OSError: b", None)
    assert results[2] == ("OSError", "b", "own")
    # who has no error of its own hears of what can be put right
    results = pools(3).run(fail, {0: ValueError("a"), 2: UnpickledUserError("k", 1, "give 2")})
    assert results[1][0] == "UserError"
    assert results[1][2] == ("k", "1", "give 2")


# ---- joining


def joined(rank: int, world: int) -> tuple[bool, int, int]:
    comm = join("cpu")
    return isinstance(comm, Distributed), comm.index, comm.world


def test_join(pools: Pools) -> None:
    assert pools(2).run(joined) == [(True, 0, 2), (True, 1, 2)]
    assert issubclass(Distributed, Communicator)
