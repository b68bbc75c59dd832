"""Recipe and processes -> what a run works on: tokenizer, rows, model; and the held-out loss of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ows_ds import methods
from ows_ds.communicate import together
from ows_ds.config import Recipe
from ows_ds.data import IGNORE, MULTIPLE, Encoded, collate, encode_rows, held_out_batches
from ows_ds.errors import UserError
from ows_ds.layers import ModelLayers
from ows_ds.loss import token_losses
from ows_ds.rows import fetch, load_rows
from ows_ds.runtime import Runtime, check_memory, load_model, load_tokenizer
from ows_ds.weights import Weights


@dataclass
class Job:
    """What a run works on."""

    recipe: Recipe
    runtime: Runtime
    weights: Weights
    layers: ModelLayers  # of the model without adapters
    tokenizer: Any
    rows: list[Encoded]
    held_out: list[Encoded]
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

    def batch(self, rows: list[Encoded]) -> dict[str, Tensor]:
        """Right-padded tensors (rows, tokens): labels on the CPU, the others on the device."""
        batch = collate(rows, self.pad_id)
        return {name: t if name == "labels" else t.to(self.runtime.device) for name, t in batch.items()}


def load(recipe: Recipe, runtime: Runtime, training: bool = True) -> Job:
    """Data before weights: what is wrong with it shows at once. Collective. Raises UserError.

    training: with held-out rows, adapters and the model's fingerprint.
    """
    assert recipe.data.train is not None  # config.check
    held_out: list[Encoded] = []
    with together(runtime.comm):
        if runtime.comm.index == 0:  # one process downloads, the others find the data sets in the cache
            fetch(recipe.data, evaluation=training)
    with together(runtime.comm):
        tokenizer = load_tokenizer(recipe)
        rows = _encode(recipe, tokenizer, recipe.data.train, "data.train", runtime)
        if training and recipe.data.eval is not None:
            held_out = _encode(recipe, tokenizer, recipe.data.eval, "data.eval", runtime)
    if training:
        check_memory(recipe, runtime, max((len(row["input_ids"]) for row in [*rows, *held_out]), default=1))
        adapt = functools.partial(methods.adapt, recipe)
        weights, layers = load_model(recipe, runtime, adapt, methods.deepspeed_trains(recipe))
    else:
        weights, layers = load_model(recipe, runtime)
    job = Job(recipe, runtime, weights, layers, tokenizer, rows, held_out)
    _check_rows(job)
    if training:
        job.model = methods.base_model(recipe, weights)
    return job


def _check_rows(job: Job) -> None:
    """Refuse (UserError) rows with tokens or positions that the model has no embedding of."""
    rows, module = [*job.rows, *job.held_out], cast(Any, job.weights.module)
    module = module.get_base_model() if hasattr(module, "get_base_model") else module  # of one with adapters
    largest = max(max(row["input_ids"]) for row in rows)
    if largest >= job.vocabulary:
        right = f"give a model that embeds all tokens of its tokenizer: rows have {largest}, it knows {job.vocabulary}"
        raise UserError("model.path", job.recipe.model.path, right)
    words = (module.get_input_embeddings(), module.get_output_embeddings())
    tables = [m.shape[0] for m in job.layers.embeddings if module.get_submodule(m.modules[0]) not in words]
    if not tables:
        return  # positions are computed
    positions = min(*tables, getattr(module.config, "max_position_embeddings", None) or tables[0])
    longest = max(len(row["input_ids"]) for row in rows)
    if -(-longest // MULTIPLE) * MULTIPLE > positions:
        right = f"give at most {positions // MULTIPLE * MULTIPLE}: the model has learned {positions} positions"
        raise UserError("data.max_length", job.recipe.data.max_length, right)


def _encode(recipe: Recipe, tokenizer: Any, path: str, key: str, runtime: Runtime) -> list[Encoded]:
    data = recipe.data
    train = key == "data.train"
    subset, split = (data.train_subset, data.train_split) if train else (data.eval_subset, data.eval_split)
    rows = load_rows(path, data.format, key, subset, split)
    encoded, counts = encode_rows(rows, tokenizer, data.max_length, data.loss_on, data.format, key, data.template)
    if runtime.comm.index == 0:
        notes = [f"{counts.dropped} without a trained token dropped"] if counts.dropped else []
        notes += [f"{counts.truncated} cut to {data.max_length} tokens"] if counts.truncated else []
        print(f"{key}: {counts.kept} rows, {counts.trained_tokens:,} trained tokens" + "".join(f"; {n}" for n in notes))
    return encoded


def calibration(job: Job) -> Iterator[dict[str, Tensor]]:
    """This process's batches of the rows that layers are scored on."""
    sampling, comm = job.recipe.sampling, job.runtime.comm
    rows = job.rows[: sampling.calibration_samples]
    lengths = [len(row["input_ids"]) for row in rows]
    for share in held_out_batches(len(rows), sampling.calibration_batch_size, comm.world, comm.index, lengths):
        yield job.batch([rows[i] for i in share])


@torch.no_grad()
def evaluate(job: Job) -> float:
    """Mean cross entropy of the held-out tokens with the coordinates attached. Collective."""
    weights, comm = job.weights, job.runtime.comm
    training = weights.module.training
    weights.module.eval()
    shares = held_out_batches(
        len(job.held_out),
        job.recipe.train.eval_batch_size,
        comm.world,
        comm.index,
        [len(row["input_ids"]) for row in job.held_out],
    )
    sums = torch.zeros(2, dtype=torch.float64, device=job.runtime.device)
    for share in shares:
        batch = job.batch([job.held_out[i] for i in share])
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
    with together(runtime.comm):
        rows = _encode(recipe, tokenizer, path, key, runtime)
    job = Job(recipe, runtime, weights, layers, tokenizer, [], rows)
    _check_rows(job)
    return evaluate(job)
