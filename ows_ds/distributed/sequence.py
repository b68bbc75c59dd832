"""Sequence parallelism: ranks that share the tokens of each row, which may be too long for the memory of one.

    row --cut--> pieces --each rank its own--> layers --attention alone: some heads of all tokens--> loss of the piece

Of w ranks, every ``size`` that follow one another are a group; the w / size groups have different rows. What trains is
the same on all ranks, and gradients are summed over all of them anyway: a piece is to that what a row is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ows_ds.compat.deepspeed import Ulysses
from ows_ds.compat.transformers import attention_by
from ows_ds.distributed.communicator import Communicator, Distributed
from ows_ds.distributed.zero3 import join_deepspeed


class SequenceParallel:
    """The group that this rank is in.

    Attributes:
        size: Ranks of a group; 1: every rank has whole rows.
        part: Which piece of its rows this rank has, from 0.
        data_rank: Which rows it has, of ``data_ranks``.
    """

    def __init__(self, comm: Communicator, size: int = 1) -> None:
        """size: a divisor of the world size. Collective."""
        self.size, self.part = size, comm.rank % size
        self.data_rank, self.data_ranks = comm.rank // size, comm.world_size // size
        self._row_ends: list[int] | None = None
        self._kernels: dict[str, Callable[..., Any]] = {}
        if size > 1:
            join_deepspeed()
            group = comm.split(size)
            assert isinstance(group, Distributed)
            self._ulysses = Ulysses(group.process_group, comm.count)

    def passes(self) -> AbstractContextManager[None]:
        """Within it models attend over the group's rows: all passes are of batches that were cut, see `begin`."""
        return attention_by(self._attend) if self.size > 1 else nullcontext()

    def begin(self, batch: Mapping[str, Tensor]) -> None:
        """The next passes, forward and backward, are of ``batch``, of `ows_ds.data.batches.cut`."""
        ends = batch.get("whole_row_ends")
        self._row_ends = None if ends is None else ends.tolist()

    def _attend(
        self, name: str, kernel: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: None = None, **more: Any,
    ) -> Any:  # fmt: skip
        if name not in self._kernels:  # FlashAttention is given where rows end, and knows windows
            self._kernels[name] = kernel if "flash" in name else functools.partial(self._by_rows, kernel)
        return self._ulysses(self._kernels[name], module, query, key, value, **more)

    def _by_rows(
        self,
        kernel: Callable[..., Any],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """A kernel without masks, of each row of packed sequences alone; (sequences, heads, tokens, size) of all three.

        So no mask of tokens x tokens is made, but for rows that are longer than a sliding window.
        """
        more.pop("position_ids")
        window, (count, _, tokens, _) = more.get("sliding_window"), query.shape

        def attend(*row: Tensor) -> Tensor:
            attended: Tensor = kernel(module, *row, _window(row[0], window), **more)[0]
            return attended

        if self._row_ends is None:
            return attend(query, key, value), None
        found = []
        for start, end in pairwise(self._row_ends):
            sequence, first = divmod(start, tokens)
            row = slice(first, first + end - start)
            found.append(attend(*(one[sequence : sequence + 1, :, row] for one in (query, key, value))))
        return torch.cat(found, 1).view(count, tokens, *found[0].shape[2:]), None


def _window(query: Tensor, window: int | None) -> Tensor | None:
    """The mask of a row (..., tokens, size) in which a token sees itself and ``window`` - 1 before it; None: all."""
    tokens = query.shape[-2]
    if window is None or tokens <= window:
        return None
    places = torch.arange(tokens, device=query.device)
    distance = places[:, None] - places
    return ((distance >= 0) & (distance < window))[None, None]
