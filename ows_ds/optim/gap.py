"""When a block gets new projectors under ``optim.update_proj_gap: auto``, from what is known at no cost.

What share of a gradient G a projector keeps, ||G Q||^2 / ||G||^2, is known in the step that finds it alone, and there
it flatters Q, which was chosen by that step's batch. ||G Q||^2 is known in every step: it is that of the coordinates'
gradients. So its mean over a window of steps is compared with that over the first window after the projector was
taken; when it has fallen below a share of it, what the projector caught has been learned or has turned away, and the
block gets new projectors. A gradient that shrinks as a whole looks the same; the least and most gaps bound it.

    clock    start            + 1 ... w       + w + 1 ... 2 w      ...
             new projector    first window    compared, and so on with each further window of w = least / 2 steps
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ows_ds.distributed.communicator import Communicator


@dataclass
class _Window:
    """Of one projector. first: mean square of the first window; None: it is this one. total: (), float64, on the
    device, of ``count`` steps of this window."""

    first: float | None = None
    total: Tensor | None = None
    count: int = 0


class Gap:
    """The state of all blocks, the same on every rank. A block's clock counts its active steps."""

    def __init__(self, least: int, most: int, share: float) -> None:
        """least, most: steps between two projectors. share: of the first window's mean square, below which a new one is
        due."""
        self.most, self.share = most, share
        self.window = max(1, least // 2)
        self._starts: dict[str, int] = {}
        self._windows: dict[str, _Window] = {}

    def due(self, name: str, clock: int) -> bool:
        """Whether the step at this clock is one that begins to find the block's new projectors."""
        return clock == self._starts.get(name, 0)

    def taken(self, names: Iterable[str]) -> None:
        """These blocks have new projectors from now on."""
        self._windows |= {name: _Window() for name in names}

    def add(self, name: str, square: Tensor) -> None:
        """A step's ||G Q||^2, () on any device, where the projectors are not that step's own. Does not wait for it."""
        window = self._windows.get(name)
        if window is not None:
            window.total = square.double() if window.total is None else window.total + square
            window.count += 1

    def decide(self, clocks: Mapping[str, int], comm: Communicator) -> None:
        """After each step, which of the blocks with these clocks are due from the next one on. Collective, with a wait
        for the device, where the window of any of them has ended; else it asks nothing of either."""
        ended = [name for name in clocks if name in self._windows and self._windows[name].count == self.window]
        # sums over ranks are the same on all; were they not, rank 0's would count
        fallen = comm.broadcast_object(self._compare(ended), "update_proj_gap") if ended else []
        for name, clock in clocks.items():
            if name in fallen or clock - self._starts.get(name, 0) >= self.most:
                self._starts[name] = clock
                self._windows.pop(name, None)

    def _compare(self, names: Sequence[str]) -> list[str]:
        """Of the blocks ``names``, all with a full window, those that keep too little; the next window begins."""
        totals = [total for name in names if (total := self._windows[name].total) is not None]
        fallen = []
        for name, total in zip(names, torch.stack(totals).tolist(), strict=True):
            first, mean = self._windows[name].first, total / self.window
            if first is not None and mean < self.share * first:
                fallen.append(name)
            self._windows[name] = _Window(mean if first is None else first)
        return fallen

    def drop(self, name: str) -> None:
        """The block leaves."""
        self._starts.pop(name, None)
        self._windows.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        windows = {
            name: [one.first, None if one.total is None else float(one.total), one.count]
            for name, one in self._windows.items()
        }
        return {"starts": dict(self._starts), "windows": windows}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from where ``state`` was taken."""
        self._starts, self._windows = dict(state["starts"]), {}
        for name, (first, total, count) in state["windows"].items():
            known = None if total is None else torch.tensor(total, dtype=torch.float64, device=device)
            self._windows[name] = _Window(first, known, count)
