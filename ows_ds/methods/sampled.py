"""Methods that draw layers, all trained by `ows_ds.optim.ows.OWS`.

ows      layers sampled by their outliers, trained in low-rank subspaces (Li et al., Algorithm 1)
lisa     layers sampled with equal probability, trained at full rank beside embedding and head (Pan et al. 2024);
         moments of a layer that leaves are freed
lisa-d   the same with probabilities that fall linearly from the layer nearest the input to the last (Li et al., section
         2.2, which does not give the form of the fall)
galore   all layers, all the time, in low-rank subspaces (Zhao et al. 2024)
badam    one layer after the other at full rank, Adam from the start in each turn (Luo, Yu, Li 2024, Algorithm 1).
         A block is a transformer layer, as in the authors' code; embedding and head stay frozen there, which is
         ``optim.always_on: none``. ``sampling.period`` is their number of Adam steps a block
"""

from __future__ import annotations

from typing import Any

from ows_ds import config
from ows_ds.config import OWSConfig, Recipe
from ows_ds.distributed.weights import Weights
from ows_ds.optim.ows import OWS
from ows_ds.optim.sampling import Cycle


def build(recipe: Recipe, weights: Weights, importance: list[float], accumulation: int) -> OWS:
    """The recipe's method. importance: what layers are sampled in proportion to. Collective."""
    name, sampling = recipe.method.name, recipe.sampling
    seed = recipe.train.seed if sampling.seed is None else sampling.seed
    own: dict[str, Any] = {"accumulation": accumulation, "seed": seed}
    own |= {"period": config.period(recipe, None), "gamma": config.gamma(recipe, importance)}
    sampler = None
    if name in ("lisa", "lisa-d", "badam"):
        own["rank"] = None
    own["adaptive"] = name == "ows" and sampling.importance == "gradient"
    if name != "ows":
        own["block"] = "layer"
    if name == "galore":
        own |= {"scheme": "fixed", "gamma": len(importance)}
    if name == "badam":
        own["gamma"], sampler = 1, Cycle(len(importance), sampling.order, seed)
    given = dict(sampling) | dict(recipe.optim) | own
    settings = OWSConfig(**{key: given[key] for key in OWSConfig.model_fields})
    return OWS(weights, importance, settings, sampler=sampler)
