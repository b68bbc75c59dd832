"""Full fine-tuning: all weights, all the time; under ZeRO-3 with DeepSpeed's own optimizer."""

from __future__ import annotations

from typing import Any

from ows_ds.config import Recipe
from ows_ds.distributed.weights import Weights
from ows_ds.model.layers import ModelLayers
from ows_ds.optim.adamw import AdamW, Group


def build(recipe: Recipe, weights: Weights, layers: ModelLayers, **adamw: Any) -> AdamW:
    """AdamW on every weight."""
    names = tuple(name for name, _ in weights.module.named_parameters())
    return AdamW(weights, [Group(names, tuple(range(len(layers.layers))))], **adamw)
