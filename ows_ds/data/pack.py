"""Rows -> sequences of several rows each, so that little of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

import numpy

from ows_ds.data.encoded import Encoded, EncodedRows, joined


def pack(lengths: Sequence[int], largest: int) -> list[list[int]]:
    """Numbers of the rows of each sequence of at most ``largest`` tokens; every row comes once.

    Best fit decreasing: from the longest row to the shortest, each goes where it leaves the least room. A sequence
    lists its rows in order, and sequences stand in the order of their first rows.
    """
    room: defaultdict[int, list[int]] = defaultdict(list)  # free tokens -> sequences, the newest last
    free: list[int] = []  # the keys of room, sorted
    packs: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        at = bisect_left(free, lengths[row])
        if at == len(free):
            number, rest = len(packs), largest - lengths[row]
            packs.append([])
        else:
            space = free[at]
            number, rest = room[space].pop(), space - lengths[row]
            if not room[space]:
                del free[at], room[space]
        packs[number].append(row)
        if rest:
            if rest not in room:
                insort(free, rest)
            room[rest].append(number)
    return sorted(sorted(rows) for rows in packs)


def also_in(rows: Sequences, others: Sequences) -> list[int]:
    """Which rows of ``others`` are in ``rows`` too, token for token; numbers from 0."""
    known = {row.input_ids.tobytes() for part in others.parts for row in part}
    there = {key for part in rows.parts for row in part if (key := row.input_ids.tobytes()) in known}
    every = (row.input_ids.tobytes() for part in others.parts for row in part)
    return [number for number, key in enumerate(every) if key in there]


class Sequences:
    """What steps consist of: lists of rows, one each, or several where they are packed, or two that are compared.

    reference: float64, (sequences, 2): log-probabilities of compared rows under the model before training; None: not
    asked for.
    """

    def __init__(self, parts: Sequence[EncodedRows], largest: int | None = None, rows: int = 1) -> None:
        """parts: rows by source. largest: tokens of a sequence into which a part's rows are packed, or None. rows: that
        are compared, one after the other in a part."""
        self.parts, self._largest, self.rows = list(parts), largest, rows
        self.packs = None if largest is None else [pack(part.lengths.tolist(), largest) for part in parts]
        self.sizes = [len(part) // rows for part in self.packs or self.parts]
        self.reference: numpy.ndarray | None = None
        self.starts = list(accumulate(self.sizes, initial=0))

    @property
    def digest(self) -> str:
        """A hash of all rows, and of what is trained of them."""
        return " ".join(part.digest for part in self.parts)

    def joined(self, other: Sequences) -> Sequences:
        """The rows of both, by source."""
        return Sequences([joined(both) for both in zip(self.parts, other.parts, strict=True)], self._largest, self.rows)

    @property
    def packed(self) -> bool:
        """Whether a sequence may have several rows, end to end."""
        return self.packs is not None

    def __len__(self) -> int:
        return self.starts[-1]

    def __iter__(self) -> Iterator[list[Encoded]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, at: int) -> list[Encoded]:
        at = range(len(self))[at]
        part = bisect_right(self.starts, at) - 1
        number = at - self.starts[part]
        own = self.packs[part][number] if self.packs else range(number * self.rows, (number + 1) * self.rows)
        found = [self.parts[part][row] for row in own]
        if self.reference is not None:
            found = [replace(row, reference=float(x)) for row, x in zip(found, self.reference[at], strict=True)]
        return found

    @property
    def longest(self) -> int:
        """Tokens of the longest row of a batch: of a sequence, or of a compared row."""
        found = [part.lengths for part in self.parts] if self.rows > 1 else [self.lengths]
        return max((int(some.max(initial=0)) for some in found), default=0)

    @cached_property
    def lengths(self) -> numpy.ndarray:
        """Tokens of each sequence: int64."""
        return self._sums([part.lengths for part in self.parts])

    @cached_property
    def leading(self) -> numpy.ndarray:
        """Tokens of each sequence's first row, without the first one, which nothing predicts: int64."""
        counts = [part.lengths[:: self.rows] - 1 for part in self.parts]
        return numpy.concatenate([numpy.empty(0, numpy.int64), *counts])

    @cached_property
    def targets(self) -> numpy.ndarray:
        """Tokens of each sequence that the loss counts: int64."""
        return self._sums([part.targets for part in self.parts])

    def _sums(self, counts: list[numpy.ndarray]) -> numpy.ndarray:
        """counts: of each part's rows -> their sum over the rows of each sequence."""
        if self.rows > 1:
            counts = [some.reshape(-1, self.rows).sum(1) for some in counts]
        elif self.packs is not None:
            counts = [
                numpy.fromiter((some[rows].sum() for rows in packs), numpy.int64, len(packs))
                for some, packs in zip(counts, self.packs, strict=True)
            ]
        return numpy.concatenate([numpy.empty(0, numpy.int64), *counts])
