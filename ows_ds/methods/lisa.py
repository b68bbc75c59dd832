"""LISA: layers sampled with equal probability and trained at full rank, beside embedding and head (Pan et al. 2024).

LISA-D is the same with probabilities that fall linearly from the layer nearest the input to the last (Li et al.,
section 2.2, which does not give the form of the fall). Moments of a layer that leaves are freed.
"""

from __future__ import annotations

from typing import Any

from ows_ds.config import Recipe
from ows_ds.distributed.weights import Weights
from ows_ds.optim.ows import OWS


def build(recipe: Recipe, weights: Weights, importance: list[float], **common: Any) -> OWS:
    """gamma layers a period at full rank."""
    return OWS(weights, scores=importance, gamma=recipe.sampling.gamma, rank=None, **common)
