"""Bytes of a rank, before anything runs: a pure function of shapes and settings.

What lies between steps is exact. What lies inside a step is a model of its phases, of which the largest counts: see
``docs/memory.md``. Activations are those of a decoder layer of transformers' LLaMA under scaled-dot-product attention;
other layers are read in the same way by the shapes of their matrices.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ows_ds.model.blocks import Block, Matrix, Vector
from ows_ds.model.parts import split
from ows_ds.optim.layout import CHUNK, RefreshPart, gram_entries, group_in_order, pack
from ows_ds.optim.sizes import IN_FLOAT32, OVERSAMPLING, kept_directions
from ows_ds.planner.step import (
    ADAPTERS,
    StepSpec,
    activations,
    computed_again,
    entries_of,
    keeps_low_rank,
    numel,
    parts_of,
)

# bytes of full-rank gradients in a reduce-scatter beside the backward pass; 0: each weight's gradient is sent alone
FULL_RANK_BUCKET = 0

Parts = dict[str, int]  # bytes by component


def state(spec: StepSpec) -> Parts:
    """Bytes that a rank holds between two steps; the rank with the largest parts."""
    plan, b, e, w = spec.plan, spec.itemsize, spec.wide, spec.world_size
    # peft keeps adapters of bfloat16 models in float32; DeepSpeed has all weights in one format
    adapters = sum(spec.full_rank.values()) if spec.method in ADAPTERS else 0
    mine = spec.share(*spec.full_rank.values())
    rows, own = plan.rows * plan.r, plan.stride * plan.r
    return {
        "weights": spec.weights + (spec.share(adapters) * b if spec.sharded else adapters * e),
        "coordinates": rows * b,
        # this rank's sums lie beside its own gradients; DeepSpeed keeps a shard's gradient in the weights' format, and
        # in float32 for the step
        "gradients": (rows + own * (w > 1)) * e + (mine * (e + b) if spec.deepspeed_trains else 0),
        "moments": (own + spec.second_moments) * e + math.ceil(mine * spec.moments_of_entry),
        "masters": mine * spec.master_of_entry + (own * e if b < e else 0),
        "projectors": _projector_entries(spec) * b,
        **({"buckets": spec.bucket * b} if spec.deepspeed_trains else {}),  # DeepSpeed's, of gradients on their way
    }


@dataclass(frozen=True)
class Memory:
    """Bytes. state: between steps, by component. phases: what each phase of a step adds, by component."""

    state: Parts
    phases: dict[str, Parts]

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """The most at any time."""
        return sum(self.state.values()) + sum(self.phases[self.largest].values())


def memory(spec: StepSpec, refresh: bool = False) -> Memory:
    """What a step needs; refresh: one that finds all projectors again (from full gradients, or by sketches)."""
    walk = list(spec.walk(refresh))
    kinds = [kind for _, kind in walk]
    saved = [activations(spec, block, kind) for block, kind in walk]
    b, hidden = spec.itemsize, spec.tokens * spec.hidden
    lowest = next((index for index, kind in enumerate(kinds) if kind), None)
    if lowest is not None and not spec.outside_trains:  # its input needs no gradient, and its norm keeps none
        saved[lowest] -= hidden * 4
    inputs = [hidden * b * bool(kind) for kind in kinds]
    alive = inputs if spec.checkpointing else saved

    def there(index: int) -> int:
        """Of the layers up to one, what is on the device: of inputs on the host the last, and one on its way."""
        first = max(0, index - spec.on_gpu) if spec.checkpointing and spec.offload else 0
        return sum(alive[first : index + 1])

    kept, found = _gradients(spec), _projectors(spec, refresh)
    before = kept[-1] if spec.accumulation > 1 else 0  # of earlier micro-batches
    common = {"activations": 0, "one layer": 0, "gathered": 0, "gradients": before}
    phases = dict.fromkeys(("arrival", "forward", "loss", "backward"), common)

    def meet(phase: str, parts: Parts, gathered: int) -> None:
        phases[phase] = max(phases[phase], parts | {"gathered": gathered}, key=lambda one: sum(one.values()))

    widest = _forward(spec)
    for index, (block, kind) in enumerate(walk):
        # what a layer keeps is part of what its forward pass makes
        making = (0 if kind and not spec.checkpointing else widest) + spec.dense(block)
        entering, running = _gathered(spec, block.name, False)
        below = there(index)
        now = {"activations": below, "gradients": before}
        meet("arrival", now, entering)
        meet("forward", now | {"one layer": making}, running)
        if not kind:
            continue
        if spec.checkpointing:  # in float32 the first norm's input is what lies there already
            shared = b == 4 and (index != lowest or spec.outside_trains)
            below += saved[index] - (inputs[index] if shared else 0)
        now = {"activations": below, "gradients": kept[index], "new projectors": found[index]}
        meet("arrival", now | {"one layer": 2 * hidden * b}, _gathered(spec, block.name, True)[0])
        for module, working, gradients in _backward(spec, block, kind, refresh):
            moment = {"one layer": working, "gradients": kept[index] + gradients}
            meet("backward", now | moment, _gathered(spec, module, True)[1])
    entering, running = _gathered(spec, spec.head.modules[-1], False)
    # the last norm's input, in float32, and what it gives to the head
    last = hidden * 4 * any(kinds) + hidden * b * (1 + spec.outside_trains)
    now = {"activations": there(len(alive) - 1) + last, "gradients": before}
    meet("arrival", now, entering)
    logits, head = _loss(spec, refresh)
    phases["loss"] = now | {"logits": logits, "gradients": before + head, "gathered": running}
    everywhere = _everywhere(spec, refresh)
    phases = {phase: parts | everywhere for phase, parts in phases.items()}
    if not spec.sharded:
        del phases["arrival"]
    if not any(kinds):
        del phases["backward"]
    if spec.head.name in spec.full_rank:
        phases["embedding"] = _embedding(spec, kept[-1]) | {"new projectors": found[-1]}
    if FULL_RANK_BUCKET and spec.full_rank and spec.world_size > 1 and not spec.deepspeed_trains:
        for phase in {"loss", "backward", "embedding"} & phases.keys():
            phases[phase] |= {"bucket": FULL_RANK_BUCKET}
    phases["update"] = {"temporaries": _update(spec), "gradients": kept[-1]}
    if refresh and spec.low_rank and spec.refresh != "sketch":
        phases["choice"] = {"new projectors": _arrived(spec, _ranges(spec))[-1]}
    if refresh and spec.low_rank:  # the all-gather's buffers, and the old projectors
        plan = spec.refresh_plan()
        gathers = (spec.world_size + 1) * plan.stride * plan.columns
        phases["gather"] = {"projectors": (gathers + _projector_entries(spec)) * b}
    return Memory(state(spec), phases)


def _projector_entries(spec: StepSpec) -> int:
    return sum(math.prod(matrix.side(matrix.short, spec.rank)) for matrix in spec.projected)


def _gathered(spec: StepSpec, module: str, backward: bool) -> tuple[int, int]:
    """Bytes of gathered weights and of the gathers' buffers as ``module`` is entered, and while it runs."""
    if not spec.sharded:
        return 0, 0
    if spec.gathered is not None:
        return spec.gathered.at(module, backward)
    parts = [part for part in spec.parts if part not in spec.layers.final]
    total = sum(entries for part in parts for entries, _ in spec.stored(part))
    return (spec.size(*parts) * min(total, spec.max_live) // total,) * 2


def _embedding(spec: StepSpec, kept: int) -> Parts:
    """The last of a backward pass: the embedding's whole gradient; where it is tied, the head's too, and their sum."""
    embedding = spec.layers.embeddings[0]
    whole, tied = numel(embedding) * spec.itemsize, len(embedding.modules) > 1
    gradients = whole * (1 + tied) + kept
    if spec.accumulation == 1 and not spec.deepspeed_trains:  # its part comes of it
        gradients -= spec.share(numel(embedding)) * spec.itemsize
    gathered = _gathered(spec, embedding.modules[0], True)[1]
    return {"gradients": gradients, "their sum": whole * tied, "gathered": gathered}


def _arrived(spec: StepSpec, sizes: Mapping[str, Mapping[int, int]]) -> list[int]:
    """Bytes of ``sizes``, by weight and owner, of the busiest owner: as each layer's backward pass runs, and at its
    end."""
    totals = Counter({0: 0})

    def add(names: Iterable[str]) -> int:
        for name in names:
            totals.update(sizes.get(name, {}))
        return max(totals.values())

    found = [add([spec.head.name])]
    found += [add([part.name for part in parts_of(block)]) for block in spec.layers.layers[:0:-1]]
    totals.clear()
    return [*found[::-1], add(sizes) if sizes else 0]


def _gradients(spec: StepSpec) -> list[int]:
    """As `_arrived`: this rank's gradients of weights that train at full rank, in the weights' format, or in float32
    where micro-batches add up.
    """
    if spec.deepspeed_trains:  # among the state
        return [0] * (len(spec.layers.layers) + 1)
    itemsize = spec.itemsize if spec.accumulation == 1 else spec.wide
    arrived = _arrived(spec, {name: {0: spec.share(size) * itemsize} for name, size in spec.full_rank.items()})
    return arrived if spec.accumulation == 1 else arrived[-1:] * len(arrived)


def _projectors(spec: StepSpec, refresh: bool) -> list[int]:
    """As `_arrived`: what projectors are chosen from, of one micro-batch."""
    if not (refresh and spec.low_rank and spec.refresh != "sketch" and spec.refresh_passes == 1):
        return [0] * (len(spec.layers.layers) + 1)
    return _arrived(spec, _ranges(spec))


def _ranges(spec: StepSpec) -> dict[str, Counter[int]]:
    """By matrix and owner, bytes of a basis of its gradient's range, and of what the buffer does not take of their
    product."""
    found: dict[str, Counter[int]] = {}
    for part in spec.refresh_plan().parts:
        matrix, r = spec.plan.matrices[part.name], part.shape[-1]
        more = min(OVERSAMPLING, matrix.short - r)
        size = spec.wide * (matrix.short * (r + more) + matrix.long * more)
        found.setdefault(part.name, Counter())[part.owner] += size * math.prod(part.shape[:-2])
    return found


def _everywhere(spec: StepSpec, refresh: bool) -> Parts:
    """What lies there in every pass: sums of full gradients, sketches."""
    if not (refresh and spec.low_rank):
        return {}
    if spec.refresh == "sketch":
        first, second = spec.refresh_plan("first"), spec.refresh_plan("second")
        sums = max(plan.stride * plan.columns for plan in (first, second)) * spec.world_size
        if spec.world_size > 1:  # of stacks: apart from what is sent
            whole = {m.name for m in spec.projected if m.experts}
            sums += sum(math.prod(part.shape) for part in first.parts if part.name in whole)
        bases = sum(math.prod(part.shape) for part in first.parts)
        return {"sketches": sums * spec.wide + bases * spec.itemsize}
    if spec.refresh_passes == 1:
        return {}
    owned = Counter({0: 0})
    for part in spec.refresh_plan().parts:
        if spec.refresh == "compressed":
            owned[part.owner] += _compressed(spec, part)
        else:
            owned[part.owner] += entries_of(spec, part)
    return {"sums of gradients": max(owned.values()) * spec.wide}


def _compressed(spec: StepSpec, part: RefreshPart) -> int:
    """Entries of what an owner keeps of a sum of gradients (`ows_ds.optim.compressed`)."""
    matrix, experts = spec.plan.matrices[part.name], 1 if part.experts is None else part.experts[1] - part.experts[0]
    return (matrix.long + matrix.short) * kept_directions(part.shape[-1], matrix.short) * experts


def _backward(spec: StepSpec, block: Block, kind: str, refresh: bool) -> Iterator[tuple[str, int, int]]:
    """Moments of a layer's backward pass: the module that runs; bytes beside what was kept (gradients of activations,
    and what is made of a weight's); bytes of gradients of weights.
    """
    parts = split(block, spec.hidden)
    mlp = parts.widest
    rows = 1 if mlp is None else mlp.rows
    tiled = computed_again(spec, block)
    run = spec.run if tiled else spec.tokens
    inner = run * rows * (parts.heads if mlp is None else mlp.between) * spec.itemsize
    hidden = spec.tokens * spec.hidden * spec.itemsize
    kept = kind in ("full", "adapters") or (kind == "low" and mlp is not None and not keeps_low_rank(mlp.down))
    # gradients of the experts' inputs and outputs have a row for each of them
    wide = 0 if mlp is None or not mlp.down.experts else 3 * rows * hidden
    # of codes a matrix is made when the activation function has had its turn
    # of a run, and gradients of the input by runs
    again = run * sum(one.made for one in tiled) * spec.itemsize + hidden * bool(tiled)
    yield block.name, again + 2 * hidden + max((3 - kept) * inner, (2 - kept) * inner + spec.dense(block), wide), 0
    if spec.method == "dora" and kind == "adapters":  # forward: W + B A for its norm, by way of an identity matrix
        yield block.name, 2 * hidden + max(3 * numel(m) + m.in_features**2 for m in block.matrices) * spec.wide, 0
    made = 0 if tiled else spec.tokens * parts.made * spec.itemsize
    searched = refresh and spec.low_rank
    if kind != "full" or (searched and spec.refresh == "sketch"):
        return
    came = 0  # this rank's parts of the layer's gradients
    widths = 1  # of the MLP, beside what was kept: its activations go one after the other
    searching = 0  # on a GPU, of the matrix before: its gradient, and the search beside the backward pass
    trained = {m.name for m in spec.trained.layers[spec.layers.layers.index(block)].matrices}
    # of an MLP whose tokens come in runs, gradients of all matrices add up until the last one, beside one run's
    waiting = [m for m in reversed(block.matrices) if m.name in trained and any(m in (*t.up, t.down) for t in tiled)]
    for matrix in (m for m in reversed(block.matrices) if m.name in trained):
        flowing = 2 * hidden - made  # the MLP's activations have gone
        if mlp is not None and (matrix is mlp.down or matrix in mlp.up):
            flowing, widths = (2 + bool(tiled)) * hidden + widths * inner, widths - 2
        part = spec.share(numel(matrix)) * spec.itemsize
        whole = came + numel(matrix) * spec.itemsize + (0 if searched or spec.world_size == 1 else part)
        if matrix in waiting:
            whole += sum(map(numel, waiting)) * spec.itemsize
            waiting.remove(matrix)
        # what experts have kept, a row for each, is freed before the gradient of their first stacks is searched
        least = -inner - rows * hidden if matrix.experts else 0
        left = 2 * hidden - made if mlp is not None and matrix.experts and matrix in mlp.up else flowing
        yield matrix.modules[0], max(least, flowing), whole
        if searched and (
            spec.refresh_passes == 1 or spec.refresh == "compressed"
        ):  # when the module's own input has gone
            yield matrix.modules[0], max(least, flowing) + searching, whole
            yield matrix.modules[0], max(min(least, left), left - inner) + _finder(spec, matrix), whole
            searching = (_finder(spec, matrix) + numel(matrix) * spec.itemsize) * spec.on_gpu
        if not searched and spec.accumulation == 1 and not spec.deepspeed_trains:
            came += part


def _finder(spec: StepSpec, matrix: Matrix) -> int:
    """Bytes that the search for a projector needs: the longer product while it is made orthonormal, twice in float64;
    or a product beside blocks of G in float32, where G is not.
    """
    ranked = spec.plan.matrices.get(matrix.name, matrix)
    run = math.ceil(matrix.count / spec.world_size)  # of experts, with one owner
    r = ranked.low_rank(spec.rank)
    compresses = spec.refresh == "compressed" and spec.refresh_passes > 1
    width = 4 * (kept_directions(r, matrix.short) if compresses else min(r + OVERSAMPLING, matrix.short)) * run
    long, short = matrix.long * width, matrix.short * width
    copy = 4 * min(IN_FLOAT32, numel(matrix)) if spec.itemsize != 4 else 0
    return max(6 * long + short, copy + long + 2 * short)


def _forward(spec: StepSpec) -> int:
    """Bytes of a frozen layer's forward pass at its widest."""
    widest = max(
        split(block, spec.hidden).made * (spec.run if computed_again(spec, block) else spec.tokens)
        for block in spec.layers.layers
    )
    return (4 * spec.hidden * spec.tokens + widest) * spec.itemsize


def on_host(spec: StepSpec) -> int:
    """Bytes of layers' inputs in the host's memory, for each GPU: of all that a backward pass reaches but the last."""
    if not (spec.checkpointing and spec.offload):
        return 0
    kinds = [kind for _, kind in spec.walk()]
    return sum(map(bool, kinds[:-1])) * spec.tokens * spec.hidden * spec.itemsize


def _loss(spec: StepSpec, refresh: bool) -> tuple[int, int]:
    """Bytes of a run's logits, their float32 copy and gradient, with the gradients of what the head has seen; and of
    the head's own gradient.
    """
    b, e, vocabulary = spec.itemsize, spec.wide, spec.head.shape[0]
    if spec.whole_logits:
        return (spec.tokens * b + (spec.tokens - spec.rows) * (b + 3 * e)) * vocabulary, 0
    learns = spec.head.name in spec.full_rank or (
        refresh and spec.refresh != "sketch" and spec.head.name in spec.plan.matrices
    )
    backward = learns or any(kind for _, kind in spec.walk())
    run = min(spec.labels, max(1, CHUNK // vocabulary))
    logits = run * vocabulary * (b + e + (b if b < e and backward else 0))
    rows = (2 * spec.labels + run if backward else spec.labels) * spec.hidden * b
    return logits + rows, vocabulary * spec.hidden * (b if run == spec.labels else b + e) if learns else 0


def _update(spec: StepSpec) -> int:
    """Bytes of the roots of the second moments, of all that Adam works on at once or of one tensor after the other; and
    of the float32 gradients of weights that train at full rank.
    """
    found, alike = [0], defaultdict[tuple[str, float], list[int]](list)
    for layout in spec.plan.layouts:
        for one in layout.runs(spec.scale):
            if (rows := layout.local(one.rows, 0)) is not None and (spec.rule == "adamw" or one.kind == "vectors"):
                alike[one.kind, one.scale].append((rows.stop - rows.start) * spec.plan.r)
    for own in alike.values():
        # on a GPU one kernel, which needs none
        found += [] if spec.on_gpu else [_roots(spec, some) for some in group_in_order(own)]
    if spec.rule == "muon":
        found.append(_orthonormal(spec))
    shares = {name: spec.share(size) for name, size in spec.full_rank.items()}
    parts = [*spec.layers.final, *(part for block in spec.layers.layers for part in block.vectors)]
    vectors = {part.name for part in parts if isinstance(part, Vector)}
    limit = sum(shares.values()) if spec.deepspeed_trains else CHUNK
    for run in pack(shares, max(1, limit)):
        sizes = [stop - start for _, start, stop in sorted(run, key=lambda part: part[0] in vectors)]  # Adam's groups
        cast = sum(sizes) * spec.wide if spec.itemsize < spec.wide and not spec.deepspeed_trains else 0
        # what AdamW works on in place of what is kept
        made = (2 * (spec.moments == "int8") + (spec.master == "none")) * sum(sizes) * spec.wide
        found.append(_roots(spec, sizes) + cast + made)
    return max(found)


def _orthonormal(spec: StepSpec) -> int:
    """Bytes of muon's step: of one matrix its rows in float64, or what they come to; U^T U of all, float64, with what
    is made of them."""
    grams = 8 * gram_entries(spec.projected, spec.rank)
    longest = max((m.count * m.long * m.low_rank(spec.rank) for m in spec.projected), default=0)
    rows = min(longest, max((layout.stride * layout.r for layout in spec.plan.layouts), default=0))
    return max(grams + 8 * rows * (spec.itemsize < 8), 7 * grams, 2 * grams + spec.wide * rows)


def _roots(spec: StepSpec, sizes: Sequence[int]) -> int:
    if spec.on_gpu:
        return sum(sizes) * spec.wide
    # one after the other: root and quotient, beside what is left of the tensor before
    return max((before + 2 * size for before, size in zip([0, *sizes], sizes, strict=False)), default=0) * spec.wide
