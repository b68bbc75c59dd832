"""Encoded rows, kept as flat arrays, and what became of the rows they were made of."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy

IGNORE = -100  # the label that torch's cross entropy leaves out
Encoded = dict[str, list[int]]
"""`input_ids` and `labels`, of equal length; IGNORE where a token is not trained."""


@dataclass
class Counts:
    """What became of the rows of a file or data set.

    Attributes:
        rows: rows read.
        kept: rows with at least one trained token.
        dropped: rows without one, after cutting to the largest length.
        truncated: rows that were cut, kept or dropped.
        bad: rows that could not be used and were skipped.
        tokens: tokens of the kept rows.
        trained_tokens: those of them with a label.
        first_dropped: where the first one dropped stands, and why; "" without any.
        first_bad: the same of the first one skipped.
    """

    rows: int = 0
    kept: int = 0
    dropped: int = 0
    truncated: int = 0
    bad: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    first_dropped: str = ""
    first_bad: str = ""

    def __add__(self, other: Counts) -> Counts:
        """Of both together."""
        sums: dict[str, Any] = {
            name: (mine or vars(other)[name]) if isinstance(mine, str) else mine + vars(other)[name]
            for name, mine in vars(self).items()
        }
        return Counts(**sums)

    def line(self, max_length: int) -> str:
        """All of it in one line. max_length: of a row, in tokens."""
        notes = [f"{self.bad:,} bad ones skipped, the first is {self.first_bad}"] if self.bad else []
        if self.dropped:
            notes.append(f"{self.dropped:,} without a trained token dropped, the first is {self.first_dropped}")
        notes += [f"{self.truncated:,} cut to {max_length} tokens"] if self.truncated else []
        return f"{self.kept:,} rows, {self.trained_tokens:,} trained tokens" + "".join(f"; {note}" for note in notes)


@dataclass(frozen=True, eq=False)
class EncodedRows(Sequence[Encoded]):
    """Rows one after the other. tokens: int32, (tokens of all rows); trained: bool, alike; ends: int64, (rows)."""

    tokens: numpy.ndarray
    trained: numpy.ndarray
    ends: numpy.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, at: int) -> Encoded: ...
    @overload
    def __getitem__(self, at: slice) -> list[Encoded]: ...

    def __getitem__(self, at: int | slice) -> Encoded | list[Encoded]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        at = range(len(self))[at]
        some = slice(self.ends[at - 1] if at else 0, self.ends[at])
        ids = self.tokens[some]
        return {"input_ids": ids.tolist(), "labels": numpy.where(self.trained[some], ids, IGNORE).tolist()}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        lengths: list[int] = numpy.diff(self.ends, prepend=0).tolist()
        return lengths

    @property
    def largest(self) -> int:
        """The largest token; 0 without any."""
        return int(self.tokens.max(initial=0))


@dataclass
class Builder:
    """Rows that become `EncodedRows`."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    trained: bytearray = field(default_factory=bytearray)
    ends: array[int] = field(default_factory=lambda: array("q"))

    def add(self, row: Encoded) -> None:
        """One more."""
        self.tokens.extend(row["input_ids"])
        self.trained.extend(label != IGNORE for label in row["labels"])
        self.ends.append(len(self.tokens))

    def build(self) -> EncodedRows:
        """All of them. The builder is of no more use: its memory is theirs."""
        trained = numpy.asarray(self.trained, numpy.uint8).view(numpy.bool_)
        return EncodedRows(numpy.asarray(self.tokens, numpy.int32), trained, numpy.asarray(self.ends, numpy.int64))


def joined(parts: Sequence[EncodedRows]) -> EncodedRows:
    """All rows of ``parts``, in order."""
    starts = numpy.cumsum([0, *(len(part.tokens) for part in parts)])
    ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
    columns = ([part.tokens for part in parts], [part.trained for part in parts], ends)
    return EncodedRows(*(numpy.concatenate(column) for column in columns))
