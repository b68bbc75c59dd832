"""Products with weights that are frozen and whose coordinates train.

A weight as stored, W (rows, columns), is used as decay * W + L R^T with L (rows, r), R (columns, r): for rows >=
columns L is the trained coordinates and R the projector, otherwise the other way round. Neither L R^T nor the gradient
of W is ever formed: the coordinates' gradient comes out of products of their own size.

How tokens meet a matrix, or a stack of them: `ows_ds.optim.products`. Who lets a model's modules use this:
`ows_ds.optim.hooks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ows_ds.compat.torch import reshaped
from ows_ds.distributed.formats import Format
from ows_ds.distributed.frozen import resting
from ows_ds.optim.products import EVERY, Experts, Use
from ows_ds.optim.projection import is_tall


@dataclass
class Coordinates:
    """What is attached to one matrix (m, n), or to a stack (E, m, n) of them: then everything has E first.

    values: (max(m, n), r), a leaf. projector: (min(m, n), r). Both of the weight's dtype.
    grad: where linear modules add the gradient of ``values``, its shape, float32 or wider; None: autograd brings it.
    decay: factor on the frozen weight: weight decay acts on decay * W + L R^T as a whole.
    transposed: values on the shorter side, the projector on the longer one (the second pass of a `Sketch`).
    """

    shape: tuple[int, ...]
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

    def accumulate(self, a: Tensor, b: Tensor, use: Use) -> Tensor | None:
        """The gradient a^T b, for a (tokens, max(m, n)) and b (tokens, r): added to `grad`, or returned."""
        if self.grad is None:
            return (a.t() @ b).to(self.values.dtype)
        use.add_outer(self.grad, a, b)
        return None


def make_coordinates(
    shape: tuple[int, ...], values: Tensor, projector: Tensor, grad: Tensor, direct: bool, transposed: bool = False
) -> Coordinates:
    """Coordinates whose gradients are added to ``grad``, in its dtype.

    values: becomes a leaf that shares its memory. direct: linear modules add them; otherwise autograd brings them (to
    embeddings, and to a head that is differentiated where its loss is computed).
    """
    leaf = values.detach().requires_grad_()

    def add(gradient: Tensor | None) -> None:
        if gradient is not None:
            grad.add_(gradient)

    def spend(leaf: Tensor) -> None:
        if not direct:  # not in a hook before: a loss that differentiates its head calls that as well, once a run
            add(leaf.grad)
        leaf.grad = None

    if direct:  # before whoever else waits for the gradient
        leaf.register_hook(add)
    leaf.register_post_accumulate_grad_hook(spend)
    return Coordinates(shape, leaf, projector, transposed=transposed, grad=grad if direct else None)


class FrozenLinear(torch.autograd.Function):
    """y = x (decay * W + sum of L R^T)^T + b, each token with a matrix W of its own where W is a stack.

    W is frozen, perhaps in few bits, or trains at full rank and has no coordinates. Saves x B (tokens x r) where
    coordinates stand on the output side, x where any stand on the input side or W trains, and nothing of the tokens'
    size otherwise. The weight is saved as the module's own parameter, so that ZeRO-3 may release it after the forward
    pass and gather it again for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scales: Tensor | None,
        format: Format | None,
        bias: Tensor | None,
        attached: list[Coordinates],
        inputs_first: bool,
        use: Use,
        *values: Tensor,
    ) -> Tensor:
        """x (..., C_in), weight as stored, bias (C_out), values: of what is ``attached`` -> (..., C_out), as x.

        scales, format: of a weight that is codes."""
        tokens = use.flat(x)
        matrix = _dense(weight, scales, format, x.dtype)
        matrix = matrix if inputs_first else matrix.mT
        decay = attached[0].decay if attached else 1.0
        if bias is not None and isinstance(matrix, Tensor):
            y = torch.addmm(bias.to(x.dtype), tokens, matrix, alpha=decay)
        else:
            y = use.product(tokens, matrix)
            if decay != 1.0:
                y *= decay
            if bias is not None:
                y += bias.to(x.dtype)
        inner = outer = hidden = None
        if attached:
            inner, outer = sides(attached, inputs_first, x.dtype)
            hidden = use.product(tokens, inner)
            use.add_product(y, hidden, outer.mT)
        ctx.outside = [one.left != inputs_first for one in attached]
        needed = list(zip(ctx.needs_input_grad[FIRST_VALUE:], ctx.outside, strict=True))
        inputs_needed = ctx.needs_input_grad[1] or any(needs and not outside for needs, outside in needed)
        ctx.save_for_backward(
            weight,
            scales,
            inner,
            outer,
            tokens if inputs_needed else None,
            hidden if any(needs and outside for needs, outside in needed) else None,
        )
        ctx.attached, ctx.decay, ctx.inputs_first, ctx.use, ctx.format = attached, decay, inputs_first, use, format
        ctx.bias_dtype = None if bias is None else bias.dtype
        return reshaped(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad (..., C_out)."""
        weight, scales, inner, outer, tokens, hidden = ctx.saved_tensors
        use: Use = ctx.use
        flat = use.flat(grad)
        grad_x = grad_weight = grad_bias = None
        grad_hidden = None if outer is None else use.product(flat, outer)
        if ctx.needs_input_grad[0]:
            matrix = _dense(weight, scales, ctx.format, flat.dtype)
            grad_x = use.product(flat, matrix.mT if ctx.inputs_first else matrix)
            if ctx.decay != 1.0:
                grad_x *= ctx.decay
            if grad_hidden is not None:
                use.add_product(grad_x, grad_hidden, inner.mT)
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_weight = use.outer(*((tokens, flat) if ctx.inputs_first else (flat, tokens))).to(weight.dtype)
        if ctx.needs_input_grad[4]:
            grad_bias = flat.sum(0).to(ctx.bias_dtype)
        grads: list[Tensor | None] = []
        first = 0
        for one, outside, needs in zip(ctx.attached, ctx.outside, ctx.needs_input_grad[FIRST_VALUE:], strict=True):
            columns = slice(first, first + one.projector.shape[-1])
            first = columns.stop
            a, b = (flat, hidden) if outside else (tokens, grad_hidden)
            if needs:
                assert b is not None
                grads.append(one.accumulate(a, b[..., columns], use))
            else:
                grads.append(None)
        return grad_x, grad_weight, None, None, grad_bias, None, None, None, *grads


FIRST_VALUE = 8  # of `FrozenLinear`'s arguments


def _dense(weight: Tensor, scales: Tensor | None, format: Format | None, dtype: torch.dtype) -> Any:
    """What to multiply with, as it is stored: a tensor, `Scaled`, or `Experts`."""
    if format is None or scales is None:
        return weight.to(dtype)
    if format.experts is not None:
        return Experts(format, weight, scales, dtype)
    return format.factor(weight, scales, dtype)


def sides(attached: list[Coordinates], inputs_first: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(C_in, k) and (C_out, k) of all that is attached, side by side."""
    lefts, rights = zip(*(one.factors for one in attached), strict=True)
    # one alone: the tensors themselves, for copies would be kept for the backward pass
    left, right = (some[0].to(dtype) if len(some) == 1 else torch.cat(some, -1).to(dtype) for some in (lefts, rights))
    return (left, right) if inputs_first else (right, left)


def frozen_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, attached: list[Coordinates], inputs_first: bool, use: Use = EVERY
) -> Tensor:
    """See `FrozenLinear`. weight: a module's own parameter, real or codes."""
    frozen = resting(weight)
    scales, format = (None, None) if frozen is None else (frozen.scales, frozen.format)
    given = (weight, scales, format, bias, attached, inputs_first, use, *(one.values for one in attached))
    y: Tensor
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        y = FrozenLinear.apply(x, *given)
        return y
    with torch.autocast(kind, enabled=False):  # it casts what goes into products: here that is done by hand
        y = FrozenLinear.apply(x.to(torch.get_autocast_dtype(kind)), *given)
    return y
