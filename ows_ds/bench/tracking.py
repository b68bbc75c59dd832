"""Bytes of live tensors through a piece of work, by component: exact and the same every time, on any device.

Counted is every storage that an operation of torch returns, until it is freed, and every one that was there before.
What a kernel allocates and frees within itself is not seen, nor are the allocator's gaps.

    weights       the model's parameters, adapters among them
    gradients     of parameters and coordinates
    optimizer     the rest of the method's state: moments, float32 masters, coordinates, projectors
    activations   made in a forward pass and still alive
    buffers       all else: tensors of a backward pass and of an update, token ids, rotary tables
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ows_ds.compat.torch import storage_address

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "buffers")
_OWNERS = ("ows_ds", "torch.optim", "galore_torch", "peft")  # packages whose objects are searched for tensors


class Tracker(TorchDispatchMode):
    """Follows storages while it is entered. Enter `forward` around forward passes."""

    def __init__(self, model: nn.Module, weights: Iterable[Tensor], state: Any) -> None:
        """weights: the model's tensors on this rank. state: has the method's other tensors (see `state_tensors`)."""
        super().__init__()
        self._component: dict[int, str] = {}  # by the number of a storage
        self._numbers: dict[int, int] = {}  # of a live storage, by its address
        self._events: list[tuple[int, int]] = []  # number, bytes that came (or went)
        self._phase = "buffers"
        self._model, self._state = model, state
        self._handles: list[Any] = []
        self._see_state()
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._see(parameter.grad, "gradients")
        for tensor in weights:
            self._see(tensor, "weights")
        for one in gc.get_objects():
            if issubclass(type(one), Tensor):
                self._see(one)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """What is made within are activations; what its backward pass brings to weights are gradients.

        So are parts of gradients that the method keeps when its own hooks are done.
        """
        self.close()
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(lambda grad: self._see(grad, "gradients")))
                kept = parameter.register_post_accumulate_grad_hook(lambda _: self._see_state("gradients"))
                self._handles.append(kept)
        self._phase = "activations"
        try:
            yield
        finally:
            self._phase = "buffers"

    def close(self) -> None:
        """Remove the hooks on gradients."""
        while self._handles:
            self._handles.pop().remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # a view is of what is known, or of a copy within a kernel, as gloo's reduce-scatter makes one
        for one in () if func.is_view else tree_iter(out):
            if isinstance(one, Tensor):
                self._see(one, self._phase, new=True)
        return out

    def _see_state(self, only: str | None = None) -> None:
        for component, tensor in state_tensors(self._state):
            if only in (None, component):
                self._see(tensor, component)

    def _see(self, tensor: Tensor, component: str = "buffers", new: bool = False) -> None:
        """Count the tensor's storage once; ``component`` holds unless it is known and ``new``."""
        if tensor.device.type == "meta" or type(tensor).__name__ == "FakeTensor":
            return
        storage, address = tensor.untyped_storage(), storage_address(tensor)
        size = storage.nbytes()
        number = self._numbers.get(address)
        if number is None:
            number = self._numbers[address] = len(self._component)
            self._events.append((number, size))
            weakref.finalize(storage, self._gone, address, number, size).atexit = False
            self._component[number] = component
        elif not new and component != "buffers":
            self._component[number] = component

    def _gone(self, address: int, number: int, size: int) -> None:
        del self._numbers[address]
        self._events.append((number, -size))

    def peak(self) -> dict[str, int]:
        """Bytes by component when their sum was largest."""
        return peak(self._events, self._component)


def peak(events: Iterable[tuple[int, int]], component: Mapping[int, str]) -> dict[str, int]:
    """Bytes by component when their sum was largest. events: (number, bytes that came or went), in order."""
    now: Counter[str] = Counter()
    best, most = dict.fromkeys(COMPONENTS, 0), 0
    for number, size in events:
        now[component[number]] += size
        if (total := now.total()) > most:
            best, most = {name: now[name] for name in COMPONENTS}, total
    return best


def state_tensors(owner: Any, grads: bool = False, seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """("gradients" or "optimizer", tensor) of all tensors that ``owner`` refers to, but for those inside modules.

    Gradients are a tensor's ``.grad``, and what an attribute with "grad" in its name refers to. Searched are containers
    and objects of packages that optimizers come from.
    """
    seen = set() if seen is None else seen
    if id(owner) in seen or isinstance(owner, nn.Module):
        return
    seen.add(id(owner))
    parts: Iterable[tuple[str, Any]] = ()
    if isinstance(owner, Tensor):
        if isinstance(owner, nn.Parameter) and owner.grad is not None:
            yield "gradients", owner.grad
        yield "gradients" if grads else "optimizer", owner.data
    elif isinstance(owner, Mapping | list | tuple):
        parts = (("", value) for value in (owner.values() if isinstance(owner, Mapping) else owner))
    elif type(owner).__module__.startswith(_OWNERS):
        parts = vars(owner).items()
    for name, value in parts:
        yield from state_tensors(value, grads or "grad" in name, seen)
