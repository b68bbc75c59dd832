"""OWS as an optimizer: refresh -> communicate -> update -> merge.

    ows = OWS(model, scores="scores.json", gamma=5, rank=128)
    loss = model(**batch).loss
    ows.backward(loss); ows.step(); ows.zero_grad()

Between two calls of `step` the following holds: the layer set of the coming step is drawn and agreed, its vectors
listen for gradients, and each of its matrices either has coordinates attached or, where a refresh is due, is merged
and lets its full gradient through once. Under ``refresh="sketch"`` the latter never happens: for two steps a matrix has
a sketch attached, beside its coordinates or, if it has just entered, alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ows_ds.compat.torch import foreach_mul_, foreach_norm, mark_step_called
from ows_ds.config import check_sketch
from ows_ds.distributed.adopt import as_weights
from ows_ds.distributed.weights import ReadShard, Shard, Weights, interval, load_weights, weight_shards
from ows_ds.errors import UserError
from ows_ds.importance.probabilities import importance, probabilities
from ows_ds.importance.scores import Scores
from ows_ds.model.fingerprint import fingerprint
from ows_ds.model.layers import Block, Matrix, ModelLayers, find_layers
from ows_ds.optim.full_rank import FullRank, load_states, state_shards, steps_of
from ows_ds.optim.layout import COLUMNS, Plan, RefreshPlan, make_plan, plan_refresh
from ows_ds.optim.low_rank import LowRankHook, collect
from ows_ds.optim.projection import find_projector, rotation, sketch_width, start_basis
from ows_ds.optim.refresh import Refresh, Sketch
from ows_ds.optim.sampling import Cycle, LayerSet, Sampler
from ows_ds.optim.update import Accept, AdamWSettings, CoordinateBuffer, always

CHOICES = {
    "sampling.scheme": ("bernoulli", "fixed"),
    "optim.projector": ("randomized", "svd"),
    "optim.refresh": ("full", "sketch"),
    "optim.refresh_batch": ("full", "first"),
    "optim.moments_on_refresh": ("keep", "reset", "rotate"),
    "optim.merge_rounding": ("nearest", "stochastic"),
    "optim.always_on": ("full", "low_rank", "none"),
    "optim.side": ("std", "left", "right"),
}
ALWAYS = "always"  # name of the unit of embedding, head and final norm


class OWS(torch.optim.Optimizer):
    """Outlier-weighed layerwise sampling with low-rank coordinates (OWS, Algorithm 1), on one process or many.

    ``param_groups[0]["lr"]`` is the learning rate; torch's and transformers' schedulers work on it as on any optimizer.
    """

    def __init__(
        self,
        model: nn.Module | Weights,
        *,
        scores: str | Path | Scores | Sequence[float],
        gamma: float = 5,
        period: int = 50,
        scheme: str = "bernoulli",
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        projector: str = "randomized",
        refresh: str = "full",
        refresh_batch: str = "full",
        moments_on_refresh: str = "keep",
        merge_rounding: str = "nearest",
        always_on: str = "full",
        side: str = "std",
        accumulation: int = 1,
        seed: int = 0,
        sampler: Sampler | Cycle | None = None,
    ) -> None:
        """Collective. Freezes all weights of ``model`` but those that train; replaces its linear modules' forward.

        model: a plain model on its device (rank 0's weights are copied to all), a DeepSpeed engine made with ZeRO-3
        and no optimizer, or a `Weights`. scores: a file (refused for another model), `Scores`, or the ratios D.
        gamma: expected layers a period. period: K, optimizer steps. rank: None trains the sampled layers at full rank.
        sampler: draws the sets in place of scores, gamma and scheme. update_proj_gap: T_p, steps of a layer's activity.
        accumulation: calls of `backward` a step. The other names are those of the recipe.

        Raises UserError for values that cannot work with this model.
        """
        given = {
            "sampling.scheme": scheme,
            "optim.projector": projector,
            "optim.refresh": refresh,
            "optim.refresh_batch": refresh_batch,
            "optim.moments_on_refresh": moments_on_refresh,
            "optim.merge_rounding": merge_rounding,
            "optim.always_on": always_on,
            "optim.side": side,
        }
        for key, choice in given.items():
            if choice not in CHOICES[key]:
                raise UserError(key, choice, f"expected one of {', '.join(CHOICES[key])}")
        if refresh == "sketch":
            check_sketch(projector, refresh_batch, update_proj_gap)
        least = {"sampling.period": period, "optim.update_proj_gap": update_proj_gap}
        if rank is not None:
            least["optim.rank"] = rank
        elif always_on == "low_rank":
            raise UserError("optim.always_on", always_on, "expected full or none where the layers train at full rank")
        for key, number in {**least, "accumulation": accumulation}.items():
            if number < 1:
                raise UserError(key, number, "expected an integer of at least 1")
        self.weights: Weights = as_weights(model)
        self.comm = self.weights.comm
        self.module = self.weights.module
        self.layers: ModelLayers = find_layers(self.module, self.weights.shape)
        self.low_rank = rank is not None
        self.rank = COLUMNS if rank is None else rank
        self.period, self.update_proj_gap, self.accumulation = period, update_proj_gap, accumulation
        self.max_grad_norm, self.projector, self.seed = max_grad_norm, projector, seed
        self.refresh_batch, self.moments_on_refresh, self.always_on = refresh_batch, moments_on_refresh, always_on
        self.merge_rounding, self.refresh, self.side = merge_rounding, refresh, side
        self._always = Block(
            ALWAYS,
            self.layers.embeddings if always_on == "low_rank" else (),
            self.layers.final if always_on != "none" else (),
        )
        check_fits(self.layers, gamma, rank, always_on)
        self.probabilities = probabilities(self._ratios(scores), gamma)
        self._sampler = Sampler(self.probabilities, scheme, seed) if sampler is None else sampler

        self.module.requires_grad_(False)
        self._parameters = dict(self.module.named_parameters())
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "scale": scale}
        super().__init__([{"params": list(self._parameters.values())}], defaults)

        self._weight_dtype = next(iter(self._parameters.values())).dtype
        self.dtype = torch.promote_types(self._weight_dtype, torch.float32)
        self._lookups = {matrix.name for matrix in self.layers.embeddings}
        self._hooks: dict[str, list[LowRankHook]] = {}
        blocks = (*self.layers.layers, self._always)
        for matrix in (m for block in blocks for m in block.matrices):
            modules = [self.module.get_submodule(name) for name in matrix.modules]
            self._hooks[matrix.name] = [LowRankHook(m, self.weights.sharded) for m in modules]

        self.steps = 0
        self.skipped = 0
        self.layer_set: LayerSet = ()
        self.grad_norm: Tensor | None = None
        self.trained_names: set[str] = set()
        self._micro = 0
        self._clocks: dict[str, int] = {}  # steps of each active unit since it entered
        self._projectors: dict[str, Tensor] = {}
        self._bases: dict[str, Tensor] = {}  # (long, w): what a first pass of sketches found, for the second
        self._vector_hooks: dict[str, RemovableHandle] = {}
        self._refresh: Refresh | None = None
        self._found: dict[str, Tensor] = {}  # projectors that the step's refresh has found, until the step is taken
        self._sketches: list[Sketch] = []
        self._layer_of = {block.name: index for index, block in enumerate(self.layers.layers)}
        self._energies: dict[int, Tensor] = {}
        self._moved: dict[int, Tensor] = {}
        self._reduced: list[Tensor] | None = None
        nothing = make_plan((), self.rank, self.comm.world_size)
        self._buffer = CoordinateBuffer(nothing, self.comm, self.dtype, self._weight_dtype, self.device)
        self._full = FullRank(self.weights, self.dtype)
        if always_on == "full":
            self._enter_full(self.layers.embeddings)
        self._prepare()

    # ------------------------------------------------------------------ the user's side

    @property
    def device(self) -> torch.device:
        """Where forward and backward run."""
        return self.weights.device

    @property
    def lr(self) -> float:
        """The learning rate of the coming step."""
        return float(self.param_groups[0]["lr"])

    @property
    def plan(self) -> Plan:
        """Layout of the coordinates of the coming step."""
        return self._buffer.plan

    @property
    def nothing_to_train(self) -> bool:
        """Nothing trains in the coming step: the layer set is empty and nothing is always on."""
        return not self.plan.blocks and not self._full.parameters

    def set_accumulation_steps(self, micro_batches: int) -> None:
        """From the coming step on, ``backward`` is called this often a step, the same on all processes.

        Between two steps. Of a step that was begun and not taken nothing stays: it counts as one that was skipped.
        """
        if micro_batches < 1:
            raise UserError("accumulation", micro_batches, "expected an integer of at least 1")
        if self._micro:
            self._cancel_refresh()
            self._micro = self.accumulation
            self.skip()
            self.zero_grad()
        self.accumulation = micro_batches
        if self._refresh is not None and self.refresh_batch == "full":
            self._refresh.set_accumulation_steps(micro_batches)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate one micro-batch. Gradients of all processes and micro-batches are averaged and added, in this
        order: ``loss`` is this process's mean, divided by the number of micro-batches as in plain PyTorch.
        """
        if self.nothing_to_train:
            return
        if self._micro == self.accumulation:
            raise RuntimeError(f"backward was called more than accumulation = {self.accumulation} times a step")
        self._buffer.last_pass(self._micro + 1 == self.accumulation)
        self.weights.backward(loss)
        self._micro += 1
        if self._refresh is not None and self.refresh_batch == "first":
            self._finish_refresh()
            for name, projector in self._found.items():
                self._attach(self.plan.matrices[name], projector)

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Average the gradients over processes, after the step's last `backward`. Collective.

        Returns their global norm, () on the device; 0 where nothing trains. `step` and `skip` do it if need be: it is
        for those who want to look at the norm first.
        """
        self.weights.after_step()
        if self.nothing_to_train:
            self._reduced = []
            return torch.zeros((), dtype=self.dtype, device=self.device)
        if self._micro != self.accumulation:
            raise RuntimeError(f"step after {self._micro} of accumulation = {self.accumulation} backward passes")
        if self._refresh is not None:
            self._finish_refresh()
        self._reduced = grads = self._buffer.reduce()
        squares = [norm.square() for norm in foreach_norm(grads)] if grads else []
        # nothing is added but what is not finite, of which no basis must be made
        squares += [torch.linalg.vector_norm(sketch.grads) * 0 for sketch in self._sketches]
        squares += self._full.squares()
        self.grad_norm = norm = self.comm.all_reduce(torch.stack(squares).sum(), "grad_norm").sqrt()
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One optimizer step, then everything the next one needs: a new set every K steps, refreshes armed. Collective.

        A step in which nothing trains is counted in `skipped`.
        """
        if closure is not None:
            raise RuntimeError("OWS takes no closure: it evaluates the loss once a step")
        if self._reduced is None:
            self.reduce()
        if self.nothing_to_train:
            self.skipped += 1
        else:
            self._update()
        for name in self._clocks:
            self._clocks[name] += 1
        self._advance()

    @torch.no_grad()
    def skip(self) -> None:
        """In place of `step`, where gradients are not finite: what trains and its moments stay as they are. Collective.

        The step is counted, also in `skipped`; projectors that were due in it are taken in the next one.
        """
        if self._reduced is None:
            self.reduce()
        mark_step_called(self)
        for name in self._found:
            self._detach(self.plan.matrices[name])
        self._found = {}
        self._bases.update(self._sketch_bases())
        for name in (name for sketch in self._sketches for name in sketch.coordinates):
            for attachment in self._hooks[name]:
                attachment.sketch = None
        self._sketches = []
        self.skipped += 1
        self._advance()

    def _advance(self) -> None:
        self.steps += 1
        self._energies, self._moved = {}, {}
        self._micro, self._reduced = 0, None
        self._prepare()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        self._buffer.zero_grad()
        for sketch in self._sketches:
            sketch.grads.zero_()
        self._full.zero_grad()

    @torch.no_grad()
    def merge(self) -> None:
        """Add all coordinates to the weights and set them to zero: the model alone then is what was trained.

        Training may go on. Not between `backward` and `step`. Collective.
        """
        self.weights.after_step()
        for block in self.plan.blocks:
            self._merge(block)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within it the model alone is what was trained, for saving; afterwards all is as before, to the bit.

        Not between `backward` and `step`. What this process holds of the merged weights is kept on the host
        meanwhile. Collective.
        """
        self.weights.after_step()
        attached = {name: self._hooks[name][0].coordinates for name in self.plan.matrices}
        coordinates = {name: one for name, one in attached.items() if one is not None}
        decays = {name: one.decay for name, one in coordinates.items()}
        runs = {
            name: self.weights.resident_slice(self._parameters[name])[1].to("cpu", copy=True) for name in coordinates
        }
        kept = [
            (tensor, tensor.clone())
            for block in self._buffer.blocks.values()
            for tensor in (block.values, block.master)
        ]
        self.merge()
        try:
            yield
        finally:
            with torch.no_grad():
                self.weights.after_step()
                for name, run in runs.items():
                    self.weights.resident_slice(self._parameters[name])[1].copy_(run)
                    coordinates[name].decay = decays[name]
                for tensor, before in kept:
                    tensor.copy_(before)

    def close(self) -> None:
        """Merge, and give the model its own forward passes back, every weight frozen."""
        self.merge()
        self._drop()
        self._full.leave(list(self._full.parameters))
        for attachments in self._hooks.values():
            for attachment in attachments:
                attachment.remove()

    def train_step(self, losses: Iterable[Callable[[], Tensor]], accept: Accept = always) -> Tensor:
        """A whole optimizer step: `backward` on each micro-batch's loss, `step` (or `skip`), `zero_grad`.

        losses: computes this process's losses, one a micro-batch; their sum is its mean. Not called in a step in which
        nothing trains. accept: of the sum and the gradients' norm (see `reduce`): whether the step is taken, the same
        on all processes. Returns the sum: float64, (). Collective.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for compute in () if self.nothing_to_train else losses:
            loss = compute()
            self.backward(loss)
            total += loss.detach()
        if accept(total, self.reduce()):
            self.step()
        else:
            self.skip()
        self.zero_grad()
        return total

    def projector_energy(self) -> dict[int, Tensor]:
        """Of each layer whose projectors the coming step finds anew, from `reduce` to `step`: (2,), float64, on the
        device, this process's part of ||G Q||^2 and ||G||^2, summed over its matrices.

        The sums over processes are what the projectors keep and what there was. Empty under ``refresh="sketch"``, which
        never has G.
        """
        return self._energies

    @torch.no_grad()
    def update_norm(self, all_layers: bool = False) -> dict[int, Tensor]:
        """How far layers have moved by the last step since their last merge: of those that were merged after it, or of
        all that train.

        By layer ||C||, a scalar on the device, the same on all processes: the Frobenius norm of its matrices' change
        C Q^T together, weight decay aside, since Q has orthonormal columns. Does not wait for the device.
        """
        moved = dict(self._moved)
        for block in self.plan.blocks if all_layers else ():
            layer = self._layer_of.get(block.name)
            if layer is not None and layer not in moved and self._trains(block):
                moved[layer] = self._length(block, self._buffer.blocks[block.name].values)
        return moved

    # ------------------------------------------------------------------ update

    def _update(self) -> None:
        found, self._found = self._found, {}
        self._take(found)
        grads, norm = self._reduced, self.grad_norm
        assert grads is not None
        assert norm is not None
        group = self.param_groups[0]
        hyper = AdamWSettings(group["lr"], group["betas"], group["eps"], group["weight_decay"], group["scale"])
        clip = torch.ones_like(norm)
        if self.max_grad_norm is not None:
            clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if grads:
            foreach_mul_(grads, clip)
        self._buffer.update(hyper)
        self._full.update(hyper, clip)
        vectors = [vector for block in self.plan.blocks for vector in block.vectors]
        self.weights.write(
            [self._parameters[vector.name] for vector in vectors],
            [self._buffer.value(vector.name).view(-1)[: vector.numel] for vector in vectors],
        )
        for matrix in self.plan.matrices.values() if hyper.weight_decay else ():
            # tied modules share one Coordinates
            attached = self._hooks[matrix.name][0].coordinates
            if attached is not None:  # not yet, where only sketches of the matrix are taken
                attached.decay *= 1.0 - hyper.lr * hyper.weight_decay

    # ------------------------------------------------------------------ between steps

    @torch.no_grad()
    def _prepare(self) -> None:
        self._finish_sketches()
        changed = self.steps % self.period == 0
        plan = self.plan
        if changed:
            drawn = self.comm.broadcast_object(self._sampler.draw() if self.comm.rank == 0 else None, "layer_set")
            self.layer_set = tuple(drawn)
            plan = self._plan(self.layer_set)
        due = self._due(plan)
        passes = self._passes(plan)
        if changed or any(one.owners for one in passes):
            described = zip(("refresh", "second sketches"), (one.describe() for one in passes), strict=False)
            self.comm.assert_consistent(
                f"the layers and the plan of step {self.steps + 1}",
                {"layers": list(self.layer_set), "plan": plan.describe(), **dict(described)},
            )
        if changed:
            self._change(plan)
        for block in due if self.refresh == "full" else ():
            self._merge(block)
        self._arm(passes)
        self._await_gradients()

    def _await_gradients(self) -> None:
        """Let the gradients of layers whose every matrix has coordinates go as they come: the highest come first."""
        whole = (u for u in self.plan.blocks if all(self._hooks[m.name][0].coordinates for m in u.matrices))
        self._buffer.await_gradients([block.name for block in whole if block.name != ALWAYS][::-1])

    def _due(self, plan: Plan) -> list[Block]:
        """The units for whose matrices new projectors, or the first ones, are to be found from the coming step on."""
        return [u for u in plan.blocks if u.matrices and self._clocks.get(u.name, 0) % self.update_proj_gap == 0]

    def _passes(self, plan: Plan) -> list[RefreshPlan]:
        """What is refreshed in the coming step: a plan of full gradients, or two, of first and of second sketches."""
        due = [m for block in self._due(plan) for m in block.matrices]
        if self.refresh == "full":
            return [plan_refresh(due, self.comm.world_size)]
        second = [m for m in plan.matrices.values() if m.name in self._bases]
        return [plan_refresh(due, self.comm.world_size, True), plan_refresh(second, self.comm.world_size)]

    def _plan(self, layer_set: Iterable[int]) -> Plan:
        blocks = [self.layers.layers[i] for i in layer_set]
        if not self.low_rank:  # their matrices train elsewhere, in `FullRank`
            blocks = [Block(block.name, (), block.vectors) for block in blocks]
        if self._always.matrices or self._always.vectors:
            blocks.append(self._always)
        return make_plan(blocks, self.rank, self.comm.world_size)

    def _change(self, plan: Plan) -> None:
        """From the old set to ``plan``: merge and free what leaves, carry over what stays, start what enters."""
        if plan == self.plan:
            return
        stay = {block.name for block in plan.blocks}
        for block in self.plan.blocks:
            if block.name not in stay:
                self._merge(block)
                self._release(block)
                self._full.leave(matrix.name for matrix in self._full_rank_matrices(block))
        self._buffer.change(plan)
        for block in plan.blocks:
            if block.name not in self._clocks:
                self._clocks[block.name] = 0
                for vector in block.vectors:
                    self._buffer.block(vector.name).fill(
                        vector.name, self.weights.full_tensor(self._parameters[vector.name])
                    )
                self._listen(block)
                self._enter_full(self._full_rank_matrices(block))

    def _full_rank_matrices(self, block: Block) -> tuple[Matrix, ...]:
        """The matrices of a unit of the plan that train at full rank beside it."""
        if self.low_rank or block.name == ALWAYS:
            return ()
        return next(layer.matrices for layer in self.layers.layers if layer.name == block.name)

    def _enter_full(self, matrices: Iterable[Matrix]) -> None:
        names = [matrix.name for matrix in matrices]
        self._full.enter({name: self._parameters[name] for name in names})
        self.trained_names.update(names)

    def _listen(self, block: Block) -> None:
        """Let the unit's vectors train: their gradients go straight into the buffer."""

        def hook_of(name: str, numel: int) -> Any:
            def hook(parameter: Tensor) -> None:
                gradient, parameter.grad = parameter.grad, None
                assert gradient is not None
                self._buffer.grad(name).view(-1)[:numel] += gradient.reshape(-1)
                self._buffer.arrived(name)

            return hook

        for vector in block.vectors:
            parameter = self._parameters[vector.name]
            parameter.requires_grad_(True)
            self._vector_hooks[vector.name] = parameter.register_post_accumulate_grad_hook(
                hook_of(vector.name, vector.numel)
            )
            self.trained_names.add(vector.name)
        self.trained_names.update(matrix.name for matrix in block.matrices)

    def _release(self, block: Block) -> None:
        """Freeze a unit and drop all that was kept for it but its moments, which go with the buffer."""
        for vector in block.vectors:
            self._vector_hooks.pop(vector.name).remove()
            self._parameters[vector.name].requires_grad_(False)
        for matrix in block.matrices:
            self._projectors.pop(matrix.name, None)
            self._bases.pop(matrix.name, None)
            self._detach(matrix)
        del self._clocks[block.name]

    def _attach(self, matrix: Matrix, projector: Tensor, decay: float = 1.0) -> None:
        name, buffer = matrix.name, self._buffer
        direct = name not in self._lookups
        values, grad = buffer.value(name), buffer.grad(name)
        coordinates = collect(matrix.shape, values, projector, grad, direct)
        coordinates.decay = decay
        # called when all the leaf's uses have had their turn, though they bring autograd nothing
        coordinates.values.register_hook(lambda _: buffer.arrived(name))
        # tied modules share one object, and with it one decay
        for attachment in self._hooks[matrix.name]:
            attachment.coordinates = coordinates

    def _detach(self, matrix: Matrix) -> None:
        for attachment in self._hooks[matrix.name]:
            attachment.coordinates = attachment.sketch = None

    def _decay(self, matrix: Matrix) -> float:
        attached = self._hooks[matrix.name][0].coordinates
        return 1.0 if attached is None else attached.decay

    def _merge(self, block: Block) -> None:
        """W <- decay * W + L R^T for the unit's matrices, on this process's part of W; coordinates become zero.

        Collective under bfloat16: the float32 coordinates come together.
        """
        if not self._trains(block):
            return
        buffer = self._buffer.blocks[block.name]
        values = buffer.full_tensor()
        if block.name in self._layer_of:
            self._moved[self._layer_of[block.name]] = self._length(block, values)
        for matrix in block.matrices:
            attached = self._hooks[matrix.name][0].coordinates
            if attached is None:
                continue
            mine, projector = values[slice(*buffer.layout.slots[matrix.name])], attached.projector.to(self.dtype)
            left, right = (mine, projector) if attached.left else (projector, mine)
            noise = f"{self.seed}/{self.steps}/{matrix.name}" if self.merge_rounding == "stochastic" else None
            self.weights.merge(self._parameters[matrix.name], left, right, attached.decay, noise)
            buffer.fill(matrix.name, torch.zeros_like(mine))
            attached.decay = 1.0

    def _trains(self, block: Block) -> bool:
        """Whether any of the unit's matrices has coordinates."""
        return any(self._hooks[matrix.name][0].coordinates for matrix in block.matrices)

    def _length(self, block: Block, values: Tensor) -> Tensor:
        """Frobenius norm, (), of the coordinates of all of a unit's matrices among the unit's ``values`` (rows, r)."""
        rows = slice(*self._buffer.blocks[block.name].layout.segments["matrices"])
        return torch.linalg.vector_norm(values[rows], dtype=self.dtype)

    # ------------------------------------------------------------------ refresh

    def _arm(self, passes: list[RefreshPlan]) -> None:
        """Prepare the coming step for what `_passes` has planned."""
        if self.refresh == "full":
            self._let_through(passes[0])
        else:
            for second, plan in enumerate(passes):
                self._attach_sketches(plan, bool(second))

    def _seed(self, name: str) -> int:
        """Of a matrix's randomness in this step's refresh, on whatever process."""
        return zlib.crc32(f"{self.seed}/{self.steps}/{name}".encode())

    def _attach_sketches(self, plan: RefreshPlan, second: bool) -> None:
        """Let the coming step take the first or second sketches of the gradients of ``plan``'s matrices."""
        if not plan.owners:
            return
        matrices = [self.plan.matrices[name] for name in plan.owners]
        bases = {}
        for matrix in matrices:
            if second:
                bases[matrix.name] = self._bases.pop(matrix.name)
                continue
            width = sketch_width(self.rank, min(matrix.shape))
            start = start_basis(matrix.short, width, self._seed(matrix.name), self._projectors.get(matrix.name))
            bases[matrix.name] = start.to(self.device, self._parameters[matrix.name].dtype)
        sketch = Sketch(self.comm, plan, matrices, bases, self.dtype, second, self._lookups)
        self._sketches.append(sketch)
        for name, coordinates in sketch.coordinates.items():
            for attachment in self._hooks[name]:
                attachment.sketch = coordinates

    def _let_through(self, plan: RefreshPlan) -> None:
        """Detach the (merged) matrices of ``plan`` and let their full gradients through in the coming step."""
        if not plan.owners:
            return

        across: set[str] = set()

        def find(name: str, gradient: Tensor) -> Tensor:
            previous = self._projectors.get(name)
            return find_projector(gradient, self.rank, self.projector, self._seed(name), previous, name in across)

        for name in plan.owners:
            self._detach(self.plan.matrices[name])
        self._refresh = Refresh(
            self.comm,
            plan,
            {name: self._parameters[name] for name in plan.owners},
            1 if self.refresh_batch == "first" else self.accumulation,
            find,
            lambda name, gradient: self._buffer.grad(name).add_(gradient),
            self.dtype,
            self.device,
            across,
        )

    def _cancel_refresh(self) -> None:
        if self._refresh is not None:
            self._refresh.cancel()
            self._refresh = None

    @torch.no_grad()
    def _finish_refresh(self) -> None:
        refresh, self._refresh = self._refresh, None
        assert refresh is not None
        self._found = refresh.finish(self.rank)
        for block in self.plan.blocks:
            names = [matrix.name for matrix in block.matrices if matrix.name in refresh.plan.owners]
            if names and block.name in self._layer_of:
                mine = [refresh.squares[name].to(self.device) for name in names if name in refresh.squares]
                nothing = torch.zeros(2, dtype=torch.float64, device=self.device)
                self._energies[self._layer_of[block.name]] = sum(mine, nothing)

    @torch.no_grad()
    def _finish_sketches(self) -> None:
        """After a step: bases for the second sketches, and new projectors for the coming step. Collective."""
        sketches, self._sketches = self._sketches, []
        for sketch in sketches:
            found = sketch.finish(self.rank)
            for attachment in (a for name in found for a in self._hooks[name]):
                attachment.sketch = None
            if not sketch.second:
                self._bases.update(found)
                continue
            for block in self.plan.blocks:
                if any(matrix.name in found for matrix in block.matrices):
                    self._merge(block)
            self._take(found)

    def _take(self, projectors: dict[str, Tensor]) -> None:
        """Attach coordinates of zero in new subspaces to the (merged) matrices."""
        # Adam has counted the steps before a first projector, too, in which there was nothing to train
        anew = {
            block.name
            for block in self.plan.blocks
            for m in block.matrices
            if m.name in projectors and (self.moments_on_refresh == "reset" or m.name not in self._projectors)
        }
        for name, projector in projectors.items():
            old = self._projectors.get(name)
            if old is not None:
                self._carry_moments(name, old, projector)
            self._projectors[name] = projector
            self._attach(self.plan.matrices[name], projector)
        self._buffer.set_steps({(block, "matrices"): 0.0 for block in anew})

    def _carry_moments(self, name: str, old: Tensor, new: Tensor) -> None:
        """What becomes of a matrix's moments when its subspace changes (``optim.moments_on_refresh``).

        keep: nothing, as GaLore. reset: zero. rotate: the mean turns with the subspace; the second moment as that of
        uncorrelated components would.
        """
        block = self._buffer.block(name)
        rows = block.local_rows(name)
        if rows is None or self.moments_on_refresh == "keep":
            return
        mean, square = block.exp_avg[rows], block.exp_avg_sq[rows]
        if self.moments_on_refresh == "reset":
            mean.zero_()
            square.zero_()
        else:
            turn = rotation(old, new).to(self.dtype)
            mean.copy_(mean @ turn)
            square.copy_(square @ turn.square())

    # ------------------------------------------------------------------ state

    def _drop(self) -> None:
        """Forget the current set without merging."""
        self._cancel_refresh()
        self._sketches, self._found, self._reduced = [], {}, None
        for block in self.plan.blocks:
            self._release(block)
            self._full.leave(matrix.name for matrix in self._full_rank_matrices(block))
        self._buffer.change(make_plan((), self.rank, self.comm.world_size))

    def pieces(self) -> list[Shard]:
        """This process's part of all tensors that a checkpoint needs beside the base model. Between two steps only."""
        self.weights.after_step()
        result = list(self._buffer.pieces())
        for kind, tensors in (("projector", self._projectors), ("sketch_basis", self._sketch_bases())):
            for name, tensor in tensors.items():
                start, stop = interval(tensor.numel(), self.comm.rank, self.comm.world_size)
                result.append(Shard(f"{kind}/{name}", tuple(tensor.shape), start, tensor.reshape(-1)[start:stop]))
        result += state_shards(self.weights, self._parameters, self._full.states())
        return result + weight_shards(self.weights, self._parameters, sorted(self.trained_names))

    def _sketch_bases(self) -> dict[str, Tensor]:
        """What the second sketches of the coming step are taken with, (long, w) by matrix name."""
        second = (sketch for sketch in self._sketches if sketch.second)
        return {name: one.projector for sketch in second for name, one in sketch.coordinates.items()}

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, JSON-able; rank 0's is the one to keep (the sampler's stream is there)."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "rank": self.rank if self.low_rank else None,
            "side": self.side,
            "layer_set": list(self.layer_set),
            "probabilities": self.probabilities,
            "sampler": self._sampler.state(),
            "clocks": dict(self._clocks),
            "decays": {name: self._decay(matrix) for name, matrix in self.plan.matrices.items()},
            "projectors": sorted(self._projectors),
            "sketch_bases": sorted(self._sketch_bases()),
            "adam_steps": [[*key, count] for key, count in self._buffer.steps.items()],
            "full_steps": steps_of(self._full.states()),
            "touched": sorted(self.trained_names),
            "lr": self.param_groups[0]["lr"],
        }

    @torch.no_grad()
    def restore(self, numbers: dict[str, Any], read: ReadShard) -> None:
        """Continue from where `pieces` and `numbers` were taken, at any world size, over any kind of weights.

        read: (name, first, last + 1) -> these entries of the flattened tensor. The model must be the same base model.
        """
        rank = self.rank if self.low_rank else None
        if numbers["rank"] != rank:
            raise UserError("optim.rank", rank, f"expected {numbers['rank']}, the rank of the checkpoint")
        if numbers.get("side", "std") != self.side:
            raise UserError("optim.side", self.side, f"expected {numbers['side']}, the side of the checkpoint")
        if numbers["probabilities"] != self.probabilities:
            raise UserError("sampling", "other probabilities", "resume with the scores and gamma of the checkpoint")
        self.weights.after_step()
        self._drop()
        self.steps, self.skipped = numbers["steps"], numbers["skipped"]
        self.layer_set = tuple(numbers["layer_set"])
        self.trained_names = set(numbers["touched"])
        self._sampler.restore(numbers["sampler"])
        self.param_groups[0]["lr"] = numbers["lr"]
        load_weights(self.weights, self._parameters, numbers["touched"], read)

        plan = self._plan(self.layer_set)
        self._buffer.change(plan)
        self._buffer.read(read)
        self._buffer.set_steps({(block, kind): count for block, kind, count in numbers["adam_steps"]})
        for block in plan.blocks:
            self._enter_full(self._full_rank_matrices(block))
        load_states(self.weights, self._parameters, self._full.states(), numbers["full_steps"], read)

        self._clocks = dict(numbers["clocks"])
        dtype = next(iter(self._parameters.values())).dtype
        for block in plan.blocks:
            self._listen(block)
            for matrix in block.matrices:
                if matrix.name in numbers["projectors"]:
                    flat = read(f"projector/{matrix.name}", 0, matrix.short * self.rank)
                    self._projectors[matrix.name] = flat.view(matrix.short, self.rank).to(self.device, dtype)
                    self._attach(matrix, self._projectors[matrix.name], numbers["decays"][matrix.name])
                if matrix.name in numbers["sketch_bases"]:
                    width = sketch_width(self.rank, min(matrix.shape))
                    flat = read(f"sketch_basis/{matrix.name}", 0, matrix.long * width)
                    self._bases[matrix.name] = flat.view(matrix.long, width).to(self.device, dtype)
        self._arm(self._passes(plan))
        self._await_gradients()

    def state_dict(self) -> dict[str, Any]:
        """Not to be had: the state is spread over processes. Use `ows_ds.checkpoint` with `pieces` and `numbers`."""
        raise RuntimeError("OWS has no state_dict: its state is spread over processes; use ows_ds.checkpoint.save")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        raise RuntimeError("OWS has no state_dict: use ows_ds.checkpoint.open_checkpoint and restore")

    # ------------------------------------------------------------------ checks

    def _ratios(self, scores: str | Path | Scores | Sequence[float]) -> Sequence[float]:
        if isinstance(scores, (str, Path)):
            scores = Scores.read(Path(scores))
            scores.check(fingerprint(self.weights), len(self.layers.layers))
        if isinstance(scores, Scores):
            scores = importance(scores.metric, len(scores.layers), scores.layers)
        ratios = scores
        if len(ratios) != len(self.layers.layers):
            right = f"expected one ratio for each of the {len(self.layers.layers)} layers"
            raise UserError("sampling.scores", f"{len(ratios)} ratios", right)
        return ratios


def check_fits(layers: ModelLayers, gamma: float, rank: int | None, always_on: str) -> None:
    """Refuse (UserError) what this model is too small for, before anything costly is done with it."""
    if gamma > len(layers.layers):
        right = f"expected at most {len(layers.layers)}, the number of layers"
        raise UserError("sampling.gamma", gamma, right)
    if rank is None:
        return
    low_rank = [matrix for block in layers.layers for matrix in block.matrices]
    low_rank += layers.embeddings if always_on == "low_rank" else ()
    for matrix in low_rank:
        if rank > min(matrix.shape):
            right = f"expected at most {min(matrix.shape)}, the smaller side of {matrix.name} {matrix.shape}"
            raise UserError("optim.rank", rank, right)
