"""communicate.py in a world of one: every operation is the identity, nothing is sent, errors come out as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ows_ds.distributed.communicator import Communicator, RankMismatchError, _first_difference, join
from ows_ds.errors import UserError


def test_every_operation_is_the_identity() -> None:
    comm = Communicator()
    assert (comm.rank, comm.world_size) == (0, 1)
    tensor = torch.arange(6.0).view(3, 2)
    expected = tensor.clone()
    assert comm.broadcast(tensor) is tensor
    assert comm.reduce(tensor, 0) is None  # type: ignore[func-returns-value]
    assert comm.reduce_scatter(tensor) is tensor
    assert comm.all_gather(tensor) is tensor
    assert comm.all_reduce(tensor) is tensor
    assert torch.equal(tensor, expected)
    value = {"layers": [1, 3], "text": "ä"}
    assert comm.broadcast_object(value) is value
    assert comm.all_gather_object(value) == [value]
    comm.barrier()
    comm.assert_consistent("anything", value)
    comm.raise_if_any_failed(None)
    assert not comm.sent


def test_alone_what_is_begun_is_done() -> None:
    comm = Communicator()
    part, whole = torch.arange(4.0), torch.zeros(4)
    for start in (comm.start_all_gather, comm.start_reduce_scatter):
        start(part, whole).wait()
        assert torch.equal(whole, torch.arange(4.0))
        start(whole[:], whole).wait()  # a view of the same memory
        assert torch.equal(whole, torch.arange(4.0))
        whole.zero_()
    assert not comm.sent


def test_errors_come_out_as_they_are() -> None:
    for error in (ValueError("bad"), UserError("optim.rank", 0, "expected 1")):
        with pytest.raises(type(error)) as caught:
            Communicator().raise_if_any_failed(error)
        assert caught.value is error


def test_join_without_a_process_group() -> None:
    assert type(join("cpu")) is Communicator


@pytest.mark.parametrize(
    ("other", "value", "says"),
    [
        ([1, 3], [1, 4], "[1, 4]"),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "b: 3"),
        ({"a": {"x": 1, "y": {"z": 2}}, "b": 1}, {"a": {"x": 1, "y": {"z": 5}}, "b": 7}, "a: y: z: 5"),
        ({"a": 1, "b": 2}, {"a": 1}, "b: null"),
        ({"a": 1}, {"a": 1, "b": [2]}, "b: [2]"),
        ({"a": {"x": 1}}, {"a": 3}, "a: 3"),
        (None, "text", '"text"'),
    ],
)
def test_first_difference(other: Any, value: Any, says: str) -> None:
    assert _first_difference(other, value) == says


class Two(Communicator):
    """Rank 0 of two whose other process always says ``other``."""

    world_size = 2

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.other = other

    def _same(self, digest: bytes) -> bool:
        return False

    def all_gather_object(self, value: Any, name: str = "collect") -> list[Any]:
        assert name == "agree"
        return [value, self.other]


def test_disagreement_says_what_differs() -> None:
    comm = Two({"layers": [1, 4], "rank": 8})
    with pytest.raises(RankMismatchError) as caught:
        comm.assert_consistent("the layers of step 7", {"layers": [1, 3], "rank": 8})
    assert str(caught.value) == (
        "the ranks do not agree on the layers of step 7: rank 1 has layers: [1, 4] where rank 0 has layers: [1, 3]"
    )
