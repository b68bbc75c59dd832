"""Recipe and ranks -> what a run works on: tokenizer, rows, model; and its held-out loss."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from ows_ds import methods
from ows_ds.checkpoint import Checkpoint
from ows_ds.compat.torch import to_device
from ows_ds.config import Recipe, Source, accumulation, sources
from ows_ds.data import attention, mix, prepare
from ows_ds.data.batches import HOST, MULTIPLE, Batches, Step, Steps, collate, compared, cut, held_out_batches
from ows_ds.data.encoded import IGNORE, Encoded
from ows_ds.data.pack import Sequences, also_in
from ows_ds.data.rows import fetch
from ows_ds.data.stream import Stream
from ows_ds.distributed.communicator import fail_together
from ows_ds.distributed.launch import Runtime
from ows_ds.distributed.weights import Weights
from ows_ds.errors import UserError
from ows_ds.importance.directions import find_directions, needs_directions
from ows_ds.model import generation
from ows_ds.model.blocks import ModelLayers
from ows_ds.model.pretrained import load_model, load_tokenizer
from ows_ds.optim.hooks import hook_frozen
from ows_ds.train import preference
from ows_ds.train.loss import token_losses
from ows_ds.train.memory_check import fit_memory

DIRECTION_ROWS, DIRECTION_LENGTH = 16, 2048  # tokens of a row; frozen matrices take the leading directions from these

logger = logging.getLogger(__name__)


@dataclass
class RunContext:
    """What a run works on."""

    recipe: Recipe
    runtime: Runtime
    weights: Weights
    layers: ModelLayers  # of the model without adapters
    tokenizer: Any
    rows: Sequences  # under data.streaming those of the first block
    held_out: Sequences
    steps: Steps | None = None  # None: nothing is trained
    model: str = ""  # fingerprint of the base model
    started: str = ""  # the day on which the run first began, which templates write as today's date
    digests: dict[str, str] = field(default_factory=dict)  # of the rows, by key
    stops: list[int] = field(default_factory=list)  # special tokens with which what is trained ends

    @functools.cached_property
    def vocabulary(self) -> int:
        """Entries of the model's embedding."""
        module: Any = self.weights.module
        return int(self.weights.shape(module.get_input_embeddings().weight)[0])

    @functools.cached_property
    def pad_id(self) -> int:
        """The token that fills batches up."""
        pad = self.tokenizer.pad_token_id
        pad = int(pad if pad is not None else self.tokenizer.eos_token_id or 0)
        return pad if pad < self.vocabulary else 0  # a token that was added for padding alone; it is masked

    @property
    def multiple(self) -> int:
        """Tokens: sequences of a batch are padded to a multiple of it."""
        return MULTIPLE * self.runtime.sequence.size

    @property
    def steps_per_epoch(self) -> int:
        """0: unknown."""
        return 0 if self.steps is None else self.steps.steps_per_epoch

    def read(self, k: int) -> tuple[Step, list[dict[str, Tensor]]]:
        """Optimizer step ``k`` (from 0), and this rank's micro-batches on the CPU, pinned where there is a GPU."""
        assert self.steps is not None
        step = self.steps.take(k)
        batches = []
        for sequences in step.micro_batches:
            batch = self.collate(sequences, self.rows.packed)
            if self.runtime.device.type == "cuda":  # here, beside the step before
                batch = {name: t if name in HOST else t.pin_memory() for name, t in batch.items()}
            batches.append(batch)
        return step, batches

    def collate(self, sequences: list[list[Encoded]], packed: bool) -> dict[str, Tensor]:
        """What the loss takes, on the CPU: of rows that ranks share, this rank's piece."""
        if rows := self.recipe.loss.rows:
            return compared(sequences, self.pad_id, rows, self.recipe.loss.name == "orpo")
        shared = self.runtime.sequence
        batch = collate(sequences, self.pad_id, packed, self.multiple)
        del batch["attention_mask"]  # the loss does without
        return cut(batch, shared.part, shared.size) if shared.size > 1 else batch

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``batch`` where the model runs, but for `batches.HOST`. Does not wait for the device."""
        return {name: t if name in HOST else to_device(t, self.runtime.device) for name, t in batch.items()}

    def batch(self, sequences: list[list[Encoded]], packed: bool = False) -> dict[str, Tensor]:
        """Right-padded tensors (sequences, tokens) where the model runs, but for `batches.HOST`."""
        return self.to_device(collate(sequences, self.pad_id, packed))


def load(recipe: Recipe, runtime: Runtime, training: bool = True, opened: Checkpoint | None = None) -> RunContext:
    """Data before weights, so that its mistakes show at once. Collective. Raises UserError.

    training: with steps, held-out rows, adapters and the model's fingerprint. opened: what the run resumes from.
    """
    comm, held_out = runtime.comm, Sequences([])
    steps: Steps | None = None
    facts, state = ({}, None) if opened is None else (opened.facts, opened.state.get("data"))
    started = comm.broadcast_object(facts.get("started") or datetime.now().date().isoformat())
    today = datetime.fromisoformat(started)
    with fail_together(comm):
        if comm.rank == 0:  # one rank downloads, the others find the data sets in the cache
            fetch(recipe.data, evaluation=training)
    if training and recipe.data.streaming:  # its blocks are cut into micro-batches as they are read
        recipe = fit_memory(recipe, runtime, recipe.data.max_length)
    with fail_together(comm):
        tokenizer = load_tokenizer(recipe)
        if recipe.data.streaming:
            steps = _stream(recipe, tokenizer, runtime, state, today)
            rows = steps.sequences
        else:
            rows = _encode(recipe, tokenizer, sources(recipe.data, "data.train"), "data.train", runtime, today)
        if training and recipe.data.eval is not None:
            held_out = _encode(recipe, tokenizer, sources(recipe.data, "data.eval"), "data.eval", runtime, today)
    if comm.rank == 0 and not recipe.data.streaming and (twice := also_in(rows, held_out)):
        says = "data.eval: %d of its %d rows are training rows, too, the first is row %d: its loss is no held-out loss"
        logger.warning(says, len(twice), sum(map(len, held_out.parts)), twice[0] + 1)
    digests = {"data.train": rows.digest, "data.eval": held_out.digest}
    for key, digest in digests.items():
        other = [rank for rank, one in enumerate(comm.all_gather_object(digest, "agree")) if one != digest]
        if other:
            right = f"expected the same rows on every rank: rank {comm.rank} and rank {other[0]} read different ones"
            raise UserError(key, str(getattr(recipe.data, key.removeprefix("data."))), right)
        if facts.get("rows", {}).get(key, digest) != digest and comm.rank == 0:
            where = ", in the block that is read again" if recipe.data.streaming and key == "data.train" else ""
            logger.warning("%s: not the rows that the run began with, or not encoded as they were%s", key, where)
    if training:
        if not recipe.data.streaming:
            recipe = fit_memory(recipe, runtime, max(rows.longest, held_out.longest))
        runtime = runtime.sized(recipe.train.micro_batch_size, accumulation(recipe, comm.world_size))
        steps = steps or _batches(recipe, rows, runtime)
        adapt = functools.partial(methods.adapt, recipe)
        if comm.rank == 0:
            logger.info("loading %s", recipe.model.path)
        weights, layers = load_model(recipe, runtime, adapt, methods.deepspeed_trains(recipe))
    else:
        weights, layers = load_model(recipe, runtime)
    hook_frozen(weights)
    context = RunContext(recipe, runtime, weights, layers, tokenizer, rows, held_out, steps, "", started, digests)
    _check_rows(context)
    if needs_directions(weights):
        first = rows
        if recipe.data.streaming and state is not None:  # those that the run began with
            with fail_together(comm), closing(_stream(recipe, tokenizer, runtime, None, today)) as begun:
                first = begun.sequences
        find_directions(weights, _some_rows(replace(context, rows=first), DIRECTION_ROWS, DIRECTION_LENGTH, 1))
    if training:
        context.model = methods.base_model(recipe, weights)
        if recipe.loss.rows:
            preference.disable_dropout(weights.module)
        for some in (rows, held_out):
            some.reference = preference.reference(context, some, context.model)
        module = cast(Any, weights.module)
        ends = {token for part in rows.parts for token in part.last_trained}
        context.stops = sorted(ends & generation.special_tokens(tokenizer).keys())
        if (line := generation.stop_at(module, tokenizer, context.stops)) and comm.rank == 0:
            logger.info(line)
    return context


def _check_rows(context: RunContext) -> None:
    """Refuse (UserError) rows with tokens or positions that the model has no embedding of, now and in later blocks, and
    packed ones where it does not keep them apart. Collective."""
    module = cast(Any, context.weights.module)
    module = module.get_base_model() if hasattr(module, "get_base_model") else module  # of one with adapters
    words = (module.get_input_embeddings(), module.get_output_embeddings())
    tables = [m.shape[0] for m in context.layers.embeddings if module.get_submodule(m.modules[0]) not in words]
    positions = min(*tables, getattr(module.config, "max_position_embeddings", None) or tables[0]) if tables else None
    vocabulary = context.vocabulary

    def refuse(found: Sequences) -> None:
        largest = max((part.largest for part in found.parts), default=0)
        if largest >= vocabulary:
            right = (
                f"expected a model that embeds all tokens of its tokenizer: rows have {largest}, it knows {vocabulary}"
            )
            raise UserError("model.path", context.recipe.model.path, right)
        longest = max((int(part.lengths.max(initial=0)) for part in found.parts), default=0)
        multiple = context.multiple
        if positions is not None and -(-longest // multiple) * multiple > positions:  # others are computed
            right = f"expected at most {positions // multiple * multiple}: the model has learned {positions} positions"
            raise UserError("data.max_length", context.recipe.data.max_length, right)

    refuse(context.rows)
    refuse(context.held_out)
    if isinstance(context.steps, Stream):
        context.steps.check = refuse
    if context.recipe.data.packing and not attention.keeps_apart(context.weights, vocabulary):
        right = "expected false: the attention of this model does not keep the rows of a sequence apart"
        raise UserError("data.packing", True, right)
    shared = context.runtime.sequence
    if shared.size > 1 and (why_not := attention.why_not_shared(context.weights, shared, vocabulary)):
        right = f"expected 1: rows of this model cannot be shared by ranks ({why_not})"
        raise UserError("train.sequence_parallel", shared.size, right)


def _encode(
    recipe: Recipe, tokenizer: Any, given: list[Source], key: str, runtime: Runtime, today: datetime | None = None
) -> Sequences:
    found, counts = prepare.prepare(recipe.data, tokenizer, given, key, today)
    if runtime.comm.rank == 0:
        packed = f"; packed into {len(found):,} sequences" if found.packed else ""
        logger.info("%s: %s%s", key, counts.line(recipe.data.max_length), packed)
    return found


def _split(recipe: Recipe, runtime: Runtime) -> tuple[int, int, int, int, int]:
    """What `Steps` takes."""
    train, shared = recipe.train, runtime.sequence
    return train.global_batch_size, train.micro_batch_size, shared.data_ranks, shared.data_rank, train.seed


def _stream(recipe: Recipe, tokenizer: Any, runtime: Runtime, state: dict[str, Any] | None, today: datetime) -> Stream:
    data, given = recipe.data, sources(recipe.data, "data.train")
    encode = functools.partial(prepare.block, data, tokenizer, given, today=today)
    found = Stream(given, data.buffer_size, encode, *_split(recipe, runtime), state=state)
    if runtime.comm.rank == 0:
        logger.info("data.train: %s; more while training", found.counts.line(data.max_length))
    return found


def _batches(recipe: Recipe, rows: Sequences, runtime: Runtime) -> Batches:
    weights = prepare.weights(sources(recipe.data, "data.train"))
    found = Batches(rows, *_split(recipe, runtime), parts=None if weights is None else (rows.sizes, weights))
    left = len(rows) - found.steps_per_epoch * recipe.train.global_batch_size
    if left and runtime.comm.rank == 0:
        logger.info(
            "data.train: each epoch leaves out %d of %d, which fill no batch, other ones each time", left, len(rows)
        )
    return found


def calibration(context: RunContext) -> Iterator[dict[str, Tensor]]:
    """This rank's batches of the rows that layers are scored on."""
    sampling, comm = context.recipe.sampling, context.runtime.comm
    count, length, size = sampling.calibration_samples, sampling.calibration_length, sampling.calibration_batch_size
    return _some_rows(context, count, length, size, comm.world_size, comm.rank)


def _some_rows(
    context: RunContext, count: int, length: int, size: int, world_size: int = 1, rank: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Batches of the first rows of each source in proportion to its rows: of all of them, or one rank's of some.

    length: of a row, at most, in tokens; no rank shares a row with others here, so it bounds what a pass keeps.
    """
    sizes = [len(part) for part in context.rows.parts]
    shares = mix.shares(min(count, sum(sizes)), sizes)
    rows = [
        row.first(length) for part, share in zip(context.rows.parts, shares, strict=True) for row in islice(part, share)
    ]
    for mine in held_out_batches(len(rows), size, world_size, rank, list(map(len, rows))):
        yield context.batch([[rows[i]] for i in mine])


@torch.no_grad()
def evaluate(context: RunContext) -> dict[str, float]:
    """``eval_loss``: mean cross entropy of the held-out tokens with the low-rank updates attached, or mean of what is
    learned in its place, then with ``eval_reward_accuracy``. Collective."""
    weights, comm, held_out = context.weights, context.runtime.comm, context.held_out
    shared = context.runtime.sequence
    training = weights.module.training
    weights.module.eval()
    size = context.recipe.train.eval_batch_size
    sums = torch.zeros(3, dtype=torch.float64, device=context.runtime.device)
    compares = bool(context.recipe.loss.rows)
    for mine in held_out_batches(len(held_out), size, shared.data_ranks, shared.data_rank, held_out.lengths):
        batch = context.to_device(context.collate([held_out[i] for i in mine], held_out.packed))
        shared.begin(batch)
        right = torch.zeros((), dtype=torch.float64)
        if compares:
            statistics: list[Tensor] = []
            loss = preference.loss(context, batch, len(held_out) / held_out.leading.sum(), statistics=statistics)
            right, count = statistics[0][0], torch.tensor(len(mine))
        else:
            with shared.passes():
                loss, count = token_losses(weights, batch), (batch["labels"][:, 1:] != IGNORE).sum()
        sums += torch.stack([one.double().to(sums.device) for one in (loss, count, right)])
        weights.after_step()
    weights.module.train(training)
    total, counted, rights = comm.all_reduce(sums, "evaluation").tolist()
    found = {"eval_loss": total / counted}
    return found | {"eval_reward_accuracy": rights / counted} if compares else found


def to_measure(
    recipe: Recipe, runtime: Runtime, weights: Weights, layers: ModelLayers, tokenizer: Any, path: str, key: str
) -> RunContext:
    """For `evaluate` of the rows in ``path`` under ``weights``, given as data.eval is. Collective.

    Raises UserError naming ``key`` for rows that cannot be read or encoded.
    """
    data = recipe.data
    source = Source(path=path, subset=data.eval_subset, split=data.eval_split, format=data.format)
    with fail_together(runtime.comm):
        rows = _encode(recipe, tokenizer, [source], key, runtime)
    context = RunContext(recipe, runtime, weights, layers, tokenizer, Sequences([]), rows)
    _check_rows(context)
    return context
