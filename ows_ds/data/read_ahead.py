"""Steps that are read in a thread, one ahead of the one that trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


def in_thread(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """What ``function`` gives, from a thread of its own that the program's end does not wait for."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name=function.__qualname__, daemon=True).start()
    return result


class ReadAhead(Generic[T]):
    """Calls ``read`` for one step after the other in a thread.

    Step k + 1 is read from the moment that step k is taken. Close it: the thread ends with the read in hand.
    """

    def __init__(self, read: Callable[[int], T], end: int, device: torch.device) -> None:
        """end: the step after the last one.

        device: where the run computes, the CPU or the current GPU; pinned memory belongs to its context.
        """
        # without a launcher the device has no index
        select = (torch.cuda.set_device, (torch.cuda.current_device(),)) if device.type == "cuda" else (None, ())
        self._pool = ThreadPoolExecutor(1, "read-ahead", *select)
        self._read, self._end = read, end
        self._next: Future[T] | None = None

    def take(self, k: int) -> T:
        """``read(k)``, or its error. Steps are taken in order; the first one may be any."""
        result = (self._next or self._pool.submit(self._read, k)).result()
        self._next = self._pool.submit(self._read, k + 1) if k + 1 < self._end else None
        return result

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)
