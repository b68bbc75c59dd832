"""Recipe and processes -> what a run works on: tokenizer, rows, model; and the held-out loss of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ows_ds import methods
from ows_ds.config import Recipe, Source, sources
from ows_ds.data import attention, mix, prepare
from ows_ds.data.batches import HOST, MULTIPLE, Batches, collate, held_out_batches
from ows_ds.data.encoded import IGNORE, Encoded
from ows_ds.data.pack import Sequences
from ows_ds.data.rows import fetch
from ows_ds.data.stream import Stream
from ows_ds.distributed.communicator import fail_together
from ows_ds.distributed.launch import Runtime
from ows_ds.distributed.weights import Weights
from ows_ds.errors import UserError
from ows_ds.model.layers import ModelLayers
from ows_ds.model.pretrained import load_model, load_tokenizer
from ows_ds.train.loss import token_losses
from ows_ds.train.memory_check import check_memory


@dataclass
class Job:
    """What a run works on."""

    recipe: Recipe
    runtime: Runtime
    weights: Weights
    layers: ModelLayers  # of the model without adapters
    tokenizer: Any
    rows: Sequences  # under data.streaming those of the first block
    held_out: Sequences
    steps: Batches | Stream | None = None  # None: nothing is trained
    model: str = ""  # fingerprint of the base model

    @property
    def vocabulary(self) -> int:
        """Entries of the model's embedding."""
        module: Any = self.weights.module
        return int(self.weights.shape(module.get_input_embeddings().weight)[0])

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        pad = int(pad if pad is not None else self.tokenizer.eos_token_id or 0)
        return pad if pad < self.vocabulary else 0  # a token that was added for padding alone; it is masked

    def batch(self, sequences: list[list[Encoded]], packed: bool = False) -> dict[str, Tensor]:
        """Right-padded tensors (sequences, tokens): `batches.HOST` on the CPU, the others on the device."""
        batch = collate(sequences, self.pad_id, packed)
        return {name: t if name in HOST else t.to(self.runtime.device) for name, t in batch.items()}


def load(recipe: Recipe, runtime: Runtime, training: bool = True, state: dict[str, Any] | None = None) -> Job:
    """Data before weights: what is wrong with it shows at once. Collective. Raises UserError.

    training: with steps, held-out rows, adapters and the model's fingerprint. state: of the steps of a run that is gone
    on with.
    """
    held_out = Sequences([])
    steps: Batches | Stream | None = None
    with fail_together(runtime.comm):
        if runtime.comm.rank == 0:  # one process downloads, the others find the data sets in the cache
            fetch(recipe.data, evaluation=training)
    with fail_together(runtime.comm):
        tokenizer = load_tokenizer(recipe)
        if recipe.data.streaming:
            steps = stream = _stream(recipe, tokenizer, runtime, state)
            rows = stream.sequences
            if not training:
                stream.close()
        else:
            rows = _encode(recipe, tokenizer, sources(recipe.data, "data.train"), "data.train", runtime)
        if training and recipe.data.eval is not None:
            held_out = _encode(recipe, tokenizer, sources(recipe.data, "data.eval"), "data.eval", runtime)
    if training:
        check_memory(recipe, runtime, max([*rows.lengths, *held_out.lengths]))
        steps = steps or _batches(recipe, rows, runtime)
        adapt = functools.partial(methods.adapt, recipe)
        weights, layers = load_model(recipe, runtime, adapt, methods.deepspeed_trains(recipe))
    else:
        weights, layers = load_model(recipe, runtime)
    job = Job(recipe, runtime, weights, layers, tokenizer, rows, held_out, steps)
    _check_rows(job)
    if training:
        job.model = methods.base_model(recipe, weights)
    return job


def _check_rows(job: Job) -> None:
    """Refuse (UserError) rows with tokens or positions that the model has no embedding of, now and in later blocks, and
    packed ones where it does not keep them apart. Collective."""
    module = cast(Any, job.weights.module)
    module = module.get_base_model() if hasattr(module, "get_base_model") else module  # of one with adapters
    words = (module.get_input_embeddings(), module.get_output_embeddings())
    tables = [m.shape[0] for m in job.layers.embeddings if module.get_submodule(m.modules[0]) not in words]
    positions = min(*tables, getattr(module.config, "max_position_embeddings", None) or tables[0]) if tables else None
    vocabulary = job.vocabulary

    def refuse(found: Sequences) -> None:
        largest = max((part.largest for part in found.parts), default=0)
        if largest >= vocabulary:
            right = (
                f"expected a model that embeds all tokens of its tokenizer: rows have {largest}, it knows {vocabulary}"
            )
            raise UserError("model.path", job.recipe.model.path, right)
        longest = max((length for part in found.parts for length in part.lengths), default=0)
        if positions is not None and -(-longest // MULTIPLE) * MULTIPLE > positions:  # others are computed
            right = f"expected at most {positions // MULTIPLE * MULTIPLE}: the model has learned {positions} positions"
            raise UserError("data.max_length", job.recipe.data.max_length, right)

    refuse(job.rows)
    refuse(job.held_out)
    if isinstance(job.steps, Stream):
        job.steps.check = refuse
    if job.recipe.data.packing and not attention.keeps_apart(job.weights, vocabulary):
        right = "expected false: the attention of this model does not keep the rows of a sequence apart"
        raise UserError("data.packing", True, right)


def _encode(recipe: Recipe, tokenizer: Any, given: list[Source], key: str, runtime: Runtime) -> Sequences:
    found, counts = prepare.prepare(recipe.data, tokenizer, given, key)
    if runtime.comm.rank == 0:
        packed = f"; packed into {len(found):,} sequences" if found.packed else ""
        print(f"{key}: {counts.line(recipe.data.max_length)}{packed}")
    return found


def _stream(recipe: Recipe, tokenizer: Any, runtime: Runtime, state: dict[str, Any] | None) -> Stream:
    data, train, given = recipe.data, recipe.train, sources(recipe.data, "data.train")
    encode = functools.partial(prepare.block, data, tokenizer, given)
    place = (train.global_batch_size, train.micro_batch_size, runtime.comm.world_size, runtime.comm.rank, train.seed)
    found = Stream(given, data.buffer_size, encode, *place, state)
    if runtime.comm.rank == 0:
        print(f"data.train: {found.counts.line(data.max_length)}; more while training")
    return found


def _batches(recipe: Recipe, rows: Sequences, runtime: Runtime) -> Batches:
    train, weights = recipe.train, prepare.weights(sources(recipe.data, "data.train"))
    parts = None if weights is None else (rows.sizes, weights)
    place = (train.global_batch_size, train.micro_batch_size, runtime.comm.world_size, runtime.comm.rank, train.seed)
    return Batches(rows, *place, parts)


def calibration(job: Job) -> Iterator[dict[str, Tensor]]:
    """This process's batches of the rows that layers are scored on: of each source as many as it has of all."""
    sampling, comm = job.recipe.sampling, job.runtime.comm
    sizes = [len(part) for part in job.rows.parts]
    shares = mix.shares(min(sampling.calibration_samples, sum(sizes)), sizes)
    rows = [row for part, share in zip(job.rows.parts, shares, strict=True) for row in part[:share]]
    lengths = [len(row["input_ids"]) for row in rows]
    for share in held_out_batches(len(rows), sampling.calibration_batch_size, comm.world_size, comm.rank, lengths):
        yield job.batch([[rows[i]] for i in share])


@torch.no_grad()
def evaluate(job: Job) -> float:
    """Mean cross entropy of the held-out tokens with the coordinates attached. Collective."""
    weights, comm = job.weights, job.runtime.comm
    training = weights.module.training
    weights.module.eval()
    shares = held_out_batches(
        len(job.held_out),
        job.recipe.train.eval_batch_size,
        comm.world_size,
        comm.rank,
        job.held_out.lengths,
    )
    sums = torch.zeros(2, dtype=torch.float64, device=job.runtime.device)
    for share in shares:
        batch = job.batch([job.held_out[i] for i in share], job.held_out.packed)
        targets = (batch["labels"][:, 1:] != IGNORE).sum().double().to(sums.device)
        sums += torch.stack([token_losses(weights, batch).double(), targets])
        weights.after_step()
    weights.module.train(training)
    loss, targets = comm.all_reduce(sums, "evaluation").tolist()
    return float(loss / targets)


def mean_loss(
    recipe: Recipe, runtime: Runtime, weights: Weights, layers: ModelLayers, tokenizer: Any, path: str, key: str
) -> float:
    """Mean cross entropy of the trained tokens of the rows in ``path`` under ``weights``. Collective.

    Raises UserError naming ``key`` for rows that cannot be read or encoded.
    """
    data = recipe.data
    with fail_together(runtime.comm):
        rows = _encode(
            recipe,
            tokenizer,
            [Source(path=path, subset=data.eval_subset, split=data.eval_split, format=data.format)],
            key,
            runtime,
        )
    job = Job(recipe, runtime, weights, layers, tokenizer, Sequences([]), rows)
    _check_rows(job)
    return evaluate(job)
