"""The method that ``method.name`` names, in one trainer, with one data order and one report.

A method is a way to build an optimizer of the interface of `ows_ds.optimizer.OWS` from a recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ows_ds.config import Recipe
from ows_ds.methods import badam, galore, lisa, ows
from ows_ds.optimizer import OWS
from ows_ds.weights import Weights

Build = Callable[..., OWS]
METHODS: dict[str, Build] = {
    "ows": ows.build,
    "lisa": lisa.build,
    "lisa-d": lisa.build,
    "galore": galore.build,
    "badam": badam.build,
}
FULL_RANK = ("lisa", "lisa-d", "badam")  # methods whose layers have no projectors


def importance_of(recipe: Recipe) -> str:
    """What layers are sampled by: ``sampling.importance`` where the method is ows, else what defines the method."""
    own = {"lisa": "uniform", "lisa-d": "decreasing", "galore": "uniform", "badam": "uniform"}
    return own.get(recipe.method.name, recipe.sampling.importance)


def build(recipe: Recipe, weights: Weights, importance: list[float], accumulation: int) -> OWS:
    """The recipe's method over ``weights``. Collective.

    importance: one number >= 0 a layer, in proportion to which layers are sampled. accumulation: micro-batches a step.
    """
    return METHODS[recipe.method.name](recipe, weights, importance, **common(recipe, accumulation))


def common(recipe: Recipe, accumulation: int) -> dict[str, Any]:
    """The settings of `OWS` that all methods take from the recipe as they are."""
    sampling, optim = recipe.sampling, recipe.optim
    return {
        "period": sampling.period,
        "scheme": sampling.scheme,
        "refresh_gap": optim.refresh_gap,
        "scale": optim.scale,
        "lr": optim.lr,
        "betas": optim.betas,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "projector": optim.projector,
        "refresh_batch": optim.refresh_batch,
        "moments_on_refresh": optim.moments_on_refresh,
        "always_on": optim.always_on,
        "accumulation": accumulation,
        "seed": recipe.train.seed if sampling.seed is None else sampling.seed,
    }
