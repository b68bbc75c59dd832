"""New projectors without full gradients: of two products of each gradient with known matrices, as the coordinates'
backward pass gives them. `after_step` gives projectors for the steps that follow.

    first step              Y = G Omega (long, w)    reduce_scatter -> owner: its orthonormal basis    all_gather
    second step             Z = G^T basis (short, w) reduce_scatter -> owner: its leading r directions all_gather
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ows_ds.config import OWSConfig
from ows_ds.distributed.communicator import Communicator
from ows_ds.model.layers import Block, Matrix
from ows_ds.optim.active_set import ActiveSet
from ows_ds.optim.layout import Plan, RefreshPlan, plan_refresh
from ows_ds.optim.low_rank import Coordinates, make_coordinates
from ows_ds.optim.projection import Range, orthonormal, range_of, sketch_width
from ows_ds.optim.refresh import Refresh, gather


class Sketches(Refresh):
    """Projectors of sketches over two steps."""

    def __init__(self, active: ActiveSet, config: OWSConfig) -> None:
        super().__init__(active, config)
        self.sketches: list[Sketch] = []

    def plans(self, plan: Plan, due: Sequence[Block]) -> list[RefreshPlan]:
        first = [matrix for block in due for matrix in block.matrices]
        second = [matrix for matrix in plan.matrices.values() if matrix.name in self.bases]
        return [plan_refresh(first, self.comm.world_size, True), plan_refresh(second, self.comm.world_size)]

    def begin(self, plans: Sequence[RefreshPlan], step: int) -> None:
        """Let the coming step take first and second sketches of gradients."""
        active = self.active
        for second, plan in enumerate(plans):
            if not plan.owners:
                continue
            matrices = [active.plan.matrices[name] for name in plan.owners]
            bases = {}
            for matrix in matrices:
                if second:
                    bases[matrix.name] = self.bases.pop(matrix.name)
                    continue
                width, name = sketch_width(active.r, matrix.short), matrix.name
                start = self._start(name, matrix.short, width, step, active.projectors.get(name))
                bases[name] = start.to(active.weight_dtype)
            sketch = Sketch(self.comm, plan, matrices, bases, active.dtype, bool(second), active.lookups)
            self.sketches.append(sketch)
            for name, coordinates in sketch.coordinates.items():
                for hook in active.hooks[name]:
                    hook.sketch = coordinates

    def not_finite(self) -> list[Tensor]:
        return [torch.linalg.vector_norm(sketch.grads) * 0 for sketch in self.sketches]

    @torch.no_grad()
    def after_step(self) -> dict[str, Tensor]:
        projectors: dict[str, Tensor] = {}
        for sketch in self._end():
            if sketch.second:
                projectors.update(sketch.projectors(self.active.r, self._choose))
            else:
                self.bases.update(sketch.bases())
        return projectors

    def skip(self) -> None:
        self.bases.update(self.second_bases())
        self._end()

    def _end(self) -> list[Sketch]:
        sketches, self.sketches = self.sketches, []
        for hook in (hook for one in sketches for name in one.coordinates for hook in self.active.hooks[name]):
            hook.sketch = None
        return sketches

    def cancel(self) -> None:
        self._end()

    def zero_grad(self) -> None:
        for sketch in self.sketches:
            sketch.grads.zero_()

    def second_bases(self) -> dict[str, Tensor]:
        second = (sketch for sketch in self.sketches if sketch.second)
        return {name: one.projector for sketch in second for name, one in sketch.coordinates.items()}


class Sketch:
    """One pass of sketches of some matrices' gradients, summed over backward passes, until `bases` or `projectors`.

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
            direct = matrix.name not in lookups
            self.coordinates[matrix.name] = make_coordinates(matrix.shape, zeros, basis, sums, direct, second)

    def bases(self) -> dict[str, Tensor]:
        """Of a first pass: by matrix, (long, w), orthonormal, on every rank. Collective."""
        found = {name: orthonormal(sketch)[0] for name, sketch in self._mine().items()}
        gathered = self._gathered(found, self.grads.shape[1], "sketch_bases")
        return {name: basis[:, : self.coordinates[name].projector.shape[1]] for name, basis in gathered.items()}

    def projectors(self, r: int, choose: Callable[[Mapping[str, Range]], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Of a second pass: by matrix, (short, r), on every rank. Collective."""
        ranges = {name: range_of(sketch) for name, sketch in self._mine().items()}
        dtype = self.grads.dtype
        found = {name: ranges[name].basis.to(dtype) @ turn.to(dtype) for name, turn in choose(ranges).items()}
        return self._gathered(found, r, "projectors")

    def _mine(self) -> dict[str, Tensor]:
        """The sketches, summed over ranks, of the matrices that this rank owns. Collective."""
        mine, first = self.comm.reduce_scatter(self.grads, "sketches"), self.comm.rank * self.plan.stride
        found = {}
        for name, owner in self.plan.owners.items():
            if owner == self.comm.rank:
                start, stop = self.plan.slots[name]
                found[name] = mine[start - first : stop - first, : self.coordinates[name].projector.shape[1]]
        return found

    def _gathered(self, found: dict[str, Tensor], columns: int, what: str) -> dict[str, Tensor]:
        dtype = next(iter(self.coordinates.values())).projector.dtype
        return gather(self.comm, self.plan, found, columns, dtype, self._device, what)
