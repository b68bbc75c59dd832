"""A model -> its transformer layers, their matrices and vectors, found by structure.

Nothing here knows a model family by name. The stack of layers is the module list nearest to the token embedding. In a
layer, a matrix is the weight of a linear module, or one of a stack of experts, stored as one parameter of three
dimensions; whatever is left is a vector, however many dimensions it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ows_ds.distributed.frozen import named_weights
from ows_ds.errors import UserError
from ows_ds.model.blocks import Block, Matrix, ModelLayers, Shape, Vector

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)


def find_layers(model: nn.Module, shape: Callable[[nn.Parameter], Shape] | None = None) -> ModelLayers:
    """Find the layers of ``model`` (not changed).

    shape: gives a parameter's full shape where the parameter itself does not (ZeRO-3 empties it).
    Raises UserError (key ``model.path``) for what cannot be trained here: no stack of layers, encoder-decoders,
    quantised weights, adapters.
    """
    shape = shape or (lambda parameter: tuple(parameter.shape))
    config = getattr(model, "config", None)
    label = getattr(config, "name_or_path", "") or type(model).__name__

    def refuse(right: str) -> UserError:
        return UserError("model.path", label, right)

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("expected a causal language model; this one is an encoder-decoder")
    stack_name, stack = _stack(model, shape, refuse)
    names = {parameter: name for name, parameter in named_weights(model)}
    active = experts_per_token(config)

    users: dict[nn.Parameter, list[str]] = {}  # the modules of parameters that several layers share
    for module_name, module in stack.named_modules(prefix=stack_name):
        for _, parameter in named_weights(module, recurse=False):
            users.setdefault(parameter, []).append(module_name)
    seen: set[nn.Parameter] = set()

    layers = []
    for index, layer in enumerate(stack):
        parts: list[tuple[str, Shape, Matrix | Vector]] = []  # with the name of their module
        experts: dict[str, int] = {}  # the module that has experts in it -> their number
        for module_name, module in layer.named_modules(prefix=f"{stack_name}.{index}"):
            if hasattr(module, "base_layer"):  # what peft calls the module inside an adapter
                kind = type(module).__name__
                raise refuse(f"{module_name} is a {kind}; give a model without adapters, or merge them")
            for key, parameter in named_weights(module, recurse=False):
                if parameter in seen:  # an earlier layer's
                    continue
                seen.add(parameter)
                full, name = shape(parameter), names[parameter]
                if not parameter.is_floating_point() or parameter.element_size() < 2:
                    kind = f"{type(module).__name__} of {parameter.dtype}"
                    raise refuse(f"{module_name} is a {kind}; give a model of plain modules (not quantised)")
                sides, part = (full[-2], full[-1]) if len(full) > 1 else (0, 0), Vector(name, math.prod(full))
                found: Matrix | Vector = part
                if key == "weight" and len(full) == 2 and isinstance(module, (nn.Linear, Conv1D)):
                    found = Matrix(name, sides, tuple(users[parameter]), isinstance(module, Conv1D))
                elif len(full) == 3 and not isinstance(module, CONVOLUTIONS) and min(sides) > 1:
                    first = bool(getattr(module, "is_transposed", False))
                    found = Matrix(name, sides, tuple(users[parameter]), first, full[0], min(active or 1, full[0]))
                    experts[module_name] = full[0]
                parts.append((module_name, full, found))
            if isinstance(module, nn.ModuleList) and len({type(one) for one in module}) == 1 < len(module):
                experts[module_name] = len(module)
        routers = tuple(part for module_name, full, part in parts if _chooses(module_name, full, experts))
        others = [part for _, _, part in parts if part not in routers]
        matrices = tuple(part for part in others if isinstance(part, Matrix))
        vectors = tuple(part for part in others if isinstance(part, Vector))
        layers.append(Block(f"{stack_name}.{index}", matrices, vectors, routers))

    embeddings, final = _outside(model, stack_name, shape, names)
    known = {*(matrix.name for matrix in embeddings), *(vector.name for vector in final)}
    sizes = {name: math.prod(shape(parameter)) for parameter, name in names.items() if name not in known}
    largest = max((matrix.numel for matrix in embeddings), default=0)
    return ModelLayers(tuple(layers), embeddings, final, _heads(model, stack_name, sizes, largest))


def _chooses(module_name: str, shape: Shape, experts: dict[str, int]) -> bool:
    """Whether a weight chooses experts: it has an output for each, and stands beside them.

    experts: names of the modules with experts in them, and how many.
    """

    def inside(outer: str) -> bool:
        return f"{module_name}.".startswith(f"{outer}.")

    if any(inside(one) for one in experts):
        return False
    outputs = shape[-1] if shape[:1] == (1,) else shape[0] if shape else 0
    return any(count == outputs and inside(one.rpartition(".")[0]) for one, count in experts.items())


EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)


def experts_per_token(config: Any) -> int | None:
    """How many experts a token goes to, as transformers' configurations say it; None where they do not."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = next((value for key in EXPERTS_PER_TOKEN if (value := getattr(config, key, None))), None)
    return max(found) if isinstance(found, (list, tuple)) else found


def _heads(model: nn.Module, stack_name: str, sizes: dict[str, int], most: int) -> tuple[Vector, ...]:
    """What stands at the model's root, after the module with the stack, and is no larger than the embedding.

    sizes: of the weights that are not known yet. Towers for images and their projectors come before the stack.
    """
    roots = [name for name, _ in model.named_children()]
    after = roots[roots.index(stack_name.partition(".")[0]) + 1 :]
    beside: dict[str, list[Vector]] = {}
    for name, numel in sizes.items():
        if (root := name.partition(".")[0]) in after:
            beside.setdefault(root, []).append(Vector(name, numel))
    heads = (vectors for vectors in beside.values() if sum(vector.numel for vector in vectors) <= most)
    return tuple(vector for vectors in heads for vector in vectors)


def _stack(
    model: nn.Module, shape: Callable[[nn.Parameter], Shape], refuse: Callable[[str], UserError]
) -> tuple[str, nn.ModuleList]:
    """In the smallest module that has both the token embedding and a module list in it, the list that lies least deep,
    of those the largest; of all the model where it does not say which its embedding is."""

    def size(module: nn.Module) -> int:
        return sum(math.prod(shape(parameter)) for _, parameter in named_weights(module))

    stacks = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not any(map(size, stacks.values())):
        raise refuse("expected a transformer: no list of layers was found in this model")
    try:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        embedding = None
    holder = next((name for name, module in model.named_modules() if module is embedding), "")
    while holder:
        holder = holder.rpartition(".")[0]
        inside = {name: one for name, one in stacks.items() if name.startswith(f"{holder}." if holder else "")}
        if any(map(size, inside.values())):
            stacks = inside
            break
    filled = [item for item in stacks.items() if size(item[1])]
    return min(filled, key=lambda item: (item[0].count("."), -size(item[1])))


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
        for key, parameter in named_weights(module, recurse=False):
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
