"""Collectives, and how many bytes they send.

Two implementations of one interface: `Communicator` (world size 1, nothing is sent) and `Distributed` over
``torch.distributed``. Bytes are those that one rank sends under the bandwidth-optimal algorithms (ring), so that they
are exact, comparable numbers:

    broadcast, reduce     N                    from the root / to the owner (every rank but the owner)
    reduce_scatter        N * (w - 1) / w
    all_gather            c * (w - 1)          c = one rank's contribution
    all_reduce            2 * N / w * (w - 1)  N / w rounded up to whole bytes
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ows_ds.compat.torch import default_store, to_device
from ows_ds.errors import Failed, UserError, joined

# torch >= 2.13 has new names for these and warns about the old ones
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class RankMismatchError(RuntimeError):
    """Ranks that must agree do not; the message says what differs."""


class Pending(Protocol):
    """A collective that was started."""

    def wait(self) -> Any:
        """Return when its result may be used (on a GPU: by what is queued from now on)."""


class _Copied:
    """Done at once: ``target`` <- ``source``, unless it is the same memory."""

    def __init__(self, source: Tensor, target: Tensor) -> None:
        if target.data_ptr() != source.data_ptr():
            target.copy_(source)

    def wait(self) -> None:
        pass


class Communicator:
    """World size 1: every operation is the identity. Also the interface.

    sent: bytes that this rank has sent, by the name of the operation. begun: collectives that it has begun.
    """

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.begun = 0

    def count(self, name: str, sent: int) -> None:
        """Count a collective that this rank begins now, and the bytes that it sends."""
        self.sent[name] += sent
        self.begun += 1

    def broadcast(self, tensor: Tensor, name: str = "broadcast") -> Tensor:
        """Rank 0's ``tensor`` on all, in place."""
        return tensor

    def reduce(self, tensor: Tensor, owner: int, name: str = "reduce") -> None:
        """The sum over ranks into ``owner``'s ``tensor``, in place; the others' contents are undefined."""

    def reduce_scatter(self, tensor: Tensor, name: str = "reduce_scatter") -> Tensor:
        """The sum over ranks, of which each receives its part.

        tensor: first dimension a multiple of the world size. Returns its ``rank``-th equal part; may share memory.
        """
        return tensor

    def start_reduce_scatter(self, tensor: Tensor, part: Tensor, name: str = "reduce_scatter") -> Pending:
        """As `reduce_scatter`, into ``part`` and in the background: neither is touched until `Pending.wait`."""
        return _Copied(tensor, part)

    def all_gather(self, part: Tensor, name: str = "all_gather") -> Tensor:
        """The ranks' equal-sized ``part`` one after the other along the first dimension; may share memory."""
        return part

    def start_all_gather(self, part: Tensor, full: Tensor, name: str = "all_gather") -> Pending:
        """As `all_gather`, into ``full`` (which ``part`` may lie in, at its place) and in the background."""
        return _Copied(part, full)

    def all_reduce(self, tensor: Tensor, name: str = "all_reduce") -> Tensor:
        """The sum over ranks, in place."""
        return tensor

    def broadcast_object(self, value: Any, name: str = "broadcast_object") -> Any:
        """Rank 0's JSON-able ``value`` on all."""
        return value

    def all_gather_object(self, value: Any, name: str = "all_gather_object") -> list[Any]:
        """Every rank's JSON-able ``value``, in order, on all."""
        return [value]

    def barrier(self) -> None:
        """Returns when all ranks have called it."""

    def split(self, size: int) -> Communicator:
        """That of every ``size`` ranks that follow one another, of which this is one. Collective."""
        return self

    def store(self) -> Any:
        """torch's store in which the ranks met, by a new connection; None at world size 1."""
        return None

    def meets(self, name: str, seconds: float) -> bool:
        """Whether all ranks call this, with the same ``name``, within ``seconds``. No collective: each may call it."""
        return True

    def assert_consistent(self, what: str, value: Any) -> None:
        """Compare a digest of the JSON-able ``value`` over all ranks.

        Raises RankMismatchError on every rank, naming ``what``, the ranks and the first difference.
        """
        if self._same(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()):
            return
        values = self.all_gather_object(value, "agree")
        lines = [
            f"rank {i} has {_first_difference(values[0], v)} where rank 0 has {_first_difference(v, values[0])}"
            for i, v in enumerate(values)
            if v != values[0]
        ]
        raise RankMismatchError(f"the ranks do not agree on {what}: " + "; ".join(lines))

    def _same(self, digest: bytes) -> bool:
        """Whether all ranks have the same 32 bytes."""
        return True

    def raise_if_any_failed(self, error: BaseException | None) -> None:
        """Where any rank has an error, all raise.

        A rank that failed raises its own; the others the same, if it is a UserError or Failed, else a RankMismatchError
        that names the rank.
        """
        mine: Any = None
        if isinstance(error, UserError):
            mine = [[one.key, str(one.value), one.right] for one in error.errors]
        elif isinstance(error, Failed):
            mine = {"failed": str(error)}
        elif error is not None:
            mine = f"{type(error).__name__}: {error}"
        everyones = self.all_gather_object(mine, "agree")
        if error is not None:
            raise error
        failed = [(i, theirs) for i, theirs in enumerate(everyones) if theirs is not None]
        for _, theirs in failed:
            if isinstance(theirs, list):
                raise joined(UserError(*one) for one in theirs)
            if isinstance(theirs, dict):
                raise Failed(theirs["failed"])
        if failed:
            raise RankMismatchError("; ".join(f"rank {i}: {text}" for i, text in failed))


class Distributed(Communicator):
    """The ranks of a ``torch.distributed`` group (the default group unless given)."""

    def __init__(self, device: torch.device | str, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group
        self.process_group: Any = dist.group.WORLD if group is None else group
        self.device = torch.device(device)
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def broadcast(self, tensor: Tensor, name: str = "broadcast") -> Tensor:
        self.count(name, tensor.nbytes if self.rank == 0 else 0)
        dist.broadcast(tensor, group_src=0, group=self.group)
        return tensor

    def reduce(self, tensor: Tensor, owner: int, name: str = "reduce") -> None:
        self.count(name, 0 if self.rank == owner else tensor.nbytes)
        dist.reduce(tensor, group_dst=owner, group=self.group)

    def reduce_scatter(self, tensor: Tensor, name: str = "reduce_scatter") -> Tensor:
        part = tensor.new_empty(tensor.shape[0] // self.world_size, *tensor.shape[1:])
        self.start_reduce_scatter(tensor, part, name).wait()
        return part

    def start_reduce_scatter(self, tensor: Tensor, part: Tensor, name: str = "reduce_scatter") -> Pending:
        self.count(name, part.nbytes * (self.world_size - 1))
        work: Pending = _reduce_scatter(part, tensor, group=self.group, async_op=True)
        return work

    def all_gather(self, part: Tensor, name: str = "all_gather") -> Tensor:
        full = part.new_empty(part.shape[0] * self.world_size, *part.shape[1:])
        self.start_all_gather(part.contiguous(), full, name).wait()
        return full

    def start_all_gather(self, part: Tensor, full: Tensor, name: str = "all_gather") -> Pending:
        self.count(name, part.nbytes * (self.world_size - 1))
        work: Pending = _all_gather(full, part, group=self.group, async_op=True)
        return work

    def all_reduce(self, tensor: Tensor, name: str = "all_reduce") -> Tensor:
        self.count(name, 2 * math.ceil(tensor.nbytes / self.world_size) * (self.world_size - 1))
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def broadcast_object(self, value: Any, name: str = "broadcast_object") -> Any:
        return self._objects([value if self.rank == 0 else None], name)[0]

    def all_gather_object(self, value: Any, name: str = "all_gather_object") -> list[Any]:
        return self._objects([value], name)

    def _objects(self, value: list[Any], name: str) -> list[Any]:
        # JSON as bytes rather than pickled objects: what arrives is data, never code
        text = torch.frombuffer(bytearray(json.dumps(value[0]).encode()), dtype=torch.uint8)
        lengths = self.all_gather(to_device(torch.tensor([len(text)]), self.device), name).tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(text)] = text
        texts = self.all_gather(to_device(padded, self.device), name).cpu().view(self.world_size, -1).numpy()
        return [json.loads(row[:length].tobytes()) for row, length in zip(texts, lengths, strict=True)]

    def _same(self, digest: bytes) -> bool:
        mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        everyones = self.all_gather(to_device(mine, self.device), "agree").cpu().view(self.world_size, -1)
        return bool((everyones == mine).all())

    def barrier(self) -> None:
        self.begun += 1
        # NCCL otherwise guesses the device, and says so
        dist.barrier(group=self.group, device_ids=[self.device.index] if self.device.index is not None else None)

    def split(self, size: int) -> Communicator:
        if size == self.world_size:
            return self
        firsts = range(0, self.world_size, size)
        groups = [dist.new_group(list(range(first, first + size))) for first in firsts]  # by all ranks
        return Distributed(self.device, groups[self.rank // size])

    def store(self) -> Any:
        return default_store().clone()

    def meets(self, name: str, seconds: float) -> bool:
        store, keys = self.store(), [f"ows_ds/meets/{name}/{rank}" for rank in range(self.world_size)]
        store.set(keys[self.rank], b"")
        end = time.monotonic() + seconds
        while not store.check(keys):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


def join(device: torch.device | str) -> Communicator:
    """`Distributed` where there is a process group of more than one rank, else `Communicator`."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Distributed(device)
    return Communicator()


def leave() -> None:
    """End the default process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def fail_together(comm: Communicator) -> Iterator[None]:
    """Where the body, which must not communicate, fails on any rank, all raise (see `raise_if_any_failed`)."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    comm.raise_if_any_failed(error)


def _first_difference(other: Any, value: Any) -> str:
    if isinstance(value, dict) and isinstance(other, dict):
        for key in sorted(value.keys() | other.keys()):
            if value.get(key) != other.get(key):
                return f"{key}: {_first_difference(other.get(key), value.get(key))}"
    if isinstance(value, list) and isinstance(other, list) and len(value) > 20:
        for index, item in enumerate(value):
            if index >= len(other) or item != other[index]:
                return f"[{index}] of {len(value)}: {_first_difference(other[index : index + 1], item)}"
    return json.dumps(value)[:200]
