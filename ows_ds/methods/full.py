"""Full fine-tuning: all weights, all the time; under ZeRO-3 with DeepSpeed's own optimizer."""

from __future__ import annotations

from typing import Any

from ows_ds.adamw import AdamW, Group
from ows_ds.config import Recipe
from ows_ds.layers import ModelLayers
from ows_ds.weights import Weights


def build(recipe: Recipe, weights: Weights, layers: ModelLayers, **adamw: Any) -> AdamW:
    """AdamW on every weight."""
    names = tuple(name for name, _ in weights.module.named_parameters())
    return AdamW(weights, [Group(names, tuple(range(len(layers.layers))))], **adamw)
