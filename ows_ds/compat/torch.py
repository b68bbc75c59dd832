"""Private names of torch (2.11 to 2.13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def zero_all(tensors: Sequence[Tensor]) -> None:
    """Set tensors to zero, in one kernel on a GPU."""
    torch._foreach_zero_(list(tensors))


def scale_all(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors in place by a scalar on their device, in one kernel on a GPU and without a wait for it."""
    if tensors:
        torch._foreach_mul_(list(tensors), factor)


def squared_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum of squares of each tensor, ()."""
    return [norm.square() for norm in torch._foreach_norm(list(tensors))] if tensors else []


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each of ``sources`` into its target, in one kernel on a GPU."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def mark_stepped(optimizer: Any) -> None:
    """Let torch's schedulers believe that ``optimizer`` has stepped: they warn of a first call without a step."""
    optimizer._opt_called = True
