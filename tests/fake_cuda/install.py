"""Puts the devices under torch.cuda, in a process that has not imported torch yet."""

from __future__ import annotations

import atexit
import ctypes
import os
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from tests.fake_cuda import streams
from tests.fake_cuda.build import library
from tests.fake_cuda.host_waits import host_waits
from tests.fake_cuda.races import Bytes, races

MEMORY = 80 << 30  # bytes of each device, of which nothing is ever taken
INTEGERS = ctypes.POINTER(ctypes.c_uint64)
OnWait = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
OnKernel = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_int, INTEGERS, INTEGERS, INTEGERS, ctypes.POINTER(ctypes.c_int)
)
OnFree = ctypes.CFUNCTYPE(None, ctypes.c_uint64)


@OnWait
def _on_wait(cause: bytes) -> None:
    streams.wait(cause.decode())


@OnKernel
def _on_kernel(name: bytes, number: int, memory: Any, first: Any, last: Any, written: Any) -> None:
    stream = streams.current_stream().cuda_stream
    if not name:
        races.allocated(memory[0], stream)
        return
    races.kernel(stream, name.decode(), [Bytes(memory[i], first[i], last[i], bool(written[i])) for i in range(number)])


@OnFree
def _on_free(memory: int) -> None:
    races.freed(memory)


def install(devices: int) -> None:
    """Let torch see ``devices`` GPUs. Follows kernels where FAKE_CUDA_RACES is set, which takes most of the time."""
    device = ctypes.CDLL(str(library()))
    if not device.fake_cuda_register():
        raise RuntimeError("torch was imported before")
    import torch

    kernels = (_on_kernel, _on_free) if "FAKE_CUDA_RACES" in os.environ else (OnKernel(), OnFree())
    device.fake_cuda_follow(_on_wait, *kernels)
    _install_functions(torch, device, devices)
    from tests.fake_cuda import collectives

    collectives.install(torch)
    atexit.register(_finish, device)


def _install_functions(torch: Any, library: Any, devices: int) -> None:
    """What torch.cuda itself calls, and what it has no Python for."""
    cuda, at = torch.cuda, torch._C
    for name in ("allocated", "peak"):
        getattr(library, f"fake_cuda_{name}").restype = ctypes.c_longlong

    def set_device(index: int) -> None:
        if index >= devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        torch.accelerator.set_device_index(index)

    def exchange_device(index: int) -> int:
        before = at._cuda_getDevice()
        if index >= 0:
            set_device(index)
        return before

    def memory(index: int) -> dict[str, Any]:
        counts = {"current": library.fake_cuda_allocated(), "peak": library.fake_cuda_peak()}
        return {"allocated_bytes": {"all": counts}, "reserved_bytes": {"all": counts}}

    at._cuda_getDeviceCount = lambda: devices
    at._cuda_getDevice = torch.accelerator.current_device_index
    at._cuda_setDevice = set_device
    at._cuda_memoryStats = memory
    at._cuda_resetPeakMemoryStats = lambda index: library.fake_cuda_reset_peak()
    at._cuda_emptyCache = lambda: None
    at._cuda_set_sync_debug_mode = host_waits.warn
    at._cuda_getCurrentRawStream = lambda index: 0
    cuda._initialized = True
    cuda._exchange_device = cuda._maybe_exchange_device = exchange_device
    cuda.default_generators = tuple(torch.Generator(f"cuda:{i}") for i in range(devices))
    properties = SimpleNamespace(name="not a GPU", major=9, minor=0, total_memory=MEMORY)
    cuda._get_device_properties = lambda index: properties
    cuda.mem_get_info = cuda.memory.mem_get_info = lambda device=None: (MEMORY, MEMORY)
    cuda.nvtx = SimpleNamespace(range_push=lambda name: None, range_pop=lambda: None, range=lambda name: nullcontext())
    cuda.nccl.version = lambda: (2, 27, 5)
    torch.version.cuda = "13.0"
    for name in ("Stream", "Event", "stream", "set_stream", "current_stream", "synchronize"):
        setattr(cuda, name, getattr(streams, name))
    svd = torch.linalg.svd
    torch.linalg.svd = lambda A, full_matrices=True, *, driver=None, out=None: svd(A, full_matrices, out=out)
    cuda.default_stream = lambda device=None: streams.DEFAULT
    torch.Tensor.record_stream = lambda self, stream: races.record(
        self.untyped_storage().data_ptr(), stream.cuda_stream
    )


def _finish(library: Any) -> None:
    time.sleep(0.2)  # autograd's threads, if they have just been started, must not meet the interpreter's end
    library.fake_cuda_follow(OnWait(), OnKernel(), OnFree())
    rank = os.environ.get("RANK", "0")
    for variable, found in (("FAKE_CUDA_WAITS", host_waits.take()), ("FAKE_CUDA_RACES", races.found)):
        if path := os.environ.get(variable):
            lines = [f"rank {rank}: {number:5d} {text}\n" for text, number in found.most_common()]
            with open(path, "a") as file:
                file.write("".join(lines))
