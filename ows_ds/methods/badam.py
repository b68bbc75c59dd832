"""BAdam: one layer at a time at full rank, in turn, Adam anew for each turn (Luo, Yu, Li 2024, Algorithm 1).

A block is a transformer layer, as in the authors' code; embedding and head stay frozen there, which is
``optim.always_on: none``. ``sampling.period`` is their number of Adam steps a block.
"""

from __future__ import annotations

from typing import Any

from ows_ds.config import Recipe
from ows_ds.distributed.weights import Weights
from ows_ds.optim.ows import OWS
from ows_ds.optim.sampling import Cycle


def build(recipe: Recipe, weights: Weights, importance: list[float], **common: Any) -> OWS:
    """One layer a period at full rank, in the order of ``sampling.order``."""
    sampler = Cycle(len(importance), recipe.sampling.order, common["seed"])
    return OWS(weights, scores=importance, gamma=1, rank=None, sampler=sampler, **common)
