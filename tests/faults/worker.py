"""``ows-ds`` in which one rank fails: ``python -m tests.faults.worker FAULT RANK STEP train ...``.

The fault comes in the forward pass of optimizer step STEP (from 1), and never after a launcher's restart.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ows_ds.cli import main
from ows_ds.train.step import StepRunner


def _memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")


def _data() -> None:
    raise OSError(5, "Input/output error", "train.arrow")


FAULTS: dict[str, Callable[[], None]] = {
    "memory": _memory,
    "data": _data,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(1e6),
}


def inject(fault: str, step: int) -> None:
    """Let this process fail."""
    take, loss = StepRunner.take, StepRunner._loss
    current = -1

    def taking(self: Any, number: int, last: bool) -> dict[str, Any]:
        nonlocal current
        current = number + 1
        return take(self, number, last)

    def failing(self: Any, *given: Any) -> Any:
        if current == step:
            Path(self.context.recipe.train.output_dir, "fault").touch()
            FAULTS[fault]()
        return loss(self, *given)

    StepRunner.take, StepRunner._loss = taking, failing  # type: ignore[method-assign]


if __name__ == "__main__":
    fault, rank, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    del sys.argv[1:4]
    if int(os.environ["RANK"]) == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        inject(fault, step)
    sys.exit(main())
