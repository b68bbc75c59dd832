"""What one rank does in a training step, as shapes and settings; and how its layers are read.

Letters, here and in the modules that count: b, e bytes of a weight's entry and of a coordinate's; T tokens of a
micro-batch; h hidden size; V vocabulary; w ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ows_ds.distributed.packing import Packing
from ows_ds.model.blocks import Block, Matrix, ModelLayers, Vector
from ows_ds.model.parts import MLP, split
from ows_ds.optim.layout import COLUMNS, Plan, RefreshPart, RefreshPlan, Scale, make_plan, plan_refresh
from ows_ds.optim.sizes import ADAPTERS, LOW_RANK, MOMENT_BLOCK, SAMPLED
from ows_ds.planner.gathering import Gathered

Part = Matrix | Vector


@dataclass(frozen=True)
class StepSpec:
    """One rank's part of a training step. Numbers of DeepSpeed are entries."""

    layers: ModelLayers
    method: str = "ows"
    layer_set: tuple[int, ...] = ()  # ignored by methods that train all layers
    rank: int = 128  # r
    always_on: str = "full"
    refresh: str = "full"
    refresh_batch: str = "full"
    lora_rank: int = 8
    itemsize: int = 2  # b
    rows: int = 1  # sequences of a micro-batch
    length: int = 512  # tokens of each
    shared_by: int = 1  # ranks that share the tokens of a row
    kv_copies: int = 1  # how often heads of keys and values are sent to other ranks of these
    labelled: int | None = None  # tokens of the micro-batch with a loss; None: all
    accumulation: int = 1
    checkpointing: bool = False
    offload: bool = False  # inputs of checkpointed layers lie on the host
    tile: int | None = None  # tokens that an MLP takes at a time; None: all
    fused: bool = False  # norms and activation functions are one kernel each, and keep what they are given
    compiled: bool = False  # whole layers are
    whole_logits: bool = False  # the model changes its head's output, as Gemma 2, so that the loss takes all at once
    world_size: int = 1
    sharded: bool = False
    max_live: int = 500_000_000  # DeepSpeed's stage3_max_live_parameters
    on_gpu: bool = True  # Adam works on all tensors at once, and searches run beside the backward pass
    bucket: int = 500_000_000  # DeepSpeed's reduce_bucket_size
    gathered: Gathered | None = None  # what ZeRO-3 gathers; None: only bounds are known
    expert_rank: int | None = None
    router: str = "freeze"
    frozen: str = "same"  # format of frozen matrices of layers
    moments: str = "float32"  # of weights that train at full rank
    master: str = "float32"
    scale: Scale = 1.0
    rule: str = "adamw"
    watched: bool = False  # squares of each block's gradients are summed over ranks

    @property
    def second_moments(self) -> int:
        """Entries of the second moments of coordinates, on the rank with most of them."""
        layouts = [(layout, layout.second_moments(self.rule)) for layout in self.plan.layouts]

        def entries(rank: int) -> int:
            local = [layout.local(rows, rank) for layout, rows in layouts]
            return sum(rows.stop - rows.start for rows in local if rows is not None) * self.plan.r

        return max(map(entries, range(self.world_size)))

    @property
    def wide(self) -> int:
        """e: bytes of an entry of coordinates' gradients, of moments and of masters."""
        return max(4, self.itemsize)

    @property
    def tokens(self) -> int:
        """T: of this rank's piece, where ranks share rows."""
        return self.rows * math.ceil(self.length / self.shared_by)

    @property
    def run(self) -> int:
        """Tokens that an MLP takes at a time; of experts all."""
        return min(self.tokens, self.tile or self.tokens)

    @property
    def labels(self) -> int:
        """Tokens of a micro-batch with a loss: all but the first of each sequence, if nothing else is known."""
        whole = self.tokens - math.ceil(self.rows / self.shared_by)
        return whole if self.labelled is None else math.ceil(self.labelled / self.shared_by)

    @property
    def hidden(self) -> int:
        """h."""
        return self.head.shape[1]

    @property
    def head(self) -> Matrix:
        """The head, or the embedding that it is tied to."""
        return self.layers.embeddings[-1]

    @property
    def outside(self) -> list[Part]:
        """Embeddings, head, final vectors."""
        return [*self.layers.embeddings, *self.layers.final]

    @cached_property
    def parts(self) -> list[Part]:
        """All weights of the model."""
        return [*self.outside, *(part for block in self.layers.layers for part in parts_of(block))]

    @property
    def sizes(self) -> list[int]:
        """Entries of each weight of the model."""
        return [numel(part) for part in self.parts]

    @cached_property
    def formats(self) -> dict[str, Packing]:
        """Of the matrices that are in few bits, by name."""
        if self.frozen == "same":
            return {}
        trained = set(self.full_rank)
        for block in self.plan.blocks:
            trained.update(m.name for m in block.matrices)
            trained.update(v.name for v in block.vectors)
        matrices = [matrix for block in self.layers.layers for matrix in block.matrices]
        frozen = (matrix for matrix in matrices if matrix.name not in trained)
        return {m.name: Packing(self.frozen, m.shape, m.inputs_first, m.experts) for m in frozen}

    def stored(self, part: Part) -> tuple[tuple[int, int], ...]:
        """(entries, bytes of an entry) of each parameter that a weight is stored as."""
        found = self.formats.get(part.name)
        if found is None:
            return ((numel(part), self.itemsize),)
        return (math.prod(found.codes_shape), 1), (math.prod(found.scales_shape), 1)

    def size(self, *parts: Part) -> int:
        """Bytes of these weights, in full."""
        return sum(entries * itemsize for part in parts for entries, itemsize in self.stored(part))

    def shard_size(self, *parts: Part) -> int:
        """Bytes of one rank's shards of them."""
        return sum(self.share(entries) * itemsize for part in parts for entries, itemsize in self.stored(part))

    def read(self, part: Part) -> int:
        """Bytes that a pass moves for a weight: of one in few bits also what is made of it, written and read."""
        return self.size(part) + (2 * numel(part) * self.itemsize if part.name in self.formats else 0)

    @cached_property
    def weights(self) -> int:
        """Bytes of all weights on a rank."""
        return self.shard_size(*self.parts) if self.sharded else self.size(*self.parts)

    def dense(self, block: Block) -> int:
        """Bytes of the largest matrix of a layer that is made of its codes to be multiplied with."""
        sizes = [math.prod(found.shape) for m in block.matrices if (found := self.formats.get(m.name)) is not None]
        return max(sizes, default=0) * self.itemsize

    @property
    def low_rank(self) -> bool:
        """Whether matrices train in low-rank subspaces."""
        return self.method in LOW_RANK

    @property
    def sampled(self) -> tuple[int, ...]:
        """Transformer layers that train."""
        drawn = self.method in (*SAMPLED, "hift") and self.method != "galore"
        return self.layer_set if drawn else tuple(range(len(self.layers.layers)))

    @cached_property
    def trained(self) -> ModelLayers:
        """Layers without what never trains."""
        return self.layers.with_routers(self.router == "train")

    @cached_property
    def plan(self) -> Plan:
        """What lies in the coordinate buffer."""
        layers = self.trained.at_rank(self.rank, self.expert_rank) if self.low_rank else self.trained
        blocks = [layers.layers[i] for i in self.sampled] if self.method in SAMPLED else []
        if not self.low_rank:
            blocks = [Block(block.name, (), block.vectors) for block in blocks]
        if self.method in SAMPLED and self.always_on != "none":
            matrices = self.layers.embeddings if self.always_on == "low_rank" else ()
            blocks.append(Block("always", matrices, self.layers.final))
        return make_plan(blocks, self.rank if self.low_rank else COLUMNS, self.world_size)

    @property
    def projected(self) -> list[Matrix]:
        """Matrices with coordinates, in the order of their rows."""
        return list(self.plan.matrices.values())

    def refresh_plan(self, sketch: Literal["first", "second"] | None = None) -> RefreshPlan:
        """Who finds which projector, or has which of two sketches."""
        return plan_refresh(self.projected, self.world_size, self.rank, sketch)

    @property
    def refresh_passes(self) -> int:
        """Micro-batches of a step whose full gradients a refresh uses."""
        return self.accumulation if self.refresh_batch == "full" else 1

    @cached_property
    def full_rank(self) -> dict[str, int]:
        """Entries of each weight with a master of its own, by name: trained at full rank, or an adapter."""
        blocks = [self.trained.layers[i] for i in self.sampled]
        if self.method in ADAPTERS:
            return {name: size for block in blocks for name, size in self._adapters(block).items()}
        parts: list[Part] = []
        if self.method in ("full", "hift"):
            parts = [part for block in blocks for part in parts_of(block)]
            parts += self.outside if self.method == "full" else []
        elif self.method in SAMPLED:
            parts = [] if self.low_rank else [m for block in blocks for m in block.matrices]
            parts += self.layers.embeddings if self.always_on == "full" else ()
        return {part.name: numel(part) for part in parts}

    def _adapters(self, block: Block) -> dict[str, int]:
        sizes = {f"{m.name}.A": self.lora_rank * m.in_features for m in block.matrices}
        sizes |= {f"{m.name}.B": self.lora_rank * m.out_features for m in block.matrices}
        return sizes | ({f"{m.name}.m": m.out_features for m in block.matrices} if self.method == "dora" else {})

    @property
    def deepspeed_trains(self) -> bool:
        """DeepSpeed's own optimizer trains, which has no float64, no other moments, and always masters."""
        plain = self.itemsize < 8 and self.moments == self.master == "float32"
        return self.sharded and self.method in ("full", *ADAPTERS) and plain

    @property
    def moments_of_entry(self) -> float:
        """Bytes of both moments of an entry that trains at full rank."""
        return 2 * (1 + 4 / MOMENT_BLOCK) if self.moments == "int8" else 2 * self.wide

    @property
    def master_of_entry(self) -> int:
        """Bytes of its master."""
        return self.wide if self.master == "float32" else 0

    @property
    def outside_trains(self) -> bool:
        """Embedding, head or final norm train, and gradients run down to the input."""
        return self.method == "full" or (self.method in SAMPLED and self.always_on != "none")

    def share(self, *sizes: int) -> int:
        """Entries of weights of these sizes that one rank has."""
        return sum(math.ceil(size / self.world_size) for size in sizes)

    def walk(self, refresh: bool = False) -> Iterator[tuple[Block, str]]:
        """Each layer with its kind: how its matrices train in a pass.

        low, full (also for a projector that is searched), adapters, "frozen" with gradients passing, "" without.
        """
        passing = self.outside_trains
        for index, block in enumerate(self.layers.layers):
            kind = "frozen" if passing else ""
            if self.method != "mezo" and index in self.sampled:
                kind = "adapters" if self.method in ADAPTERS else "low" if self.low_rank and not refresh else "full"
            passing = passing or bool(kind)
            yield block, kind


def numel(part: Part) -> int:
    """Entries of a weight."""
    return part.numel


def parts_of(block: Block) -> list[Part]:
    """Weights of a layer."""
    return [*block.matrices, *block.vectors, *block.routers]


def entries(layers: ModelLayers) -> tuple[int, int]:
    """Of all weights, and of those that work on one token: of a stack of experts, those that it goes to."""
    parts: list[Part] = [*layers.embeddings, *layers.final, *(p for block in layers.layers for p in parts_of(block))]
    idle = sum((p.count - p.active) * p.numel // p.count for p in parts if isinstance(p, Matrix) and p.experts)
    total = sum(map(numel, parts))
    return total, total - idle


def entries_of(spec: StepSpec, part: RefreshPart) -> int:
    """Entries of the gradient that one owner finds projectors from."""
    matrix = spec.plan.matrices[part.name]
    return matrix.numel // matrix.count * (1 if part.experts is None else part.experts[1] - part.experts[0])


# ------------------------------------------------------------------ a layer


def keeps_low_rank(matrix: Matrix) -> bool:
    """Whether coordinates stand on the output side, so that X Q is kept for the backward pass in place of X."""
    return matrix.tall != matrix.inputs_first


def computed_again(spec: StepSpec, block: Block) -> list[MLP]:
    """A layer's MLPs that take their tokens in runs, each of which the backward pass computes again."""
    if spec.run == spec.tokens:
        return []
    return [mlp for mlp in split(block, spec.hidden).mlps if not mlp.down.experts]


def activations(spec: StepSpec, block: Block, kind: str) -> int:
    """Bytes that a layer keeps from its forward pass for its backward pass. kind: see `StepSpec.walk`."""
    if not kind:
        return 0
    b, e, hidden, parts = spec.itemsize, spec.wide, spec.hidden, split(block, spec.hidden)
    again = computed_again(spec, block)  # MLPs of which the input alone is kept
    made = sum(mlp.rows * (mlp.made - spec.fused * mlp.gated) for mlp in parts.mlps if mlp not in again)
    attention = sum(m.out_features for m in parts.attention)
    through = attention + parts.heads + made + len(again) * hidden
    through += (spec.kv_copies - 1) * max(0, attention - parts.heads)
    normed = 2 * hidden + parts.normed(block)
    token = through * b + normed * (b if spec.fused else 4)  # norms work in float32
    if kind in ("low", "full") and block.vectors and not spec.fused:
        token += normed * b  # what the norms' weights are multiplied with
    # inputs that are not kept anyway: one for all matrices that share it
    shared = [(parts.attention, hidden, 1)]
    for mlp in (mlp for mlp in parts.mlps if mlp not in again):
        shared += [(mlp.up, hidden, mlp.rows), ((mlp.down,), mlp.between, mlp.rows)]
        token += (mlp.down.count * 4 + mlp.rows * 16) * bool(mlp.down.experts)  # of the router, and the order of rows
    if spec.shared_by > 1 and parts.output is not None:  # attention's output has come back: it is not the kernel's
        shared.append(((parts.output,), parts.heads, 1))
    for matrices, width, rows in shared:
        if kind == "adapters":  # cast to the adapters' float32 one by one
            token += width * b if b == e else width * e * len(matrices)
        elif kind == "full" or (kind == "low" and not all(map(keeps_low_rank, matrices))):
            token += rows * width * b
    kept = [m for m in block.matrices if not any(m in mlp.up or m is mlp.down for mlp in again)]
    if kind == "adapters":
        token += spec.lora_rank * e * len(kept) + (0 if b == e else parts.heads * e)
        if spec.method == "dora":  # both products, which the magnitude scales
            token += 2 * b * sum(m.out_features for m in kept)
    if kind == "low":
        ranked = (spec.plan.matrices.get(m.name) for m in kept)
        token += sum(m.active * m.low_rank(spec.rank) for m in ranked if m is not None and keeps_low_rank(m)) * b
    return spec.tokens * token
