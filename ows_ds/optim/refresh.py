"""Gradients on their way to projectors, in one of two ways.

`Refresh`: full gradients, streamed out of the backward pass, one matrix at a time.

    backward reaches W      G  (every process, its own part of the batch)
        reduce              G  summed, on W's owner only; the others drop theirs
        owner               one micro-batch: Q = projector(G),  R = G Q  (its low-rank gradient) is added up, G is freed
                            more: G is added up
    ... next W ...
    finish                  owners, all at once: Q and R of the sums;  all_gather of all Q

`Sketch`: two products of G with known matrices, as the coordinates' backward pass gives them; no G anywhere.

    first pass              Y = G Omega (long, w)    reduce_scatter -> owner: its orthonormal basis    all_gather
    second pass             Z = G^T basis (short, w) reduce_scatter -> owner: its leading r directions all_gather
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ows_ds.distributed.communicator import Communicator
from ows_ds.model.layers import Matrix
from ows_ds.optim.layout import RefreshPlan
from ows_ds.optim.low_rank import Coordinates, collect
from ows_ds.optim.projection import leading, low_rank_gradient, orthonormal

FindProjector = Callable[[str, Tensor], Tensor]


class Refresh:
    """One refresh of the projectors of some matrices; alive from before a forward pass until `finish`.

    micro_batches: backward passes whose gradients the projector is found from. With one, an owner keeps nothing of a
    gradient's size; with more, an accumulator for each matrix it owns.
    """

    def __init__(
        self,
        comm: Communicator,
        plan: RefreshPlan,
        parameters: Mapping[str, nn.Parameter],
        micro_batches: int,
        find: FindProjector,
        take: Callable[[str, Tensor], Any],
        dtype: torch.dtype,
        device: torch.device,
        across: Collection[str] = (),
    ) -> None:
        """parameters: the weights of the plan's matrices, which require gradients until `finish` or `cancel`.

        find: (name, G) -> Q, float32. take: is given the name and R (max(m, n), r), over all that was seen, of each
        matrix that this process owns, as soon as it is found. dtype: of the low-rank gradients. device: of the
        projectors. across: names of the matrices whose sides are exchanged.
        """
        self.comm = comm
        self.plan = plan
        self.parameters = dict(parameters)
        self.projectors: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}  # (2,), float64: ||G Q||^2 and ||G||^2 of what this process owns
        self._dtype, self._device = dtype, device
        self._find, self._take, self._across = find, take, across
        self.set_accumulation_steps(micro_batches)
        self._sums: dict[str, Tensor] = {}
        self._handles = []
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(True)
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook(name)))

    def set_accumulation_steps(self, micro_batches: int) -> None:
        """Before the first backward pass: how many there will be."""
        self._streamed = micro_batches == 1
        self._left = dict.fromkeys(self.parameters, micro_batches)

    def _hook(self, name: str) -> Any:
        owner = self.plan.owners[name]

        def stream(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            self.comm.reduce(gradient, owner, "refresh_gradients")
            self._left[name] -= 1
            if self.comm.rank != owner:
                return
            if self._streamed:
                self._project(name, gradient)
            elif name in self._sums:
                self._sums[name].add_(gradient)
            else:
                self._sums[name] = gradient.to(self._dtype)

        return stream

    def _project(self, name: str, gradient: Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient, dtype=self._dtype)
        if not bool(norm.isfinite()):
            # no projector is made of it; the norm of all gradients tells every process to skip the step
            self._take(name, gradient.new_full((), math.nan))
            return
        # rounded as it will be stored, so that R and later coordinates share one subspace
        projector = self._find(name, gradient).to(self.parameters[name].dtype)
        self.projectors[name] = projector
        low_rank = low_rank_gradient(gradient, projector.to(self._dtype), name in self._across)
        self.squares[name] = torch.stack([torch.linalg.vector_norm(low_rank), norm]).double().square()
        self._take(name, low_rank)

    def finish(self, rank: int) -> dict[str, Tensor]:
        """All projectors (min(m, n), r) by matrix name, in the weights' dtype, on every process. Collective."""
        missing = [name for name, left in self._left.items() if left]
        if missing:
            raise RuntimeError(
                f"no gradient of {missing[0]} arrived in {self._left[missing[0]]} of the backward passes that a "
                "refresh takes: call OWS.backward once a micro-batch, `accumulation` times a step"
            )
        for name in list(self._sums):  # nothing is sent here: all owners work at the same time
            self._project(name, self._sums.pop(name))
        self.cancel()
        dtype = next(iter(self.parameters.values())).dtype
        return _gather(self.comm, self.plan, self.projectors, rank, dtype, self._device, "projectors")

    def cancel(self) -> None:
        """Freeze the weights again and stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sums.clear()
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)


class Sketch:
    """One pass of sketches of some matrices' gradients, summed over backward passes; alive until `finish`.

    Each matrix gets coordinates of value zero beside those that train: their gradient is a sketch of the matrix's.
    """

    def __init__(
        self,
        comm: Communicator,
        plan: RefreshPlan,
        matrices: Iterable[Matrix],
        bases: Mapping[str, Tensor],
        dtype: torch.dtype,
        second: bool,
        lookups: Collection[str] = (),
    ) -> None:
        """plan: of the longer sides, or of the shorter ones where this is the ``second`` pass.

        bases: by name, what the gradient is multiplied with: (short, w), or the first pass's result (long, w) in the
        second. dtype: of the sums. lookups: names of the matrices that are embeddings or heads.
        """
        self.comm, self.plan, self.second = comm, plan, second
        self._device = next(iter(bases.values())).device
        width = max(basis.shape[1] for basis in bases.values())
        self.grads = torch.zeros(comm.world_size * plan.stride, width, dtype=dtype, device=self._device)
        self.coordinates: dict[str, Coordinates] = {}
        for matrix in matrices:
            basis = bases[matrix.name]
            sums = self.grads[slice(*plan.slots[matrix.name]), : basis.shape[1]]
            # of one entry's memory: never written to, only its gradient is of interest
            zeros = torch.zeros((), dtype=basis.dtype, device=self._device).expand_as(sums)
            across, direct = second, matrix.name not in lookups
            self.coordinates[matrix.name] = collect(matrix.shape, zeros, basis, sums, direct, across)

    def finish(self, rank: int) -> dict[str, Tensor]:
        """By matrix, in the bases' dtype, on every process: the second pass's basis (long, w), or, after it, the
        projector (short, r). Collective.
        """
        width = self.grads.shape[1]
        mine = self.comm.reduce_scatter(self.grads, "sketches")
        first = self.comm.rank * self.plan.stride
        found = {}
        for name, owner in self.plan.owners.items():
            if owner == self.comm.rank:
                start, stop = self.plan.slots[name]
                sketch = mine[start - first : stop - first, : self.coordinates[name].projector.shape[1]]
                found[name] = leading(sketch, rank) if self.second else orthonormal(sketch)[0]
        dtype = next(iter(self.coordinates.values())).projector.dtype
        columns, what = (rank, "projectors") if self.second else (width, "sketch_bases")
        gathered = _gather(self.comm, self.plan, found, columns, dtype, self._device, what)
        if self.second:
            return gathered
        return {name: basis[:, : self.coordinates[name].projector.shape[1]] for name, basis in gathered.items()}


def _gather(
    comm: Communicator,
    plan: RefreshPlan,
    found: Mapping[str, Tensor],
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    what: str,
) -> dict[str, Tensor]:
    """What each owner ``found``, (rows of its slot, <= columns), on every process, padded with zeros. Collective."""
    part = torch.zeros(plan.stride, columns, dtype=dtype, device=device)
    first = comm.rank * plan.stride
    for name, matrix in found.items():
        start, stop = plan.slots[name]
        part[start - first : stop - first, : matrix.shape[1]] = matrix
    whole = comm.all_gather(part, what)
    # cloned, so that a matrix that leaves gives its memory back
    return {name: whole[start:stop].clone() for name, (start, stop) in plan.slots.items()}
