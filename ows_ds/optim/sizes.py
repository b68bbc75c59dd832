"""Numbers that decide how large what a method keeps is, and what a model is too small for: without torch."""

from __future__ import annotations

from ows_ds import config
from ows_ds.config import Recipe
from ows_ds.errors import UserError
from ows_ds.model.blocks import ModelLayers

LOW_RANK = ("ows", "galore")  # methods that train in low-rank subspaces
SAMPLED = (*LOW_RANK, "lisa", "lisa-d", "badam")  # and all that `ows_ds.optim.ows.OWS` trains
ADAPTERS = ("lora", "dora")

OVERSAMPLING = 8  # directions that the range finder follows beyond the rank
ROUNDS = 3  # of the range finder: products with G and with G^T
IN_FLOAT32 = 1 << 22  # entries of a gradient that are in float32 at once where it is not
MOMENT_BLOCK = 256  # entries of a moment in 8 bits that share a scale
MUON_ITERATIONS = 6  # of Newton-Schulz


def sketch_width(r: int, short: int) -> int:
    """Columns of a sketch: more than twice the rank, for two products make one round, and there is no other."""
    return min(2 * r + OVERSAMPLING, short)


def kept_directions(r: int, short: int) -> int:
    """k, the directions of a compressed sum of gradients, for a projector of r."""
    return min(max(2 * r, r + OVERSAMPLING), short)


def check_fits(layers: ModelLayers, gamma: float, rank: int | None, always_on: str) -> None:
    """Refuse (UserError) what this model is too small for, before anything costly is done with it."""
    if gamma > len(layers.layers):
        raise UserError("sampling.gamma", gamma, f"expected at most {len(layers.layers)}, the number of layers")
    low_rank = [m for block in layers.at_rank(rank).layers for m in block.matrices if m.experts is None]
    low_rank += layers.embeddings if always_on == "low_rank" else ()
    for matrix in low_rank if rank is not None else ():
        if rank is not None and rank > matrix.short:
            expected = f"expected at most {matrix.short}, the smaller side of {matrix.name} {matrix.shape}"
            raise UserError("optim.rank", rank, expected)


def check(recipe: Recipe, layers: ModelLayers) -> None:
    """The same for a recipe, before the model is scored."""
    name, optim = recipe.method.name, recipe.optim
    if name in SAMPLED:
        gamma = config.gamma(recipe, [1.0] * len(layers.layers)) if name in ("ows", "lisa", "lisa-d") else 1
        check_fits(layers, gamma, optim.rank if name in LOW_RANK else None, optim.always_on)
