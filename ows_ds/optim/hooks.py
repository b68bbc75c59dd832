"""Hooks on a model's modules: products with their weights become `ows_ds.optim.low_rank.frozen_linear`.

LowRankHook    in place of the forward pass of a plain linear module or an embedding
WeightHook     a `StandIn` in place of a weight, where the module's own code, or transformers', multiplies with it
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from ows_ds.compat.torch import own_parameter, with_weight
from ows_ds.distributed.frozen import frozen_of, resting, without_memory
from ows_ds.distributed.weights import Weights
from ows_ds.optim.low_rank import Coordinates, frozen_linear, sides
from ows_ds.optim.products import EVERY, Batched, Grouped, OneExpert, Use


class Hook(ABC):
    """What acts on a module's weight while it is installed: `coordinates`, `sketch`, both or nothing. Without either,
    and with a weight that is frozen or trains at full rank, the module computes what it always did. The values of
    `sketch` are zero: only their gradient counts."""

    coordinates: Coordinates | None = None
    sketch: Coordinates | None = None

    @property
    def attached(self) -> list[Coordinates]:
        """What acts now."""
        return [one for one in (self.coordinates, self.sketch) if one is not None]

    @abstractmethod
    def remove(self) -> None:
        """Give the module back as it was, but for a weight in few bits, which always needs its hook."""


def multiplies(module: nn.Module) -> bool:
    """Whether a module's forward pass is the plain product with its weight, or the plain lookup in it."""
    return isinstance(module, nn.Embedding) or type(module).forward in (nn.Linear.forward, Conv1D.forward)


class LowRankHook(Hook):
    """Takes the place of a linear module's or an embedding's forward pass."""

    def __init__(self, module: nn.Module, sharded: bool) -> None:
        """sharded: the weight is gathered only around each pass (ZeRO-3)."""
        self.module = module
        self._sharded = sharded
        self._own: Callable[..., Tensor] = type(module).forward
        self._forward = self._lookup if isinstance(module, nn.Embedding) else self._linear
        module.forward = self._forward

    def remove(self) -> None:
        self.coordinates = self.sketch = None
        if frozen_of(own_parameter(self.module, "weight")) is None:
            del self.module.forward

    def _linear(self, x: Tensor) -> Tensor:
        module: Any = self.module
        weight, attached = own_parameter(module, "weight"), self.attached
        # torch's own linear keeps a view of the gathered weight alive until the backward pass; under ZeRO-3 that
        # would undo the sharding, so that frozen modules go through FrozenLinear there as well
        if not resting(weight) and (weight.requires_grad or not (attached or self._sharded)):
            return self._own(module, x)
        return frozen_linear(x, weight, module.bias, attached, isinstance(module, Conv1D))

    def _lookup(self, ids: Tensor) -> Tensor:
        y = self._own(self.module, ids)
        attached = self.attached
        if not attached:
            return y
        right, left = sides(attached, False, y.dtype)
        # a shallow copy with L in the weight's place goes through the module's own forward, scaling included
        shadow = with_weight(self.module, left)
        low_rank = self._own(shadow, ids) @ right.t()
        return torch.add(low_rank, y, alpha=attached[0].decay)


class WeightHook(Hook):
    """Puts a `StandIn` in a weight's place, under its name: the module's own code, or a function of transformers'
    ``ALL_EXPERTS_FUNCTIONS``, computes with it as with the parameter, a matrix or a stack of experts' matrices."""

    def __init__(self, module: nn.Module, key: str) -> None:
        """key: the parameter's name in ``module``."""
        self.module, self.key = module, key
        self._unbound: tuple[Tensor, ...] | None = None
        self.observe: Callable[[int, bool, Tensor], None] | None = None
        """Is called with (expert, whether its matrix is stored as (C_in, C_out), tokens) before they are multiplied."""
        module.__dict__[key] = StandIn(self)  # found before nn.Module's own __getattr__ looks among its parameters
        self._handle = module.register_forward_pre_hook(self._forget)

    def _forget(self, *_: Any) -> None:
        self._unbound = None

    def remove(self) -> None:
        self.coordinates = self.sketch = self._unbound = None
        if frozen_of(self.parameter) is not None:
            return
        self._handle.remove()
        del self.module.__dict__[self.key]

    @property
    def parameter(self) -> nn.Parameter:
        """The module's own."""
        return own_parameter(self.module, self.key)

    def unbound(self) -> tuple[Tensor, ...]:
        """Each expert's weight where they train at full rank: one gradient of the stack is made of all of theirs."""
        if self._unbound is None:
            self._unbound = self.parameter.unbind()
        return self._unbound

    @property
    def like(self) -> Tensor:
        """A tensor of the real weight's shape, dtype and device."""
        parameter = self.parameter
        frozen = resting(parameter)
        if frozen is None:
            return parameter
        return without_memory(frozen.format.full_shape, frozen.format.dtype, parameter.device)

    def merged(self) -> Tensor:
        """decay * W + L R^T, (E, ...), differentiable: for code that does something else with it than to multiply."""
        weight: Tensor = self.parameter
        if (frozen := resting(weight)) is not None:
            weight = frozen.format.dense(weight, frozen.scales)
        for one in self.attached:
            left, right = one.factors
            weight = torch.add(left @ right.mT, weight, alpha=one.decay)
        return weight


SIZES = ("shape", "dtype", "device", "ndim", "dim", "size", "numel", "stride", "data_ptr", "is_cuda", "is_contiguous")


@dataclass(frozen=True, eq=False)
class StandIn:
    """A weight, (a, b) or a stack (E, a, b), as a model's code sees it, or its transpose, or one expert's part of it.

    Tokens are multiplied with it by `FrozenLinear`; in all else it is the tensor that it stands for.
    """

    hook: WeightHook
    flipped: bool = False
    expert: int | None = None

    @property
    def tensor(self) -> Tensor:
        """What it stands for."""
        hook = self.hook
        if self.expert is not None and hook.parameter.requires_grad:
            return self._seen(hook.unbound()[self.expert], None)
        return self._seen(hook.merged(), self.expert)

    def _seen(self, weight: Tensor, expert: int | None) -> Tensor:
        found = weight if expert is None else weight[expert]
        return found.mT if self.flipped else found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("hook", "flipped", "expert"):  # a copy that is being made
            raise AttributeError(name)
        return getattr(self._seen(self.hook.like, self.expert) if name in SIZES else self.tensor, name)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: Any) -> Any:
        one = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool)
        if not one or self.dim() == 2:
            return self.tensor[index]
        return replace(self, expert=range(len(self))[int(index)])

    @property
    def mT(self) -> StandIn:
        """As a tensor's."""
        return replace(self, flipped=not self.flipped)

    def transpose(self, a: int, b: int) -> Any:
        """As a tensor's."""
        dims = self.dim()
        return self.mT if {a % dims, b % dims} == {dims - 2, dims - 1} else self.tensor.transpose(a, b)

    def t(self) -> Any:
        """As a tensor's."""
        return self.T

    @property
    def T(self) -> Any:
        """As a tensor's."""
        return self.mT if self.dim() == 2 else self.tensor.T

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x, weight = (*args, None, None)[:2]
        if isinstance(weight, cls) and isinstance(x, Tensor):
            y = weight._product(getattr(func, "__name__", ""), x, args[2:], kwargs)
            if y is not None:
                return y
        args, kwargs = tree_map(lambda one: one.tensor if isinstance(one, cls) else one, (args, kwargs))
        return func(*args, **kwargs)

    def _product(self, name: str, x: Tensor, more: Any, kwargs: Any) -> Tensor | None:
        """What the function of torch of this name makes of x and this; None if it is no product of tokens with it."""
        inputs_first, bias, alone = not self.flipped, None, self.dim() == 2
        use: Use | None = None
        if alone and name in ("linear", "matmul", "mm") and not self.hook.parameter.requires_grad:
            use = EVERY if self.expert is None else OneExpert(self.expert)
            if name == "linear":
                inputs_first, bias = self.flipped, (*more, kwargs.get("bias"))[0]
        elif not alone and name in ("bmm", "matmul") and x.dim() == 3:
            use = Batched()
        elif not alone and name in ("_grouped_mm", "grouped_mm_fallback"):
            use = Grouped((*more, kwargs.get("offs"))[0])
        if use is None:
            return None
        if self.hook.observe is not None:
            for expert, tokens in use.inputs(x):
                self.hook.observe(expert, inputs_first, tokens)
        y = frozen_linear(x, self.hook.parameter, None, self.hook.attached, inputs_first, use)
        return y if bias is None else y + bias


def hook_of(module: nn.Module, key: str, sharded: bool) -> Hook:
    """The hook on the module's parameter ``key``: a new one, or that of a weight which may be in few bits.

    sharded: the weight is gathered only around each pass (ZeRO-3).
    """
    if frozen_of(own_parameter(module, key)) is not None:
        there: Hook | None = _in_place_of_forward(module) or getattr(module.__dict__.get(key), "hook", None)
        if there is not None:
            return there
    return LowRankHook(module, sharded) if multiplies(module) else WeightHook(module, key)


def hook_frozen(weights: Weights) -> None:
    """Let modules compute with weights that are in few bits, whoever trains what. Once a model."""
    for parameter in weights.parameters().values():
        frozen = frozen_of(parameter)
        for module, key in () if frozen is None else frozen.places:
            hook_of(module, key, weights.sharded)


def trained(module: nn.Module, recurse: bool = True) -> list[Tensor]:
    """The leaves whose gradients the module's forward pass brings: its own weights that train, attached coordinates.

    recurse: also weights of modules within."""
    leaves: list[Tensor] = [parameter for parameter in module.parameters(recurse) if parameter.requires_grad]
    return leaves + [one.values for hook in _hooks_on(module) for one in hook.attached]


def has_hook(module: nn.Module) -> bool:
    """Whether coordinates of the module's own weights are, or may come to be, attached to it."""
    return any(True for _ in _hooks_on(module))


def _hooks_on(module: nn.Module) -> Iterator[Hook]:
    if (found := _in_place_of_forward(module)) is not None:
        yield found
    yield from (one.hook for one in module.__dict__.values() if isinstance(one, StandIn))


def _in_place_of_forward(module: nn.Module) -> LowRankHook | None:
    forward: Any = module.__dict__.get("forward")  # perhaps wrapped
    found = getattr(getattr(forward, "__wrapped__", forward), "__self__", None)
    return found if isinstance(found, LowRankHook) else None
