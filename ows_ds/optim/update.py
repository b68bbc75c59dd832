"""The coordinates that train, their gradients, and torch's AdamW on this rank's part of them.

Every rank holds all coordinates as the forward pass uses them, and all their gradients, which its backward pass makes;
float32 masters and moments exist only for the rows that a rank owns. A step is, block by block,

    all ranks' gradients --reduce_scatter--> own rows --AdamW--> own rows --all_gather--> all ranks' coordinates

The reduction of a block starts as soon as its last gradient is there, while the backward pass runs on; AdamW works on
all blocks at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ows_ds.compat.torch import zero_all
from ows_ds.distributed.communicator import Communicator, Pending
from ows_ds.distributed.weights import ReadShard, Shard
from ows_ds.optim import muon
from ows_ds.optim.layout import Layout, Plan, Run, group_in_order
from ows_ds.optim.muon import Rule

STATE = ("master", "exp_avg", "exp_avg_sq")  # what a checkpoint holds of whatever AdamW trains, as tensors

Accept = Callable[[Tensor, Tensor], bool]
"""(this rank's loss, the norm of all ranks' gradients) -> whether the step is taken."""


def always(loss: Tensor, norm: Tensor) -> bool:
    """An `Accept` that does not look, and so does not wait for the device."""
    return True


def clip_factor(norm: Tensor, largest: float | None) -> Tensor:
    """What gradients of global ``norm``, (), are multiplied with so that it is at most ``largest``; None: 1."""
    return torch.ones_like(norm) if largest is None else (largest / (norm + 1e-6)).clamp(max=1.0)


@dataclass(frozen=True)
class AdamWSettings:
    """AdamW's numbers in one step; lr is the scheduled learning rate."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def matrices(self, scale: float) -> dict[str, Any]:
        """For coordinates: lr * scale on the update; the decay is lr * weight_decay, as for whole weights."""
        decay = self.weight_decay / scale
        return {"lr": self.lr * scale, "betas": self.betas, "eps": self.eps, "weight_decay": decay}

    def vectors(self) -> dict[str, Any]:
        """For biases and norms: not decayed, as usual."""
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": 0.0}

    def full_rank(self) -> dict[str, Any]:
        """For weights trained at full rank."""
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}


class BlockBuffer:
    """The coordinates of one block.

    values: (rows, r), of the weights' dtype, the same on every rank. grads: (rows, r), float32 (float64 where the
    weights are float64): this rank's sums. Of this rank's rows only, (stride, r), of the gradients' dtype:
    master, what AdamW works on; reduced_grads, the gradients' sums over ranks; exp_avg, exp_avg_sq. Master lies in
    ``values`` where the dtypes are the same, and reduced_grads in ``grads`` in a world of one. parameters: masters of
    each run of rows (`Layout.runs`) that AdamW trains and that has some here. Under the rule muon exp_avg is the
    matrices' momentum, and exp_avg_sq has the vectors' rows alone (`Layout.second_moments`).
    """

    def __init__(
        self,
        layout: Layout,
        comm: Communicator,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        device: torch.device,
        rule: Rule,
    ) -> None:
        self.layout, self.comm = layout, comm
        self.values = torch.zeros(layout.rows, layout.r, dtype=weight_dtype, device=device)
        self.grads = torch.zeros(layout.rows, layout.r, dtype=dtype, device=device)
        own = self.values[slice(*layout.part(comm.rank))]
        self.master = own if weight_dtype == dtype else own.to(dtype)
        self.reduced_grads = self.grads if comm.world_size == 1 else torch.zeros_like(self.master)
        self.second_moments = layout.second_moments(rule.name)
        squares = layout.local(self.second_moments, comm.rank) or slice(0, 0)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master[squares])
        self._squares_from = squares.start
        # AdamW counts on the CPU, its one kernel on the GPU, each parameter for itself; a kind's counts are the same
        counts = device if device.type == "cuda" else "cpu"
        self.steps = {run: torch.zeros((), dtype=torch.float32, device=counts) for run in layout.runs(rule.scale)}
        trained = (run for run in self.steps if rule.name == "adamw" or run.kind == "vectors")
        local = {run: layout.local(run.rows, comm.rank) for run in trained}
        self._local = {run: rows for run, rows in local.items() if rows is not None}
        self.parameters = {run: nn.Parameter(self.master[rows]) for run, rows in self._local.items()}
        self.awaited: set[str] = set()
        self._pending: Pending | None = None

    def state(self, run: Run) -> dict[str, Tensor]:
        """AdamW's state of `parameters`'s entry, in the memory of this object's tensors."""
        rows = self._local[run]
        return {"step": self.steps[run], "exp_avg": self.exp_avg[rows], "exp_avg_sq": self.squares(rows)}

    def squares(self, rows: slice) -> Tensor:
        """Second moments of some of this rank's rows, all of which have them."""
        return self.exp_avg_sq[rows.start - self._squares_from : rows.stop - self._squares_from]

    @property
    def reducing(self) -> bool:
        """Whether `start_reduce` was called since the last `reduce`."""
        return self._pending is not None

    def start_reduce(self) -> None:
        """Begin to sum the gradients over ranks. Collective."""
        self._pending = self.comm.start_reduce_scatter(self.grads, self.reduced_grads, "gradients")

    def reduce(self) -> Tensor:
        """`reduced_grads`, after the end of what `start_reduce` began."""
        assert self._pending is not None
        self._pending.wait()
        self._pending = None
        for run, parameter in self.parameters.items():
            parameter.grad = self.reduced_grads[self._local[run]]
        return self.reduced_grads

    def start_publish(self) -> Pending:
        """Begin to bring every rank's rows of master into all ranks' values. Collective."""
        own = self.values[slice(*self.layout.part(self.comm.rank))]
        if own.dtype != self.master.dtype:
            own.copy_(self.master)
        return self.comm.start_all_gather(own, self.values, "coordinates")

    def full_tensor(self) -> Tensor:
        """(rows, r): all ranks' master. Collective where it is not in `values`."""
        if self.values.dtype == self.master.dtype:
            return self.values
        return self.comm.all_gather(self.master, "merge")

    def fill(self, name: str, value: Tensor) -> None:
        """Set a slot, on every rank, to ``value``: its first entries in row order; the rest stays."""
        first, last = self.layout.slots[name]
        self.values[first:last].view(-1)[: value.numel()] = value.reshape(-1)
        rows = self.local_rows(name)
        if rows is not None and self.values.dtype != self.master.dtype:
            start = self.layout.part(self.comm.rank)[0]
            self.master[rows] = self.values[start + rows.start : start + rows.stop].to(self.master)

    def slot(self, rows: Tensor, name: str) -> Tensor:
        """What is in a slot of ``rows`` (rows, r), all of the block's: a view of the slot's own shape."""
        shape = self.layout.shapes[name]
        return rows[slice(*self.layout.slots[name])].view(-1)[: math.prod(shape)].view(shape)

    def local_rows(self, name: str) -> slice | None:
        """Where the slot's rows lie in this rank's part, None if none do."""
        return self.layout.local(self.layout.slots[name], self.comm.rank)


class CoordinateBuffer:
    """The coordinates of all blocks of a plan, which may change between steps, and one AdamW over them."""

    def __init__(
        self,
        plan: Plan,
        comm: Communicator,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        device: torch.device,
        rule: Rule | None = None,
    ) -> None:
        """dtype: of gradients, masters and moments. weight_dtype: of the coordinates in the forward pass. rule: of the
        matrices' steps."""
        self.comm = comm
        self.rule = rule or Rule()
        self._kind = (dtype, weight_dtype, device, self.rule)
        self.blocks: dict[str, BlockBuffer] = {}
        self._queue: list[BlockBuffer] = []  # awaited, in the order of their reductions
        self._order: list[BlockBuffer] = []  # of all reductions of a step
        self._overlap = False
        self.change(plan)

    def change(self, plan: Plan) -> None:
        """Blocks that stay keep everything; those that leave are dropped, those that enter begin with zeros."""
        old, device = self.blocks, self._kind[2]
        self.plan = plan
        self.blocks = {
            layout.block.name: old.get(layout.block.name) or BlockBuffer(layout, self.comm, *self._kind)
            for layout in plan.layouts
            if layout.rows
        }
        self._queue, self._order = [], list(self.blocks.values())
        self._block_of = {name: block for block in self.blocks.values() for name in block.layout.slots}
        groups: list[dict[str, Any]] = []
        alike: dict[tuple[str, float], list[nn.Parameter]] = {}
        for run, parameter in ((run, p) for block in self.blocks.values() for run, p in block.parameters.items()):
            alike.setdefault((run.kind, run.scale), []).append(parameter)
        for (kind, scale), some in alike.items():
            parameters = iter(some)
            # AdamW's temporaries are as large as what it works on at once, a group
            for sizes in group_in_order([parameter.numel() for parameter in some]):
                groups.append({"params": list(islice(parameters, len(sizes))), "kind": kind, "scale": scale})
        self._adamw: torch.optim.AdamW | None = None
        if groups:
            self._adamw = torch.optim.AdamW(groups, fused=True if device.type == "cuda" else None)  # one kernel
            states = ((p, block.state(run)) for block in self.blocks.values() for run, p in block.parameters.items())
            self._adamw.state.update(states)

    def block(self, name: str) -> BlockBuffer:
        """That of the slot ``name``."""
        return self._block_of[name]

    def value(self, name: str) -> Tensor:
        """What is in a slot: a view of its values."""
        return self.block(name).slot(self.block(name).values, name)

    def grad(self, name: str) -> Tensor:
        """The same of its gradients."""
        return self.block(name).slot(self.block(name).grads, name)

    # ------------------------------------------------------------------ a step

    def await_gradients(self, blocks: Sequence[str]) -> None:
        """In the coming step, reduce these blocks in this order, each as soon as `arrived` was called for all of it."""
        self._queue = [self.blocks[name] for name in blocks if self.comm.world_size > 1]
        self._order = [*self._queue, *(block for block in self.blocks.values() if block not in self._queue)]
        for block in self._queue:
            block.awaited = set(block.layout.slots)

    def last_pass(self, last: bool) -> None:
        """Whether the coming backward pass is the step's last: only then does a block's last gradient complete it."""
        self._overlap = last

    def arrived(self, name: str) -> None:
        """A backward pass has added all it has to the slot's gradients. Collective where that completes a block."""
        block = self.block(name)
        if block.reducing:
            raise RuntimeError(f"a gradient of {name} came after its block's gradients were on their way")
        if self._overlap:
            block.awaited.discard(name)
            while self._queue and not self._queue[0].awaited:
                self._queue.pop(0).start_reduce()

    def reduce(self) -> list[Tensor]:
        """(stride, r) of each block: this rank's rows of the sum of all ranks' gradients. Collective."""
        self._queue = []
        for (
            block
        ) in self._order:  # what was awaited without effect keeps its place: on another rank it may have arrived
            if not block.reducing:
                block.start_reduce()
        return [block.reduce() for block in self.blocks.values()]

    def energies(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """By block with matrices, the sum of squares of the matrices' rows, (), of what `reduce` gave."""
        found = {}
        for (name, block), gradient in zip(self.blocks.items(), grads, strict=True):
            if block.layout.block.matrices:
                rows = block.layout.local(block.layout.segments["matrices"], self.comm.rank) or slice(0, 0)
                found[name] = torch.linalg.vector_norm(gradient[rows]).square()
        return found

    def update(self, settings: AdamWSettings) -> None:
        """One step on this rank's rows with what `reduce` gave, then all rows on every rank. Collective."""
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                matrices = group["kind"] == "matrices"
                group.update(settings.matrices(group["scale"]) if matrices else settings.vectors())
            self._adamw.step()
            self._adamw.zero_grad()
        if self.rule.name == "muon":
            muon.step(self.blocks, self.comm, settings.lr, settings.weight_decay, self.rule)
        for block in self.blocks.values():
            for run in block.steps.keys() - block.parameters.keys():
                block.steps[run] += 1
        self.publish()

    def publish(self) -> None:
        """Every rank's masters into all ranks' values. Collective."""
        for pending in [block.start_publish() for block in self.blocks.values()]:
            pending.wait()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        if self.blocks:
            zero_all([block.grads for block in self.blocks.values()])

    # ------------------------------------------------------------------ state

    @property
    def steps(self) -> dict[tuple[str, str], float]:
        """Adam's step counts, by block and kind."""
        return {(n, run.kind): float(count) for n, block in self.blocks.items() for run, count in block.steps.items()}

    def set_steps(self, steps: Mapping[tuple[str, str], float]) -> None:
        """Set Adam's step counts of the named ones."""
        for (name, kind), count in steps.items():
            for run, steps_of in self.blocks[name].steps.items():
                if run.kind == kind:
                    steps_of.fill_(count)

    def shards(self) -> Iterator[Shard]:
        """This rank's rows of what a checkpoint holds, padding left out."""
        for name, block in self.blocks.items():
            for kind in STATE:
                rows, first, last = self._stored(block, kind)
                if rows:
                    run = getattr(block, kind).reshape(-1)[: last - first]
                    yield Shard(f"{kind}/{name}", (rows, block.layout.r), first, run)

    def _stored(self, block: BlockBuffer, kind: str) -> tuple[int, int, int]:
        """Rows that a checkpoint holds of a block's state, and this rank's entries among them: first and last + 1."""
        layout = block.layout
        start, stop = block.second_moments if kind == "exp_avg_sq" else (0, layout.rows)
        stop = min(stop, layout.used)
        first, last = (min(max(row, start), stop) for row in layout.part(self.comm.rank))
        return stop - start, (first - start) * layout.r, (last - start) * layout.r

    def load(self, read: ReadShard) -> None:
        """Set everything but step counts to what `shards` gave. Collective."""
        for name, block in self.blocks.items():
            for kind in STATE:
                rows, first, last = self._stored(block, kind)
                if rows:
                    tensor = getattr(block, kind)
                    tensor.view(-1)[: last - first] = read(f"{kind}/{name}", first, last).to(tensor)
        self.publish()
