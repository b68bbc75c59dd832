"""Inputs of checkpointed layers in the host's memory between the forward and the backward pass.

    forward    layer i's input --copy, beside layer i's own pass--> host (pinned)
    backward   layer i is to be computed again: its input is back; the copy of layer i - 1's begins beside it

The copies run on a stream of their own. On a CPU they are copies all the same, so that what is kept can be counted.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

LEAST = 1024  # bytes of what is worth a copy


class _Away:
    """A tensor on the host. back: on the device again, or on its way there. below: what was taken away before it."""

    def __init__(self, host: Tensor, below: _Away | None) -> None:
        self.host, self.below = host, below
        self.back: Tensor | None = None
        self.event: torch.cuda.Event | None = None


class Offload:
    """Takes what a layer's checkpoint saves to the host: see `saving`.

    Attributes:
        moved: bytes that went to the host so far; ``kept``: bytes that were to be saved and stayed.
    """

    def __init__(self, device: torch.device) -> None:
        """device: where the model runs."""
        self.device = device
        self.moved = self.kept = 0
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: _Away | None = None

    def saving(self) -> AbstractContextManager[None]:
        """Within it, what autograd saves goes to the host: parameters and what is small aside."""
        found: AbstractContextManager[None] = saved_tensors_hooks(self._pack, self._unpack)
        return found

    def begin(self) -> None:
        """A forward pass begins: what earlier ones have taken away is not fetched before what this one does."""
        self._last = None

    def _pack(self, tensor: Tensor) -> Tensor | _Away:
        size = tensor.numel() * tensor.element_size()
        if isinstance(tensor, torch.nn.Parameter) or size < LEAST or not tensor.is_floating_point():
            self.kept += size * (not isinstance(tensor, torch.nn.Parameter))
            return tensor
        self.moved += size
        tensor = tensor.detach()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._side is not None)
        self._last = away = _Away(host, self._last)
        if self._side is None:
            host.copy_(tensor)
            return away
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._side)  # its memory is not given away before it is read
        return away

    def _unpack(self, saved: Tensor | _Away) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._fetch(saved)
        if self._side is not None:
            now = torch.cuda.current_stream(self.device)
            assert saved.event is not None
            now.wait_event(saved.event)
            assert saved.back is not None
            saved.back.record_stream(now)
            if saved.below is not None:  # beside the layer that is computed again now
                self._side.wait_stream(now)  # no sooner than that: one input ahead, not all of them
                self._fetch(saved.below)
        found, saved.back, saved.below = saved.back, None, None
        assert found is not None
        return found

    def _fetch(self, away: _Away) -> None:
        """Begin to bring it back, after its way to the host."""
        if away.back is not None:
            return
        if self._side is None:
            away.back = away.host.clone()
            return
        with torch.cuda.stream(self._side):
            away.back = away.host.to(self.device, non_blocking=True)
            away.event = self._side.record_event()
