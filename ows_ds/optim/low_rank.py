"""Linear modules whose weight is frozen and whose coordinates train.

A weight as stored, W (rows, columns), is used as decay * W + L R^T with L (rows, r), R (columns, r): for rows >=
columns L is the trained coordinates and R the projector, otherwise the other way round (see ``project.py``). Neither
L R^T nor the gradient of W is ever formed: the coordinates' gradient comes out of products of their own size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ows_ds.compat.torch import add_product, with_weight
from ows_ds.optim.projection import is_tall


@dataclass
class Coordinates:
    """What is attached to one matrix.

    values: (max(m, n), r), a leaf. projector: (min(m, n), r). Both of the weight's dtype.
    grad: where linear modules add the gradient of ``values``, its shape, float32 or wider; None: autograd brings it.
    decay: factor on the frozen weight: weight decay acts on decay * W + L R^T as a whole.
    transposed: values on the shorter side, the projector on the longer one (the second pass of a `Sketch`).
    """

    shape: tuple[int, int]
    values: Tensor
    projector: Tensor
    decay: float = 1.0
    transposed: bool = False
    grad: Tensor | None = None

    @property
    def left(self) -> bool:
        """Whether the values are L."""
        return is_tall(self.shape) != self.transposed

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """L (rows, r) and R (columns, r)."""
        return (self.values, self.projector) if self.left else (self.projector, self.values)

    def accumulate(self, a: Tensor, b: Tensor) -> Tensor | None:
        """The gradient a^T b, for a (tokens, max(m, n)) and b (tokens, r): added to `grad`, or returned."""
        if self.grad is None:
            return (a.t() @ b).to(self.values.dtype)
        add_product(self.grad, a.t(), b)
        return None


def make_coordinates(
    shape: tuple[int, int], values: Tensor, projector: Tensor, grad: Tensor, direct: bool, transposed: bool = False
) -> Coordinates:
    """Coordinates whose gradients are added to ``grad``, in its dtype.

    values: becomes a leaf that shares its memory. direct: linear modules add them; otherwise autograd brings them (to
    embeddings, and to a head that is differentiated where its loss is computed).
    """
    leaf = values.detach().requires_grad_()
    if direct:
        return Coordinates(shape, leaf, projector, transposed=transposed, grad=grad)

    def add(leaf: Tensor) -> None:
        assert leaf.grad is not None
        grad.add_(leaf.grad)
        leaf.grad = None

    leaf.register_post_accumulate_grad_hook(add)
    return Coordinates(shape, leaf, projector, transposed=transposed)


class FrozenLinear(torch.autograd.Function):
    """y = x (decay * W + sum of L R^T)^T + b with frozen W.

    Saves x B (tokens x r) where coordinates stand on the output side, x where any stand on the input side, and nothing
    of the tokens' size without coordinates. The weight is saved as the module's own parameter, so that ZeRO-3 may
    release it after the forward pass and gather it again for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        attached: list[Coordinates],
        inputs_first: bool,
        *values: Tensor,
    ) -> Tensor:
        """x (..., C_in), weight as stored, bias (C_out), values: of what is ``attached`` -> (..., C_out), as x."""
        tokens = x.reshape(-1, x.shape[-1])
        matrix = weight.to(x.dtype) if inputs_first else weight.to(x.dtype).t()
        decay = attached[0].decay if attached else 1.0
        if bias is not None:
            y = torch.addmm(bias.to(x.dtype), tokens, matrix, alpha=decay)
        else:
            y = tokens @ matrix
            if decay != 1.0:
                y *= decay
        inner = outer = hidden = None
        if attached:
            inner, outer = _sides(attached, inputs_first, x.dtype)
            hidden = tokens @ inner
            y.addmm_(hidden, outer.t())
        ctx.outside = [one.left != inputs_first for one in attached]
        needed = list(zip(ctx.needs_input_grad[5:], ctx.outside, strict=True))
        ctx.save_for_backward(
            weight,
            inner,
            outer,
            tokens if any(needs and not outside for needs, outside in needed) else None,
            hidden if any(needs and outside for needs, outside in needed) else None,
        )
        ctx.attached, ctx.decay, ctx.inputs_first = attached, decay, inputs_first
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad (..., C_out)."""
        weight, inner, outer, tokens, hidden = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_bias = None
        grad_hidden = None if outer is None else flat @ outer
        if ctx.needs_input_grad[0]:
            matrix = weight.to(flat.dtype)
            grad_x = flat @ (matrix.t() if ctx.inputs_first else matrix)
            if ctx.decay != 1.0:
                grad_x *= ctx.decay
            if grad_hidden is not None:
                grad_x.addmm_(grad_hidden, inner.t())
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0).to(ctx.bias_dtype)
        grads: list[Tensor | None] = []
        first = 0
        for one, outside, needs in zip(ctx.attached, ctx.outside, ctx.needs_input_grad[5:], strict=True):
            columns = slice(first, first + one.projector.shape[1])
            first = columns.stop
            a, b = (flat, hidden) if outside else (tokens, grad_hidden)
            if needs:
                assert b is not None
                grads.append(one.accumulate(a, b[:, columns]))
            else:
                grads.append(None)
        return grad_x, None, grad_bias, None, None, *grads


def _sides(attached: list[Coordinates], inputs_first: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(C_in, k) and (C_out, k) of all that is attached, side by side."""
    lefts, rights = zip(*(one.factors for one in attached), strict=True)
    # one alone: the tensors themselves, for copies would be kept for the backward pass
    left, right = (some[0].to(dtype) if len(some) == 1 else torch.cat(some, 1).to(dtype) for some in (lefts, rights))
    return (left, right) if inputs_first else (right, left)


class LowRankHook:
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

    def _linear(self, x: Tensor) -> Tensor:
        module: Any = self.module
        weight, attached = module.weight, self.attached
        # torch's own linear keeps a view of the gathered weight alive until the backward pass; under ZeRO-3 that
        # would undo the sharding, so that frozen modules go through FrozenLinear there as well
        if weight.requires_grad or not (attached or self._sharded):
            return self._own(module, x)
        values, kind = (one.values for one in attached), x.device.type
        given = (weight, module.bias, attached, isinstance(module, Conv1D), *values)
        y: Tensor
        if not torch.is_autocast_enabled(kind):
            y = FrozenLinear.apply(x, *given)
            return y
        with torch.autocast(kind, enabled=False):  # it casts what goes into products: here that is done by hand
            y = FrozenLinear.apply(x.to(torch.get_autocast_dtype(kind)), *given)
        return y

    def _lookup(self, ids: Tensor) -> Tensor:
        y = self._own(self.module, ids)
        attached = self.attached
        if not attached:
            return y
        right, left = _sides(attached, False, y.dtype)
        # a shallow copy with L in the weight's place goes through the module's own forward, scaling included
        shadow = with_weight(self.module, left)
        low_rank = self._own(shadow, ids) @ right.t()
        return torch.add(low_rank, y, alpha=attached[0].decay)


def trained(module: nn.Module) -> list[Tensor]:
    """The leaves whose gradients the module's forward pass brings: its own weights that train, attached coordinates."""
    leaves: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    attachment = getattr(module.__dict__.get("forward"), "__self__", None)
    if isinstance(attachment, LowRankHook):
        leaves += [one.values for one in attachment.attached]
    return leaves
