"""How many bytes a process holds and sends, before anything runs: a pure function of shapes and settings.

What lies between steps (weights, coordinates, gradients, moments, masters, projectors) is exact, and so is what is sent
but for ZeRO-3's gathers, of which there are bounds. What lives inside a step is a model of the largest of its phases:

    arrival    activations as in the passes + gathered weights, which are copied out of the buffer that they came in
    forward    activations of the layers up to one + what that layer's forward pass makes
    loss       activations of all layers + the logits of a run of tokens + their gradients
    backward   activations of the layers still below + what one layer's backward pass makes (or its forward pass, where
               there is no backward)
    embedding  its whole gradient, where it trains at full rank
    update     Adam's temporaries
    refresh    as backward, with one full gradient and the search for its projector

Activations are those of a decoder layer as transformers' LLaMA has it, under scaled-dot-product attention; other
layers are read in the same way by the shapes of their matrices. See ``docs/memory.md``.

Letters: b, e bytes of a weight's entry and of a coordinate's; T tokens of a micro-batch; h hidden size; V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ows_ds.model.layers import Block, Matrix, ModelLayers, Vector
from ows_ds.optim.layout import CHUNK, COLUMNS, Plan, group_in_order, make_plan, pack, plan_refresh
from ows_ds.optim.projection import BLOCK, OVERSAMPLING, sketch_width
from ows_ds.planner.gathering import Gathered

LOW_RANK = ("ows", "galore")
SAMPLED = (*LOW_RANK, "lisa", "lisa-d", "badam")
ADAPTERS = ("lora", "dora")


@dataclass(frozen=True)
class Job:
    """One process's part of a training step.

    layers: of the model. method: as ``method.name``. layer_set: the layers that train (all are under galore, full, lora
    and dora). itemsize: b. rows, length: sequences of a micro-batch, and tokens of each; labelled: tokens of the
    micro-batch with a loss, None: all. whole_logits: the model works on its head's output, as Gemma 2. max_live,
    bucket: DeepSpeed's ``stage3_max_live_parameters`` and ``reduce_bucket_size``, entries. foreach: Adam works on all
    tensors at once (torch on GPUs). gathered: what ZeRO-3 gathers (`ows_ds.planner.gathering`); None: only bounds are known.
    """

    layers: ModelLayers
    method: str = "ows"
    layer_set: tuple[int, ...] = ()
    rank: int = 128
    always_on: str = "full"
    refresh: str = "full"
    refresh_batch: str = "full"
    lora_rank: int = 8
    itemsize: int = 2
    rows: int = 1
    length: int = 512
    labelled: int | None = None
    accumulation: int = 1
    checkpointing: bool = False
    whole_logits: bool = False
    world_size: int = 1
    sharded: bool = False
    max_live: int = 500_000_000
    foreach: bool = True
    bucket: int = 500_000_000
    gathered: Gathered | None = None

    @property
    def wide(self) -> int:
        """e: bytes of a coordinate, of a moment and of a master's entry."""
        return max(4, self.itemsize)

    @property
    def tokens(self) -> int:
        """T: of a micro-batch."""
        return self.rows * self.length

    @property
    def sampled(self) -> tuple[int, ...]:
        """The transformer layers that train."""
        return self.layer_set if self.method in (*SAMPLED, "hift") and self.method != "galore" else self._every

    @property
    def _every(self) -> tuple[int, ...]:
        return tuple(range(len(self.layers.layers)))

    @property
    def head(self) -> Matrix:
        """The head, or the embedding that it is tied to."""
        return self.layers.embeddings[-1]

    @cached_property
    def plan(self) -> Plan:
        """What lies in the coordinate buffer."""
        if self.method not in SAMPLED:
            return make_plan((), COLUMNS, self.world_size)
        low_rank = self.method in LOW_RANK
        blocks = [self.layers.layers[i] for i in self.sampled]
        blocks = blocks if low_rank else [Block(block.name, (), block.vectors) for block in blocks]
        if self.always_on != "none":
            matrices = self.layers.embeddings if self.always_on == "low_rank" else ()
            blocks.append(Block("always", matrices, self.layers.final))
        return make_plan(blocks, self.rank if low_rank else COLUMNS, self.world_size)

    @cached_property
    def full_rank(self) -> dict[str, int]:
        """Entries of each weight that trains whole, with a master, adapters among them."""
        inside = [part for i in self.sampled for part in _parts(self.layers.layers[i])]
        outside: list[Matrix | Vector] = [*self.layers.embeddings, *self.layers.final]
        if self.method == "mezo":
            return {}
        if self.method in ADAPTERS:
            return {name: size for i in self._every for name, size in self._adapters(self.layers.layers[i]).items()}
        if self.method == "full":
            return {part.name: _numel(part) for part in (*inside, *outside)}
        if self.method == "hift":
            return {part.name: _numel(part) for part in inside}
        found = [m for i in self.sampled for m in self.layers.layers[i].matrices] if self.method not in LOW_RANK else []
        found += self.layers.embeddings if self.always_on == "full" else ()
        return {matrix.name: _numel(matrix) for matrix in found}

    def _adapters(self, block: Block) -> dict[str, int]:
        sizes = {f"{m.name}.A": self.lora_rank * m.in_features for m in block.matrices}
        sizes |= {f"{m.name}.B": self.lora_rank * m.out_features for m in block.matrices}
        return sizes | ({f"{m.name}.m": m.out_features for m in block.matrices} if self.method == "dora" else {})

    @property
    def deepspeed_trains(self) -> bool:
        """Under ZeRO-3, DeepSpeed's own optimizer, which has no float64."""
        return self.sharded and self.method in ("full", *ADAPTERS) and self.itemsize < 8


def _numel(part: Matrix | Vector) -> int:
    return part.numel if isinstance(part, Vector) else part.shape[0] * part.shape[1]


def _parts(block: Block) -> list[Matrix | Vector]:
    return [*block.matrices, *block.vectors]


def sizes_of(layers: ModelLayers) -> list[int]:
    """Entries of each weight of a model."""
    parts = [*layers.embeddings, *layers.final, *(part for block in layers.layers for part in _parts(block))]
    return [_numel(part) for part in parts]


def likely_set(probabilities: Sequence[float], deviations: float = 0.0) -> tuple[int, ...]:
    """A layer set to plan for: as many layers as are expected, or ``deviations`` standard deviations more.

    The likeliest ones, the lowest that can be drawn always among them: how far the backward pass runs down decides the
    activations.
    """
    expected = sum(probabilities)
    count = expected + deviations * math.sqrt(sum(p * (1 - p) for p in probabilities))
    possible = [i for i, p in enumerate(probabilities) if p > 0]
    order = possible[:1] + sorted(possible[1:], key=lambda i: -probabilities[i])
    return tuple(sorted(order[: min(len(order), math.ceil(count - 1e-9))]))


# ------------------------------------------------------------------ between steps


def state(job: Job) -> dict[str, int]:
    """Bytes that a process holds between two steps, by component; the process with the largest parts."""
    plan, b, e, w = job.plan, job.itemsize, job.wide, job.world_size
    sizes = sizes_of(job.layers)
    # peft keeps adapters of bfloat16 models in float32; DeepSpeed has all weights in one format
    adapters = sum(job.full_rank.values()) if job.method in ADAPTERS else 0
    mine = sum(math.ceil(size / w) for size in job.full_rank.values())
    rows, own = plan.rows * plan.r, plan.stride * plan.r
    return {
        "weights": sum(math.ceil(size / w) if job.sharded else size for size in sizes) * b
        + (math.ceil(adapters / w) * b if job.sharded else adapters * e),
        "coordinates": rows * b,
        # this process's sums over processes lie beside its own; DeepSpeed keeps a shard's gradient in the weights'
        # format, and in float32 for the step
        "gradients": (rows + own * (w > 1)) * e + (mine * (e + b) if job.deepspeed_trains else 0),
        "moments": 2 * own * e + 2 * mine * e,
        "masters": mine * e + (own * e if b < e else 0),
        "projectors": sum(m.short for m in plan.matrices.values()) * plan.r * b,
        **({"buckets": job.bucket * b} if job.deepspeed_trains else {}),  # DeepSpeed's, of gradients on their way
    }


# ------------------------------------------------------------------ inside a step


@dataclass(frozen=True)
class Memory:
    """Bytes. state: between steps, by component. phases: what each phase of a step adds, by component."""

    state: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """The most at any time."""
        return sum(self.state.values()) + sum(self.phases[self.largest].values())


def memory(job: Job, refresh: bool = False) -> Memory:
    """What a step needs; refresh: one in which all projectors are found anew (from full gradients, or by sketches)."""
    kinds = kinds_of(job, refresh)
    saved = [activations_of(job, block, kind) for block, kind in zip(job.layers.layers, kinds, strict=True)]
    hidden = job.tokens * job.head.shape[1]
    flows = any(kinds)
    # the last norm's input, in float32, and what it gives to the head
    last = hidden * 4 * flows + hidden * job.itemsize * (1 + _outside_trains(job))
    lowest = next((index for index, kind in enumerate(kinds) if kind), None)
    if lowest is not None and not _outside_trains(job):  # its input needs no gradient, and its norm keeps none
        saved[lowest] -= hidden * 4
    inputs = [hidden * job.itemsize * bool(kind) for kind in kinds]
    alive = inputs if job.checkpointing else saved

    kept, found = _gradients(job), _found(job, refresh)
    before = kept[-1] if job.accumulation > 1 else 0  # of earlier micro-batches
    forward = backward = arrival = {"activations": 0, "one layer": 0, "gathered": 0, "gradients": before}

    def larger(one: dict[str, int], other: dict[str, int], gathered: int) -> dict[str, int]:
        return max(one, other | {"gathered": gathered}, key=_total)

    for index, block in enumerate(job.layers.layers):
        # what a layer keeps is part of what its forward pass makes
        making = 0 if kinds[index] and not job.checkpointing else _forward(job)
        entering, running = _gathered(job, block.name, False)
        now = {"activations": sum(alive[: index + 1]), "gradients": before}
        arrival = larger(arrival, now, entering)
        forward = larger(forward, now | {"one layer": making}, running)
        if not kinds[index]:
            continue
        below = sum(alive[: index + 1])
        if job.checkpointing:  # in float32 the first norm's input is what lies there already
            shared = job.itemsize == 4 and (index != lowest or _outside_trains(job))
            below += saved[index] - (inputs[index] if shared else 0)
        now = {"activations": below, "gradients": kept[index], "new projectors": found[index]}
        arrival = larger(arrival, now | {"one layer": 2 * hidden * job.itemsize}, _gathered(job, block.name, True)[0])
        for module, working, gradients in _moments(job, block, kinds[index], refresh):
            moment = {"one layer": working, "gradients": kept[index] + gradients}
            backward = larger(backward, now | moment, _gathered(job, module, True)[1])
    entering, running = _gathered(job, job.head.modules[-1], False)
    now = {"activations": sum(alive) + last, "gradients": before}
    arrival = larger(arrival, now, entering)
    logits, head = _loss(job, refresh)
    loss = now | {"logits": logits, "gradients": before + head, "gathered": running}
    phases = {"arrival": arrival} if job.sharded else {}
    phases |= {"forward": forward, "loss": loss}
    if flows:
        phases["backward"] = backward
    if job.head.name in job.full_rank:
        phases["embedding"] = _embedding(job, kept) | {"new projectors": found[-1]}
    phases["update"] = {"temporaries": _update(job), "gradients": kept[-1]}
    if refresh and job.method in LOW_RANK:
        phases["gather"] = {"projectors": _gather(job)}
    for phase in ("arrival", "forward", "loss", "backward"):
        if phase in phases:
            phases[phase] |= _everywhere(job, refresh)
    return Memory(state(job), phases)


def _total(parts: dict[str, int]) -> int:
    return sum(parts.values())


def _gathered(job: Job, module: str, backward: bool) -> tuple[int, int]:
    """Bytes of gathered weights and of the gathers' buffers as ``module`` is entered, and while it runs."""
    if not job.sharded:
        return 0, 0
    if job.gathered is not None:
        entering, running = job.gathered.at(module, backward)
        return entering * job.itemsize, running * job.itemsize
    total = sum(_numel(p) for u in job.layers.layers for p in _parts(u)) + sum(map(_numel, job.layers.embeddings))
    return (min(total, job.max_live) * job.itemsize,) * 2


def _embedding(job: Job, kept: Sequence[int]) -> dict[str, int]:
    """The last of a backward pass: the embedding's whole gradient; where it is tied, the head's too, and their sum."""
    embedding = job.layers.embeddings[0]
    whole = _numel(embedding) * job.itemsize
    tied = len(embedding.modules) > 1
    gradients = whole * (1 + tied) + kept[-1]
    if job.accumulation == 1 and not job.deepspeed_trains:  # its part comes of it
        gradients -= math.ceil(_numel(embedding) / job.world_size) * job.itemsize
    return {
        "gradients": gradients, "their sum": whole * tied, "gathered": _gathered(job, embedding.modules[0], True)[1],
    }  # fmt: skip


def _found(job: Job, refresh: bool) -> list[int]:
    """Bytes of the projectors that the busiest process has found from one micro-batch: while each layer's backward pass
    runs, and, last, when all are there.
    """
    matrices = list(job.plan.matrices.values())
    streamed = job.accumulation == 1 or job.refresh_batch == "first"
    if not (refresh and job.method in LOW_RANK and job.refresh == "full" and streamed):
        return [0] * (len(job.layers.layers) + 1)
    owners = plan_refresh(matrices, job.world_size).owners

    def owned(names: set[str]) -> int:
        sizes = [0] * job.world_size
        for m in matrices:
            sizes[owners[m.name]] += m.short * job.itemsize * job.rank * (m.name in names)
        return max(sizes)

    inside = [{m.name for m in block.matrices} for block in job.layers.layers]
    head = {job.head.name}
    above = [owned(head.union(*inside[index + 1 :])) for index in range(len(inside))]
    return [*above, owned(set(owners))]


def _everywhere(job: Job, refresh: bool) -> dict[str, int]:
    """What lies there in every pass: sums of full gradients, sketches."""
    found = {}
    matrices = list(job.plan.matrices.values())
    if refresh and job.method in LOW_RANK and job.refresh == "sketch":
        plans = (plan_refresh(matrices, job.world_size, True), plan_refresh(matrices, job.world_size))
        sums = max(plan.stride for plan in plans) * job.world_size * _width(job) * job.wide
        found["sketches"] = sums + sum(m.long for m in matrices) * _width(job) * job.itemsize
    elif refresh and job.method in LOW_RANK and job.refresh_batch == "full" and job.accumulation > 1:
        owners = plan_refresh(matrices, job.world_size).owners
        owned = [sum(_numel(m) for m in matrices if owners[m.name] == i) for i in range(job.world_size)]
        found["sums of gradients"] = max(owned) * job.wide
    return found


def _width(job: Job) -> int:
    """Columns of the buffer of sketches."""
    return max((sketch_width(job.rank, min(m.shape)) for m in job.plan.matrices.values()), default=0)


def kinds_of(job: Job, refresh: bool) -> list[str]:
    """Of each layer: how its matrices train (low, full, adapters), "frozen" with gradients passing, "" without."""
    kinds = []
    below = _outside_trains(job)  # gradients run through all layers
    for index in range(len(job.layers.layers)):
        kind = "frozen" if below else ""
        if job.method != "mezo" and index in job.sampled:
            kind = "adapters" if job.method in ADAPTERS else "full"
            if job.method in LOW_RANK and not refresh:
                kind = "low"
        below = below or bool(kind)
        kinds.append(kind)
    return kinds


def _outside_trains(job: Job) -> bool:
    """Whether embedding, head and final norm train, and gradients run down to the input."""
    return job.method == "full" or (job.method in SAMPLED and job.always_on != "none")


@dataclass(frozen=True)
class _Parts:
    """A layer's matrices by what they do, told by their shapes and order."""

    attention: tuple[Matrix, ...]  # hidden -> queries, keys, values
    output: Matrix
    up: tuple[Matrix, ...]  # hidden -> between: one, two (gated), or the two in one
    down: Matrix

    @property
    def between(self) -> int:
        """The MLP's inner width."""
        return self.down.in_features

    @property
    def made(self) -> int:
        """Entries a token that the MLP keeps for its backward pass, frozen."""
        up = sum(m.out_features for m in self.up)
        return up + (self.between if up > self.between else 0)  # gated: the activation's output, too


def parts_of(block: Block, hidden: int) -> _Parts:
    """Raises ValueError for a layer that does not look like attention and an MLP."""
    outputs = [m for m in block.matrices if m.out_features == hidden]
    down = outputs[-1] if outputs else None
    if down is None:
        raise ValueError(f"{block.name} has no matrix that gives {hidden} features")
    up = tuple(
        m for m in block.matrices if m is not down and m.out_features in (down.in_features, 2 * down.in_features)
    )
    rest = [m for m in block.matrices if m is not down and m not in up]
    if not up or not rest:
        raise ValueError(f"{block.name} does not look like attention and an MLP")
    output = next(m for m in reversed(rest) if m.out_features == hidden)
    return _Parts(tuple(m for m in rest if m is not output), output, up, down)


def activations_of(job: Job, block: Block, kind: str) -> int:
    """Bytes that a layer keeps from its forward pass for its backward pass."""
    if not kind:
        return 0
    tokens, b, hidden = job.tokens, job.itemsize, job.head.shape[1]
    parts = parts_of(block, hidden)
    through = sum(m.out_features for m in parts.attention) + parts.output.in_features + parts.made
    total = tokens * (through * b + 2 * hidden * 4)  # norms work in float32
    if kind in ("low", "full") and block.vectors:
        total += tokens * 2 * hidden * b  # what the norms' weights are multiplied with
    # inputs that are not kept anyway: one for all matrices that share it
    groups = ((parts.attention, hidden), (parts.up, hidden), ((parts.down,), parts.between))
    for matrices, width in groups:
        if kind == "adapters":
            # cast to the adapters' float32 one by one
            total += tokens * (width * b if b == job.wide else width * job.wide * len(matrices))
        elif kind == "full" or any(not m.saves_low_rank for m in matrices):
            total += tokens * width * b * (kind != "frozen")
    if kind == "adapters":
        total += tokens * job.lora_rank * job.wide * len(block.matrices)
        total += 0 if b == job.wide else tokens * parts.output.in_features * job.wide
    if job.method == "dora" and kind == "adapters":  # both products, which the magnitude scales
        total += 2 * tokens * b * sum(m.out_features for m in block.matrices)
    if kind == "low":
        total += tokens * job.rank * b * sum(m.saves_low_rank for m in block.matrices)
    return total


def _moments(job: Job, block: Block, kind: str, refresh: bool) -> Iterator[tuple[str, int, int]]:
    """Moments of a layer's backward pass: the module that runs, bytes beside what was kept (gradients of activations,
    and what is made of a weight's), bytes of gradients of weights.
    """
    parts = parts_of(block, job.head.shape[1])
    inner = job.tokens * parts.between * job.itemsize
    hidden = job.tokens * job.head.shape[1] * job.itemsize
    kept = kind in ("full", "adapters") or (kind == "low" and not parts.down.saves_low_rank)
    yield block.name, 2 * hidden + (3 - kept) * inner, 0
    if job.method == "dora" and kind == "adapters":  # forward: W + B A for its norm, by way of an identity matrix
        yield block.name, 2 * hidden + max(3 * _numel(m) + m.in_features**2 for m in block.matrices) * job.wide, 0
    searched = refresh and job.method in LOW_RANK
    if kind != "full" or (searched and job.refresh == "sketch"):
        return
    streamed = searched and (job.accumulation == 1 or job.refresh_batch == "first")
    came = 0  # this process's parts of the layer's gradients
    widths = 1  # of the MLP, beside what was kept: its activations go one after the other
    for matrix in reversed(block.matrices):
        atomic_write = 2 * hidden - job.tokens * parts.made * job.itemsize  # the MLP's have gone
        if matrix is parts.down or matrix in parts.up:
            atomic_write, widths = 2 * hidden + widths * inner, widths - 2
        part = 0 if searched or job.world_size == 1 else math.ceil(_numel(matrix) / job.world_size) * job.itemsize
        whole = came + _numel(matrix) * job.itemsize + part
        yield matrix.modules[0], max(0, atomic_write), whole
        if streamed:  # when the module's own input has gone
            yield matrix.modules[0], max(0, atomic_write - inner) + _finder(job, matrix), whole
        if not searched and job.accumulation == 1 and not job.deepspeed_trains:
            came += math.ceil(_numel(matrix) / job.world_size) * job.itemsize


def _finder(job: Job, matrix: Matrix) -> int:
    """Bytes that the search for a projector needs: the longer product while it is made orthonormal, twice in float64;
    or a product beside blocks of G in float32, where G is not.
    """
    width = 4 * min(job.rank + OVERSAMPLING, matrix.short)
    long, short = max(matrix.shape) * width, min(matrix.shape) * width
    copy = 4 * min(BLOCK, _numel(matrix)) if job.itemsize != 4 else 0
    return max(6 * long + short, copy + long + 2 * short)


def _forward(job: Job) -> int:
    """Bytes of a frozen layer's forward pass at its widest."""
    parts = parts_of(job.layers.layers[0], job.head.shape[1])
    return job.tokens * (4 * job.head.shape[1] + parts.made) * job.itemsize


def _loss(job: Job, refresh: bool) -> tuple[int, int]:
    """Bytes of a run's logits, their float32 copy and gradient, with the gradients of what the head has seen; and of
    the head's own gradient.
    """
    b, e = job.itemsize, job.wide
    vocabulary, hidden = job.head.shape
    labelled = job.tokens - job.rows if job.labelled is None else job.labelled
    learns = job.head.name in {**job.full_rank, **(job.plan.matrices if refresh and job.refresh == "full" else {})}
    backward = any(kinds_of(job, False)) or learns
    if job.whole_logits:
        return (job.tokens * b + (job.tokens - job.rows) * (b + 3 * e)) * vocabulary, 0
    run = min(labelled, max(1, CHUNK // vocabulary))
    logits = run * vocabulary * (b + e + (b if b < e and backward else 0))
    rows = (2 * labelled + run) * hidden * b if backward else labelled * hidden * b
    head = vocabulary * hidden * (b if run == labelled else b + e) if learns else 0
    return logits + rows, head


def _gradients(job: Job) -> list[int]:
    """Bytes of this process's gradients of weights that train whole: while each layer's backward pass runs, and, last,
    when all are there. In the weights' format, or in float32 where micro-batches add up.
    """
    itemsize = job.itemsize if job.accumulation == 1 else job.wide
    sizes = {name: math.ceil(size / job.world_size) * itemsize for name, size in job.full_rank.items()}
    if job.deepspeed_trains:  # among the state
        sizes = {}
    total = sum(sizes.values())
    if job.accumulation > 1:
        return [total] * (len(job.layers.layers) + 1)
    inside = [sum(sizes.get(part.name, 0) for part in _parts(block)) for block in job.layers.layers]
    head = sizes.get(job.head.name, 0)
    return [head + sum(inside[index + 1 :]) for index in range(len(inside))] + [total]


def _update(job: Job) -> int:
    """Bytes of the roots of the second moments, of all that Adam works on at once or of one tensor after the other; and
    of the float32 gradients of weights that train whole.
    """
    plan = job.plan
    found = [0]
    for kind in ("matrices", "vectors"):
        local = [layout.local(layout.segments.get(kind, (0, 0)), 0) for layout in plan.layouts]
        sizes = [(rows.stop - rows.start) * plan.r for rows in local if rows is not None]
        found += [_roots(job, some) for some in group_in_order(sizes)]
    shares = {name: math.ceil(size / job.world_size) for name, size in job.full_rank.items()}
    parts = [*job.layers.final, *(part for block in job.layers.layers for part in block.vectors)]
    vectors = {part.name for part in parts if isinstance(part, Vector)}
    limit = sum(shares.values()) if job.deepspeed_trains else CHUNK
    for run in pack(shares, max(1, limit)):
        sizes = [stop - start for _, start, stop in sorted(run, key=lambda part: part[0] in vectors)]  # Adam's groups
        cast = sum(sizes) * job.wide if job.itemsize < job.wide and not job.deepspeed_trains else 0
        found.append(_roots(job, sizes) + cast)
    return max(found)


def _roots(job: Job, sizes: Sequence[int]) -> int:
    if job.foreach:
        return sum(sizes) * job.wide
    # one after the other: root and quotient, beside what is left of the tensor before
    return max((before + 2 * size for before, size in zip([0, *sizes], sizes, strict=False)), default=0) * job.wide


def _gather(job: Job) -> int:
    """Bytes of the all-gather of projectors, and of the old ones that are still there."""
    plan = plan_refresh(list(job.plan.matrices.values()), job.world_size)
    kept = sum(m.short for m in job.plan.matrices.values())
    return ((job.world_size + 1) * plan.stride + kept) * job.plan.r * job.itemsize


# ------------------------------------------------------------------ traffic


def traffic(job: Job, refresh: bool = False, index: int = 0) -> dict[str, int]:
    """Bytes that process ``index`` sends in a step, by operation as in ``metrics.jsonl``. 0 for one process.

    Left out: evaluations, draws, merges at a change of the set, and messages of some bytes (agreement, ``metrics``).

    refresh: with full gradients, or (sketch) both of its two steps' products, beside the rest. Gathers of ZeRO-3 are
    here where ``job.gathered`` is known, else see `gathers`. Under ZeRO-3 with DeepSpeed's own optimizer, gradients
    are its buckets', of the same size up to padding.
    """
    w, b, e, plan = job.world_size, job.itemsize, job.wide, job.plan
    sent = dict.fromkeys(("gradients", "coordinates", "full_rank_gradients"), 0) | plan.bytes_per_step(e, b)
    part = sum(math.ceil(size / w) for size in job.full_rank.values()) * b * (w - 1)
    sent["full_rank_gradients"] = part * job.accumulation
    sent["full_rank_weights"] = 0 if job.sharded else part
    sent["grad_norm"] = 2 * math.ceil(e / w) * (w - 1)
    if refresh and job.method in LOW_RANK:
        matrices = list(plan.matrices.values())
        last = plan_refresh(matrices, w)
        sent["projectors"] = last.stride * job.rank * b * (w - 1)
        merged = sum(layout.stride for layout in plan.layouts if "matrices" in layout.segments)
        sent["merge"] = merged * plan.r * e * (w - 1) if b < e else 0
        if job.refresh == "sketch":
            first = plan_refresh(matrices, w, True)
            sent["sketches"] = (first.stride + last.stride) * _width(job) * e * (w - 1)
            sent["sketch_bases"] = first.stride * _width(job) * b * (w - 1)
        else:
            batches = job.accumulation if job.refresh_batch == "full" else 1
            away = sum(_numel(m) for m in matrices if last.owners[m.name] != index)
            sent["refresh_gradients"] = away * b * batches * (w > 1)
    if job.gathered is not None:
        sent["weights"] = job.gathered.shares(w, job.accumulation) * b * (w - 1)
    return {name: size for name, size in sent.items() if size}


def gathers(job: Job) -> tuple[int, int]:
    """Least and most bytes that a process sends for ZeRO-3's gathers of weights in a step.

    Each pass of a micro-batch needs every weight it touches once: forward all of them, backward those of the layers
    that gradients run through, under checkpointing forward once more. At most, DeepSpeed gathers each anew each time;
    at least (as many weights stay as ``max_live`` lets), what a forward pass needs.
    """
    if not job.sharded or job.world_size == 1:
        return 0, 0
    part = (job.world_size - 1) * job.itemsize * job.accumulation

    def shares(blocks: Sequence[Block], more: Sequence[Matrix | Vector]) -> int:
        sizes = [_numel(p) for block in blocks for p in _parts(block)] + [_numel(p) for p in more]
        return sum(math.ceil(size / job.world_size) for size in sizes)

    layers = job.layers.layers
    outside: list[Matrix | Vector] = [*job.layers.embeddings, *job.layers.final]
    trained_names = [block for block, kind in zip(layers, kinds_of(job, False), strict=True) if kind]
    # a tied head is a second use
    forward = shares(layers, outside)
    again = shares(trained_names, ()) * (2 if job.checkpointing else 1) + shares((), outside)
    tied = shares((), [job.head]) if len(job.head.modules) > 1 else 0
    return forward * part, (forward + again + 2 * tied) * part


def per_method(job: Job, methods: Sequence[str]) -> dict[str, Memory]:
    """The same model, batch and processes under several methods."""
    return {method: memory(replace(job, method=method)) for method in methods}
