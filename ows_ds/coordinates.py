"""Linear modules whose weight is frozen and whose coordinates train.

A weight as stored, W (rows, columns), is used as decay * W + L R^T with L (rows, r), R (columns, r): for rows >=
columns L is the trained coordinates and R the projector, otherwise the other way round (see ``project.py``). Neither
L R^T nor the gradient of W is ever formed: the coordinates' gradient comes out of products of their own size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ows_ds.project import is_tall


@dataclass
class Coordinates:
    """What is attached to one matrix.

    values: (max(m, n), r), float32 (float64 under float64 weights), a leaf with ``.grad``.
    projector: (min(m, n), r), the weight's dtype.
    decay: factor on the frozen weight: weight decay acts on decay * W + L R^T as a whole.
    across: the other way round, values on the shorter side and the projector on the longer one (a `Sketch`, or as
    `ows_ds.layers.Matrix.across` says).
    """

    shape: tuple[int, int]
    values: Tensor
    projector: Tensor
    decay: float = 1.0
    across: bool = False

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """L (rows, r) and R (columns, r)."""
        left = is_tall(self.shape) != self.across
        return (self.values, self.projector) if left else (self.projector, self.values)


class FrozenLinear(torch.autograd.Function):
    """y = x (decay * W + L R^T)^T + b with frozen W.

    Saves x B (tokens x r) where the coordinates stand on the output side, x where they stand on the input side, and
    nothing of the tokens' size without coordinates. The weight is saved as the module's own parameter, so that
    ZeRO-3 may release it after the forward pass and gather it again for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inner: Tensor | None,
        outer: Tensor | None,
        decay: float,
        inputs_first: bool,
    ) -> Tensor:
        """x (..., C_in), weight as stored, bias (C_out), inner (C_in, r), outer (C_out, r) -> (..., C_out)."""
        tokens = x.reshape(-1, x.shape[-1])
        matrix = weight if inputs_first else weight.t()
        if bias is not None:
            y = torch.addmm(bias, tokens, matrix, alpha=decay)
        else:
            y = tokens @ matrix
            if decay != 1.0:
                y *= decay
        hidden = None
        if inner is not None and outer is not None:
            hidden = tokens @ inner.to(x.dtype)
            y.addmm_(hidden, outer.to(x.dtype).t())
        ctx.save_for_backward(
            weight,
            inner,
            outer,
            tokens if ctx.needs_input_grad[3] else None,
            hidden if ctx.needs_input_grad[4] else None,
        )
        ctx.decay, ctx.inputs_first = decay, inputs_first
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad (..., C_out)."""
        weight, inner, outer, tokens, hidden = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_bias = grad_inner = grad_outer = None
        grad_hidden = None if outer is None else flat @ outer.to(grad.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = flat @ (weight.t() if ctx.inputs_first else weight)
            if ctx.decay != 1.0:
                grad_x *= ctx.decay
            if grad_hidden is not None:
                grad_x.addmm_(grad_hidden, inner.to(grad.dtype).t())
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        if ctx.needs_input_grad[3]:
            grad_inner = (tokens.t() @ grad_hidden).to(inner.dtype)
        if ctx.needs_input_grad[4]:
            grad_outer = (flat.t() @ hidden).to(outer.dtype)
        return grad_x, None, grad_bias, grad_inner, grad_outer, None, None


class Attachment:
    """Takes the place of a module's forward pass for as long as it is installed.

    With `coordinates` and `sketch` None and the weight frozen or trained at full rank, the module computes what it
    always did. The values of `sketch` are zero: only their gradient counts.
    """

    def __init__(self, module: nn.Module, sharded: bool) -> None:
        """sharded: the weight is gathered only around each pass (ZeRO-3)."""
        self.module = module
        self.coordinates: Coordinates | None = None
        self.sketch: Coordinates | None = None
        self._sharded = sharded
        self._own: Callable[..., Tensor] = type(module).forward
        self._forward = self._lookup if isinstance(module, nn.Embedding) else self._linear
        module.forward = self._forward

    def remove(self) -> None:
        """Give the module its own forward pass back."""
        self.coordinates = self.sketch = None
        del self.module.forward

    @property
    def attached(self) -> list[Coordinates]:
        """What acts now: coordinates, sketch, both or nothing."""
        return [one for one in (self.coordinates, self.sketch) if one is not None]

    def _factors(self) -> tuple[Tensor, Tensor, float] | None:
        """L (rows, k), R (columns, k) of all that is attached, side by side, and the weight's decay."""
        attached = self.attached
        if not attached:
            return None
        if len(attached) == 1:  # the tensors themselves: copies would be kept for the backward pass
            return *attached[0].factors, attached[0].decay
        lefts, rights = zip(*(one.factors for one in attached), strict=True)
        return torch.cat(lefts, 1), torch.cat(rights, 1), attached[0].decay

    def _linear(self, x: Tensor) -> Tensor:
        module: Any = self.module
        weight, factors = module.weight, self._factors()
        # torch's own linear keeps a view of the gathered weight alive until the backward pass; under ZeRO-3 that
        # would undo the sharding, so that frozen modules go through FrozenLinear there as well
        if weight.requires_grad or (factors is None and not self._sharded):
            return self._own(module, x)
        inputs_first = isinstance(module, Conv1D)
        inner = outer = None
        decay = 1.0
        if factors is not None:
            left, right, decay = factors
            inner, outer = (left, right) if inputs_first else (right, left)
        y: Tensor = FrozenLinear.apply(x, weight, module.bias, inner, outer, decay, inputs_first)
        return y

    def _lookup(self, ids: Tensor) -> Tensor:
        y = self._own(self.module, ids)
        factors = self._factors()
        if factors is None:
            return y
        left, right, decay = factors
        # a shallow copy with L in the weight's place goes through the module's own forward, scaling included
        shadow = copy.copy(self.module)
        shadow.__dict__["_parameters"] = {"weight": left.to(y.dtype)}
        low_rank = self._own(shadow, ids) @ right.to(y.dtype).t()
        return torch.add(low_rank, y, alpha=decay)


def trained(module: nn.Module) -> list[Tensor]:
    """The leaves whose gradients the module's forward pass brings: its own weights that train, attached coordinates."""
    leaves: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    attachment = getattr(module.__dict__.get("forward"), "__self__", None)
    if isinstance(attachment, Attachment):
        leaves += [one.values for one in attachment.attached]
    return leaves
