"""The lowest loss of a run's evaluations: which checkpoint is the best, and when to stop early."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ows_ds.config import Train


@dataclass
class Best:
    """step: of the lowest loss, None before the first evaluation. since: evaluations after it. stopped: by `Train`."""

    loss: float = math.inf
    step: int | None = None
    since: int = 0
    stopped: bool = False

    def add(self, loss: float, step: int, settings: Train) -> bool:
        """Count an evaluation; whether it is the best one."""
        if loss < self.loss:
            self.loss, self.step, self.since = loss, step, 0
            return True
        self.since += 1
        self.stopped = settings.early_stopping is not None and self.since >= settings.early_stopping
        return False

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        found = asdict(self)
        return found | {"loss": None if math.isinf(self.loss) else self.loss}


def restored(state: dict[str, Any] | None) -> Best:
    """What `Best.state` gave."""
    if state is None:
        return Best()
    return Best(**{**state, "loss": math.inf if state["loss"] is None else state["loss"]})
