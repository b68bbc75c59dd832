"""Bytes and collectives of a step: a pure function of shapes and settings, exact but for ZeRO-3 without a replay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ows_ds.model.parts import split
from ows_ds.optim.layout import gram_entries
from ows_ds.planner.step import StepSpec, entries_of, parts_of


def traffic(spec: StepSpec, refresh: bool = False, index: int = 0) -> dict[str, int]:
    """Bytes that rank ``index`` sends in a step, by operation as in ``metrics.jsonl``; empty for one rank.

    Left out: evaluations, draws, merges at a change of the set, and messages of some bytes (agreement, ``metrics``).

    refresh: with full gradients or, by sketches, the products of both of its steps. Under DeepSpeed's own optimizer
    gradients are its buckets', of the same size up to padding. ZeRO-3's gathers are here where ``spec.gathered`` is
    known, else see `gathers`.
    """
    w, b, e, plan = spec.world_size, spec.itemsize, spec.wide, spec.plan
    full_rank = spec.share(*spec.full_rank.values()) * b * (w - 1)
    sent = plan.bytes_per_step(e, b)
    sent["full_rank_gradients"] = full_rank * spec.accumulation
    sent["full_rank_weights"] = 0 if spec.sharded else full_rank
    if spec.rule == "muon":
        sent["grams"] = 2 * math.ceil(8 * gram_entries(spec.projected, spec.rank) / w) * (w - 1)
    watched = sum("matrices" in layout.segments for layout in plan.layouts) * spec.watched
    sent["grad_norm"] = 2 * spec.share(e * (1 + watched)) * (w - 1)
    if refresh and spec.low_rank:
        last = spec.refresh_plan()
        sent["projectors"] = last.stride * last.columns * b * (w - 1)
        merged = sum(layout.stride for layout in plan.layouts if "matrices" in layout.segments)
        sent["merge"] = merged * plan.r * e * (w - 1) if b < e else 0
        if spec.refresh == "sketch":
            first, second = spec.refresh_plan("first"), spec.refresh_plan("second")
            passes = first.bytes_of_pass(w, first, e, b), second.bytes_of_pass(w, last, e, b)
            sent["sketches"] = sum(one["sketches"] for one in passes)
            sent["sketch_bases"] = passes[0]["sketch_bases"]
        else:
            away = sum(entries_of(spec, part) for part in last.parts if part.owner != index)
            sent["refresh_gradients"] = away * b * spec.refresh_passes * (w > 1)
    sent["sequence"] = _exchanged(spec) * spec.accumulation
    if spec.gathered is not None:
        sent["weights"] = spec.gathered.shares(w, spec.accumulation) * (w - 1)
    return {name: size for name, size in sent.items() if size}


def _exchanged(spec: StepSpec) -> int:
    """Bytes of a micro-batch's attention where ranks share rows (Ulysses): queries, keys, values and outputs of all
    layers, again under checkpointing, and their gradients where a backward pass runs."""
    if spec.shared_by == 1:
        return 0
    found = 0
    for block, kind in spec.walk():
        parts = split(block, spec.hidden)
        queries_keys_values = sum(m.out_features for m in parts.attention)
        entries = queries_keys_values + parts.heads
        entries += (spec.kv_copies - 1) * max(0, queries_keys_values - parts.heads)
        passes = (2 if spec.method == "mezo" else 1) + (1 + spec.checkpointing if kind else 0)
        found += spec.tokens * entries * spec.itemsize // spec.shared_by * (spec.shared_by - 1) * passes
    return found


def gathers(spec: StepSpec) -> tuple[int, int]:
    """Least and most bytes that a rank sends for ZeRO-3's gathers of weights in a step.

    A forward pass uses every weight once, a backward pass those of the layers that gradients run through, again under
    checkpointing. At most, DeepSpeed gathers a weight for each use; at least, for the forward pass alone.
    """
    if not spec.sharded or spec.world_size == 1:
        return 0, 0
    times = (spec.world_size - 1) * spec.accumulation
    outside = spec.shard_size(*spec.outside)
    inside = [(spec.shard_size(*parts_of(block)), kind) for block, kind in spec.walk()]
    forward = sum(size for size, _ in inside) + outside
    backward = sum(size for size, kind in inside if kind) * (2 if spec.checkpointing else 1) + outside
    tied = spec.shard_size(spec.head) if len(spec.head.modules) > 1 else 0  # a second use
    return forward * times, (forward + backward + 2 * tied) * times


@dataclass(frozen=True)
class Messages:
    """Collectives of one kind in a step. sent: bytes of a rank, in all. count: of them. rounds: 2 of all-reduces."""

    sent: float
    count: float = 1.0
    rounds: int = 1


def messages(spec: StepSpec, refreshes: float) -> dict[str, Messages]:
    """Collectives of a step by operation. refreshes: of all projectors, in a step."""
    last = spec.world_size - 1  # this rank owns least, and sends most in a refresh
    counts = dict.fromkeys(("gradients", "coordinates", "merge"), len(spec.plan.layouts))
    counts["full_rank_gradients"] = len(spec.full_rank) * spec.accumulation
    counts["full_rank_weights"] = len(spec.full_rank)
    # four exchanges a layer, forward and backward, and forward again under checkpointing
    counts["sequence"] = 4 * spec.accumulation * sum(2 + spec.checkpointing if kind else 1 for _, kind in spec.walk())
    counts["refresh_gradients"] = len(spec.refresh_plan().parts) * spec.refresh_passes
    sent = traffic(spec)
    found = {
        op: Messages(size, counts.get(op, 1), 2 if op in ("grad_norm", "grams") else 1) for op, size in sent.items()
    }
    for op, size in traffic(spec, True, last).items() if refreshes else ():
        if op not in sent:
            found[op] = Messages(size * refreshes, counts.get(op, 1) * refreshes)
    if spec.gathered is not None and "weights" in found:
        found["weights"] = Messages(found["weights"].sent, spec.gathered.gathers(spec.accumulation))
    elif most := gathers(spec)[1]:
        matrices = sum(len(block.matrices) for block in spec.layers.layers)
        found["weights"] = Messages(most, 3 * matrices * spec.accumulation)
    return found
