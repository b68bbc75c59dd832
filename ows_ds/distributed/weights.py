"""One view of the model's weights, wherever they live: replicated on every rank, or in DeepSpeed's shards.

A weight is seen as its flattened entries in row-major order. Rank i of w owns the interval [i * s, (i + 1) * s) of
them with s = ceil(numel / w), the partition of ZeRO-3 and of ``torch.chunk``, and only it writes them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ows_ds.compat.torch import copy_all, copy_to_host, to_device
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.frozen import Frozen, frozen_of, named_weights, resting, without_memory
from ows_ds.distributed.merging import CHUNK, add_low_rank


def interval(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and last + 1 flattened entry of ``rank``; the same for the last ranks where the entries do not suffice."""
    size = math.ceil(numel / world_size)
    return min(rank * size, numel), min((rank + 1) * size, numel)


@dataclass
class Shard:
    """A run of a flattened tensor that this rank contributes to a checkpoint.

    shape: of the full tensor; start: of the run; tensor: 1-D.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor


ReadShard = Callable[[str, int, int], Tensor]
"""(name, first, last + 1) -> these entries of the flattened tensor."""


class Weights(Protocol):
    """What the rest of the program may do with a model's weights."""

    module: nn.Module
    comm: Communicator
    device: torch.device  # where forward and backward run
    sharded: bool  # whether weights are gathered only around each pass
    moved: Counter[str]  # bytes of real weights that went ``to_host`` (`freeze`) and ``to_device`` (`thaw`)

    def __call__(self, **batch: Any) -> Any:
        """The model's forward pass."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """All weights by name, real ones: of frozen matrices in few bits those that rest elsewhere."""

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let the real weights of those that may be in few bits rest, and modules compute with codes of what they are
        now. Not inside a forward or backward pass. Collective."""

    def thaw(self, parameters: Iterable[nn.Parameter]) -> None:
        """Bring their real weights back to the device and into their modules. Collective."""

    def stage(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begin to read what `thaw` will need, beside what else runs."""

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The full parameter's shape."""

    def interval(self, parameter: nn.Parameter) -> tuple[int, int]:
        """The flattened entries that this rank owns."""

    def local(self, parameter: nn.Parameter) -> Tensor:
        """Those entries: 1-D, of the weight's dtype, sharing its memory; while they rest, on the CPU, and perhaps read
        from a file (`set_local` writes). Not inside a forward or backward pass."""

    def set_local(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Set those entries, resting or not, to ``values``; `publish` follows."""

    def resident_slice(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        """All entries that lie on this rank: where they start, and the 1-D run, sharing the weight's memory."""

    def publish(self, parameters: list[nn.Parameter]) -> None:
        """After writing ``local`` of ``parameters``: let every rank see it. Collective."""

    def write(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        """Set full parameters to ``values`` (any dtype, numel entries each), which every rank has."""

    def merge(
        self, parameter: nn.Parameter, left: Tensor, right: Tensor, decay: float, noise: str | None = None
    ) -> None:
        """In place W <- decay * W + left @ right.mT, left (rows, r), right (columns, r), without communication. Of a
        stack of matrices, left (E, rows, r), right (E, columns, r).

        noise: None, or what the randomness of stochastic rounding depends on (see `add_low_rank`).
        """

    def backward(self, loss: Tensor) -> None:
        """Backpropagate this rank's part of the mean over ranks: ``loss`` divided by the world size."""

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Within it ``parameters`` are gathered, and what rank 0 writes to them stays. Collective."""

    def after_step(self) -> None:
        """Call it after every step, evaluation and generation: nothing stays gathered."""

    def full_tensor(self, parameter: nn.Parameter) -> Tensor:
        """The full parameter on every rank, detached, in its dtype. Collective under ZeRO-3, and while it rests."""

    def runs(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor]]:
        """The same in runs of at most about `CHUNK` entries: where each starts, 1-D, valid until the next. Collective
        under ZeRO-3: every rank takes all of them."""


class Home(ABC):
    """What is common to both homes of weights (see `Weights`)."""

    module: nn.Module
    comm: Communicator
    device: torch.device
    _reader: ThreadPoolExecutor | None = None

    def __init__(self) -> None:
        self.moved: Counter[str] = Counter()

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(named_weights(self.module))

    @abstractmethod
    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]: ...

    def interval(self, parameter: nn.Parameter) -> tuple[int, int]:
        return interval(math.prod(self.shape(parameter)), self.comm.rank, self.comm.world_size)

    def local(self, parameter: nn.Parameter) -> Tensor:
        own, frozen = self.interval(parameter), resting(parameter)
        return self._local(parameter) if frozen is None else frozen.entries(*own, own)

    def set_local(self, parameter: nn.Parameter, values: Tensor) -> None:
        frozen = resting(parameter)
        if frozen is None:
            self._local(parameter).copy_(values)
        else:
            frozen.set_host(values.to("cpu", frozen.format.dtype, copy=True))

    def publish(self, parameters: list[nn.Parameter]) -> None:
        real = [parameter for parameter in parameters if not resting(parameter)]
        self._publish(real)
        for frozen in filter(None, map(resting, parameters)):
            self._set_codes(frozen)
        self._moved(len(real) < len(parameters))

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        changed = [f for f in map(frozen_of, parameters) if f is not None and not f.resting]
        for frozen in changed:
            self._set_codes(frozen)
            host = copy_to_host(self._local(frozen.real))
            self.moved["to_host"] += host.nbytes
            frozen.set_host(host)
            self._release(frozen.real)
            frozen.resting = True
            frozen.place()
        self._moved(bool(changed))

    def thaw(self, parameters: Iterable[nn.Parameter]) -> None:
        changed = list(filter(None, map(resting, parameters)))
        for frozen in changed:
            start, stop = self._needed(frozen)
            self.moved["to_device"] += (stop - start) * frozen.format.dtype.itemsize
            self._hold(frozen)
            for parameter in (frozen.codes, frozen.scales):
                self._release(parameter)
            frozen.resting, frozen.host, frozen.source = False, None, None
            frozen.place()
        self._moved(bool(changed))

    def stage(self, parameters: Iterable[nn.Parameter]) -> None:
        for frozen in filter(None, map(resting, parameters)):
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, "ows_ds-stage")
            frozen.stage(*self._needed(frozen), self.interval(frozen.real), self._reader, self.device.type == "cuda")

    def full_tensor(self, parameter: nn.Parameter, name: str = "export") -> Tensor:
        numel = math.prod(self.shape(parameter))
        size = math.ceil(numel / self.comm.world_size)
        return self._gather(parameter, 0, size, name)[:numel].view(self.shape(parameter))

    def runs(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor]]:
        numel = math.prod(self.shape(parameter))
        size = math.ceil(numel / self.comm.world_size)
        length = math.ceil(CHUNK / self.comm.world_size)
        for at in range(0, size, length):
            length = min(length, size - at)
            gathered = self._gather(parameter, at, length)
            for rank in range(self.comm.world_size):
                start = rank * size + at
                if start < numel:
                    yield start, gathered[rank * length : (rank + 1) * length][: numel - start]
            del gathered  # before the next is there

    def _gather(self, parameter: nn.Parameter, at: int, length: int, name: str = "export") -> Tensor:
        """``length`` entries of every rank's interval, from its entry ``at`` on, one after the other."""
        (start, stop), frozen = self.interval(parameter), resting(parameter)
        if frozen is None:
            part = self._local(parameter)[at : at + length]
        else:
            part = frozen.entries(min(start + at, stop), min(start + at + length, stop), (start, stop))
        return self._joined(part, length, name)

    def _joined(self, part: Tensor, length: int, name: str) -> Tensor:
        """Every rank's ``part``, of at most ``length`` entries, one after the other, ``length`` apart. Collective."""
        part = to_device(part, self.device)  # from the CPU where DeepSpeed keeps shards that are offloaded
        if part.numel() < length:  # the last ones are shorter
            part = torch.nn.functional.pad(part, (0, length - part.numel()))
        return self.comm.all_gather(part, name)

    def _set_codes(self, frozen: Frozen) -> None:
        """Codes and scales <- those of the real weights, one full matrix at a time. Collective."""
        full = self.full_tensor(frozen.real, "frozen_weights")
        for parameter, values in zip((frozen.codes, frozen.scales), frozen.quantise(full), strict=True):
            self._store(parameter, values)

    # ------------------------------------------------------------------ what differs

    @abstractmethod
    def _local(self, parameter: nn.Parameter) -> Tensor:
        """`local` of what does not rest."""

    @abstractmethod
    def _publish(self, parameters: list[nn.Parameter]) -> None:
        """`publish` of what does not rest."""

    @abstractmethod
    def _release(self, parameter: nn.Parameter) -> None:
        """Free a parameter's memory."""

    @abstractmethod
    def _store(self, parameter: nn.Parameter, full: Tensor) -> None:
        """Give a parameter memory again, and the entries of ``full``, which every rank has."""

    @abstractmethod
    def _needed(self, frozen: Frozen) -> tuple[int, int]:
        """Entries of the real weights that this rank reads to `_hold` them."""

    @abstractmethod
    def _hold(self, frozen: Frozen) -> None:
        """Give the real weights, which rest, memory on the device. Collective."""

    @abstractmethod
    def _moved(self, changed: bool) -> None:
        """Parameters have changed places with others."""


class Replicated(Home):
    """Every rank has every weight. Nothing is sent for a forward or backward pass."""

    sharded = False

    def __init__(self, module: nn.Module, comm: Communicator) -> None:
        """module: the model, on its device. Rank 0's weights are copied to the others. Collective."""
        super().__init__()
        self.module = module
        self.comm = comm
        self.device = next(module.parameters()).device
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                comm.broadcast(tensor.data)

    def __call__(self, **batch: Any) -> Any:
        return self.module(**batch)

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def _local(self, parameter: nn.Parameter) -> Tensor:
        start, stop = self.interval(parameter)
        return parameter.data.view(-1)[start:stop]

    def resident_slice(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        return 0, parameter.data.view(-1)

    def _publish(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters if self.comm.world_size > 1 else ():  # of one rank, the interval is the weight
            size = math.ceil(parameter.numel() / self.comm.world_size)
            full = self._joined(self._local(parameter), size, "full_rank_weights")
            parameter.data.view(-1).copy_(full[: parameter.numel()])

    def write(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        if parameters:
            shaped = [value.view(p.shape) for p, value in zip(parameters, values, strict=True)]
            copy_all([p.data for p in parameters], shaped)

    def merge(
        self, parameter: nn.Parameter, left: Tensor, right: Tensor, decay: float, noise: str | None = None
    ) -> None:
        add_low_rank(parameter.data.view(-1), 0, left, right, decay, noise)

    def backward(self, loss: Tensor) -> None:
        (loss / self.comm.world_size if self.comm.world_size > 1 else loss).backward()

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()  # every rank writes the same

    def after_step(self) -> None:
        pass

    def full_tensor(self, parameter: nn.Parameter, name: str = "export") -> Tensor:
        return super().full_tensor(parameter, name) if resting(parameter) else parameter.detach()

    def runs(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor]]:
        if resting(parameter):
            yield from super().runs(parameter)
            return
        flat = parameter.data.view(-1)
        yield from ((start, flat[start : start + CHUNK]) for start in range(0, len(flat), CHUNK))

    def _moved(self, changed: bool) -> None:
        pass  # nobody has recorded which parameters there were

    def _release(self, parameter: nn.Parameter) -> None:
        parameter.data = without_memory(tuple(parameter.shape), parameter.dtype, self.device)

    def _store(self, parameter: nn.Parameter, full: Tensor) -> None:
        parameter.data = full.contiguous()

    def _needed(self, frozen: Frozen) -> tuple[int, int]:
        # of what has never changed every rank reads all
        return self.interval(frozen.real) if frozen.host is not None else (0, frozen.real.numel())

    def _hold(self, frozen: Frozen) -> None:
        real, all_here = frozen.real, frozen.host is None
        part = frozen.staged(*self._needed(frozen), self.interval(real))
        if all_here:
            real.data = to_device(part, self.device).view(real.shape)
        else:
            size = math.ceil(real.numel() / self.comm.world_size)
            real.data = self._joined(part, size, "frozen_weights")[: real.numel()].view(real.shape)


def weight_shards(weights: Weights, parameters: dict[str, nn.Parameter], names: Iterable[str]) -> list[Shard]:
    """This rank's intervals of the named weights, as ``weight/NAME``."""
    found = ((name, parameters[name]) for name in names)
    return [Shard(f"weight/{name}", weights.shape(p), weights.interval(p)[0], weights.local(p)) for name, p in found]


def load_weights(weights: Weights, parameters: dict[str, nn.Parameter], names: Iterable[str], read: ReadShard) -> None:
    """Set the named weights to what `weight_shards` gave. Collective."""
    changed = {name: parameters[name] for name in names}
    for name, parameter in changed.items():
        weights.set_local(parameter, read(f"weight/{name}", *weights.interval(parameter)))
    weights.publish(list(changed.values()))
