"""Where the host waits for the device: .item(), bool(), copies of memory that is not pinned, nonzero, eigh, ..."""

from __future__ import annotations

import threading
import warnings
from collections import Counter

from tests.fake_cuda.places import Place, here


class HostWaits:
    """Counts waits by cause and place."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, Place]] = Counter()
        self._warns = False

    def warn(self, mode: int) -> None:
        """Warn of each wait from now on, or no more: torch.cuda.set_sync_debug_mode."""
        self._warns = mode > 0

    def count(self, cause: str) -> None:
        """The host waits here."""
        with self._lock:
            self._counts[cause, here()] += 1
        if self._warns:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    def take(self) -> Counter[str]:
        """In words, with how often: what was counted since it was taken last."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return Counter({f"{cause} at {place}": number for (cause, place), number in counts.items()})


host_waits = HostWaits()
