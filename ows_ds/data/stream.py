"""Rows that are read while training: block after block, each like a small data set of its own.

    source --so many rows, in order--> block --encoded, packed, shuffled--> steps; what fills no step is left out

Every process reads and encodes every block, so a step has the same rows however many there are, and a run goes on from
where a block began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from ows_ds.config import Source
from ows_ds.data import mix
from ows_ds.data.batches import own
from ows_ds.data.encoded import Counts
from ows_ds.data.pack import Sequences
from ows_ds.data.rows import Found, stream
from ows_ds.errors import UserError


@dataclass(frozen=True)
class At:
    """Where a block begins.

    block: its number, from 0. step: the first optimizer step of it, from 0. rows: of each source, those read before it
    since its last beginning.
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


class Stream:
    """The steps of a run over sources that are read one block at a time, each from its beginning when it ends."""

    steps_per_epoch = 0  # nobody knows

    def __init__(
        self,
        sources: Sequence[Source],
        buffer_size: int,
        encode: Callable[[Sequence[list[Found]]], tuple[Sequences, Counts]],
        batch_size: int,
        micro_batch_size: int,
        world_size: int,
        rank: int,
        seed: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        """buffer_size: rows of a block, over all sources. encode: rows of a block by their sources -> sequences, and
        what became of the rows.

        state: what `state` gave; None: from the start. Raises UserError as ``encode`` and `rows.stream` do, and naming
        train.global_batch_size where a block does not fill it.
        """
        self.batch_size, self.micro_batch_size, self.world_size, self.rank = (
            batch_size,
            micro_batch_size,
            world_size,
            rank,
        )
        self.seed, self._encode, self._sources = seed, encode, sources
        self._counts = mix.shares(buffer_size, [1.0 if s.weight is None else s.weight for s in sources])
        at = At(**state) if state else At(0, 0, [0] * len(sources))
        self._readers = [_Reader(source, start) for source, start in zip(sources, at.rows, strict=True)]
        self.check: Callable[[Sequences], None] | None = None  # what refuses a block, the first one aside
        self.counts = Counts()  # of the blocks that were begun
        self._pool = ThreadPoolExecutor(1, "rows")
        self._next: Future[_Block] | None = None
        self._begin(self._read(at))

    def _read(self, at: At) -> _Block:
        rows = [reader.take(count) for reader, count in zip(self._readers, self._counts, strict=True)]
        sequences, counts = self._encode(rows)
        if len(sequences) < self.batch_size:
            right = f"expected at most {len(sequences)}, as many as a block of data.buffer_size rows holds"
            raise UserError("train.global_batch_size", self.batch_size, right)
        return _Block(at, sequences, counts, [reader.at for reader in self._readers])

    def _begin(self, block: _Block) -> None:
        """Take steps from ``block``, and read the next one beside them."""
        if self.check is not None:
            self.check(block.sequences)
        self.block = block
        self.counts += block.counts
        self._order = mix.generator(self.seed, block.at.block).permutation(len(block.sequences))
        self._end = block.at.step + len(block.sequences) // self.batch_size
        self._next = self._pool.submit(self._read, At(block.at.block + 1, self._end, block.after))

    @property
    def sequences(self) -> Sequences:
        """Those of the block in hand."""
        return self.block.sequences

    def take(self, k: int) -> tuple[list[Any], list[list[Any]]]:
        """As `batches.Batches.take`; steps come in order."""
        while k >= self._end:
            assert self._next is not None
            self._begin(self._next.result())
        start = (k - self.block.at.step) * self.batch_size
        everyone = [self.sequences[int(i)] for i in self._order[start : start + self.batch_size]]
        return everyone, own(everyone, self.micro_batch_size, self.world_size, self.rank)

    def state(self) -> dict[str, Any]:
        """Where the block in hand begins, as plain numbers."""
        return asdict(self.block.at)

    def close(self) -> None:
        """Read no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Reader:
    """The rows of a source without end."""

    def __init__(self, source: Source, start: int) -> None:
        self.source, self.at = source, start
        self._rows: Iterator[Found] = stream(source, "data.train", start)

    def take(self, count: int) -> list[Found]:
        """The next ``count`` rows."""
        found: list[Found] = []
        while len(found) < count:
            if (row := next(self._rows, None)) is not None:
                found.append(row)
                self.at += 1
            else:
                self.at, self._rows = 0, stream(self.source, "data.train", 0)
        return found
