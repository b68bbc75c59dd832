"""A model -> its transformer layers, their matrices and vectors, found by structure.

Nothing here knows a model family by name: the stack of layers is the module list that holds the most
parameters, a matrix is the weight of a plain linear module, and whatever is left in a layer is a vector.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from ows_ds.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Matrix:
    """A two-dimensional weight that can be trained in a low-rank subspace.

    name: the parameter's dotted name in the model.
    shape: as stored: (C_out, C_in), or (C_in, C_out) where ``inputs_first`` (GPT-2's ``Conv1D``).
    modules: dotted names of the modules that use it: one, or embedding and head where they are tied.
    """

    name: str
    shape: tuple[int, int]
    modules: tuple[str, ...]
    inputs_first: bool = False

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


@dataclass(frozen=True)
class Vector:
    """A bias, a norm's weight or another parameter that trains at full rank, flattened, and is not decayed."""

    name: str
    numel: int


@dataclass(frozen=True)
class Block:
    """What is sampled, attached and merged together: one transformer layer, or what always trains."""

    name: str
    matrices: tuple[Matrix, ...]
    vectors: tuple[Vector, ...]


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

    def at_rank(self, r: int | None) -> ModelLayers:
        """The same where a layer's matrix whose shorter side is below r is a vector: at full rank it has fewer
        coordinates than at rank r. Where no matrix is larger, they stay (see `check_fits`)."""
        if r is None or all(matrix.short < r for block in self.layers for matrix in block.matrices):
            return self
        return dataclasses.replace(self, layers=tuple(_at_rank(block, r) for block in self.layers))


def _at_rank(block: Block, r: int) -> Block:
    small = tuple(Vector(m.name, math.prod(m.shape)) for m in block.matrices if m.short < r)
    return Block(block.name, tuple(m for m in block.matrices if m.short >= r), (*block.vectors, *small))


def find_layers(model: nn.Module, shape: Callable[[nn.Parameter], Shape] | None = None) -> ModelLayers:
    """Find the layers of ``model`` (not changed).

    shape: gives a parameter's full shape where the parameter itself does not (ZeRO-3 empties it).
    Raises UserError (key ``model.path``) for what cannot be trained here: no stack of layers, encoder-decoders,
    quantised or wrapped linear modules, parameters of three and more dimensions inside a layer.
    """
    shape = shape or (lambda parameter: tuple(parameter.shape))
    label = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__

    def refuse(right: str) -> UserError:
        return UserError("model.path", label, right)

    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise refuse("expected a causal language model; this one is an encoder-decoder")
    stack_name, stack = _stack(model, shape, refuse)
    names = {parameter: name for name, parameter in model.named_parameters()}

    layers = []
    for index, layer in enumerate(stack):
        matrices: list[Matrix] = []
        vectors: list[Vector] = []
        for module_name, module in layer.named_modules(prefix=f"{stack_name}.{index}"):
            if hasattr(module, "base_layer"):  # what peft calls the module inside an adapter
                kind = type(module).__name__
                raise refuse(f"{module_name} is a {kind}; give a model without adapters, or merge them")
            for key, parameter in module.named_parameters(recurse=False):
                full = shape(parameter)
                name = names[parameter]
                if key == "weight" and isinstance(module, (nn.Linear, Conv1D)):
                    _plain(module, module_name, refuse)
                    matrices.append(Matrix(name, (full[0], full[1]), (module_name,), isinstance(module, Conv1D)))
                elif len(full) <= 1:
                    vectors.append(Vector(name, full[0] if full else 1))
                else:
                    raise refuse(f"{name} has shape {full}; in a layer only linear weights may have two dimensions")
        layers.append(Block(f"{stack_name}.{index}", tuple(matrices), tuple(vectors)))

    embeddings, final = _outside(model, stack_name, shape, names)
    known = {*(matrix.name for matrix in embeddings), *(vector.name for vector in final)}
    sizes = {name: math.prod(shape(parameter)) for parameter, name in names.items() if name not in known}
    largest = max((math.prod(matrix.shape) for matrix in embeddings), default=0)
    return ModelLayers(tuple(layers), embeddings, final, _heads(stack_name, sizes, largest))


def _heads(stack_name: str, sizes: dict[str, int], most: int) -> tuple[Vector, ...]:
    """What stands at the model's root, beside the module with the stack, and is no larger than the embedding.

    sizes: of the weights that are not known yet. A vision tower is larger.
    """
    beside: dict[str, list[Vector]] = {}
    for name, numel in sizes.items():
        if (root := name.partition(".")[0]) != stack_name.partition(".")[0]:
            beside.setdefault(root, []).append(Vector(name, numel))
    heads = (vectors for vectors in beside.values() if sum(vector.numel for vector in vectors) <= most)
    return tuple(vector for vectors in heads for vector in vectors)


def _stack(
    model: nn.Module, shape: Callable[[nn.Parameter], Shape], refuse: Callable[[str], UserError]
) -> tuple[str, nn.ModuleList]:
    def size(module: nn.Module) -> int:
        return sum(math.prod(shape(parameter)) for parameter in module.parameters())

    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise refuse("expected a transformer: no list of layers was found in this model")
    return max(stacks, key=lambda item: size(item[1]))


def _plain(module: nn.Module, name: str, refuse: Callable[[str], UserError]) -> None:
    weight = module.weight
    forward = type(module).forward
    if forward not in (nn.Linear.forward, Conv1D.forward) or not getattr(weight, "is_floating_point", bool)():
        raise refuse(
            f"{name} is a {type(module).__name__} of {weight.dtype}; give a model of plain linear modules "
            "(not quantised, without adapters)"
        )


def _outside(
    model: nn.Module,
    stack_name: str,
    shape: Callable[[nn.Parameter], Shape],
    names: dict[nn.Parameter, str],
) -> tuple[tuple[Matrix, ...], tuple[Vector, ...]]:
    """Embeddings and head, and the vectors around the stack. Anything else outside (a vision tower) stays frozen."""
    parent_name = stack_name.rpartition(".")[0]
    parent = model.get_submodule(parent_name)
    stack = model.get_submodule(stack_name)
    module_names = {module: name for name, module in model.named_modules()}

    def candidates() -> Iterator[nn.Module]:
        yield from (getattr(model, get)() for get in ("get_input_embeddings", "get_output_embeddings"))
        yield from (child for child in parent.children() if child is not stack)

    users: dict[nn.Parameter, list[str]] = {}
    final: list[Vector] = []
    seen: set[nn.Module] = set()
    for module in candidates():
        if module is None or module in seen or module not in module_names:
            continue
        seen.add(module)
        for key, parameter in module.named_parameters(recurse=False):
            full = shape(parameter)
            if len(full) == 2 and key == "weight" and isinstance(module, (nn.Linear, nn.Embedding)):
                users.setdefault(parameter, []).append(module_names[module])
            elif len(full) <= 1:
                final.append(Vector(names[parameter], full[0] if full else 1))
    embeddings = []
    for parameter, modules in users.items():
        full = shape(parameter)
        embeddings.append(Matrix(names[parameter], (full[0], full[1]), tuple(modules)))
    return tuple(embeddings), tuple(final)
