"""torch.cuda's streams and events, as far as they order kernels."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.fake_cuda.host_waits import host_waits
from tests.fake_cuda.races import Clock, races

_numbers = itertools.count()
_thread = threading.local()


class Stream:
    """As `torch.cuda.Stream`."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device, self.priority = device, priority
        self.cuda_stream = self.stream_id = next(_numbers)

    def wait_stream(self, other: Stream) -> None:
        races.stream_waits(self.cuda_stream, races.clock(other.cuda_stream))

    def wait_event(self, event: Event) -> None:
        races.stream_waits(self.cuda_stream, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        host_waits.count("stream synchronize")
        races.host_waits(races.clock(self.cuda_stream))

    def query(self) -> bool:
        return False  # the worst that may be

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return hash(self.cuda_stream)


DEFAULT = Stream()


class Event:
    """As `torch.cuda.Event`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.clock = Clock()

    def record(self, stream: Stream | None = None) -> None:
        self.clock = Clock(races.clock((stream or current_stream()).cuda_stream))

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        host_waits.count("event synchronize")
        races.host_waits(self.clock)

    def query(self) -> bool:
        return False  # the worst that may be

    def elapsed_time(self, other: Event) -> float:
        return 1.0


def current_stream(device: Any = None) -> Stream:
    """Of this thread."""
    return getattr(_thread, "stream", DEFAULT)


def set_stream(stream: Stream) -> None:
    _thread.stream = stream


@contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """Within it a stream is this thread's current one."""
    before = current_stream()
    set_stream(stream or before)
    try:
        yield
    finally:
        set_stream(before)


def synchronize(device: Any = None) -> None:
    host_waits.count("device synchronize")
    races.host_waits()


def wait(cause: str) -> None:
    """The host waits for the current stream."""
    host_waits.count(cause)
    races.host_waits(races.clock(current_stream().cuda_stream))
