"""Products with weights that are frozen and whose coordinates train.

A weight as stored, W (rows, columns), is used as decay * W + L R^T with L (rows, r), R (columns, r): for rows >=
columns L is the trained coordinates and R the projector, otherwise the other way round (see ``project.py``). Neither
L R^T nor the gradient of W is ever formed: the coordinates' gradient comes out of products of their own size.

A stack of experts' weights is E such matrices, and a token is multiplied with those of its own experts. Which, a model
says by how it uses the stack: `Use`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from ows_ds.compat.torch import (
    add_product,
    grouped_product,
    has_grouped_product,
    own_parameter,
    reshaped,
    with_weight,
)
from ows_ds.distributed.formats import Format, Scaled
from ows_ds.distributed.frozen import frozen_of, resting, without_memory
from ows_ds.distributed.weights import Weights
from ows_ds.optim.projection import is_tall


@dataclass(frozen=True)
class Experts:
    """A stack of matrices in few bits, each of which is made when it is asked for: (E, C_in, C_out)."""

    format: Format
    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
    flipped: bool = False

    @property
    def mT(self) -> Experts:
        """As a tensor's."""
        return replace(self, flipped=not self.flipped)

    @property
    def shape(self) -> tuple[int, ...]:
        """As a tensor's."""
        experts, *sides = self.format.full_shape
        return (experts, *(sides[::-1] if self.flipped else sides))

    def __getitem__(self, expert: int) -> Tensor | Scaled:
        found = self.format.factor(self.codes, self.scales, self.dtype, expert)
        return found.mT if self.flipped else found


def times(x: Tensor, matrix: Tensor | Scaled) -> Tensor:
    """x matrix."""
    return x @ matrix if isinstance(matrix, Tensor) else matrix.product(x)


class Use:
    """How tokens (n, C_in) are multiplied with a matrix (C_in, C_out). Subclasses: with a stack of matrices."""

    def flat(self, x: Tensor) -> Tensor:
        """Tokens as the other methods take them."""
        return x.reshape(-1, x.shape[-1])

    def product(self, x: Tensor, matrix: Any) -> Tensor:
        """x (n, i) matrix (i, o) -> (n, o). matrix: a tensor, `Scaled`, or `Experts`."""
        return times(x, matrix)

    def add_product(self, total: Tensor, x: Tensor, matrix: Tensor) -> None:
        """The same, added to ``total`` in place."""
        total.addmm_(x, matrix)

    def add_outer(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """``total`` (i, o), perhaps of a wider dtype, <- total + a^T b, for tokens a (n, i) and b (n, o)."""
        add_product(total, a.t(), b)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """a^T b alone."""
        return a.t() @ b

    def inputs(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """Which tokens go to which matrix."""
        return [(0, self.flat(x))]


@dataclass(frozen=True)
class OneExpert(Use):
    """All tokens with the matrix of one expert."""

    index: int

    def inputs(self, x: Tensor) -> list[tuple[int, Tensor]]:
        return [(self.index, self.flat(x))]

    def product(self, x: Tensor, matrix: Any) -> Tensor:
        return times(x, matrix[self.index])

    def add_product(self, total: Tensor, x: Tensor, matrix: Tensor) -> None:
        total.addmm_(x, matrix[self.index])

    def add_outer(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        add_product(total[self.index], a.t(), b)


@dataclass(frozen=True, eq=False)
class Grouped(Use):
    """Tokens in the order of their experts. ends: (E,), int, where each expert's tokens end; what comes after the last
    of them belongs to no expert, and its products are zero."""

    ends: Tensor

    def _groups(self) -> list[tuple[int, slice]]:
        ends = self.ends.tolist()
        return [(e, slice(a, b)) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if a < b]

    def inputs(self, x: Tensor) -> list[tuple[int, Tensor]]:
        return [(expert, x[rows]) for expert, rows in self._groups()]

    def product(self, x: Tensor, matrix: Any) -> Tensor:
        if isinstance(matrix, Tensor) and has_grouped_product(x, matrix):
            return grouped_product(x, matrix, self.ends)
        y = x.new_zeros(x.shape[0], matrix.shape[-1])
        for expert, rows in self._groups():
            y[rows] = times(x[rows], matrix[expert])
        return y

    def add_product(self, total: Tensor, x: Tensor, matrix: Tensor) -> None:
        if has_grouped_product(x, matrix):
            total += grouped_product(x, matrix, self.ends)
            return
        for expert, rows in self._groups():
            total[rows].addmm_(x[rows], matrix[expert])

    def add_outer(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        if has_grouped_product(a.t(), b):
            total += grouped_product(a.t(), b, self.ends)
            return
        for expert, rows in self._groups():
            add_product(total[expert], a[rows].t(), b[rows])

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        if has_grouped_product(a.t(), b):
            return grouped_product(a.t(), b, self.ends)
        total = a.new_zeros(len(self.ends), a.shape[-1], b.shape[-1])
        for expert, rows in self._groups():
            torch.mm(a[rows].t(), b[rows], out=total[expert])
        return total


class Batched(Use):
    """Tokens (E, n, C_in): some for each expert."""

    def flat(self, x: Tensor) -> Tensor:
        return x

    def inputs(self, x: Tensor) -> list[tuple[int, Tensor]]:
        return list(enumerate(x))

    def product(self, x: Tensor, matrix: Any) -> Tensor:
        if isinstance(matrix, Tensor):
            return x @ matrix
        y = x.new_empty(*x.shape[:-1], matrix.shape[-1])
        for expert, tokens in enumerate(x):
            y[expert] = times(tokens, matrix[expert])
        return y

    def add_product(self, total: Tensor, x: Tensor, matrix: Tensor) -> None:
        total.baddbmm_(x, matrix)

    def add_outer(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        total += a.mT @ b

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        return a.mT @ b


EVERY = Use()


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
            inner, outer = _sides(attached, inputs_first, x.dtype)
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
        del matrix  # before the caller goes on
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


def _sides(attached: list[Coordinates], inputs_first: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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


class Hook:
    """What acts on a module's weight while it is installed: `coordinates`, `sketch`, both or nothing. Without either,
    and with a weight that is frozen or trains at full rank, the module computes what it always did. The values of
    `sketch` are zero: only their gradient counts."""

    coordinates: Coordinates | None = None
    sketch: Coordinates | None = None

    @property
    def attached(self) -> list[Coordinates]:
        """What acts now."""
        return [one for one in (self.coordinates, self.sketch) if one is not None]

    def remove(self) -> None:
        """Give the module back as it was."""
        raise NotImplementedError


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
        if frozen_of(own_parameter(self.module, "weight")) is None:  # a frozen weight in few bits always needs it
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
        right, left = _sides(attached, False, y.dtype)
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
        if frozen_of(self.parameter) is not None:  # in few bits: see `LowRankHook.remove`
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
        there = getattr(module.__dict__.get("forward"), "__self__", None)
        there = there if isinstance(there, LowRankHook) else getattr(module.__dict__.get(key), "hook", None)
        if there is not None:
            return there
    return LowRankHook(module, sharded) if multiplies(module) else WeightHook(module, key)


def hook_frozen(weights: Weights) -> None:
    """Let modules compute with weights that are in few bits, whoever trains what. Once a model."""
    for parameter in weights.parameters().values():
        frozen = frozen_of(parameter)
        for module, key in () if frozen is None else frozen.places:
            hook_of(module, key, weights.sharded)


def trained(module: nn.Module) -> list[Tensor]:
    """The leaves whose gradients the module's forward pass brings: its own weights that train, attached coordinates."""
    leaves: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    attachment = getattr(module.__dict__.get("forward"), "__self__", None)
    if isinstance(attachment, LowRankHook):
        leaves += [one.values for one in attachment.attached]
    return leaves
