"""Rows -> sequences of several rows each, so that little of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import overload

from ows_ds.data.encoded import Encoded, EncodedRows


def pack(lengths: Sequence[int], largest: int) -> list[list[int]]:
    """Numbers of the rows of each sequence of at most ``largest`` tokens: every row once, none longer than that.

    Best fit, decreasing: from the longest row to the shortest, each goes where it leaves the least room. A sequence
    names its rows in order, and sequences stand in the order of their first rows.
    """
    room: defaultdict[int, list[int]] = defaultdict(list)  # tokens that are left -> sequences, the newest last
    left: list[int] = []  # the keys of room, sorted
    packs: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        at = bisect_left(left, lengths[row])
        if at == len(left):
            number, rest = len(packs), largest - lengths[row]
            packs.append([])
        else:
            space = left[at]
            number, rest = room[space].pop(), space - lengths[row]
            if not room[space]:
                del left[at], room[space]
        packs[number].append(row)
        if rest:
            if rest not in room:
                insort(left, rest)
            room[rest].append(number)
    return sorted(sorted(rows) for rows in packs)


class Sequences(Sequence[list[Encoded]]):
    """What steps are made of: lists of rows, one each, or several where they are packed."""

    def __init__(self, parts: Sequence[EncodedRows], largest: int | None = None) -> None:
        """parts: rows by their sources. largest: tokens of a sequence in which rows of a part are packed; None: they
        are not."""
        self.parts = list(parts)
        self.packs = None if largest is None else [pack(part.lengths, largest) for part in parts]
        self.sizes = [len(part) for part in self.packs or self.parts]
        self.starts = list(accumulate(self.sizes, initial=0))

    @property
    def packed(self) -> bool:
        """Whether a sequence may have several rows."""
        return self.packs is not None

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, at: int) -> list[Encoded]: ...
    @overload
    def __getitem__(self, at: slice) -> list[list[Encoded]]: ...

    def __getitem__(self, at: int | slice) -> list[Encoded] | list[list[Encoded]]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        at = range(len(self))[at]
        part = bisect_right(self.starts, at) - 1
        number = at - self.starts[part]
        return [self.parts[part][row] for row in (self.packs[part][number] if self.packs else [number])]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        of_rows = [part.lengths for part in self.parts]
        if self.packs is None:
            return [length for lengths in of_rows for length in lengths]
        return [sum(of[row] for row in rows) for of, packs in zip(of_rows, self.packs, strict=True) for rows in packs]
