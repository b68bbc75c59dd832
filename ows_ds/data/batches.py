"""Sequences -> the steps of a run -> tensors.

A sequence is a list of encoded rows: one, or several that are packed (`pack.Sequences`). Which sequences make up an
optimizer step is a pure function of seed, step and batch size; ranks and micro-batches only split it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy
import torch
from torch import Tensor

from ows_ds.data import mix
from ows_ds.data.encoded import IGNORE, Encoded
from ows_ds.errors import UserError

MULTIPLE = 8  # tokens: sequences of a batch are padded to a multiple of it
# parts of a batch that stay on the CPU, where counting needs no wait for a GPU
HOST = ("labels", "longest", "whole_row_ends", "answers", "reference", "right", "kl_labels", "kl_reference")


@dataclass(frozen=True)
class Step:
    """An optimizer step.

    Attributes:
        micro_batches: this rank's sequences, one list a micro-batch.
        tokens: of all ranks' sequences.
        targets: those of them that the loss counts.
        sequences: how many, of all ranks.
        leading: see `pack.Sequences`; 0 where rows are not compared.
        state: `Steps.state` of this step.
    """

    micro_batches: list[list[list[Encoded]]]
    tokens: int
    targets: int
    sequences: int
    leading: int
    state: dict[str, Any]


class Steps(ABC):
    """The steps of a run, and how they are split over ranks and micro-batches."""

    sequences: Any  # `pack.Sequences`
    steps_per_epoch = 0  # 0: unknown

    def __init__(self, batch_size: int, micro_batch_size: int, world_size: int, rank: int, seed: int) -> None:
        """`batch_size` counts sequences over all ranks, `micro_batch_size` those of a rank and forward pass."""
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.world_size, self.rank, self.seed = world_size, rank, seed

    @abstractmethod
    def global_step(self, k: int) -> numpy.ndarray:
        """Indices of all sequences of optimizer step `k` (from 0), over all ranks, in order: int64, (batch_size)."""

    def state(self) -> dict[str, Any]:
        """Numbers that another run needs, besides the settings, to take the steps after the last one taken."""
        return {}

    def own(self, k: int) -> list[list[int]]:
        """This rank's indices of optimizer step `k`, one list a micro-batch."""
        parts = self.global_step(k).reshape(-1, self.world_size, self.micro_batch_size)
        mine: list[list[int]] = parts[:, self.rank].tolist()
        return mine

    def take(self, k: int) -> Step:
        """Optimizer step `k` (from 0)."""
        mine, everyones, sequences = self.own(k), self.global_step(k), self.sequences
        tokens, targets = (int(counts[everyones].sum()) for counts in (sequences.lengths, sequences.targets))
        leading = int(sequences.leading[everyones].sum()) if getattr(sequences, "rows", 1) > 1 else 0
        micro_batches = [[sequences[i] for i in some] for some in mine]
        return Step(micro_batches, tokens, targets, len(everyones), leading, self.state())

    def close(self) -> None:  # noqa: B027 (there may be nothing to close)
        """Read no more."""


class Batches(Steps):
    """Steps over sequences that are all there, shuffled again in every epoch.

    Sequences that do not fill a last batch are left out of that epoch. Those of a step depend on seed, step and batch
    size alone, so a run may resume with another number of ranks.
    """

    def __init__(self, sequences: Any, *split: int, parts: tuple[Sequence[int], Sequence[float]] | None = None) -> None:
        """split: what `Steps` takes.

        parts: numbers of sequences by source, and the sources' weights; None: every sequence once an epoch.
        Raises UserError naming train.global_batch_size where it exceeds the number of sequences or is not divisible.
        """
        super().__init__(*split)
        self.sequences, self.parts = sequences, parts
        size, least = self.batch_size, self.micro_batch_size * self.world_size
        if len(sequences) < size:
            what = "packed sequences" if getattr(sequences, "packed", False) else "rows"
            raise UserError("train.global_batch_size", size, f"expected at most the number of {what}, {len(sequences)}")
        if size % least:
            raise UserError("train.global_batch_size", size, f"expected a multiple of {least}")
        self.steps_per_epoch = len(sequences) // size
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> numpy.ndarray:
        """The sequences of an epoch (from 0), in order: int64, (sequences)."""
        if self.parts is None:
            return mix.generator(self.seed, epoch).permutation(len(self.sequences))
        return mix.epoch(*self.parts, self.seed, epoch)

    def global_step(self, k: int) -> numpy.ndarray:
        epoch, i = divmod(k, self.steps_per_epoch)
        return self.order(epoch)[i * self.batch_size : (i + 1) * self.batch_size]


def held_out_batches(
    n_rows: int, batch_size: int, world_size: int, rank: int, lengths: Sequence[int] | numpy.ndarray | None = None
) -> list[list[int]]:
    """This rank's batches of row indices, such that over all ranks every row comes exactly once.

    Every rank has the same number of batches, as collectives in the forward pass need it; where rows run out
    a batch is the empty list, for which `collate` makes a batch that counts nothing. With `lengths` (tokens
    of each row), rows of similar length share a batch, the longest first, so that padding and the last wait are
    small.
    """
    order = list(range(n_rows)) if lengths is None else numpy.argsort(-numpy.asarray(lengths), kind="stable").tolist()
    batches = [order[i : i + batch_size] for i in range(0, n_rows, batch_size)]
    batches += [[]] * (-len(batches) % world_size)
    return batches[rank::world_size]


def compared(pairs: Sequence[Sequence[Encoded]], pad_id: int, format: str, whole: bool) -> dict[str, Tensor]:
    """Rows that are compared, as `collate` makes them of one row each, without an attention mask.

    format preference: first all chosen ones, then as many rejected ones. labelled: the rows themselves; those with
    other rows' answers as ``kl_input_ids`` and ``kl_labels``. Besides, on the CPU, ``reference``: float64, (rows), and
    of labelled rows ``right``: bool, (rows). whole: labels are of all of the chosen rows, and ``answers`` of the
    answers, bool, (rows, tokens).
    """
    first, second = ([[pair[i]] for pair in pairs] for i in (0, 1))
    together = first if format == "labelled" else [*first, *second]
    found = collate(together, pad_id)
    found["reference"] = torch.tensor([row.reference for [row] in together], dtype=torch.float64)
    if format == "labelled":
        more = collate(second, pad_id)
        found |= {"kl_input_ids": more["input_ids"], "kl_labels": more["labels"]}
        found["kl_reference"] = torch.tensor([row.reference for [row] in second], dtype=torch.float64)
        found["right"] = torch.tensor([row.right for [row] in first])
    if whole:
        found["answers"], chosen = found["labels"] != IGNORE, found["attention_mask"].bool()
        chosen[:, 0], chosen[len(first) :] = False, False
        found["labels"] = torch.where(chosen, found["input_ids"], found["labels"])
    del found["attention_mask"]  # the loss does without
    return found


def cut(batch: dict[str, Tensor], part: int, parts: int) -> dict[str, Tensor]:
    """One of ``parts`` equal pieces of the tokens of a batch of `collate`, for ranks that share its rows.

    batch: of a number of tokens that divides by ``parts``. Labels reach one token further than the rest: that of a
    token is the next one's, which the next piece has. `row_ends` and `longest` stay those of whole rows, also as
    `whole_row_ends`, on the CPU; `position_ids` are there in any case.
    """
    tokens = batch["input_ids"].shape[1]
    if tokens % parts:
        raise ValueError(f"{tokens} tokens are not {parts} equal pieces")
    start, stop = part * tokens // parts, (part + 1) * tokens // parts
    positions = torch.arange(tokens).expand_as(batch["input_ids"])
    found = {"position_ids": positions, **batch}
    for name in ("input_ids", "attention_mask", "position_ids", "row_ids"):
        if name in found:
            found[name] = found[name][:, start:stop].contiguous()
    found["labels"] = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORE)[:, start : stop + 1]
    if "row_ends" in batch:
        found["whole_row_ends"] = batch["row_ends"]
    return found


def collate(
    sequences: Sequence[Sequence[Encoded]], pad_id: int, packed: bool = False, multiple: int = MULTIPLE
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` of sequences of encoded rows: int64, shape (sequences, tokens).

    Padded on the right with `pad_id`, mask 0 and label -100, to the next `multiple` of tokens above the longest one.
    The first token of a row has no label: nothing predicts it. No sequences give one of padding, so that a rank without
    any can take part in a forward pass.

    packed: also what keeps rows apart. `position_ids` and `row_ids` (same shape): a token's position in its row, and
    the row's number in its sequence; padding is a row of its own, at position 0. `row_ends` (int32) and `longest`: 0
    and where each row ends, all sequences laid end to end, and tokens of the longest row.
    """
    longest = max((sum(map(len, rows)) for rows in sequences), default=1)
    shape = (max(len(sequences), 1), -(-longest // multiple) * multiple)
    ids, mask, labels, positions, numbers = (numpy.full(shape, v, numpy.int64) for v in (pad_id, 0, IGNORE, 0, 0))
    places = numpy.arange(shape[1])
    lengths: list[int] = []
    for i in range(shape[0]):
        at = 0
        for number, row in enumerate(sequences[i] if sequences else ()):
            end = at + len(row)
            ids[i, at:end] = row.input_ids
            labels[i, at + 1 : end] = row.labels[1:]
            positions[i, at:end] = places[: len(row)]
            numbers[i, at:end] = number
            lengths.append(len(row))
            at = end
        mask[i, :at] = 1
        if rest := shape[1] - at:
            numbers[i, at:] = len(sequences[i]) if at else 0
            lengths.append(rest)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if packed:
        ends = numpy.cumsum([0, *lengths], dtype=numpy.int32)
        batch |= {"position_ids": positions, "row_ids": numbers, "row_ends": ends, "longest": numpy.array(max(lengths))}
    return {name: torch.from_numpy(some) for name, some in batch.items()}
