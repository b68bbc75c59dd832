"""Frozen matrices in few bits, and where their real weights are meanwhile.

A matrix that trains has its real weights in its module, as under any other training. While it is frozen, its module has
codes and scales (`formats`), and the real weights rest: in the checkpoint's files until they have changed, then this
rank's interval of them in the host's memory. What is exported and checkpointed are the real ones.

    resting      module.weight = codes, module.weight_scales = scales     real: file or host
        thaw     real -> device, codes and scales freed
    real         module.weight = real                                     trained, merged
        freeze   real -> host, codes and scales made of it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ows_ds.compat.torch import set_parameter
from ows_ds.distributed.formats import Format
from ows_ds.distributed.packing import SCALES

Fill = Callable[[int, Tensor], None]
"""(start, out): out (1-D) <- that many entries of a flattened tensor, from ``start`` on."""


@dataclass(eq=False)
class Frozen:
    """One matrix, or a stack of them, of a model whose frozen weights are in few bits.

    real: the parameter that trains, without memory while `resting`. codes, scales: the parameters in its place then;
    otherwise these have no memory. places: modules that use it, and under what name.
    source: gives the entries of real weights that have never changed. host: of others, this rank's interval.
    directions: see `Format.quantise`; on the CPU, the same on all ranks.
    """

    format: Format
    real: nn.Parameter
    codes: nn.Parameter
    scales: nn.Parameter
    source: Fill | None = None
    host: Tensor | None = None
    directions: Tensor | None = None
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    resting: bool = True
    _staged: Future[Tensor] | None = None

    def __post_init__(self) -> None:
        for parameter in (self.real, self.codes, self.scales):
            parameter.frozen = self  # type: ignore[attr-defined]

    def use_in(self, module: nn.Module, key: str) -> None:
        """``module`` has the matrix under the name ``key``."""
        self.places.append((module, key))
        self.place()

    def place(self) -> None:
        """Let the modules have what `resting` says."""
        for module, key in self.places:
            set_parameter(module, key, self.codes if self.resting else self.real)
            set_parameter(module, key + SCALES, self.scales if self.resting else None)

    def entries(self, start: int, stop: int, interval: tuple[int, int]) -> Tensor:
        """The real weights' flattened entries [start, stop), on the CPU; of this rank's ``interval`` where they are in
        the host's memory."""
        if self.host is not None:
            return self.host[start - interval[0] : stop - interval[0]]
        if self.source is None:
            raise RuntimeError("real weights of a frozen matrix are nowhere")
        out = torch.empty(stop - start, dtype=self.format.dtype)
        self.source(start, out)
        return out

    def stage(self, start: int, stop: int, interval: tuple[int, int], reader: ThreadPoolExecutor, pin: bool) -> None:
        """Begin to read what `staged` will be asked for, beside what else runs."""

        def read() -> Tensor:
            found = self.entries(start, stop, interval)
            return found.pin_memory() if pin else found

        if self.resting and self._staged is None:
            self._staged = reader.submit(read)

    def staged(self, start: int, stop: int, interval: tuple[int, int]) -> Tensor:
        """`entries`, perhaps begun before by `stage` with the same arguments."""
        staged, self._staged = self._staged, None
        return self.entries(start, stop, interval) if staged is None else staged.result()

    def quantise(self, full: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of the real weights, which are ``full``."""
        directions = None if self.directions is None else self.directions.to(full.device)
        return self.format.quantise(full, directions)

    def set_host(self, host: Tensor) -> None:
        """The real weights are ``host`` from now on: this rank's interval, on the CPU."""
        self.host, self.source, self._staged = host, None, None


def frozen_of(parameter: Any) -> Frozen | None:
    """Of a matrix that may be frozen in few bits; None: of any other parameter."""
    found: Frozen | None = getattr(parameter, "frozen", None)
    return found


def resting(parameter: Any) -> Frozen | None:
    """The same, None while its real weights are in their module."""
    found = frozen_of(parameter)
    return found if found is not None and found.resting else None


def named_weights(
    module: nn.Module, recurse: bool = True, duplicates: bool = False
) -> Iterator[tuple[str, nn.Parameter]]:
    """`nn.Module.named_parameters` as if no weight were in few bits: the real one in place of codes, no scales."""
    for name, parameter in module.named_parameters(recurse=recurse, remove_duplicate=not duplicates):
        frozen = frozen_of(parameter)
        if frozen is None or not frozen.resting:
            yield name, parameter
        elif parameter is frozen.codes:
            yield name, frozen.real


def without_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one entry's memory in the shape of another."""
    return torch.empty((), dtype=dtype, device=device).expand(shape)
