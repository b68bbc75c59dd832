"""What the matrices of a stack of experts are multiplied with, read off the products that a model's own code computes.

How tokens come to their experts is the model's affair: in a loop over experts, sorted, or in batches. Every way ends in
products of torch with the stack's memory, and where in it a factor lies says whose matrix it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ows_ds.compat.torch import storage_address
from ows_ds.distributed.frozen import resting
from ows_ds.errors import UserError

PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "_grouped_mm": 0, "grouped_mm_fallback": 0}
PRODUCTS |= {"addmm": 1, "addmv": 1, "baddbmm": 1}  # name -> which argument is the first factor
COPIES = ("clone", "_to_copy", "index")  # what a model may multiply with in place of the stack itself

Add = Callable[[int, bool, Tensor], None]
"""(expert, whether its matrix is stored as (C_in, C_out), tokens that it is multiplied with: (any, C_in))."""


class ExpertInputs(TorchDispatchMode):
    """Within it, ``add`` is called with the inputs of a stack's matrices.

    Raises UserError (``sampling.importance``) for a use of the stack that is no product of tokens with full matrices.
    """

    def __init__(self, name: str, stack: Tensor, add: Add) -> None:
        """name: for the error. stack: (E, a, b)."""
        super().__init__()
        self.name, self.add = name, add
        self.seen = False
        # tensors (any, a, b) in whose memory matrices lie, and whose; kept alive, so that nothing else lies there
        self._known = [(stack.detach(), list(range(len(stack))))]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if not func.is_view and any(self._find(one) for one in tensors):
            name = str(func).split(".")[1]
            uses = self._inputs(name, args, kwargs)
            if uses is not None:
                self.seen = True
                for use in uses:
                    self.add(*use)
            elif not self._copied(name, args, y):
                raise self.refusal(str(func))
        return y

    def refusal(self, what: str) -> UserError:
        """what: the model does with the stack."""
        right = f"expected rm, bi or alpha: {self.name} is used by {what}, which hides the inputs of its experts"
        return UserError("sampling.importance", "outlier", right)

    def _find(self, tensor: Tensor) -> tuple[list[int], bool] | None:
        """Whose matrices the tensor is, in order ([]: parts of some), and whether as transposes; None: no expert's."""
        for known, experts in self._known:
            step, start = known.stride(0), int(tensor.storage_offset() - known.storage_offset())
            if storage_address(tensor) == storage_address(known) and 0 <= start < step * len(known):
                first, rest = divmod(start, step)
                some = experts[first : first + (len(tensor) if tensor.dim() == 3 else 1)]
                full = rest == 0 and _sides(tensor) == _sides(known)
                full &= tensor.dim() == 2 or (tensor.dim() == 3 and tensor.stride(0) == step)
                return some if full else [], tensor.stride()[-2:] != known.stride()[-2:]
        return None

    def _inputs(self, name: str, args: Any, kwargs: Any) -> list[tuple[int, bool, Tensor]] | None:
        """What `add` takes; None if this is no product of anything with full matrices."""
        if name not in PRODUCTS:
            return None
        a, b = args[PRODUCTS[name] :][:2]
        left, right = self._find(a), self._find(b)
        if right and not left:
            experts, first, x = right[0], not right[1], a
        elif left and not right and "grouped" not in name:
            experts, first, x = *left, b[None] if b.dim() == 1 else b.mT
        else:
            return None
        if not experts:
            return None
        if "grouped" in name:
            ends = (kwargs["offs"] if "offs" in kwargs else args[2]).tolist()
            return [(e, first, x[i:j]) for e, i, j in zip(experts, [0, *ends], ends, strict=False) if i < j]
        return [(e, first, one) for e, one in zip(experts, [x] if x.dim() == 2 else x, strict=True)]

    def _copied(self, name: str, args: Any, y: Tensor) -> bool:
        """Whether full matrices were copied; then the copy is known too."""
        found = self._find(args[0]) if name in COPIES else None
        if not found or not found[0] or y.dim() != args[0].dim():
            return False
        experts, transposed = found
        if name == "index":
            [index] = args[1]
            experts = torch.tensor(experts)[index.cpu()].tolist()
        y = y.mT if transposed else y
        self._known.append((y if y.dim() == 3 else y[None], experts))
        return True


def _sides(tensor: Tensor) -> list[tuple[int, int]]:
    """Length and stride of the last two dimensions, whichever comes first."""
    return sorted(zip(tensor.shape[-2:], tensor.stride()[-2:], strict=True))


def watch(module: nn.Module, name: str, stack: nn.Parameter, add: Add) -> Iterator[RemovableHandle]:
    """Call ``add`` with what the stack, a parameter of ``module``, is multiplied with in each of its forward passes."""
    if (frozen := resting(stack)) is not None:  # its products are ours: they say what is multiplied with what
        yield from _watch_codes(module, name, next(key for one, key in frozen.places if one is module), add)
        return
    active: list[ExpertInputs] = []

    def enter(*_: Any) -> None:  # comes after DeepSpeed's own hook, which gathers
        active.append(ExpertInputs(name, stack, add))
        active[-1].__enter__()

    def leave(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        if not active:
            return
        mode = active.pop()
        mode.__exit__(None, None, None)
        if not mode.seen and all(one.numel() for one in args if isinstance(one, Tensor)):
            raise mode.refusal("code outside of torch")

    yield module.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave, always_call=True)


def _watch_codes(module: nn.Module, name: str, key: str, add: Add) -> Iterator[Any]:
    """The same of a stack in few bits, in whose place a `ows_ds.optim.hooks.StandIn` is."""
    hook, seen = module.__dict__[key].hook, False

    def observe(expert: int, inputs_first: bool, x: Tensor) -> None:
        nonlocal seen
        seen = True
        add(expert, inputs_first, x)

    def enter(*_: Any) -> None:
        nonlocal seen
        seen, hook.observe = False, observe

    def leave(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        hook.observe = None
        if not seen and all(one.numel() for one in args if isinstance(one, Tensor)):
            raise ExpertInputs(name, torch.empty(1, 0, 0), add).refusal("something that is no product of tokens")

    yield module.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave, always_call=True)
