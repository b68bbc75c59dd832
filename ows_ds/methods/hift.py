"""HiFT: one group of layers a step at full rank, in turn (Liu et al. 2024, Algorithm 1).

A group is one layer of the network, as in the paper's setting m = 1: the embedding, each transformer layer, and what
follows them. Moments of all groups are kept, those that rest on the CPU, and the learning rate changes when every
group has had its turn. ``sampling.order`` is the paper's bottom2up (ascending), top2down (descending) or random
(random, drawn once before training).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ows_ds.config import Recipe
from ows_ds.distributed.weights import Weights
from ows_ds.model.blocks import Matrix, ModelLayers, Vector
from ows_ds.optim.adamw import Group
from ows_ds.optim.sampling import LayerSet


def groups_of(recipe: Recipe, weights: Weights, layers: ModelLayers) -> list[Group]:
    """What trains together, in the order of the turns."""
    seed = recipe.train.seed if recipe.sampling.seed is None else recipe.sampling.seed
    module: Any = weights.module
    heads = {name for name, one in module.named_modules() if one is module.get_output_embeddings()}
    return turns(groups(layers, heads), recipe.sampling.order, seed)


def groups(layers: ModelLayers, heads: set[str]) -> list[Group]:
    """From the input to the output. heads: the head's module; tied to the embedding, it trains with that."""
    after = [matrix for matrix in layers.embeddings if set(matrix.modules) <= heads]
    before = [matrix for matrix in layers.embeddings if matrix not in after]
    parts: list[tuple[Sequence[Matrix | Vector], LayerSet]] = [(before, ())]
    parts += [((*block.matrices, *block.vectors), (index,)) for index, block in enumerate(layers.layers)]
    parts += [((*layers.final, *after), ())]
    return [Group(tuple(part.name for part in some), numbers) for some, numbers in parts if some]


def turns(groups: list[Group], order: str, seed: int) -> list[Group]:
    """The groups in the order in which they train, round after round."""
    if order == "random":
        return [groups[i] for i in np.random.Generator(np.random.PCG64(seed)).permutation(len(groups))]
    return groups[::-1] if order == "descending" else groups
