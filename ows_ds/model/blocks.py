"""The parts of a model as shapes: its transformer layers with their matrices and vectors, and what stands around them.

Nothing here imports torch; `ows_ds.model.layers` finds them in a model.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

Shape = tuple[int, ...]

LEAST_RANK = 8  # of experts: below, GPUs have no grouped products in bfloat16


@dataclass(frozen=True)
class Matrix:
    """A two-dimensional weight that can be trained in a low-rank subspace, or a stack of such weights under one name.

    name: the parameter's dotted name in the model.
    shape: as stored: (C_out, C_in), or (C_in, C_out) where ``inputs_first`` (GPT-2's ``Conv1D``, gpt-oss' experts).
    modules: dotted names of the modules that use it: one, or several where they share it.
    experts: E, where the parameter is a stack (E, *shape) of experts' matrices; None: it is one matrix.
    active: of a stack, how many experts a token goes to.
    rank: the low rank of each matrix of a stack; None: the block's.
    """

    name: str
    shape: tuple[int, int]
    modules: tuple[str, ...]
    inputs_first: bool = False
    experts: int | None = None
    active: int = 1
    rank: int | None = None

    @property
    def tall(self) -> bool:
        """Whether coordinates are on the left of the matrix as stored: W_0 + C Q^T; else W_0 + Q C^T."""
        return self.shape[0] >= self.shape[1]

    @property
    def long(self) -> int:
        """The longer side, that of the coordinates."""
        return max(self.shape)

    @property
    def short(self) -> int:
        """The shorter side, that of the projector."""
        return min(self.shape)

    @property
    def in_features(self) -> int:
        """C_in, the number of input features."""
        return self.shape[0 if self.inputs_first else 1]

    @property
    def out_features(self) -> int:
        """C_out, the number of output features."""
        return self.shape[1 if self.inputs_first else 0]

    @property
    def saves_low_rank(self) -> bool:
        """Whether its coordinates are on the output side, so that X Q is kept for the backward pass in place of X."""
        return self.tall != self.inputs_first

    @property
    def count(self) -> int:
        """How many matrices there are under this name."""
        return self.experts or 1

    @property
    def numel(self) -> int:
        """Entries of all of them."""
        return self.count * math.prod(self.shape)

    def low_rank(self, r: int) -> int:
        """The low rank, in a block of low rank r."""
        return self.rank or r

    def side(self, length: int, r: int) -> tuple[int, ...]:
        """(length, r), or (E, length, r) of a stack: of `long` coordinates and `short` projectors, at its own rank."""
        return (*([] if self.experts is None else [self.experts]), length, self.low_rank(r))


@dataclass(frozen=True)
class Vector:
    """A bias, a norm's weight or another parameter that trains at full rank, flattened, and is not decayed."""

    name: str
    numel: int


@dataclass(frozen=True)
class Block:
    """What is sampled, attached and merged together: a transformer layer or a module of one, or what always trains.

    routers: the weights that choose experts, among neither the matrices nor the vectors (see `ModelLayers.trained`).
    """

    name: str
    matrices: tuple[Matrix, ...]
    vectors: tuple[Vector, ...]
    routers: tuple[Matrix | Vector, ...] = ()

    @property
    def numel(self) -> int:
        """Entries of its matrices and vectors."""
        return sum(part.numel for part in self.matrices) + sum(part.numel for part in self.vectors)

    @property
    def names(self) -> set[str]:
        """Of its matrices and vectors."""
        return {part.name for part in self.matrices} | {part.name for part in self.vectors}


@dataclass(frozen=True)
class ModelLayers:
    """The parts of a causal language model.

    layers: the N_L transformer layers, input side first.
    embeddings: token embedding, position embedding if it is learned, and head; a tied head is the embedding's matrix.
    final: vectors between the last layer and the head (the final norm), and the head's bias.
    heads: weights of heads for other tasks (a score, classes), flattened: they are new, and always train.
    """

    layers: tuple[Block, ...]
    embeddings: tuple[Matrix, ...]
    final: tuple[Vector, ...]
    heads: tuple[Vector, ...] = ()

    def by_module(self) -> tuple[ModelLayers, tuple[int, ...]]:
        """The same with a block for each matrix in the place of a layer, and the layer that each is of.

        A bias goes with the matrix of its module, a layer's other vectors with its first matrix. A layer without
        matrices stays a block.
        """
        blocks, owners = [], []
        for index, layer in enumerate(self.layers):
            vectors: dict[str, list[Vector]] = {matrix.name: [] for matrix in layer.matrices} or {"": []}
            of_module = {matrix.name.rpartition(".")[0]: matrix.name for matrix in reversed(layer.matrices)}
            for vector in layer.vectors:
                vectors[of_module.get(vector.name.rpartition(".")[0], next(iter(vectors)))].append(vector)
            blocks += [Block(matrix.name, (matrix,), tuple(vectors[matrix.name])) for matrix in layer.matrices]
            blocks += [] if layer.matrices else [layer]
            owners += [index] * max(1, len(layer.matrices))
        return dataclasses.replace(self, layers=tuple(blocks)), tuple(owners)

    @property
    def router_names(self) -> frozenset[str]:
        """Of all layers."""
        return frozenset(router.name for block in self.layers for router in block.routers)

    def with_routers(self, train: bool) -> ModelLayers:
        """The same with routers among the matrices and vectors of their layers, or (not ``train``) left out."""
        return dataclasses.replace(self, layers=tuple(_with_routers(block, train) for block in self.layers))

    def at_rank(self, r: int | None, expert_rank: int | None = None) -> ModelLayers:
        """The same where a layer's matrix whose shorter side is below r is a vector: at full rank it has fewer
        coordinates than at rank r. Where no matrix is larger, they stay (see `check_fits`).

        expert_rank: of the matrices of stacks; None: `rank_of_experts`. It is no larger than their shorter side.
        """
        if r is None:
            return self
        single = [m for block in self.layers for m in block.matrices if m.experts is None]
        keep = all(matrix.short < r for matrix in single)
        return dataclasses.replace(self, layers=tuple(_at_rank(b, r, expert_rank, keep) for b in self.layers))


def _with_routers(block: Block, train: bool) -> Block:
    matrices = tuple(router for router in block.routers if train and isinstance(router, Matrix))
    vectors = tuple(router for router in block.routers if train and isinstance(router, Vector))
    return Block(block.name, (*block.matrices, *matrices), (*block.vectors, *vectors))


def _at_rank(block: Block, r: int, expert_rank: int | None, keep: bool) -> Block:
    matrices, small = [], []
    for matrix in block.matrices:
        if matrix.experts is not None and matrix.short >= min(LEAST_RANK, r):
            rank = expert_rank or rank_of_experts(matrix, r)
            matrices.append(dataclasses.replace(matrix, rank=largest_divisor(r, min(rank, matrix.short))))
        elif matrix.experts is None and (keep or matrix.short >= r):
            matrices.append(matrix)
        else:
            small.append(Vector(matrix.name, matrix.numel))
    return dataclasses.replace(block, matrices=tuple(matrices), vectors=(*block.vectors, *small))


def rank_of_experts(matrix: Matrix, r: int) -> int:
    """The rank at which the coordinates of all E experts take as much memory as those of the k experts of one token
    would at rank r: r k / E. At least `LEAST_RANK`, and a divisor of r."""
    least = max(r * matrix.active / matrix.count, min(LEAST_RANK, r))
    return next(rank for rank in range(1, r + 1) if r % rank == 0 and rank >= least)


def largest_divisor(r: int, most: int) -> int:
    """The largest divisor of r that is at most ``most``."""
    return next(rank for rank in range(min(r, most), 0, -1) if r % rank == 0)
