"""How long a step takes at best on a cluster: arithmetic, memory, links. Pure.

A phase that does f flops and moves n bytes takes max(f / peak flops, n / memory bandwidth) seconds (Williams, Waterman,
Patterson 2009). A product of T x n with n x m is 2 T m n flops. Letters as in `ows_ds.planner.memory`; r the rank, m x n a
matrix, s the length of a sequence, q the width of all queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ows_ds.model.layers import Block
from ows_ds.optim.layout import plan_refresh
from ows_ds.optim.projection import OVERSAMPLING, ROUNDS, sketch_width
from ows_ds.planner.cluster import Cluster, collective
from ows_ds.planner.memory import Job, activations_of, kinds_of, parts_of, state

# what travels while a pass computes; the rest waits for the update, or the update for it
HIDDEN = ("weights", "gradients", "full_rank_gradients", "refresh_gradients")


@dataclass(frozen=True)
class Work:
    """Of a phase of a step on one GPU. bytes: between the GPU and its memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


def work(job: Job, refreshes: float = 0.0) -> dict[str, Work]:
    """What a GPU does in a step, by phase. refreshes: of all projectors, in a step (1 / T_p where no layer changes)."""
    kinds = kinds_of(job, False)
    forward = recompute = backward = refresh = Work()
    for block, kind in zip(job.layers.layers, kinds, strict=True):
        one = _forward(job, block, kind)
        forward += one
        if kind:
            backward += _backward(job, block, kind)
            recompute += one if job.checkpointing else Work()
        if kind == "low" and refreshes:
            refresh += _refresh(job, block)
    passes = 2 if job.method == "mezo" else 1
    found = {
        "forward": forward * (passes * job.accumulation),
        "recompute": recompute * job.accumulation,
        "backward": backward * job.accumulation,
        "loss": _loss(job, any(kinds)) * (passes * job.accumulation),
        "update": _update(job),
        "refresh": refresh * refreshes,
    }
    return {phase: one for phase, one in found.items() if one.flops or one.bytes}


def _sizes(block: Block) -> tuple[int, int]:
    """Entries of a layer's matrices, and the sum of their sides."""
    return sum(m.shape[0] * m.shape[1] for m in block.matrices), sum(sum(m.shape) for m in block.matrices)


def _attention(job: Job, block: Block) -> float:
    """Flops of Q K^T and of its product with V, of which a causal mask needs half: 2 T s q (Dao et al. 2022)."""
    return 2 * job.tokens * job.length * parts_of(block, job.head.shape[1]).output.in_features


def _forward(job: Job, block: Block, kind: str) -> Work:
    """2 T per entry, attention, and X Q C^T beside the products: 2 T r (m + n)."""
    entries, sides = _sizes(block)
    atomic_write = {"low": job.rank, "adapters": job.lora_rank}.get(kind, 0)
    flops = 2 * job.tokens * (entries + atomic_write * sides) + _attention(job, block)
    return Work(flops, entries * job.itemsize + 2 * activations_of(job, block, "frozen"))


def _backward(job: Job, block: Block, kind: str) -> Work:
    """Gradients of activations cost what the forward pass did, attention twice that; those of what trains come on top.

    The latter are 2 T m n of a whole weight, 2 T r times the longer side of coordinates.
    """
    entries, sides = _sizes(block)
    forward = _forward(job, block, kind)
    trains = {
        "full": 2 * job.tokens * entries,
        "low": 2 * job.tokens * job.rank * sum(m.long for m in block.matrices),
        "adapters": 2 * job.tokens * job.lora_rank * sides,
    }.get(kind, 0)
    written = entries * job.itemsize if kind == "full" else 0
    moved = entries * job.itemsize + 4 * activations_of(job, block, "frozen") + written
    return Work(forward.flops + _attention(job, block) + trains, moved)


def _loss(job: Job, flows: bool) -> Work:
    """The head on labelled tokens: logits, the gradient of its input, and of itself where it trains; 2 T h V each."""
    vocabulary, hidden = job.head.shape
    labelled = job.tokens - job.rows if job.labelled is None else job.labelled
    learns = job.head.name in {**job.full_rank, **job.plan.matrices}
    products = 1 + flows + learns
    logits = labelled * vocabulary * 2 * (2 * job.itemsize + job.wide)  # written and read: twice in b, once in e
    return Work(2 * labelled * hidden * vocabulary * products, products * vocabulary * hidden * job.itemsize + logits)


def _update(job: Job) -> Work:
    """Of each own entry: value and moments are read and written, the gradient is read twice; a weight is written."""
    if job.method == "mezo":  # noise added, taken off twice over, and the step
        return Work(0, 4 * 2 * state(job)["weights"])
    own = state(job)["moments"] // (2 * job.wide)
    return Work(0, own * (8 * job.wide + job.itemsize))


def _refresh(job: Job, block: Block) -> Work:
    """New projectors of a layer: its full gradients, and the range finder's products with them (project.py).

    With several micro-batches the owners of matrices work at the same time, else one after the other.
    """
    entries, sides = _sizes(block)
    if job.refresh == "sketch":
        width = max(sketch_width(job.rank, min(m.shape)) for m in block.matrices)
        return Work(2 * 2 * 2 * job.tokens * job.accumulation * width * sides, 0)
    finder = [4 * ROUNDS * m.shape[0] * m.shape[1] * (job.rank + OVERSAMPLING) for m in block.matrices]
    share = 1.0
    if job.accumulation > 1 and job.refresh_batch == "full":
        owners = plan_refresh(list(job.plan.matrices.values()), job.world_size).owners
        load: dict[int, int] = {}
        for m in job.plan.matrices.values():
            load[owners[m.name]] = load.get(owners[m.name], 0) + m.shape[0] * m.shape[1]
        share = max(load.values()) / sum(load.values())
    return Work(2 * job.tokens * job.accumulation * entries + sum(finder) * share, 4 * 2 * ROUNDS * entries * share)


@dataclass(frozen=True)
class Messages:
    """Collectives of one kind in a step. sent: bytes of a process, in all. count: of them. rounds: 2 of all-reduces."""

    sent: float
    count: float = 1.0
    rounds: int = 1


def messages(
    job: Job, sent: Mapping[str, float], refresh: Mapping[str, float], refreshes: float
) -> dict[str, Messages]:
    """Collectives of a step by operation. sent, refresh: `ows_ds.planner.memory.traffic` of a plain step, and of a refresh."""
    whole = len(job.full_rank)
    matrices = len(job.plan.matrices)
    batches = job.accumulation if job.refresh_batch == "full" else 1
    blocks = len(job.plan.layouts)
    counts = {
        "gradients": blocks,
        "coordinates": blocks,
        "merge": blocks,
        "full_rank_gradients": whole * job.accumulation,
        "full_rank_weights": whole,
        "refresh_gradients": matrices * batches,
    }
    found = {name: Messages(size, counts.get(name, 1), 2 if name == "grad_norm" else 1) for name, size in sent.items()}
    for name, size in refresh.items():
        if name not in sent and refreshes:
            found[name] = Messages(size * refreshes, counts.get(name, 1) * refreshes)
    return found


@dataclass(frozen=True)
class Times:
    """Seconds of a step. work: by phase of computing. links: by operation. hidden: of links, what passes can hide."""

    work: dict[str, float]
    links: dict[str, float]

    @property
    def serial(self) -> float:
        """Nothing at the same time."""
        return sum(self.work.values()) + sum(self.links.values())

    @property
    def overlapped(self) -> float:
        """The passes hide what may travel meanwhile, as far as they are long enough: the best that overlap can do."""
        passes = sum(seconds for phase, seconds in self.work.items() if phase != "update")
        hidden = sum(seconds for name, seconds in self.links.items() if name in HIDDEN)
        rest = sum(seconds for name, seconds in self.links.items() if name not in HIDDEN)
        return max(passes, hidden) + rest + self.work.get("update", 0.0)


def times(
    cluster: Cluster, done: Mapping[str, Work], sent: Mapping[str, Messages], inside: bool = False,
    algorithm: str | None = None,
) -> Times:  # fmt: skip
    """The roofline of a step. inside: gathers of weights stay within a node (hpZ). algorithm: see `collective`."""
    flops, moved = cluster.tflops * 1e12 * cluster.reach, cluster.memory_bandwidth * 1e9 * cluster.reach
    node = cluster.of_size(min(cluster.gpus, cluster.world_size))
    links = {}
    for name, one in sent.items():
        where = node if inside and name == "weights" else cluster
        links[name] = one.count * collective(where, one.sent / one.count, 1, one.rounds, algorithm) if one.count else 0
    return Times({phase: max(w.flops / flops, w.bytes / moved) for phase, w in done.items()}, links)
