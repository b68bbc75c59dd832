"""The blocks that train now: what enters, what leaves, and what is attached to their modules meanwhile.

enter     vectors listen for gradients; matrices wait for a projector, or train at full rank (`FullRank`)
attach    a projector is there: low-rank hooks take the place of the modules' forward pass
merge     W <- decay * W + L R^T, coordinates become zero
leave     merged; projectors, coordinates and moments are freed
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ows_ds.config import OWSConfig
from ows_ds.distributed.weights import Weights
from ows_ds.model.blocks import Block, Matrix, ModelLayers, Vector
from ows_ds.optim.full_rank import FullRank, Lean
from ows_ds.optim.gap import Gap
from ows_ds.optim.hooks import Hook, hook_of
from ows_ds.optim.layout import COLUMNS, Plan, make_plan
from ows_ds.optim.low_rank import Coordinates, make_coordinates
from ows_ds.optim.muon import Rule
from ows_ds.optim.projection import rotation
from ows_ds.optim.sampling import LayerSet
from ows_ds.optim.update import CoordinateBuffer

ALWAYS = "always"  # name of the block of embedding, head and final norm


class ActiveSet:
    """What trains in the coming step.

    Attributes:
        layers: The model's layers.
        buffer: Coordinates of the active blocks, their gradients and moments.
        full: Weights that train at full rank.
        hooks: By matrix, the hooks on the modules that use it.
        projectors: By matrix of the active blocks, (short, r), in the weights' dtype.
        clocks: By active block, its steps since it entered.
        trained_names: All weights that have ever trained.
        merged_norms: By layer, ||C|| of what was merged since the last step.
    """

    def __init__(self, weights: Weights, layers: ModelLayers, config: OWSConfig) -> None:
        """Freezes all weights and puts hooks on the modules. Collective."""
        self.weights, self.layers, self.config = weights, layers, config
        module = weights.module
        self.low_rank = config.rank is not None
        auto = config.update_proj_gap == "auto"
        self.gap = Gap(*config.proj_gap_range, config.kept_energy) if auto else None
        self.update_proj_gap = config.update_proj_gap
        self.r = COLUMNS if config.rank is None else config.rank
        self.parameters = weights.parameters()
        for parameter in self.parameters.values():  # also of those that are not in their module now
            parameter.requires_grad_(False)
        self.weight_dtype = next(iter(self.parameters.values())).dtype
        self.dtype = torch.promote_types(self.weight_dtype, torch.float32)  # of masters, moments and gradients
        self.lookups = {matrix.name for matrix in self.layers.embeddings}
        self.always = Block(
            ALWAYS,
            self.layers.embeddings if config.always_on == "low_rank" else (),
            (*(self.layers.final if config.always_on != "none" else ()), *self.layers.heads),
        )
        self.layer_of = {block.name: index for index, block in enumerate(self.layers.layers)}
        self.hooks: dict[str, list[Hook]] = {}
        for matrix in (m for block in (*self.layers.layers, self.always) for m in block.matrices):
            modules, key = [module.get_submodule(name) for name in matrix.modules], matrix.name.rpartition(".")[2]
            self.hooks[matrix.name] = [hook_of(one, key, weights.sharded) for one in modules]
        self.projectors: dict[str, Tensor] = {}
        self.clocks: dict[str, int] = {}
        self.trained_names: set[str] = set()
        self.merged_norms: dict[int, Tensor] = {}
        self.steps = 0  # optimizer steps so far, which stochastic rounding depends on
        self._vector_hooks: dict[str, RemovableHandle] = {}
        nothing = make_plan((), self.r, weights.comm.world_size)
        rule = Rule(config.rule, config.scale, config.momentum, config.adjust_lr)
        self.buffer = CoordinateBuffer(nothing, weights.comm, self.dtype, self.weight_dtype, weights.device, rule)
        self.full = FullRank(weights, self.dtype, Lean(config.moments, config.master == "float32", config.seed))
        if config.always_on == "full":
            self._enter_full_rank(self.layers.embeddings)

    @property
    def plan(self) -> Plan:
        """Layout of the coordinates."""
        return self.buffer.plan

    # ------------------------------------------------------------------ enter and leave

    def plan_of(self, layer_set: LayerSet) -> Plan:
        """The plan of a set of layers and what is always trained."""
        blocks = [self.layers.layers[i] for i in layer_set]
        if not self.low_rank:  # their matrices train elsewhere, in `FullRank`
            blocks = [Block(block.name, (), block.vectors) for block in blocks]
        if self.always.matrices or self.always.vectors:
            blocks.append(self.always)
        return make_plan(blocks, self.r, self.weights.comm.world_size)

    def due(self, plan: Plan) -> list[Block]:
        """The blocks for whose matrices new projectors, or the first ones, are to be found from the coming step on."""
        return [block for block in plan.blocks if block.matrices and self._is_due(block.name)]

    def _is_due(self, name: str) -> bool:
        clock = self.clocks.get(name, 0)
        if self.gap is not None:
            return self.gap.due(name, clock)
        assert self.update_proj_gap != "auto"
        return clock % self.update_proj_gap == 0

    def decide(self, plan: Plan) -> None:
        """Which blocks that stay in ``plan`` are due under ``update_proj_gap: auto``: see `Gap.decide`. Collective."""
        if self.gap is not None:
            clocks = {b.name: self.clocks[b.name] for b in plan.blocks if b.matrices and b.name in self.clocks}
            self.gap.decide(clocks, self.weights.comm)

    def note(self, energies: Mapping[str, Tensor], found: Collection[str]) -> None:
        """All ranks' sums of `CoordinateBuffer.energies` in a step. found: matrices whose projectors it has found."""
        if self.gap is not None:
            own = {self.buffer.block(name).layout.block.name for name in found}
            for name in energies.keys() - own:
                self.gap.add(name, energies[name])

    def change(self, plan: Plan) -> None:
        """From the old set to ``plan``: merge and free what leaves, carry over what stays, start what enters.

        Collective.
        """
        if plan == self.plan:
            return
        stay = {block.name for block in plan.blocks}
        leaving = [block for block in self.plan.blocks if block.name not in stay]
        for block in leaving:
            self.merge(block)
            self._leave(block)
        self.weights.freeze(self.weights_of(leaving))
        self.weights.thaw(self.weights_of(block for block in plan.blocks if block.name not in self.clocks))
        self.buffer.change(plan)
        for block in plan.blocks:
            if block.name not in self.clocks:
                self.clocks[block.name] = 0
                for vector in block.vectors:
                    value = self.weights.full_tensor(self.parameters[vector.name])
                    self.buffer.block(vector.name).fill(vector.name, value)
                self._listen(block)
                self._enter_full_rank(self._full_rank_matrices(block))

    def drop(self) -> None:
        """Forget the current set without merging."""
        for block in self.plan.blocks:
            self._leave(block)
        self.weights.freeze(self.weights_of(self.plan.blocks))
        self.buffer.change(make_plan((), self.r, self.weights.comm.world_size))

    def restore(self, plan: Plan, clocks: dict[str, int]) -> None:
        """After `drop`: ``plan``'s blocks, whose weights, coordinates and projectors are still to be set."""
        self.clocks = clocks
        self.weights.thaw(self.weights_of(plan.blocks))
        self.buffer.change(plan)
        for block in plan.blocks:
            self._enter_full_rank(self._full_rank_matrices(block))
            self._listen(block)

    def close(self) -> None:
        """Give the model its own forward passes back, every weight frozen; nothing is merged."""
        self.drop()
        self.full.leave(list(self.full.parameters))
        for hook in (hook for hooks in self.hooks.values() for hook in hooks):
            hook.remove()

    def weights_of(self, blocks: Iterable[Block]) -> list[nn.Parameter]:
        """All that trains in blocks of a plan."""
        found = []
        for block in blocks:
            parts: tuple[Vector | Matrix, ...] = (*block.vectors, *block.matrices, *self._full_rank_matrices(block))
            found += [self.parameters[part.name] for part in parts]
        return found

    def _full_rank_matrices(self, block: Block) -> tuple[Matrix, ...]:
        """The matrices of a block of the plan that train at full rank beside it."""
        if self.low_rank or block.name == ALWAYS:
            return ()
        return self.layers.layers[self.layer_of[block.name]].matrices

    def _enter_full_rank(self, matrices: Iterable[Matrix]) -> None:
        names = [matrix.name for matrix in matrices]
        self.full.enter({name: self.parameters[name] for name in names})
        self.trained_names.update(names)

    def _listen(self, block: Block) -> None:
        """Let the block's vectors train: their gradients go straight into the buffer."""

        def hook_of(name: str) -> Any:
            def hook(parameter: Tensor) -> None:
                gradient, parameter.grad = parameter.grad, None
                assert gradient is not None
                self.buffer.grad(name).add_(gradient.reshape(-1))
                self.buffer.arrived(name)

            return hook

        for vector in block.vectors:
            parameter = self.parameters[vector.name]
            parameter.requires_grad_(True)
            hook = hook_of(vector.name)
            self._vector_hooks[vector.name] = parameter.register_post_accumulate_grad_hook(hook)
        parts: tuple[Vector | Matrix, ...] = (*block.vectors, *block.matrices)
        self.trained_names.update(part.name for part in parts)

    def _leave(self, block: Block) -> None:
        """Freeze a block and drop all that is kept for it but its moments, which go with the buffer."""
        for vector in block.vectors:
            self._vector_hooks.pop(vector.name).remove()
            self.parameters[vector.name].requires_grad_(False)
        for matrix in block.matrices:
            self.projectors.pop(matrix.name, None)
            self.detach(matrix.name)
        del self.clocks[block.name]
        if self.gap is not None:
            self.gap.drop(block.name)
        self.full.leave(matrix.name for matrix in self._full_rank_matrices(block))

    # ------------------------------------------------------------------ attach and merge

    def coordinates(self, name: str) -> Coordinates | None:
        """What is attached to a matrix. Tied modules share it, and with it one decay."""
        return self.hooks[name][0].coordinates

    def attach(self, name: str, projector: Tensor, decay: float = 1.0) -> None:
        """Let the matrix's coordinates, as they are in the buffer, train in the projector's subspace."""
        buffer, direct = self.buffer, name not in self.lookups
        shape = self.plan.matrices[name].shape
        coordinates = make_coordinates(shape, buffer.value(name), projector, buffer.grad(name), direct)
        coordinates.decay = decay
        # called when all the leaf's uses have had their turn, though they bring autograd nothing
        coordinates.values.register_hook(lambda _: buffer.arrived(name))
        for hook in self.hooks[name]:
            hook.coordinates = coordinates

    def detach(self, name: str) -> None:
        """Nothing acts on the matrix any more."""
        for hook in self.hooks[name]:
            hook.coordinates = hook.sketch = None

    def take(self, projectors: dict[str, Tensor]) -> None:
        """Attach coordinates of zero in new subspaces to the (merged) matrices."""
        moments = self.config.moments_on_refresh
        # Adam has counted the steps before a first projector, too, in which there was nothing to train
        restart = {
            block.name
            for block in self.plan.blocks
            for matrix in block.matrices
            if matrix.name in projectors and (moments == "reset" or matrix.name not in self.projectors)
        }
        for name, projector in projectors.items():
            old = self.projectors.get(name)
            if old is not None:
                self._carry_moments(name, old, projector)
            self.projectors[name] = projector
            self.attach(name, projector)
        if self.gap is not None:
            self.gap.taken({self.buffer.block(name).layout.block.name for name in projectors})
        self.buffer.set_steps({(block, "matrices"): 0.0 for block in restart})

    def _carry_moments(self, name: str, old: Tensor, new: Tensor) -> None:
        """What becomes of a matrix's moments when its subspace changes (``optim.moments_on_refresh``).

        align, keep: nothing (under align the new basis is the one nearest to the old). reset: zero. rotate: the mean
        turns with the subspace; the second moment as that of uncorrelated components would.
        """
        block, moments = self.buffer.block(name), self.config.moments_on_refresh
        rows = block.local_rows(name)
        if rows is None or moments in ("align", "keep"):
            return
        # under muon there is one moment alone
        both = [block.exp_avg[rows], *([block.squares(rows)] if self.config.rule == "adamw" else [])]
        if moments == "reset":
            for moment in both:
                moment.zero_()
            return
        turn = rotation(old, new).to(self.dtype)
        *_, long, r = block.layout.shapes[name]  # r divides a row, so that none of a stack's is cut
        first = (block.layout.part(self.weights.comm.rank)[0] + rows.start - block.layout.slots[name][0]) * self.r // r
        for moment, matrices in zip(both, (turn, turn.square()), strict=False):
            stacked = moment.view(-1, r)
            for expert, one in enumerate(matrices.view(-1, r, r)):
                own = slice(max(expert * long - first, 0), max((expert + 1) * long - first, 0))
                stacked[own] = stacked[own] @ one

    def merge(self, block: Block) -> None:
        """W <- decay * W + L R^T for the block's matrices, on this rank's part of W; coordinates become zero.

        Collective under bfloat16: the float32 coordinates come together.
        """
        if not self.has_coordinates(block):
            return
        buffer = self.buffer.blocks[block.name]
        values = buffer.full_tensor()
        if block.name in self.layer_of:
            self.merged_norms[self.layer_of[block.name]] = self.norm(block, values)
        for matrix in block.matrices:
            attached = self.coordinates(matrix.name)
            if attached is None:
                continue
            mine, projector = buffer.slot(values, matrix.name), attached.projector.to(self.dtype)
            left, right = (mine, projector) if attached.left else (projector, mine)
            noise = f"{self.config.seed}/{self.steps}/{matrix.name}"
            stochastic = self.config.merge_rounding == "stochastic"
            parameter = self.parameters[matrix.name]
            self.weights.merge(parameter, left, right, attached.decay, noise if stochastic else None)
            buffer.fill(matrix.name, torch.zeros_like(mine))
            attached.decay = 1.0

    def merge_all(self) -> None:
        """Merge all blocks. Not inside a step. Collective."""
        self.weights.after_step()
        for block in self.plan.blocks:
            self.merge(block)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """See `ows_ds.optim.ows.OWS.merged`."""
        self.weights.after_step()
        resident = self.weights.resident_slice
        found = {name: self.coordinates(name) for name in self.plan.matrices}
        attached = {name: one for name, one in found.items() if one is not None}
        decays = {name: one.decay for name, one in attached.items()}
        slices = {name: resident(self.parameters[name])[1].to("cpu", copy=True) for name in attached}
        kept = [(t, t.clone()) for block in self.buffer.blocks.values() for t in (block.values, block.master)]
        norms = dict(self.merged_norms)
        with torch.no_grad():
            self.merge_all()
        try:
            yield
        finally:
            with torch.no_grad():
                self.weights.after_step()
                for name, entries in slices.items():
                    resident(self.parameters[name])[1].copy_(entries)
                    attached[name].decay = decays[name]
                for tensor, before in kept:
                    tensor.copy_(before)
            self.merged_norms = norms

    def has_coordinates(self, block: Block) -> bool:
        """Whether any of the block's matrices has coordinates."""
        return any(self.coordinates(matrix.name) for matrix in block.matrices)

    def norm(self, block: Block, values: Tensor) -> Tensor:
        """Frobenius norm, (), of the coordinates of all of a block's matrices among its ``values`` (rows, r)."""
        rows = slice(*self.buffer.blocks[block.name].layout.segments["matrices"])
        return torch.linalg.vector_norm(values[rows], dtype=self.dtype)

    def update_norm(self, all_layers: bool) -> dict[int, Tensor]:
        """See `ows_ds.optim.ows.OWS.update_norm`."""
        norms = dict(self.merged_norms)
        for block in self.plan.blocks if all_layers else ():
            layer = self.layer_of.get(block.name)
            if layer is not None and layer not in norms and self.has_coordinates(block):
                norms[layer] = self.norm(block, self.buffer.blocks[block.name].values)
        return norms

    # ------------------------------------------------------------------ a step

    def await_gradients(self) -> None:
        """Let the gradients of layers whose every matrix has coordinates go as they come: the highest come first."""
        complete = (b for b in self.plan.blocks if all(self.coordinates(m.name) for m in b.matrices))
        self.buffer.await_gradients([block.name for block in complete if block.name != ALWAYS][::-1])

    def after_update(self, decay: float) -> None:
        """Bring the trained vectors into the model; ``decay`` the matrices' frozen weights (1: not at all)."""
        vectors = [vector for block in self.plan.blocks for vector in block.vectors]
        self.weights.write(
            [self.parameters[vector.name] for vector in vectors],
            [self.buffer.value(vector.name) for vector in vectors],
        )
        for matrix in self.plan.matrices.values() if decay != 1.0 else ():
            attached = self.coordinates(matrix.name)
            if attached is not None:  # not yet, where only sketches of the matrix are taken
                attached.decay *= decay
