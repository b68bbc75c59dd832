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
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ows_ds.compat.torch import to_device
from ows_ds.config import OWSConfig
from ows_ds.distributed.communicator import Communicator
from ows_ds.model.blocks import Block
from ows_ds.optim import compressed
from ows_ds.optim.active_set import ActiveSet
from ows_ds.optim.compressed import Compressed
from ows_ds.optim.layout import Plan, RefreshPart, RefreshPlan, plan_refresh
from ows_ds.optim.projection import (
    Choice,
    Range,
    choose,
    find_range,
    low_rank_gradient,
    seeds,
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

    def _seeds(self, part: RefreshPart, step: int | str) -> int | list[int]:
        """Of a part's randomness in a step, or a part of one, on whatever rank."""
        experts = None if part.experts is None else range(*part.experts)
        return seeds(f"{self.config.seed}/{step}/{part.name}", experts)

    def _previous(self, part: RefreshPart) -> Tensor | None:
        """The projectors that there are."""
        old = self.active.projectors.get(part.name)
        return None if old is None else part.of(old)

    def _choose(self, ranges: Mapping[RefreshPart, Range]) -> dict[RefreshPart, Choice]:
        """See `choose`. Under ``moments_on_refresh: align`` near the matrix's projector, or near noise without one."""

        def start(part: RefreshPart) -> Tensor:
            old, one = self._previous(part), ranges[part]
            return self._start(part, one.basis.shape[-2], one.r, 0) if old is None else old

        near = {part: start(part) for part in ranges} if self.config.moments_on_refresh == "align" else {}
        return choose(ranges, near, start)

    def _start(self, part: RefreshPart, short: int, width: int, step: int, previous: Tensor | None = None) -> Tensor:
        """See `start_basis`; where the model runs."""
        return to_device(start_basis(short, width, self._seeds(part, step), previous), self.active.weights.device)


class FullGradients(Refresh):
    """Projectors of full gradients.

    With one micro-batch an owner keeps nothing of a gradient's size: of each matrix a basis little wider than its
    projector; with more, a sum for each matrix it owns, under ``refresh="compressed"`` its leading directions
    (`ows_ds.optim.compressed`).
    """

    def __init__(self, active: ActiveSet, config: OWSConfig) -> None:
        super().__init__(active, config)
        self.plan: RefreshPlan | None = None  # of what is under way
        self.set_accumulation_steps(config.accumulation)
        self._step = 0
        self._found: dict[str, Tensor] = {}
        self._squares: dict[RefreshPart, Tensor] = {}  # (2,), float64: ||G Q||^2 and ||G||^2 of what this rank owns
        # of those, before the choice; and G times the basis' columns from r on: times the others it is in the buffer
        self._ranges: dict[RefreshPart, tuple[Range, Tensor]] = {}
        self._refreshed: Collection[str] = ()
        self._side = torch.cuda.Stream(active.weights.device) if active.weights.device.type == "cuda" else None
        self._left: dict[str, int] = {}
        self._sums: dict[RefreshPart, Tensor] = {}
        self._compressed: dict[RefreshPart, Compressed] = {}
        self._handles: list[Any] = []

    def plans(self, plan: Plan, due: Sequence[Block]) -> list[RefreshPlan]:
        matrices = [matrix for block in due for matrix in block.matrices]
        return [plan_refresh(matrices, self.comm.world_size, self.active.r)]

    def begin(self, plans: Sequence[RefreshPlan], step: int) -> None:
        """Detach the (merged) matrices and let their full gradients through."""
        self._refreshed, self._squares = (), {}
        [plan] = plans
        if not plan.parts:
            return
        self.plan, self._step = plan, step
        self._left = dict.fromkeys(plan.names, self._passes)
        for name in plan.names:
            self.active.detach(name)
            parameter = self.active.parameters[name]
            parameter.requires_grad_(True)
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook(name, plan.parts_of(name))))

    def set_accumulation_steps(self, steps: int) -> None:
        self._passes = 1 if self.config.refresh_batch == "first" else steps
        if self.plan is not None:
            self._left = dict.fromkeys(self.plan.names, self._passes)

    def _hook(self, name: str, parts: Sequence[RefreshPart]) -> Any:
        def stream(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            self._left[name] -= 1
            for part in parts:
                mine = part.of(gradient)
                self.comm.reduce(mine, part.owner, "refresh_gradients")
                if self.comm.rank != part.owner:
                    continue
                if self._passes == 1:
                    self._project(part, mine)
                elif self.config.refresh == "compressed":
                    self._compress(part, mine)
                elif part in self._sums:
                    self._sums[part].add_(mine)
                else:  # not a view, which would keep all of a stack's
                    self._sums[part] = mine.to(self.active.dtype, copy=mine.numel() < gradient.numel())

        return stream

    def _compress(self, part: RefreshPart, gradient: Tensor) -> None:
        seed = self._seeds(part, f"{self._step}/{self._left[part.name]}")  # each micro-batch has noise of its own
        with self._beside(gradient):
            total = self._compressed.get(part)
            self._compressed[part] = compressed.add(total, gradient, part.shape[-1], seed, self._previous(part))

    def _project(self, part: RefreshPart, gradient: Tensor | Compressed) -> None:
        config, previous, r = self.config, self._previous(part), part.shape[-1]
        with self._beside(gradient.left if isinstance(gradient, Compressed) else gradient):
            if isinstance(gradient, Compressed):
                found, product = gradient.range(r), gradient.left.to(self.active.dtype)
            else:
                found = find_range(gradient, r, config.projector, self._seeds(part, self._step), previous)
                product = low_rank_gradient(gradient, found.basis.to(self.active.dtype))
            part.of(self.active.buffer.grad(part.name)).copy_(product[..., :r])
            self._ranges[part] = found, product[..., r:].clone()
        if self._side is not None:  # where the choice is made
            for tensor in (found.basis, found.squares, found.norm, self._ranges[part][1]):
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

    def _finish(self) -> dict[RefreshPart, Tensor]:
        """The projectors of what this rank owns; their low-rank gradients into the buffer. One wait for the device."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
        ranges, self._ranges = self._ranges, {}
        chosen = self._choose({part: found for part, (found, _) in ranges.items()})
        dtype, projectors = self.active.dtype, {}
        for part in list(ranges):
            found, rest = ranges.pop(part)
            low_rank = part.of(self.active.buffer.grad(part.name))
            if part not in chosen:
                # no projector is made of it; the norm of all gradients lets every rank skip the step
                low_rank.fill_(math.nan)
                continue
            projectors[part] = chosen[part].projector(found, dtype).to(self.active.weight_dtype)
            turn = chosen[part].turn.to(dtype)
            low_rank.copy_((rest @ turn[..., found.r :, :]).add_(low_rank @ turn[..., : found.r, :]))
            norms = [torch.linalg.vector_norm(one).double() for one in (low_rank, found.norm)]
            self._squares[part] = torch.stack(norms).square()
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
        if any(self._left[name] != self._passes for name in missing) or len(missing) == len(self._left):
            raise RuntimeError(
                f"no gradient of {missing[0]} arrived in {self._left[missing[0]]} of the backward passes that a "
                "refresh takes: call OWS.backward once a micro-batch, `accumulation` times a step"
            )
        for sums in (self._sums, self._compressed):  # nothing is sent here: all owners work at the same time
            for part in list(sums):
                self._project(part, sums.pop(part))  # type: ignore[arg-type]
        mine = self._finish()
        self.cancel()
        self._refreshed = plan.names
        dtype, device = self.active.weight_dtype, self.active.weights.device
        # of weights that a model has, and does not use with what it was given, projectors are zero
        self._found = gather(self.comm, plan, mine, dtype, device, "projectors")

    def energy(self) -> dict[int, Tensor]:
        device, energy = self.active.weights.device, {}
        for layer, block in enumerate(self.active.layers.layers):
            names = [matrix.name for matrix in block.matrices if matrix.name in self._refreshed]
            if names:
                mine = [squares.to(device) for part, squares in self._squares.items() if part.name in names]
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
        self._compressed.clear()
        self._ranges.clear()
        for name in self.plan.names if self.plan is not None else ():
            self.active.parameters[name].requires_grad_(False)
        self.plan, self._found = None, {}


def gather(
    comm: Communicator,
    plan: RefreshPlan,
    found: Mapping[RefreshPart, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    what: str,
) -> dict[str, Tensor]:
    """What each owner ``found``, of the shapes of the plan's parts, on every rank, by matrix. Collective."""
    mine = torch.zeros(plan.stride, plan.columns, dtype=dtype, device=device)
    for part, one in found.items():
        rows_of(mine, part, comm.rank * plan.stride).copy_(one)
    gathered = comm.all_gather(mine, what)
    # cloned, so that a matrix that leaves gives its memory back
    parts = {name: [rows_of(gathered, part) for part in plan.parts_of(name)] for name in plan.names}
    return {name: some[0].clone() if len(some) == 1 else torch.cat(some) for name, some in parts.items()}


def rows_of(buffer: Tensor, part: RefreshPart, first: int = 0) -> Tensor:
    """What is in the part's rows of a ``buffer`` that begins with row ``first``: a view."""
    start, stop = part.rows
    return buffer[start - first : stop - first].view(-1)[: math.prod(part.shape)].view(part.shape)
