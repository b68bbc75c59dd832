"""The uses of a model's modules in a pass, found by a pass without numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ows_ds.planner.gathering import Trace, Use


class _Note(torch.autograd.Function):
    """The identity, which calls back when a gradient passes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, note: Callable[[], None]) -> Tensor:
        ctx.note = note
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.note()
        return (*grads, None)


def _noted(tree: Any, note: Callable[[], None]) -> Any:
    """``tree``; ``note`` is called whenever a gradient passes one of its tensors."""
    return tree_map(lambda one: _Note.apply(one, note) if isinstance(one, Tensor) and one.requires_grad else one, tree)


def record(
    model: nn.Module,
    trained: Iterable[str],
    low_rank: Iterable[str] = (),
    tokens: int = 8,
    at_once: Iterable[str] = (),
) -> Trace:
    """One pass of a model on the meta device, forward and, where anything trains, backward. Changes ``requires_grad``.

    trained: names of the weights that train, in the model without adapters or in it. low_rank: of those that train by
    their coordinates. at_once: names of modules whose weights are gathered together.
    """
    uses, backward, handles = [Use("reset")], False, list[Any]()
    names = {id(p): _plain(name) for name, p in model.named_parameters()}
    wanted = {_plain(name) for name in trained}
    differentiated = wanted.union(low_rank)
    for parameter in model.parameters():
        parameter.requires_grad_(names[id(parameter)] in differentiated)

    def watch(name: str, module: nn.Module) -> None:
        left = 0  # gradients of inputs that have not come

        def passed() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                uses.append(Use("release", name, False))

        def entered(_: nn.Module, inputs: Any) -> Any:
            nonlocal left
            uses.append(Use("fetch", name, True, backward))
            left = sum(isinstance(one, Tensor) and one.requires_grad for one in tree_leaves(inputs))
            return _noted(inputs, passed)

        def exited(_: nn.Module, inputs: Any, output: Any) -> Any:
            uses.append(Use("release", name, True, backward))
            return _noted(output, lambda: uses.append(Use("fetch", name, False)))

        handles.extend((module.register_forward_pre_hook(entered), module.register_forward_hook(exited)))

    weights = {}
    wholes = set(at_once)
    for full_name, module in model.named_modules():
        name = _plain(full_name)
        if any(name.startswith(f"{one}.") for one in wholes):
            continue
        weights[name] = tuple(names[id(p)] for p in module.parameters(recurse=name in wholes))
        watch(name, module)
    if any(p.dim() == 3 for p in model.parameters()):
        with suppress(ValueError, AttributeError):  # the only one that looks at no numbers
            cast(Any, model).set_experts_implementation("batched_mm")
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, tokens, tokens, device="meta")  # taken as it is: of a smaller one the values are looked at
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if logits.requires_grad:
        backward = True
        logits.sum().backward()
    for handle in handles:
        handle.remove()
    numel = {names[id(p)]: p.numel() for p in model.parameters()}
    return Trace((*uses, Use("leftovers")), weights, numel, frozenset(numel) - wanted)


def _plain(name: str) -> str:
    """A name as in the model without adapters."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
