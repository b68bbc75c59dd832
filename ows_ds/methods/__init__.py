"""The method that ``method.name`` names, in one trainer, with one data order and one report."""

from __future__ import annotations

from typing import Any

from ows_ds.config import Recipe
from ows_ds.distributed.weights import Weights
from ows_ds.methods import hift, lora, mezo, sampled
from ows_ds.model.blocks import ModelLayers
from ows_ds.model.fingerprint import fingerprint
from ows_ds.optim.adamw import BlockAdamW, Group
from ows_ds.optim.full_rank import Lean
from ows_ds.optim.method import Method
from ows_ds.optim.sizes import ADAPTERS, SAMPLED

__all__ = ["ADAPTERS", "Method", "adapt", "base_model", "build", "deepspeed_trains"]


def adapt(recipe: Recipe, model: Any) -> Any:
    """The model that is trained: ``model`` itself, or with adapters."""
    return lora.adapt(recipe, model) if recipe.method.name in ADAPTERS else model


def base_model(recipe: Recipe, weights: Weights) -> str:
    """Fingerprint of the model as it was before `adapt`. Before anything has trained. Collective."""
    return fingerprint(weights, lora.base(weights) if recipe.method.name in ADAPTERS else None)


def deepspeed_trains(recipe: Recipe) -> bool:
    """Whether DeepSpeed's own optimizer trains under ZeRO-3. Ours works on the shards in float64, which DeepSpeed's
    does not have, and where moments are in 8 bits or there are no masters."""
    lean = recipe.optim.moments != "float32" or recipe.optim.master == "none"
    return recipe.method.name in ("full", *ADAPTERS) and recipe.model.dtype != "float64" and not lean


def build(recipe: Recipe, weights: Weights, layers: ModelLayers, importance: list[float], accumulation: int) -> Method:
    """The recipe's method over ``weights``. Collective.

    layers: of the model before `adapt`. importance: one number >= 0 a layer, in proportion to which layers are sampled.
    accumulation: micro-batches a step.
    """
    name, optim = recipe.method.name, recipe.optim
    if name in SAMPLED:
        return sampled.build(recipe, weights, importance, accumulation)
    if name == "mezo":
        return mezo.build(recipe, weights, layers)
    everything = tuple(range(len(layers.layers)))
    frozen = layers.router_names if optim.router == "freeze" else frozenset()
    names = tuple(name for name in weights.parameters() if name not in frozen)
    close = None
    if name == "hift":
        groups = hift.groups_of(recipe, weights, layers)
    elif name == "full":  # under ZeRO-3 with DeepSpeed's own optimizer
        groups = [Group(names, everything)]
    else:
        groups, close = [Group(tuple(name for name in names if "lora_" in name), everything)], lora.merge
    settings = {key: getattr(optim, key) for key in ("lr", "betas", "eps", "weight_decay", "max_grad_norm")}
    lean = Lean(optim.moments, optim.master == "float32", recipe.train.seed)
    return BlockAdamW(weights, groups, close=close, lean=lean, **settings)
