"""What is drawn: the blocks of a model, how they are sampled, and what that means for its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ows_ds.config import OWSConfig
from ows_ds.importance.probabilities import probabilities
from ows_ds.model.blocks import ModelLayers
from ows_ds.optim.sampling import AdaptiveSampler, Cycle, LayerSet, Sampler


class Draws:
    """Blocks that are drawn by themselves: layers, or (``block: module``) each of their matrices.

    Attributes:
        layers: The model's parts, with these blocks in the place of its layers.
        layer_of: Of each block, the layer it is of.
        given: Of each block, its probability at the start.
        sampler: Draws sets of blocks.
    """

    def __init__(
        self, layers: ModelLayers, ratios: Sequence[float], config: OWSConfig, sampler: Sampler | Cycle | None
    ) -> None:
        """ratios: one a layer. sampler: in place of the one that the ratios and the settings describe."""
        count = len(layers.layers)
        self.layers, self.layer_of = layers, tuple(range(count))
        self._sizes = [1.0] * count  # of blocks, in layers
        if config.block == "module":
            self.layers, self.layer_of = layers.by_module()
            numels = [block.numel for block in self.layers.layers]
            self._sizes = [count * numel / sum(numels) for numel in numels]
        gamma = config.gamma_of(ratios)
        self.given = probabilities([ratios[i] for i in self.layer_of], gamma, sizes=self._sizes)
        self.sampler = Sampler(self.given, config.scheme, config.seed) if sampler is None else sampler
        if sampler is None and config.adaptive:
            numbers = {"decay": config.importance_decay, "floor": config.importance_floor}
            self.sampler = AdaptiveSampler(self._sizes, gamma, config.scheme, config.seed, **numbers)

    @property
    def probabilities(self) -> list[float]:
        """Of each block to be in the next set that is drawn."""
        return self.sampler.probabilities if isinstance(self.sampler, Sampler) else self.given

    @property
    def layer_probabilities(self) -> list[float]:
        """Of each layer; where modules are drawn, the expected share of its weights."""
        shares: dict[int, list[tuple[float, float]]] = {}
        for layer, p, size in zip(self.layer_of, self.probabilities, self._sizes, strict=True):
            shares.setdefault(layer, []).append((p, size))
        return [
            some[0][0] if len(some) == 1 else sum(p * size for p, size in some) / sum(size for _, size in some)
            for some in shares.values()
        ]

    def layers_of(self, blocks: Sequence[int]) -> LayerSet:
        """The layers of some blocks."""
        return tuple(sorted({self.layer_of[block] for block in blocks}))

    def sums(self, of_blocks: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Sums over the blocks of each layer."""
        found: dict[int, Tensor] = {}
        for block, one in of_blocks.items():
            layer = self.layer_of[block]
            found[layer] = found[layer] + one if layer in found else one
        return found

    def norms(self, of_blocks: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Norms over the blocks of each layer together."""
        found: dict[int, list[Tensor]] = {}
        for block, norm in of_blocks.items():
            found.setdefault(self.layer_of[block], []).append(norm)
        return {i: some[0] if len(some) == 1 else torch.stack(some).norm() for i, some in found.items()}
