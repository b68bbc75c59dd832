"""How decoder layers run where not as transformers runs them: compiled, with other kernels, tiled, inputs on the host.

    layer.forward   nothing in it trains and no gradient passes -> without autograd: nothing is saved
                    else -> checkpoint (inputs on the host) -> compiled graphs
    linear modules that have, or may get, coordinates stay between the graphs, as calls

So no graph knows of coordinates: a change of the layer set, a refresh or a merge compiles nothing. A graph guards only
whether its inputs and its norms' weights need gradients, of which there are four cases, all met in the first steps.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ows_ds.compat.checkpointing import enters_layer_again
from ows_ds.compat.torch import compiled, outside_of_graphs, recompiles
from ows_ds.compat.transformers import checkpointed, has_liger, model_in, plain_forward, use_liger
from ows_ds.config import Recipe, tokens_of_pass
from ows_ds.distributed.weights import Weights
from ows_ds.errors import UserError
from ows_ds.model.layers import ModelLayers
from ows_ds.model.parts import find_mlps, tile_length
from ows_ds.model.tiled import tiled
from ows_ds.optim.hooks import has_hook, trained
from ows_ds.train.offload import Offload

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ways:
    """kernels: torch, liger or compile. tile: tokens of an MLP's run, see `tile_length`. backend: of torch.compile."""

    kernels: str = "torch"
    offload: bool = False
    tile: int | None = None
    backend: str = "inductor"


def check(recipe: Recipe, device: torch.device) -> None:
    """Refuse (UserError) kernels that are not to be had here, before a model is loaded."""
    if recipe.train.kernels == "liger":
        if device.type != "cuda":
            raise UserError("train.kernels", "liger", "expected auto, torch or compile: Liger's kernels run on GPUs")
        if not has_liger():
            raise UserError("train.kernels", "liger", "expected the package liger-kernel: pip install 'ows_ds[gpu]'")


def ways_of(recipe: Recipe, layers: ModelLayers, device: torch.device) -> Ways:
    """What a recipe asks for on a device."""
    train, kernels = recipe.train, recipe.train.kernels
    if kernels == "auto":
        kernels = "liger" if device.type == "cuda" and has_liger() else "torch"
    tile = tile_length(train.tiled_mlp, tokens_of_pass(recipe), layers.embeddings[-1].shape[1])
    return Ways(kernels, train.activation_offload, tile)


class LayerRuns:
    """A model whose layers run in other ways until `close`. For training: evaluation runs as ever, but for Liger's
    kernels and tiles.

    Attributes:
        offload: What takes inputs to the host; None: nothing does.
        patched: How many modules Liger has given other kernels.
    """

    def __init__(self, weights: Weights, layers: ModelLayers, ways: Ways, asked: bool = True) -> None:
        """After the method was built, which puts hooks on modules.

        asked: for Liger; otherwise a model that Liger does not know keeps torch's. Raises UserError for what this model
        does not have. Changes torch's limit of graphs of a function, for the process, until `close`.
        """
        self.module, self._undo = weights.module, list[Callable[[], None]]()
        self.offload = Offload(weights.device) if ways.offload else None
        self.patched = 0
        inside = model_in(weights.module)
        modules = [inside.get_submodule(block.name) for block in layers.layers]
        if ways.kernels == "liger":
            self._liger(asked)
        compiles = ways.kernels == "compile"
        if compiles:
            self._undo.append(recompiles())
            self._stay_outside(modules)
        graph = functools.cache(functools.partial(compiled, backend=ways.backend)) if compiles else None
        if ways.tile is not None:
            for name in find_mlps(layers):
                self._tile(inside.get_submodule(name), ways.tile, graph)
        for number, layer in enumerate(modules):
            if self.offload is not None and number + 1 < len(modules):  # the last one's is needed at once
                self._take_away(layer, self.offload)
            self._replace(layer, _forward(layer, graph))
        if self.offload is not None:
            self._undo.append(weights.module.register_forward_pre_hook(self._begin).remove)

    def close(self) -> None:
        """Give every module back as it was."""
        while self._undo:
            self._undo.pop()()

    def _begin(self, *_: Any) -> None:
        assert self.offload is not None
        self.offload.begin()

    def _replace(self, module: nn.Module, forward: Callable[..., Any], key: str = "forward") -> None:
        """An attribute of a module's own, until `close`."""
        there, before = key in module.__dict__, module.__dict__.get(key)

        def back() -> None:
            if there:
                module.__dict__[key] = before
            else:
                module.__dict__.pop(key, None)

        self._undo.append(back)
        module.__dict__[key] = forward

    def _liger(self, asked: bool) -> None:
        self.patched, undo = use_liger(self.module)
        self._undo.append(undo)
        if not self.patched and asked:
            kind = type(self.module).__name__
            raise UserError("train.kernels", "liger", f"expected auto, torch or compile: Liger does not know {kind}")

    def _stay_outside(self, layers: list[nn.Module]) -> None:
        for module in (module for layer in layers for module in layer.modules() if has_hook(module)):
            self._replace(module, outside_of_graphs(module.forward))

    def _tile(self, module: nn.Module, tile: int, graph: Any) -> None:
        if graph is None:
            self._replace(module, tiled(module.forward, tile))
        else:
            own = functools.partial(graph(plain_forward(module)), module)
            self._replace(module, outside_of_graphs(tiled(own, tile)))

    def _take_away(self, layer: nn.Module, offload: Offload) -> None:
        found = checkpointed(layer)
        if found is None:
            right = f"expected false: transformers checkpoints a {type(layer).__name__} in another way"
            raise UserError("train.activation_offload", True, right)
        key, own = found

        def save(*args: Any, **kwargs: Any) -> Any:
            if not _reached(layer, (args, kwargs)):
                with torch.no_grad():
                    return own(*args, **kwargs)
            with offload.saving():
                return own(*args, **kwargs)

        self._replace(layer, save, key)


def _forward(layer: nn.Module, graph: Any) -> Callable[..., Any]:
    """A layer's forward pass. graph: makes a compiled function of one of a module; None: nothing is compiled."""
    own: Callable[..., Any] = layer.forward
    inner = own if graph is None else functools.partial(graph(plain_forward(layer)), layer)

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        cached = kwargs.get("past_key_values") is not None  # by the layer's number, of which graphs are to know nothing
        if cached or not (layer.training and torch.is_grad_enabled()):
            return own(*args, **kwargs)
        if not _reached(layer, (args, kwargs)):
            with torch.no_grad():
                return inner(*args, **kwargs)
        # where the layer's call is what is checkpointed, this runs within it
        found = None if graph is None or enters_layer_again() else checkpointed(layer)
        if found is not None:
            checkpoint = getattr(layer, found[0])
            return checkpoint(functools.partial(inner, **kwargs), *args)
        return inner(*args, **kwargs)

    return forward


def _reached(layer: nn.Module, inputs: Any) -> bool:
    """Whether a backward pass reaches the layer: gradients pass through it, or something in it trains."""
    if any(isinstance(one, Tensor) and one.requires_grad for one in tree_leaves(inputs)):
        return True
    return any(trained(module, recurse=False) for module in layer.modules())
