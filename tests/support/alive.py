"""What of the storages that operations make is alive: counted, in the unit that a test wants."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def bytes_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


class Alive(TorchDispatchMode):
    """Follows the storages of operations' results while it is entered.

    size: of a result's storage, in any unit; 0 where it does not count. new: leave out results that share the memory of
    an argument (views, what is written in place). looks: times to look, 10 ms apart, before a sum counts as the
    largest: gloo's thread lets go of a message a moment after it has arrived.
    made: how many were followed; most: the largest sum of sizes at once; largest: the largest size.
    """

    def __init__(self, size: Callable[[Tensor], int] = bytes_of, new: bool = True, looks: int = 1) -> None:
        super().__init__()
        self.made = self.most = self.largest = 0
        self._size, self._new, self._looks = size, new, looks
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def watch(self, tensor: Tensor) -> None:
        """Follow the storage of ``tensor`` too."""
        size, storage = self._size(tensor), tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if size and (known is None or known[0].expired()):
            self._storages[storage._cdata] = StorageWeakRef(storage), size
            self.made += 1
            self.largest = max(self.largest, size)
            self.most = max(self.most, self.now(self.most, self._looks))

    def now(self, expected: int = 0, looks: int = 100) -> int:
        """The sum of the sizes of what is alive, after so many looks while it is more than expected."""
        for look in range(looks):
            time.sleep(0.01 if look else 0.0)
            self._storages = {key: one for key, one in self._storages.items() if not one[0].expired()}
            alive = sum(size for _, size in self._storages.values())
            if alive <= expected:
                break
        return alive

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if self._new and isinstance(t, Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.watch(tensor)
        return result
