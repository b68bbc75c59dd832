"""Encoded rows as flat arrays, and what became of the rows they were made of."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy

from ows_ds.config.loss import ROWS

IGNORE = -100  # the label that torch's cross entropy leaves out
PAIRED = frozenset(ROWS.values())  # formats of which a sequence is two encoded rows, side by side


@dataclass(frozen=True, eq=False, slots=True)
class Encoded:
    """A row.

    Attributes:
        input_ids: int32, (tokens).
        trained: bool, (tokens): whether the loss counts the token.
        targets: how many tokens it counts: those trained, without the first token, which nothing predicts.
        right: whether the answer is a right one (``loss.name: kto``).
        reference: log-probability of its targets under the model before training; NaN where it is not asked for.
    """

    input_ids: numpy.ndarray
    trained: numpy.ndarray
    targets: int
    right: bool = True
    reference: float = float("nan")

    def __len__(self) -> int:
        return len(self.input_ids)

    def first(self, tokens: int) -> Encoded:
        """The row up to so many tokens, which has no reference."""
        if len(self) <= tokens:
            return self
        trained = self.trained[:tokens]
        return Encoded(self.input_ids[:tokens], trained, int(trained[1:].sum()), self.right)

    @property
    def labels(self) -> numpy.ndarray:
        """int32, (tokens): the token, or IGNORE where it is not trained."""
        return numpy.where(self.trained, self.input_ids, IGNORE)


@dataclass
class Counts:
    """What became of the rows of a file or data set.

    Attributes:
        rows: rows read.
        kept: rows with at least one trained token.
        dropped: rows without one, after truncation to the maximum length.
        truncated: rows that were truncated, kept or dropped.
        bad: invalid rows that were skipped.
        tokens: tokens of the kept rows.
        trained_tokens: those of them with a label.
        first_dropped: place of the first dropped row, and the reason; "" without any.
        first_bad: the same of the first bad row.
        ignored: columns that mean nothing to training, in order, as the keys of a dict.
        notes: how often something else is to be said.
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
    ignored: dict[str, None] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        """Of both together."""
        sums: dict[str, Any] = {}
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            if isinstance(mine, int):
                sums[name] = mine + theirs
            else:
                sums[name] = mine | theirs if isinstance(mine, dict) else mine or theirs
        sums["notes"] |= {note: self.notes[note] + other.notes[note] for note in self.notes if note in other.notes}
        return Counts(**sums)

    def line(self, max_length: int) -> str:
        """All of it in one line. max_length: of a row, in tokens."""
        notes = [f"{self.bad:,} bad ones skipped, the first is {self.first_bad}"] if self.bad else []
        if self.dropped:
            notes.append(f"{self.dropped:,} without a trained token dropped, the first is {self.first_dropped}")
        notes += [f"{self.truncated:,} cut to {max_length} tokens"] if self.truncated else []
        notes += [f"{number:,} {note}" for note, number in self.notes.items()]
        notes += [f"ignored columns: {', '.join(self.ignored)}"] if self.ignored else []
        return f"{self.kept:,} rows, {self.trained_tokens:,} trained tokens" + "".join(f"; {note}" for note in notes)


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """Rows one after the other; a row is a view of them.

    Attributes:
        tokens: int32, (tokens of all rows).
        trained: bool, the same shape.
        ends: int64, (rows): where each row ends.
        targets: int64, (rows): see `Encoded`.
        right: bool, (rows): see `Encoded`.
    """

    tokens: numpy.ndarray
    trained: numpy.ndarray
    ends: numpy.ndarray
    targets: numpy.ndarray
    right: numpy.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[Encoded]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, at: int) -> Encoded:
        at = range(len(self))[at]
        tokens = slice(self.ends[at - 1] if at else 0, self.ends[at])
        return Encoded(self.tokens[tokens], self.trained[tokens], int(self.targets[at]), bool(self.right[at]))

    @property
    def lengths(self) -> numpy.ndarray:
        """Tokens of each row: int64."""
        return numpy.diff(self.ends, prepend=0)

    @property
    def last_trained(self) -> list[int]:
        """The tokens at which what is trained ends, each once."""
        last = self.trained.copy()
        if len(last):
            inside = numpy.ones(len(last), numpy.bool_)
            inside[self.ends[self.ends > 0] - 1] = False  # the next token is another row's
            last[:-1] &= ~(self.trained[1:] & inside[:-1])
        return [int(token) for token in numpy.unique(self.tokens[last])]

    @cached_property
    def digest(self) -> str:
        """A hash of all rows and of what is trained of them, which takes a pass over all tokens."""
        found = hashlib.blake2b(digest_size=16)
        for part in (self.tokens, self.trained, self.ends, self.targets):
            found.update(numpy.ascontiguousarray(part).view(numpy.uint8).data)
        if not self.right.all():
            found.update(self.right.tobytes())
        return found.hexdigest()

    @property
    def largest(self) -> int:
        """The largest token; 0 without any."""
        return int(self.tokens.max(initial=0))


@dataclass
class Builder:
    """Collects rows for `EncodedRows`."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    trained: bytearray = field(default_factory=bytearray)
    ends: array[int] = field(default_factory=lambda: array("q"))
    targets: array[int] = field(default_factory=lambda: array("q"))
    right: bytearray = field(default_factory=bytearray)

    def add(self, input_ids: Sequence[int], trained: Sequence[bool], right: bool = True) -> None:
        """One more row."""
        self.right.append(right)
        self.tokens.extend(input_ids)
        self.trained.extend(trained)
        self.ends.append(len(self.tokens))
        self.targets.append(sum(trained[1:]))

    def build(self) -> EncodedRows:
        """All rows. They share the builder's memory, so nothing can be added afterwards."""
        return EncodedRows(
            numpy.asarray(self.tokens, numpy.int32),
            numpy.asarray(self.trained, numpy.uint8).view(numpy.bool_),
            numpy.asarray(self.ends, numpy.int64),
            numpy.asarray(self.targets, numpy.int64),
            numpy.asarray(self.right, numpy.uint8).view(numpy.bool_),
        )


def joined(parts: Sequence[EncodedRows]) -> EncodedRows:
    """All rows of ``parts``, in order."""
    starts = numpy.cumsum([0, *(len(part.tokens) for part in parts)])
    ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
    columns = {name: [getattr(p, name) for p in parts] for name in ("tokens", "trained", "targets", "right")}
    return EncodedRows(**{name: numpy.concatenate(some) for name, some in (columns | {"ends": ends}).items()})
