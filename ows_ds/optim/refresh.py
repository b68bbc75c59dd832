"""New projectors: gradients on their way to their leading directions, in one of two ways with one interface (the other
way: `ows_ds.optim.sketch`).

    plans -> begin -> backward passes -> reduce -> take -> (the step) -> after_step
                                              `-> skip, where the step is not taken

`FullGradients`: full gradients, streamed out of the backward pass, one matrix at a time. `take` gives projectors for
the step in hand.

    backward reaches W      G  (every rank, its own part of the batch)
        reduce              G  summed, on W's owner only; the others drop theirs
        owner               one micro-batch: B = basis of G's range,  G B; G is freed (on a GPU beside the backward
                            pass, so that the owners of several matrices work at the same time)
                            more: G is added up
    ... next W ...
    reduce                  owners, all at once: B and G B of the sums; then, with one wait for the device, the leading
                            directions of every B: Q and the low-rank gradients R = G Q;  all_gather of all Q
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ows_ds.compat.torch import to_device
from ows_ds.config import OWSConfig
from ows_ds.distributed.communicator import Communicator
from ows_ds.model.layers import Block
from ows_ds.optim.active_set import ActiveSet
from ows_ds.optim.layout import Plan, RefreshPlan, plan_refresh
from ows_ds.optim.projection import (
    Range,
    choose,
    find_range,
    low_rank_gradient,
    start_basis,
)


class Refresh:
    """The interface. This base refreshes nothing."""

    def __init__(self, active: ActiveSet, config: OWSConfig) -> None:
        self.active, self.config, self.comm = active, config, active.weights.comm
        self.bases: dict[str, Tensor] = {}
        """By matrix, (long, w): what a first pass of sketches has found, until the second one begins."""

    def plans(self, plan: Plan, due: Sequence[Block]) -> list[RefreshPlan]:
        """Who finds what in the coming step. due: the blocks of ``plan`` that need new projectors."""
        return []

    def begin(self, plans: Sequence[RefreshPlan], step: int) -> None:
        """Arm the coming step, number ``step``, for ``plans``, the same on all ranks."""

    def set_accumulation_steps(self, steps: int) -> None:
        """Before the first backward pass: how many there will be."""

    def after_backward(self) -> None:
        """After each backward pass. Collective."""

    def reduce(self) -> None:
        """After the step's last backward pass. Collective."""

    def not_finite(self) -> list[Tensor]:
        """Scalars, 0 where all that was gathered is finite."""
        return []

    def energy(self) -> dict[int, Tensor]:
        """See `ows_ds.optim.ows.OWS.projector_energy`."""
        return {}

    def take(self) -> dict[str, Tensor]:
        """Projectors (short, r) by matrix that the step in hand is taken with, once."""
        return {}

    def after_step(self) -> dict[str, Tensor]:
        """Projectors (short, r) by matrix for the coming steps. Collective."""
        return {}

    def skip(self) -> None:
        """The step in hand is not taken: nothing that was found is used."""

    def cancel(self) -> None:
        """Forget what was begun."""

    def zero_grad(self) -> None:
        """Forget gradients."""

    def second_bases(self) -> dict[str, Tensor]:
        """By matrix, (long, w): what the coming step's second sketches are taken with."""
        return {}

    def _seed(self, name: str, step: int) -> int:
        """Of a matrix's randomness in a step, on whatever rank."""
        return zlib.crc32(f"{self.config.seed}/{step}/{name}".encode())

    def _choose(self, ranges: Mapping[str, Range]) -> dict[str, Tensor]:
        """See `choose`. Under ``moments_on_refresh: align`` near the matrix's projector, or near noise without one."""
        near: dict[str, Tensor] = {}
        for name, one in ranges.items() if self.config.moments_on_refresh == "align" else ():
            old = self.active.projectors.get(name)
            near[name] = self._start(name, len(one.basis), self.active.r, 0) if old is None else old
        return choose(ranges, self.active.r, near)

    def _start(self, name: str, short: int, width: int, step: int, previous: Tensor | None = None) -> Tensor:
        """See `start_basis`; where the model runs."""
        return to_device(start_basis(short, width, self._seed(name, step), previous), self.active.weights.device)


class FullGradients(Refresh):
    """Projectors of full gradients.

    With one micro-batch an owner keeps nothing of a gradient's size: of each matrix a basis little wider than its
    projector; with more, a sum for each matrix it owns.
    """

    def __init__(self, active: ActiveSet, config: OWSConfig) -> None:
        super().__init__(active, config)
        self.plan: RefreshPlan | None = None  # of what is under way
        self.set_accumulation_steps(config.accumulation)
        self._step = 0
        self._found: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}  # (2,), float64: ||G Q||^2 and ||G||^2 of what this rank owns
        # of those, before the choice; and G times the basis' columns from r on: times the others it is in the buffer
        self._ranges: dict[str, tuple[Range, Tensor]] = {}
        self._refreshed: Collection[str] = ()
        self._side = torch.cuda.Stream(active.weights.device) if active.weights.device.type == "cuda" else None
        self._left: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def plans(self, plan: Plan, due: Sequence[Block]) -> list[RefreshPlan]:
        return [plan_refresh([matrix for block in due for matrix in block.matrices], self.comm.world_size)]

    def begin(self, plans: Sequence[RefreshPlan], step: int) -> None:
        """Detach the (merged) matrices and let their full gradients through."""
        self._refreshed, self._squares = (), {}
        [plan] = plans
        if not plan.owners:
            return
        self.plan, self._step = plan, step
        self._left = dict.fromkeys(plan.owners, self._passes)
        for name in plan.owners:
            self.active.detach(name)
            parameter = self.active.parameters[name]
            parameter.requires_grad_(True)
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook(name, plan.owners[name])))

    def set_accumulation_steps(self, steps: int) -> None:
        self._passes = 1 if self.config.refresh_batch == "first" else steps
        if self.plan is not None:
            self._left = dict.fromkeys(self.plan.owners, self._passes)

    def _hook(self, name: str, owner: int) -> Any:
        def stream(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            self.comm.reduce(gradient, owner, "refresh_gradients")
            self._left[name] -= 1
            if self.comm.rank != owner:
                return
            if self._passes == 1:
                self._project(name, gradient)
            elif name in self._sums:
                self._sums[name].add_(gradient)
            else:
                self._sums[name] = gradient.to(self.active.dtype)

        return stream

    def _project(self, name: str, gradient: Tensor) -> None:
        config, previous = self.config, self.active.projectors.get(name)
        with self._beside(gradient):
            found = find_range(gradient, self.active.r, config.projector, self._seed(name, self._step), previous)
            product = low_rank_gradient(gradient, found.basis.to(self.active.dtype))
            self.active.buffer.grad(name).copy_(product[:, : self.active.r])
            self._ranges[name] = found, product[:, self.active.r :].clone()
        if self._side is not None:  # where the choice is made
            for tensor in (found.basis, found.squares, found.norm, self._ranges[name][1]):
                if tensor is not None:
                    tensor.record_stream(torch.cuda.current_stream(self._side.device))

    @contextmanager
    def _beside(self, gradient: Tensor) -> Iterator[None]:
        """On a GPU, run what is within beside the backward pass, on a stream of its own: other ranks need not wait for
        this one's search. One search at a time, so that no more than two gradients are there."""
        if self._side is None:
            yield
            return
        now = torch.cuda.current_stream(self._side.device)
        now.wait_stream(self._side)
        self._side.wait_stream(now)
        gradient.record_stream(self._side)
        with torch.cuda.stream(self._side):
            yield

    def _finish(self) -> dict[str, Tensor]:
        """The projectors of what this rank owns; their low-rank gradients into the buffer. One wait for the device."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
        ranges, self._ranges = self._ranges, {}
        turns = self._choose({name: found for name, (found, _) in ranges.items()})
        dtype, projectors = self.active.dtype, {}
        for name in list(ranges):
            found, rest = ranges.pop(name)
            low_rank = self.active.buffer.grad(name)
            if name not in turns:
                # no projector is made of it; the norm of all gradients lets every rank skip the step
                low_rank.fill_(math.nan)
                continue
            turn = turns[name].to(dtype)
            projectors[name] = (found.basis.to(dtype) @ turn).to(self.active.weight_dtype)
            low_rank.copy_(torch.addmm(rest @ turn[self.active.r :], low_rank, turn[: self.active.r]))
            self._squares[name] = torch.stack([torch.linalg.vector_norm(low_rank), found.norm]).double().square()
        return projectors

    def after_backward(self) -> None:
        if self.config.refresh_batch == "first" and self.plan is not None:
            self.reduce()
            for name, projector in self._found.items():
                self.active.attach(name, projector)

    @torch.no_grad()
    def reduce(self) -> None:
        plan = self.plan
        if plan is None:
            return
        missing = [name for name, left in self._left.items() if left]
        if missing:
            raise RuntimeError(
                f"no gradient of {missing[0]} arrived in {self._left[missing[0]]} of the backward passes that a "
                "refresh takes: call OWS.backward once a micro-batch, `accumulation` times a step"
            )
        for name in list(self._sums):  # nothing is sent here: all owners work at the same time
            self._project(name, self._sums.pop(name))
        mine = self._finish()
        self.cancel()
        self._refreshed = plan.owners
        dtype, device = self.active.weight_dtype, self.active.weights.device
        self._found = gather(self.comm, plan, mine, self.active.r, dtype, device, "projectors")

    def energy(self) -> dict[int, Tensor]:
        device, energy = self.active.weights.device, {}
        for layer, block in enumerate(self.active.layers.layers):
            names = [matrix.name for matrix in block.matrices if matrix.name in self._refreshed]
            if names:
                mine = [self._squares[name].to(device) for name in names if name in self._squares]
                energy[layer] = sum(mine, torch.zeros(2, dtype=torch.float64, device=device))
        return energy

    def take(self) -> dict[str, Tensor]:
        found, self._found = self._found, {}
        return found

    def skip(self) -> None:
        for name in self.take():
            self.active.detach(name)

    def cancel(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sums.clear()
        self._ranges.clear()
        for name in self.plan.owners if self.plan is not None else ():
            self.active.parameters[name].requires_grad_(False)
        self.plan, self._found = None, {}


def gather(
    comm: Communicator,
    plan: RefreshPlan,
    found: Mapping[str, Tensor],
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    what: str,
) -> dict[str, Tensor]:
    """What each owner ``found``, (rows of its slot, <= columns), on every rank, padded with zeros. Collective."""
    part = torch.zeros(plan.stride, columns, dtype=dtype, device=device)
    first = comm.rank * plan.stride
    for name, matrix in found.items():
        start, stop = plan.slots[name]
        part[start - first : stop - first, : matrix.shape[1]] = matrix
    gathered = comm.all_gather(part, what)
    # cloned, so that a matrix that leaves gives its memory back
    return {name: gathered[start:stop].clone() for name, (start, stop) in plan.slots.items()}
