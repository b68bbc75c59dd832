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
from ows_ds.model.blocks import Block, Matrix
from ows_ds.optim.active_set import ActiveSet
from ows_ds.optim.layout import Plan, RefreshPart, RefreshPlan, plan_refresh
from ows_ds.optim.low_rank import Coordinates, make_coordinates
from ows_ds.optim.projection import Choice, Range, orthonormal, range_of
from ows_ds.optim.refresh import Refresh, gather, rows_of
from ows_ds.optim.sizes import sketch_width

Choose = Callable[[Mapping[RefreshPart, Range]], dict[RefreshPart, Choice]]
"""See `ows_ds.optim.projection.choose`."""


class Sketches(Refresh):
    """Projectors of sketches over two steps."""

    def __init__(self, active: ActiveSet, config: OWSConfig) -> None:
        super().__init__(active, config)
        self.sketches: list[Sketch] = []

    def plans(self, plan: Plan, due: Sequence[Block]) -> list[RefreshPlan]:
        first = [matrix for block in due for matrix in block.matrices]
        second = [matrix for matrix in plan.matrices.values() if matrix.name in self.bases]
        world_size, r = self.comm.world_size, self.active.r
        return [plan_refresh(first, world_size, r, "first"), plan_refresh(second, world_size, r, "second")]

    def begin(self, plans: Sequence[RefreshPlan], step: int) -> None:
        """Let the coming step take first and second sketches of gradients."""
        active = self.active
        for second, plan in enumerate(plans):
            if not plan.parts:
                continue
            matrices = [active.plan.matrices[name] for name in plan.names]
            bases, result = {}, plan
            if second:
                bases = {name: self.bases.pop(name) for name in plan.names}
                result = plan_refresh(matrices, self.comm.world_size, active.r)
            for matrix in () if second else matrices:
                experts = None if matrix.experts is None else (0, matrix.experts)
                whole = RefreshPart(matrix.name, experts, 0, (0, 0), ())
                width = sketch_width(matrix.low_rank(active.r), matrix.short)
                start = self._start(whole, matrix.short, width, step, active.projectors.get(matrix.name))
                bases[matrix.name] = start.to(active.weight_dtype)
            sketch = Sketch(self.comm, plan, result, matrices, bases, active.dtype, bool(second), active.lookups)
            self.sketches.append(sketch)
            for name, coordinates in sketch.coordinates.items():
                for hook in active.hooks[name]:
                    hook.sketch = coordinates

    def not_finite(self) -> list[Tensor]:
        return [norm * 0 for sketch in self.sketches for norm in sketch.norms()]

    @torch.no_grad()
    def after_step(self) -> dict[str, Tensor]:
        projectors: dict[str, Tensor] = {}
        for sketch in self._end():
            if sketch.second:
                projectors.update(sketch.projectors(self._choose))
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
            sketch.zero_grad()

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
        result: RefreshPlan,
        matrices: Iterable[Matrix],
        bases: Mapping[str, Tensor],
        dtype: torch.dtype,
        second: bool,
        lookups: Collection[str] = (),
    ) -> None:
        """plan: of the sketches' way to their owners; ``result``, of what these find to all ranks.

        bases: by name, what the gradient is multiplied with: (short, w), or the first pass's result (long, w) in the
        second. dtype: of the sums. lookups: names of the matrices that are embeddings or heads.
        """
        self.comm, self.plan, self.result, self.second = comm, plan, result, second
        self._device = next(iter(bases.values())).device
        self.grads = torch.zeros(comm.world_size * plan.stride, plan.columns, dtype=dtype, device=self._device)
        self.coordinates: dict[str, Coordinates] = {}
        self._apart: dict[str, Tensor] = {}  # sums of stacks whose parts go to several ranks
        for matrix in matrices:
            basis, parts = bases[matrix.name], plan.parts_of(matrix.name)
            if len(parts) == 1:
                sums = rows_of(self.grads, parts[0])
            else:
                shape = (matrix.count, *parts[0].shape[1:])
                sums = self._apart[matrix.name] = torch.zeros(shape, dtype=dtype, device=self._device)
            # of one entry's memory: never written to, only its gradient is of interest
            zeros = torch.zeros((), dtype=basis.dtype, device=self._device).expand_as(sums)
            direct = matrix.name not in lookups
            self.coordinates[matrix.name] = make_coordinates(matrix.shape, zeros, basis, sums, direct, second)

    def zero_grad(self) -> None:
        """Forget the sums."""
        for sums in (self.grads, *self._apart.values()):
            sums.zero_()

    def norms(self) -> list[Tensor]:
        """Of the sums."""
        return [torch.linalg.vector_norm(sums) for sums in (self.grads, *self._apart.values())]

    def bases(self) -> dict[str, Tensor]:
        """Of a first pass: by matrix, (long, w), orthonormal, on every rank. Collective."""
        return self._gathered({part: orthonormal(sketch)[0] for part, sketch in self._mine().items()}, "sketch_bases")

    def projectors(
        self, choose: Callable[[Mapping[RefreshPart, Range]], dict[RefreshPart, Choice]]
    ) -> dict[str, Tensor]:
        """Of a second pass: by matrix, (short, r), on every rank. Collective."""
        found = {(part.name, part.experts): part for part in self.result.parts}
        mine = {found[part.name, part.experts]: sketch for part, sketch in self._mine().items()}
        ranges = {part: range_of(sketch, part.shape[-1]) for part, sketch in mine.items()}
        chosen = choose(ranges).items()
        return self._gathered({p: one.projector(ranges[p], self.grads.dtype) for p, one in chosen}, "projectors")

    def _mine(self) -> dict[RefreshPart, Tensor]:
        """The sketches, summed over ranks, of what this rank owns. Collective."""
        for name, sums in self._apart.items():
            for part in self.plan.parts_of(name):
                rows_of(self.grads, part).copy_(part.of(sums))
        mine, first = self.comm.reduce_scatter(self.grads, "sketches"), self.comm.rank * self.plan.stride
        return {part: rows_of(mine, part, first) for part in self.plan.parts if part.owner == self.comm.rank}

    def _gathered(self, found: dict[RefreshPart, Tensor], what: str) -> dict[str, Tensor]:
        dtype = next(iter(self.coordinates.values())).projector.dtype
        return gather(self.comm, self.result, found, dtype, self._device, what)
