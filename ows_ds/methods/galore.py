"""GaLore: all layers, all the time, in low-rank subspaces (Zhao et al. 2024)."""

from __future__ import annotations

from typing import Any

from ows_ds.config import Recipe
from ows_ds.distributed.weights import Weights
from ows_ds.optim.ows import OWS


def build(recipe: Recipe, weights: Weights, importance: list[float], **common: Any) -> OWS:
    """Every layer in every period at rank r."""
    common["scheme"] = "fixed"
    return OWS(weights, scores=importance, gamma=len(importance), rank=recipe.optim.rank, **common)
