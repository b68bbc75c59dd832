"""Sequences -> the steps of a run -> tensors.

A sequence is a list of encoded rows: one, or several that are packed (`pack.Sequences`). Which sequences make up an
optimizer step is a pure function of seed, step and batch size; ranks and micro-batches only cut it into parts.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy
import torch
from torch import Tensor

from ows_ds.data import mix
from ows_ds.data.encoded import IGNORE, Encoded
from ows_ds.errors import UserError

MULTIPLE = 8  # tokens: sequences of a batch are padded to a multiple of it
HOST = ("labels", "longest")  # what of a batch stays on the CPU, where counting it waits for no GPU


class Batches:
    """Which sequences each optimizer step trains on, and how a rank's share is cut into micro-batches.

    They are shuffled anew in every epoch; those that do not fill a last batch are left out of that epoch.
    The sequences of a step depend on seed, step and batch size alone, so a run may go on with another number of
    ranks.
    """

    def __init__(
        self,
        sequences: Sequence[Any],
        batch_size: int,
        micro_batch_size: int,
        world_size: int,
        rank: int,
        seed: int,
        parts: tuple[Sequence[int], Sequence[float]] | None = None,
    ) -> None:
        """`batch_size` counts sequences over all ranks, `micro_batch_size` those of a rank and forward pass.

        parts: numbers of sequences by their sources, and these sources' weights; None: every one once an epoch.
        Raises UserError naming train.global_batch_size when it exceeds the number of sequences or does not divide evenly.
        """
        if len(sequences) < batch_size:
            what = "packed sequences" if getattr(sequences, "packed", False) else "rows"
            raise UserError(
                "train.global_batch_size", batch_size, f"expected at most the number of {what}, {len(sequences)}"
            )
        if batch_size % (micro_batch_size * world_size):
            raise UserError(
                "train.global_batch_size", batch_size, f"expected a multiple of {micro_batch_size * world_size}"
            )
        self.sequences, self.batch_size, self.micro_batch_size = sequences, batch_size, micro_batch_size
        self.world_size, self.rank, self.seed, self.parts = world_size, rank, seed, parts
        self.steps_per_epoch = len(sequences) // batch_size
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> numpy.ndarray:
        if self.parts is None:
            order = mix.generator(self.seed, epoch).permutation(len(self.sequences))
        else:
            order = mix.epoch(*self.parts, self.seed, epoch)
        order.flags.writeable = False  # it is cached
        return order

    def order(self, epoch: int) -> numpy.ndarray:
        """The sequences of an epoch (from 0), in order: int64, shape (sequences,), read-only."""
        return self._order(epoch)

    def global_step(self, k: int) -> list[int]:
        """Indices of all sequences of optimizer step `k` (from 0), over all ranks, in order."""
        epoch, i = divmod(k, self.steps_per_epoch)
        return [int(row) for row in self.order(epoch)[i * self.batch_size : (i + 1) * self.batch_size]]

    def take(self, k: int) -> tuple[list[Any], list[list[Any]]]:
        """All sequences of optimizer step `k` (from 0), and this rank's, one list per micro-batch."""
        everyone = [self.sequences[i] for i in self.global_step(k)]
        return everyone, own(everyone, self.micro_batch_size, self.world_size, self.rank)

    def state(self) -> dict[str, Any]:
        """What another process needs, beside the settings, to take the steps that follow: nothing."""
        return {}


def own(everyone: Sequence[Any], micro_batch_size: int, world_size: int, rank: int) -> list[list[Any]]:
    """A rank's part of the sequences of a step, one list per micro-batch."""
    starts = range(rank * micro_batch_size, len(everyone), micro_batch_size * world_size)
    return [list(everyone[i : i + micro_batch_size]) for i in starts]


def held_out_batches(
    n_rows: int, batch_size: int, world_size: int, rank: int, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """This rank's batches of row indices, such that over all ranks every row comes exactly once.

    Every rank has the same number of batches, as collectives in the forward pass need it; where rows run out
    a batch is the empty list, for which `collate` makes a batch that counts nothing. With `lengths` (tokens
    of each row), rows of like length share a batch, the longest first, so that padding and the last wait are
    small.
    """
    order = list(range(n_rows)) if lengths is None else sorted(range(n_rows), key=lambda i: (-lengths[i], i))
    batches = [order[i : i + batch_size] for i in range(0, n_rows, batch_size)]
    batches += [[]] * (-len(batches) % world_size)
    return batches[rank::world_size]


def collate(
    sequences: Sequence[Sequence[Encoded]], pad_id: int, packed: bool = False, multiple: int = MULTIPLE
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` of sequences of encoded rows: int64, shape (sequences, tokens).

    Padded on the right with `pad_id`, mask 0 and label -100, to the next `multiple` of tokens above the longest one.
    The first token of a row has no label: nothing predicts it. No sequences give one of padding, so that a rank without
    any can take part in a forward pass.

    packed: also what keeps rows apart. `position_ids` and `row_ids` (alike): a token's position in its row, and the
    row's number in its sequence; padding is a row of its own, at position 0. `row_ends` (int32) and `longest`: 0 and
    where each row ends, all sequences laid end to end, and tokens of the longest row.
    """
    longest = max((sum(len(row["input_ids"]) for row in rows) for rows in sequences), default=1)
    shape = (max(len(sequences), 1), -(-longest // multiple) * multiple)
    ids, mask, labels, positions, numbers = (
        torch.full(shape, value, dtype=torch.int64) for value in (pad_id, 0, IGNORE, 0, 0)
    )
    lengths: list[int] = []
    for i in range(shape[0]):
        at = 0
        for number, row in enumerate(sequences[i] if sequences else ()):
            n = len(row["input_ids"])
            ids[i, at : at + n] = torch.tensor(row["input_ids"])
            labels[i, at + 1 : at + n] = torch.tensor(row["labels"][1:])
            positions[i, at : at + n] = torch.arange(n)
            numbers[i, at : at + n] = number
            at += n
            lengths.append(n)
        mask[i, :at] = 1
        if rest := shape[1] - at:
            numbers[i, at:] = len(sequences[i]) if at else 0
            lengths.append(rest)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if packed:
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        longest_row = torch.tensor(max(lengths))
        batch |= {"position_ids": positions, "row_ids": numbers, "row_ends": ends, "longest": longest_row}
    return batch
