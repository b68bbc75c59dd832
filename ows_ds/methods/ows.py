"""OWS: layers sampled by their outliers, trained in low-rank subspaces (Li et al., Algorithm 1)."""

from __future__ import annotations

from typing import Any

from ows_ds.config import Recipe
from ows_ds.distributed.weights import Weights
from ows_ds.optim.ows import OWS


def build(recipe: Recipe, weights: Weights, importance: list[float], **common: Any) -> OWS:
    """gamma layers a period at rank r."""
    return OWS(weights, scores=importance, gamma=recipe.sampling.gamma, rank=recipe.optim.rank, **common)
