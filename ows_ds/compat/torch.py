"""Private names of torch, as of 2.11 to 2.13."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PINNED = 1 << 26  # bytes of a piece of pinned memory

# On a GPU one kernel for many tensors. torch documents these functions ("foreach"), but under private names only.


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. Does not wait for a GPU: from the CPU by way of pinned memory, which torch keeps until
    the copy is done."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU. From a GPU by way of two pieces of pinned memory in turns, which is several times as fast as
    into ordinary memory, of which there may be much."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    flat = tensor.reshape(-1)
    host = torch.empty(flat.shape, dtype=flat.dtype)
    size = min(PINNED // flat.element_size(), max(1, flat.numel()))
    buffers = [(torch.empty(size, dtype=flat.dtype, pin_memory=True), torch.cuda.Event()) for _ in range(2)]
    pending: list[tuple[int, Tensor, torch.cuda.Event]] = []

    def receive() -> None:
        start, piece, event = pending.pop(0)
        event.synchronize()
        host[start : start + len(piece)] = piece

    for number, start in enumerate(range(0, flat.numel(), size)):
        buffer, event = buffers[number % 2]
        if len(pending) == len(buffers):
            receive()
        piece = buffer[: flat.numel() - start]
        piece.copy_(flat[start : start + size], non_blocking=True)
        event.record()
        pending.append((start, piece, event))
    while pending:
        receive()
    return host.view(tensor.shape)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total`` (n, k) <- total + a (n, t) b (t, k), products and sums in total's dtype where the device can.

    A product in bfloat16 would be rounded to it, on a GPU perhaps more than once (split-K).
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def reshaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """``tensor`` in another shape, without a copy, as its only owner may hand it on: not a view to autograd, so that a
    model may write to what a function of ours gives it, as torch's own matmul allows."""
    found: Tensor = torch.ops.aten._unsafe_view(tensor, list(shape))
    return found


def has_grouped_product(a: Tensor, b: Tensor) -> bool:
    """Whether `grouped_product` takes these: what torch has for GPUs needs bfloat16, and rows that begin at multiples
    of 16 bytes."""
    return a.is_cuda and a.dtype == b.dtype == torch.bfloat16 and all(_aligned(one) for one in (a, b))


def _aligned(tensor: Tensor) -> bool:
    *_, rows, columns = tensor.stride()
    return 1 in (rows, columns) and max(rows, columns) % 8 == 0 and tensor.data_ptr() % 16 == 0


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """The product of each group of a's and b's rows or columns that ``ends`` separates, on the device alone."""
    return torch.nn.functional.grouped_mm(a, b, offs=ends)


def scaled_product(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """bfloat16 (n, m): a (n, k) b (k, m), both e4m3, times ``rows`` (n, 1) and ``columns`` (1, m), float32. a has its
    rows in memory one after the other, b its columns. torch documents no other way to a device's products in fp8."""
    return torch._scaled_mm(a, b, scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16)


def zero_all(tensors: Sequence[Tensor]) -> None:
    """Set all entries to zero."""
    torch._foreach_zero_(list(tensors))


def scale_all(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each tensor by a scalar on its device, in place and without waiting for it."""
    if tensors:
        torch._foreach_mul_(list(tensors), factor)


def squared_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum of squares of each tensor, ()."""
    return [norm.square() for norm in torch._foreach_norm(list(tensors))] if tensors else []


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Each target <- its source."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def times_written(tensor: Tensor) -> int:
    """How often ``tensor`` was changed in place. Nothing public tells whether a model has changed what it was given."""
    return tensor._version


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Let torch's schedulers take a skipped step for one: they warn until `Optimizer.step` was called."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def with_weight(module: nn.Module, weight: Tensor) -> Any:
    """A shallow copy of ``module`` that computes with ``weight``, a tensor, in place of its own weight.

    `torch.func.functional_call` would call the original module with its hooks.
    """
    shadow = copy.copy(module)
    shadow.__dict__["_parameters"] = {**module._parameters, "weight": weight}
    return shadow


def own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """A module's parameter, whatever stands in its place: `Module.get_parameter` asks the attribute of that name."""
    found = module._parameters[name]
    assert found is not None
    return found


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Register ``parameter`` in the place of the one of this name, or remove that (None). `setattr` would remove what
    stands in the parameter's place in the module's dictionary (see `ows_ds.optim.hooks.WeightHook`)."""
    if parameter is None:
        module._parameters.pop(name, None)
    else:
        module._parameters[name] = parameter


def storage_address(tensor: Tensor) -> int:
    """A number for the tensor's storage: the data's address is the same for storages that follow one another."""
    return tensor.untyped_storage()._cdata


def default_store() -> Any:
    """The store in which the ranks of the default process group met: a launcher may have made the group."""
    return dist.distributed_c10d._get_default_store()


def build_directory(extension: str) -> Path:
    """Where `torch.utils.cpp_extension` compiles an extension, which it names nowhere else before it waits there."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(extension, False))


# ------------------------------------------------------------------ compiled functions

GRAPHS = 64  # of one function, at most: torch's own limit, 8, is for functions that are compiled by mistake


def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """``function`` by torch.compile, for inputs of any length."""
    found: Callable[..., Any] = torch.compile(function, dynamic=True, backend=backend)
    return found


def outside_of_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as compiled functions call it: nothing in it is traced, and it has ``__wrapped__``."""
    found: Callable[..., Any] = torch.compiler.disable(function)
    return found


def recompiles() -> Callable[[], None]:
    """Let a function have `GRAPHS` graphs, in the whole process, until what is returned is called. ``torch.compile``
    has an argument for it from 2.13 on, which does not hold for what the function calls."""
    from torch import _dynamo

    before = _dynamo.config.recompile_limit
    _dynamo.config.recompile_limit = max(before, GRAPHS)

    def back() -> None:
        _dynamo.config.recompile_limit = before

    return back


def graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
