"""How long a step takes at best on a cluster: arithmetic, memory, links. Pure.

A phase that does f flops and moves n bytes takes max(f / peak flops, n / memory bandwidth) seconds (Williams, Waterman,
Patterson 2009). A product of T x n with n x m is 2 T m n flops. Letters as in `ows_ds.planner.step`; r the low rank,
m x n a matrix, s the length of a sequence, q the width of all queries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ows_ds.model.blocks import Block
from ows_ds.model.parts import split
from ows_ds.optim.sizes import MUON_ITERATIONS, OVERSAMPLING, ROUNDS, sketch_width
from ows_ds.planner.cluster import Cluster, collective, exchange
from ows_ds.planner.memory import state
from ows_ds.planner.step import StepSpec, activations, computed_again, entries_of, numel
from ows_ds.planner.traffic import Messages

# what travels while a pass computes; the rest waits for the update, or the update for it
HIDDEN = ("host", "weights", "gradients", "full_rank_gradients", "refresh_gradients")


@dataclass(frozen=True)
class Work:
    """Of a phase of a step on one GPU. bytes: between the GPU and its memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


def work(spec: StepSpec, refreshes: float = 0.0) -> dict[str, Work]:
    """What a GPU does in a step, by phase. refreshes: of all projectors, in a step (1 / T_p where no layer changes)."""
    forward = recompute = backward = refresh = Work()
    for block, kind in spec.walk():
        there, back = _passes(spec, block, kind)
        forward += there
        if kind:
            backward += back
            recompute += there if spec.checkpointing else Work()
            recompute += _again(spec, block)
        if kind == "low" and refreshes:
            refresh += _refresh(spec, block)
    passes = 2 if spec.method == "mezo" else 1
    found = {
        "forward": forward * (passes * spec.accumulation),
        "recompute": recompute * spec.accumulation,
        "backward": backward * spec.accumulation,
        "loss": _loss(spec) * (passes * spec.accumulation),
        "update": _update(spec),
        "refresh": refresh * refreshes,
    }
    return {phase: one for phase, one in found.items() if one.flops or one.bytes}


def _sizes(spec: StepSpec, block: Block) -> tuple[int, int, int]:
    """Entries of a layer's matrices that work on a token; the sum of their sides, and of the longer ones, each times
    its low rank."""
    ranked = [(m.active, m, spec.plan.matrices.get(m.name, m).low_rank(spec.rank)) for m in block.matrices]
    return (
        sum(active * math.prod(m.shape) for active, m, _ in ranked),
        sum(active * sum(m.shape) * r for active, m, r in ranked),
        sum(active * m.long * r for active, m, r in ranked),
    )


def _passes(spec: StepSpec, block: Block, kind: str) -> tuple[Work, Work]:
    """A layer's forward pass and its backward pass.

    Forward: 2 T per entry, attention, and X Q C^T beside the products, 2 T r (m + n). Attention is Q K^T and its
    product with V, of which a causal mask needs half: 2 T s q (Dao et al. 2022). Backward, gradients of activations
    cost as much, attention twice that; gradients of what trains come on top: 2 T m n of a whole weight, 2 T r times the
    longer side of coordinates.
    """
    tokens, (entries, low, longer) = spec.tokens, _sizes(spec, block)
    attention = 2 * tokens * spec.length * split(block, spec.hidden).heads
    adapters = spec.lora_rank * sum(m.active * sum(m.shape) for m in block.matrices)
    flops = 2 * tokens * (entries + {"low": low, "adapters": adapters}.get(kind, 0)) + attention
    trains = 2 * tokens * {"full": entries, "low": longer, "adapters": adapters}.get(kind, 0)
    read, kept = sum(map(spec.read, block.matrices)), activations(spec, block, "frozen")
    written = read if kind == "full" else 0
    return Work(flops, read + 2 * kept), Work(flops + attention + trains, read + 4 * kept + written)


def _again(spec: StepSpec, block: Block) -> Work:
    """MLPs whose tokens go through them in runs, once more."""
    matrices = [m for mlp in computed_again(spec, block) for m in (*mlp.up, mlp.down)]
    return Work(2 * spec.tokens * sum(map(numel, matrices)), sum(map(spec.read, matrices)))


def _loss(spec: StepSpec) -> Work:
    """The head on labelled tokens: logits, the gradient of its input, and of itself where it trains; 2 T h V each."""
    learns = spec.head.name in spec.full_rank or spec.head.name in spec.plan.matrices
    products = 1 + any(kind for _, kind in spec.walk()) + learns
    logits = spec.labels * spec.head.shape[0] * 2 * (2 * spec.itemsize + spec.wide)  # in and out: twice in b, once in e
    return Work(2 * spec.labels * numel(spec.head) * products, products * numel(spec.head) * spec.itemsize + logits)


def _update(spec: StepSpec) -> Work:
    """Of each own entry: value and moments are read and written, the gradient is read twice; a weight is written."""
    if spec.method == "mezo":  # noise added, taken off twice over, and the step
        return Work(0, 4 * 2 * state(spec)["weights"])
    own = sum(layout.stride for layout in spec.plan.layouts) * spec.plan.r + spec.share(*spec.full_rank.values())
    if spec.rule == "muon":  # U^T U and U T of own rows; four products an iteration, all ranks the same
        low = sum(layout.stride for layout in spec.plan.layouts) * spec.plan.r
        cubes = sum(m.count * m.low_rank(spec.rank) ** 3 for m in spec.projected)
        return Work(4 * low * spec.plan.r + 8 * MUON_ITERATIONS * cubes, own * (8 * spec.wide + spec.itemsize))
    return Work(0, own * (8 * spec.wide + spec.itemsize))


def _refresh(spec: StepSpec, block: Block) -> Work:
    """New projectors of a layer: its full gradients, and the range finder's products with them (projection.py).

    The owners of matrices work at the same time.
    """
    ranked = [spec.plan.matrices[m.name] for m in block.matrices if m.name in spec.plan.matrices]
    if spec.refresh == "sketch":
        products = sum(m.active * sum(m.shape) * sketch_width(m.low_rank(spec.rank), m.short) for m in ranked)
        return Work(2 * 2 * 2 * spec.tokens * spec.accumulation * products, 0)
    finder = sum(4 * ROUNDS * numel(m) * (m.low_rank(spec.rank) + OVERSAMPLING) for m in ranked)
    load = Counter[int]()
    for part in spec.refresh_plan().parts:
        load[part.owner] += entries_of(spec, part)
    share, whole = max(load.values()) / load.total(), sum(map(numel, ranked))
    if spec.refresh == "compressed" and spec.refresh_passes > 1:  # a search for each, twice as wide
        finder *= 2 * spec.refresh_passes
    made = 2 * spec.tokens * spec.accumulation * _sizes(spec, block)[0]
    return Work(made + finder * share, 4 * 2 * ROUNDS * whole * share)


@dataclass(frozen=True)
class Times:
    """Seconds of a step. work: by phase of computing. links: by operation."""

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
        hidden = sum(seconds for op, seconds in self.links.items() if op in HIDDEN)
        rest = sum(seconds for op, seconds in self.links.items() if op not in HIDDEN)
        return max(passes, hidden) + rest + self.work.get("update", 0.0)


def times(
    cluster: Cluster, done: Mapping[str, Work], sent: Mapping[str, Messages], inside: bool = False,
    algorithm: str | None = None, host: float = 0.0, shared_by: int = 1,
) -> Times:  # fmt: skip
    """The roofline of a step. inside: gathers of weights stay within a node (hpZ). algorithm: see `collective`.

    host: bytes that a GPU sends to its host, and takes back. shared_by: ranks that share the tokens of rows.
    """
    flops, moved = cluster.tflops * 1e12 * cluster.reach, cluster.memory_bandwidth * 1e9 * cluster.reach
    node = cluster.of_size(min(cluster.gpus, cluster.world_size))
    links = {}
    for op, one in sent.items():
        where = node if inside and op == "weights" else cluster
        if op == "sequence":
            links[op] = one.count * exchange(cluster, one.sent / one.count, shared_by)
            continue
        links[op] = one.count * collective(where, one.sent / one.count, 1, one.rounds, algorithm) if one.count else 0
    if host:
        links["host"] = 2 * host / (cluster.host * 1e9 * cluster.reach)
    return Times({phase: max(w.flops / flops, w.bytes / moved) for phase, w in done.items()}, links)
