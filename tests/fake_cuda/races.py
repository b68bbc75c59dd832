"""Which accesses to a device's memory nothing orders: vector clocks of streams and of the host."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from tests.fake_cuda.places import Place, here

MOST = 64  # accesses that are remembered of one memory; older ones are forgotten


class Clock(dict[int, int]):
    """By stream, the number of its kernels that are done."""

    def merge(self, other: Mapping[int, int]) -> None:
        """Let what ``other`` knows to be done be done here, too."""
        for stream, time in other.items():
            if time > self.get(stream, 0):
                self[stream] = time


class Bytes(NamedTuple):
    """A part of a memory that a kernel accesses: first byte, last byte + 1, whether it is written."""

    memory: int
    first: int
    last: int
    written: bool


class Access(NamedTuple):
    """What a kernel has accessed: it is its stream's ``time``-th."""

    bytes: Bytes
    stream: int
    time: int
    kernel: str
    place: Place

    def __str__(self) -> str:
        return f"{self.kernel} on stream {self.stream} at {self.place}"


class Races:
    """Follows kernels, waits and memory. found: in words, with how often."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.found: Counter[str] = Counter()
        self._host = Clock()
        self._streams: dict[int, Clock] = {}
        self._accesses: dict[int, list[Access]] = {}  # by memory
        self._home: dict[int, int] = {}  # the stream that a memory was allocated on
        self._recorded: dict[int, set[int]] = {}  # streams of `Tensor.record_stream`

    def clock(self, stream: int) -> Clock:
        """What is done before the next kernel of a stream. Live."""
        with self.lock:
            clock = self._streams.setdefault(stream, Clock())
            clock.merge(self._host)
            return clock

    def stream_waits(self, stream: int, clock: Clock) -> None:
        """Kernels of ``stream`` from now on come after ``clock``."""
        with self.lock:
            self.clock(stream).merge(clock)

    def host_waits(self, *clocks: Clock) -> None:
        """The host waits until what these know to be done is done; without any for all streams."""
        with self.lock:
            for clock in clocks or list(self._streams.values()):
                self._host.merge(clock)

    def kernel(self, stream: int, name: str, accessed: Iterable[Bytes]) -> None:
        """A kernel is put on a stream."""
        with self.lock:
            clock = self.clock(stream)
            clock[stream] = clock.get(stream, 0) + 1
            place = here()
            for part in accessed:
                self._home.setdefault(part.memory, stream)
                new, kept = Access(part, stream, clock[stream], name, place), []
                for old in self._accesses.get(part.memory, ()):
                    ordered = clock.get(old.stream, 0) >= old.time
                    if not ordered and _conflict(old.bytes, part):
                        kinds = " then ".join("write" if one.written else "read" for one in (old.bytes, part))
                        self.found[f"{kinds}: {old} || {new}"] += 1
                    if not (ordered and _covers(part, old.bytes)):
                        kept.append(old)
                self._accesses[part.memory] = [*kept, new][-MOST:]

    def allocated(self, memory: int, stream: int) -> None:
        """Memory was allocated on a stream."""
        with self.lock:
            self._home[memory] = stream

    def record(self, memory: int, stream: int) -> None:
        """The memory is not used again before the stream has done what is on it now."""
        with self.lock:
            self._recorded.setdefault(memory, set()).add(stream)

    def freed(self, memory: int) -> None:
        """The memory is given back, to the stream that it was allocated on."""
        with self.lock:
            home, recorded = self._home.pop(memory, 0), self._recorded.pop(memory, set())
            clock = self.clock(home)
            for old in self._accesses.pop(memory, ()):
                if clock.get(old.stream, 0) < old.time and old.stream not in recorded:
                    self.found[f"freed on stream {home} while in use: {old} || freed before {here()}"] += 1


def _conflict(one: Bytes, other: Bytes) -> bool:
    return (one.written or other.written) and one.first < other.last and other.first < one.last


def _covers(new: Bytes, old: Bytes) -> bool:
    """Whether what is unordered with ``old`` is with ``new``, too."""
    return new.first <= old.first and old.last <= new.last and (new.written or not old.written)


races = Races()


@contextmanager
def races_of_body() -> Iterator[dict[str, int]]:
    """Gives a dict that is filled at the end with what `Races.found` is of the body."""
    import torch

    races.found.clear()
    found: dict[str, int] = {}
    yield found
    gc.collect()
    torch.zeros((), device="cuda").add_(1)  # memory that was freed is reported before the next kernel
    found.update(races.found)
