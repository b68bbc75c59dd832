"""Rows that are read while training: block after block, each like a small data set of its own.

    source --so many rows, in order--> block --encoded, packed, shuffled--> steps; what fills no step is left out

Every rank reads and encodes every block, so a step has the same rows at any number of ranks, and a run resumes from the
beginning of a block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass
from typing import Any

import numpy

from ows_ds.config import Source
from ows_ds.data import mix
from ows_ds.data.batches import Steps
from ows_ds.data.encoded import Counts
from ows_ds.data.pack import Sequences
from ows_ds.data.read_ahead import in_thread
from ows_ds.data.rows import Found, stream
from ows_ds.errors import UserError


@dataclass(frozen=True)
class At:
    """Where a block begins.

    Attributes:
        block: its number, from 0.
        step: its first optimizer step, from 0.
        rows: of each source, those read before it since the source last began.
    """

    block: int
    step: int
    rows: list[int]


@dataclass(frozen=True)
class _Block:
    at: At
    sequences: Sequences
    counts: Counts
    after: list[int]  # rows, as `At` has them, of the next block


class Stream(Steps):
    """Steps over sources that are read one block at a time, each again from its beginning when it ends."""

    def __init__(
        self,
        sources: Sequence[Source],
        buffer_size: int,
        encode: Callable[[Sequence[Iterable[Found]]], tuple[Sequences, Counts]],
        *split: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        """buffer_size: rows of a block, over all sources. encode: rows of a block by source -> sequences, and what
        became of the rows. split: what `Steps` takes.

        state: what `state` gave; None: from the start. Raises UserError as ``encode`` and `rows.stream` do, and naming
        train.global_batch_size where a block does not fill it.
        """
        super().__init__(*split)
        self._encode = encode
        self._shares = mix.shares(buffer_size, [1.0 if s.weight is None else s.weight for s in sources])
        at = At(**state) if state else At(0, 0, [0] * len(sources))
        self._closed = threading.Event()
        self._readers = [_Reader(source, start, self._closed) for source, start in zip(sources, at.rows, strict=True)]
        self.check: Callable[[Sequences], None] | None = None  # refuses a block after the first one
        self.counts = Counts()  # of the blocks that were begun
        self._next: Future[_Block] | None = None
        self._begin(self._read(at))

    def _read(self, at: At) -> _Block:
        begun = [reader.passes for reader in self._readers]
        sequences, counts = self._take()
        while len(sequences) < self.batch_size:  # rows were dropped, or packed: the next ones come along
            if all(r.passes > n + 1 for r, n, share in zip(self._readers, begun, self._shares, strict=True) if share):
                right = f"expected at most {len(sequences)}, as many as all rows make"
                raise UserError("train.global_batch_size", self.batch_size, right)
            more, others = self._take()
            sequences, counts = sequences.joined(more), counts + others
        return _Block(at, sequences, counts, [reader.at for reader in self._readers])

    def _take(self) -> tuple[Sequences, Counts]:
        return self._encode([reader.take(count) for reader, count in zip(self._readers, self._shares, strict=True)])

    def _begin(self, block: _Block) -> None:
        """Take steps from ``block``."""
        if self.check is not None:
            self.check(block.sequences)
        self.block = block
        self.counts += block.counts
        self._order = mix.generator(self.seed, block.at.block).permutation(len(block.sequences))
        self._end = block.at.step + len(block.sequences) // self.batch_size

    @property
    def sequences(self) -> Sequences:
        """Those of the current block."""
        return self.block.sequences

    def global_step(self, k: int) -> numpy.ndarray:
        """As `Steps.global_step`, in the current block; steps come in order. Reads the next block meanwhile."""
        while self._next is None or k >= self._end:
            if self._next is not None:
                self._begin(self._next.result())
            after = At(self.block.at.block + 1, self._end, self.block.after)
            self._next = in_thread(self._read, after)
        start = (k - self.block.at.step) * self.batch_size
        return self._order[start : start + self.batch_size]

    def state(self) -> dict[str, Any]:
        """Where the current block begins, as plain numbers."""
        return asdict(self.block.at)

    def close(self) -> None:
        """Read no more: a block that is being read ends with CancelledError at its next row. Nobody waits for it."""
        self._closed.set()


class _Reader:
    """The rows of a source without end."""

    def __init__(self, source: Source, start: int, closed: threading.Event) -> None:
        self.source, self.at, self._closed = source, start, closed
        self.passes = 0  # times that the source has ended
        self._rows: Iterator[Found] = stream(source, "data.train", start)

    def take(self, count: int) -> Iterator[Found]:
        """The next ``count`` rows, as they are asked for."""
        while count:
            if self._closed.is_set():
                raise CancelledError
            if (row := next(self._rows, None)) is None:
                self.at, self._rows = 0, stream(self.source, "data.train", 0)
                self.passes += 1
                continue
            self.at, count = self.at + 1, count - 1
            yield row
