"""Rows -> sequences of several rows each, so that little of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
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


class Sequences:
    """What steps consist of: lists of rows, one each, or several where they are packed."""

    def __init__(self, parts: Sequence[EncodedRows], largest: int | None = None) -> None:
        """parts: rows by source. largest: tokens of a sequence into which a part's rows are packed, or None."""
        self.parts, self._largest = list(parts), largest
        self.packs = None if largest is None else [pack(part.lengths.tolist(), largest) for part in parts]
        self.sizes = [len(part) for part in self.packs or self.parts]
        self.starts = list(accumulate(self.sizes, initial=0))

    @property
    def digest(self) -> str:
        """A hash of all rows, and of what is trained of them."""
        return " ".join(part.digest for part in self.parts)

    def joined(self, other: Sequences) -> Sequences:
        """The rows of both, by source."""
        return Sequences([joined(both) for both in zip(self.parts, other.parts, strict=True)], self._largest)

    @property
    def packed(self) -> bool:
        """Whether a sequence may have several rows."""
        return self.packs is not None

    def __len__(self) -> int:
        return self.starts[-1]

    def __iter__(self) -> Iterator[list[Encoded]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, at: int) -> list[Encoded]:
        at = range(len(self))[at]
        part = bisect_right(self.starts, at) - 1
        number = at - self.starts[part]
        return [self.parts[part][row] for row in (self.packs[part][number] if self.packs else [number])]

    @cached_property
    def lengths(self) -> numpy.ndarray:
        """Tokens of each sequence: int64."""
        return self._sums([part.lengths for part in self.parts])

    @cached_property
    def targets(self) -> numpy.ndarray:
        """Tokens of each sequence that the loss counts: int64."""
        return self._sums([part.targets for part in self.parts])

    def _sums(self, counts: list[numpy.ndarray]) -> numpy.ndarray:
        """counts: of each part's rows -> their sum over the rows of each sequence."""
        if self.packs is not None:
            counts = [
                numpy.fromiter((some[rows].sum() for rows in packs), numpy.int64, len(packs))
                for some, packs in zip(counts, self.packs, strict=True)
            ]
        return numpy.concatenate([numpy.empty(0, numpy.int64), *counts])
