"""MLPs a run of tokens at a time, so that of a long row no more is there at once than of a run.

    hidden (tokens, h) --split--> runs --MLP, computed again in the backward pass--> runs --cat--> (tokens, h)

As DeepSpeed's ``TiledMLP`` does it (ALST: Bekman et al. 2025, arXiv:2506.13996, section 3.1), but each run is a
non-reentrant checkpoint of the one graph: a weight's hooks see the sum of its gradients over all runs, once, as
usual, where ``TiledMLP`` would call them once a run. What `ows_ds.optim.low_rank.FrozenLinear` adds to coordinates'
gradients adds up over runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def names_within(model: nn.Module, plain: nn.Module, names: Iterable[str]) -> list[str]:
    """What modules of ``plain`` are called in ``model``, which is the same, or has adapters around it."""
    found = {module: name for name, module in model.named_modules()}
    return [found[plain.get_submodule(name)] for name in names]


def tiled(own: Callable[[Tensor], Tensor], tile: int) -> Callable[..., Tensor]:
    """``own``, a forward pass that treats each token alone, on about ``tile`` tokens at a time."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tokens = x.numel() // x.shape[-1]
        if args or kwargs or tokens <= tile or x.dim() < 2:
            return own(x, *args, **kwargs)
        runs = x.split(math.ceil(x.shape[-2] / math.ceil(tokens / tile)), dim=-2)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(own, run, use_reentrant=False) for run in runs], dim=-2)
        return torch.cat([own(run) for run in runs], dim=-2)

    return forward
