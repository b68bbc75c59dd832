"""torch.distributed's backend nccl, over gloo on the devices' memory.

A collective is done as late as NCCL may: when it, or one that was begun after it, is waited for. Until then its
results are NaN (integers: 77).
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from tests.fake_cuda import streams
from tests.fake_cuda.races import Bytes, Clock, races

# by name, the arguments that are read and those that are written
COLLECTIVES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "all_reduce": (("tensor",), ("tensor",)),
    "broadcast": (("tensor",), ("tensor",)),
    "reduce": (("tensor",), ("tensor",)),
    "all_gather": (("tensor",), ("tensor_list",)),
    "all_gather_into_tensor": (("input_tensor",), ("output_tensor",)),
    "all_gather_single": (("input_tensor",), ("output_tensor",)),
    "reduce_scatter_tensor": (("input",), ("output",)),
    "reduce_scatter_single": (("input",), ("output",)),
}
OTHERS = (
    "_all_gather_base", "_reduce_scatter_base", "all_gather_coalesced", "all_gather_object", "all_reduce_coalesced",
    "all_to_all", "all_to_all_single", "broadcast_object_list", "gather", "gather_object", "irecv", "isend",
    "monitored_barrier", "recv", "reduce_scatter", "scatter", "scatter_object_list", "send",
)  # fmt: skip

_nccl = False  # whether the process group was made for NCCL
_inside = threading.local()  # a collective's own call of another one
_streams: dict[Any, streams.Stream] = {}  # by process group
_begun: list[Work] = []
_lock = threading.RLock()


class Work:
    """A collective that was begun, on the stream of its group. Keeps its tensors."""

    def __init__(self, stream: streams.Stream, run: Callable[[], None], tensors: Sequence[Any]) -> None:
        self._run, self._tensors, self._clock = run, tensors, Clock(races.clock(stream.cuda_stream))

    def wait(self, timeout: Any = None) -> bool:
        """The current stream waits; the host does not."""
        with _lock:
            while self in _begun:
                _inside.now = True
                try:
                    _begun.pop(0)._run()
                finally:
                    _inside.now = False
        races.stream_waits(streams.current_stream().cuda_stream, self._clock)
        return True

    def is_completed(self) -> bool:
        return False  # the worst that may be


def install(torch: Any) -> None:
    """Put them under torch.distributed."""
    dist, c10d = torch.distributed, torch.distributed.distributed_c10d

    def replace(name: str, make: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        original = getattr(c10d, name)
        made = make(torch, original, *arguments)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (made if _nccl and not getattr(_inside, "now", False) else original)(*args, **kwargs)

        for module in (dist, c10d):
            if hasattr(module, name):
                setattr(module, name, call)

    initialize, backend = c10d.init_process_group, c10d.get_backend

    @functools.wraps(initialize)
    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> None:
        global _nccl
        _nccl = backend in (None, "nccl")
        kwargs.pop("device_id", None)
        initialize("gloo" if _nccl else backend, *args, **kwargs)

    dist.init_process_group = c10d.init_process_group = init_process_group
    dist.get_backend = c10d.get_backend = lambda group=None: "nccl" if _nccl else backend(group)
    dist.is_nccl_available = c10d.is_nccl_available = lambda: True
    for name, (read, written) in COLLECTIVES.items():
        if hasattr(c10d, name):
            replace(name, _collective, read, written)
    replace("barrier", _barrier)
    for name in OTHERS:
        replace(name, _refuse)


def _collective(
    torch: Any, original: Callable[..., Any], read: Sequence[str], written: Sequence[str]
) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given, asynchronous = bound.arguments, bound.arguments.pop("async_op", False)
        inputs, outputs = ([t for name in names for t in _list(given[name])] for names in (read, written))
        views = {id(t): _on_host(torch, t) for t in (*inputs, *outputs)}
        group = given.get("group") or torch.distributed.group.WORLD
        stream = _streams[group] = _streams.get(group) or streams.Stream()
        races.stream_waits(stream.cuda_stream, races.clock(streams.current_stream().cuda_stream))
        accessed = [_bytes(t, False) for t in inputs] + [_bytes(t, True) for t in outputs]
        races.kernel(stream.cuda_stream, f"nccl:{original.__name__}", accessed)
        for t in (*inputs, *outputs):  # torch keeps them until the collective is done
            races.record(t.untyped_storage().data_ptr(), stream.cuda_stream)
        in_place = {id(t): views[id(t)].clone() for t in inputs if any(t is other for other in outputs)}
        apart = {id(t): views[id(t)] for t in inputs if id(t) not in in_place}
        for t in outputs:
            if not any(_overlap(views[id(t)], other) for other in apart.values()):
                views[id(t)].fill_(math.nan if t.is_floating_point() else 77)

        def run() -> None:
            for key, value in in_place.items():
                views[key].copy_(value)
            # gloo may not read and write the same memory
            now = views | {key: view.clone() for key, view in apart.items()}
            for name in {*read, *written}:
                tensors = [now[id(t)] for t in _list(given[name])]
                given[name] = tensors if isinstance(given[name], list) else tensors[0]
            original(**given)

        work = Work(stream, run, (*inputs, *outputs))
        with _lock:
            _begun.append(work)
        if asynchronous:
            return work
        work.wait()
        return None

    return call


def _barrier(torch: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(group: Any = None, async_op: bool = False, device_ids: Any = None) -> None:
        with _lock:
            for work in list(_begun):
                work.wait()
        streams.wait("barrier")
        original(group=group)

    return call


def _refuse(torch: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{original.__name__} over NCCL without a GPU")

    return call


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _on_host(torch: Any, t: Any) -> Any:
    """The host's tensor on the same memory."""
    if not t.is_cuda:
        raise RuntimeError(f"No backend type associated with device type {t.device.type}")
    if not t.is_contiguous():
        raise ValueError("Tensors must be contiguous")
    if t.numel() == 0:
        return torch.empty(t.shape, dtype=t.dtype)
    memory = (ctypes.c_char * t.nbytes).from_address(t.data_ptr())
    return torch.frombuffer(memory, dtype=torch.uint8).view(t.dtype).view(t.shape)


def _overlap(one: Any, other: Any) -> bool:
    return one.data_ptr() < other.data_ptr() + other.nbytes and other.data_ptr() < one.data_ptr() + one.nbytes


def _bytes(t: Any, written: bool) -> Bytes:
    first = t.storage_offset() * t.element_size()
    return Bytes(t.untyped_storage().data_ptr(), first, first + t.nbytes, written)
