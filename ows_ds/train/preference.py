"""Losses that compare answers, as functions of their tokens' log-probabilities; and those of the model before training.

dpo    -log sigmoid(beta (d_chosen - d_rejected)), d: log-probability of an answer less that of the reference model
       (Rafailov et al. 2023, equation 7)
orpo   mean cross entropy of the chosen row, its prompt too, - beta log sigmoid(log odds of chosen over rejected), odds
       of mean log-probabilities (Hong et al. 2024, equations 6 and 7)
simpo  -log sigmoid(beta (m_chosen - m_rejected) - gamma), m: mean log-probability of a token (Meng et al. 2024,
       equation 6)
reward -log sigmoid(s_chosen - s_rejected), s: what a new head says of the last token
kto    lambda (1 - sigmoid(+- beta (d - z))), z: mean d of other rows' answers, at least 0 (Ethayarajh et al. 2024,
       equation 8)

A loss of a step is a mean over its pairs, or its labelled rows; orpo's cross entropy one over tokens. TRL's losses are
the same (tests/train/test_preference.py).
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ows_ds.compat.torch import to_device
from ows_ds.config import Loss
from ows_ds.config.loss import REFERENCE
from ows_ds.data import cache
from ows_ds.data.batches import collate
from ows_ds.data.encoded import IGNORE
from ows_ds.data.pack import Sequences
from ows_ds.distributed.communicator import Communicator
from ows_ds.train.loss import token_losses

if TYPE_CHECKING:
    from ows_ds.train.context import RunContext

logger = logging.getLogger(__name__)

Compare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def loss(
    context: RunContext,
    batch: dict[str, Tensor],
    share: float,
    balance: list[Tensor] | None = None,
    statistics: list[Tensor] | None = None,
) -> Tensor:
    """The sum over a micro-batch's pairs, or labelled rows: a float32 scalar. Under kto collective.

    batch: as `batches.compared` makes it. share: pairs of the step for each token of its chosen rows, which orpo's
    cross entropy is a mean over. statistics: gets for how many pairs, or rows, the reward has the right order, or sign,
    and the sum of the margins: (2), detached.
    """
    settings, weights, comm = context.recipe.loss, context.weights, context.runtime.comm
    device, pairs = batch["input_ids"].device, len(batch["reference"])
    pairs //= 1 if settings.rows == "labelled" else 2
    if settings.name == "reward":
        weights.module.config.pad_token_id = context.pad_id  # type: ignore[union-attr]
        given = weights(input_ids=batch["input_ids"]).logits.squeeze(-1)[: 2 * pairs]
        given = given.to(torch.promote_types(given.dtype, torch.float32))
        margin = given[:pairs] - given[pairs:]
        if statistics is not None:
            statistics.append(torch.stack([(margin > 0).sum().to(margin), margin.sum()]).detach())
        return -logsigmoid(margin).sum()
    labelled = batch["labels"][:, 1:] != IGNORE
    counts = to_device(labelled.sum(1), device)
    moved = to_device(batch["reference"], device)
    if settings.name == "kto":
        kl = _divergence(context, batch, comm)
        compare: Compare = functools.partial(_kto, settings, moved, to_device(batch["right"], device), kl)
    elif settings.name == "dpo":
        compare = functools.partial(_dpo, settings, moved, pairs)
    elif settings.name == "simpo":
        compare = functools.partial(_simpo, settings, counts, pairs)
    else:
        answered = batch["answers"][:, 1:]
        inside = to_device(answered[labelled], device)
        compare = functools.partial(_orpo, settings, inside, to_device(answered.sum(1), device), pairs, share)
    kept: list[Tensor] = []

    def objective(scores: Tensor, rows: Tensor) -> Tensor:
        sums = scores.new_zeros(len(batch["labels"])).index_add(0, rows, scores)
        per_pair, margins = compare(scores, rows) if settings.name == "orpo" else compare(sums, rows)
        kept.append(torch.stack([(margins > 0).sum().to(margins), margins.sum()]).detach())
        return per_pair.sum()

    total = token_losses(weights, batch, balance, objective, pairs)
    if statistics is not None:
        statistics += kept[-1:]
    return total


def _dpo(settings: Loss, reference: Tensor, pairs: int, sums: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    moved = sums[: 2 * pairs] - reference.to(sums)
    margin = settings.strength * (moved[:pairs] - moved[pairs:])
    return -logsigmoid(margin), margin


def _simpo(settings: Loss, counts: Tensor, pairs: int, sums: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    means = (sums / counts.clamp(min=1))[: 2 * pairs]
    margin = settings.strength * (means[:pairs] - means[pairs:])
    return -logsigmoid(margin - settings.simpo_gamma), margin


def _orpo(
    settings: Loss, inside: Tensor, counts: Tensor, pairs: int, share: float, scores: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """inside: which tokens are an answer's. counts: such tokens of each row."""
    sums = scores.new_zeros(len(counts)).index_add(0, rows, scores * inside)
    means = (sums / counts.clamp(min=1))[: 2 * pairs]
    odds = means - _log1mexp(means)
    margin = odds[:pairs] - odds[pairs:]
    nothing = scores.new_zeros(pairs)
    cross = nothing.index_add(0, rows[rows < pairs], -scores[rows < pairs]) * share
    return cross - settings.strength * logsigmoid(margin), settings.strength * (means[:pairs] - means[pairs:])


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)), x < 0, exact near 0 and far from it."""
    near = x > -0.693
    return torch.where(near, (-torch.expm1(torch.where(near, x, -1.0))).log(), torch.log1p(-x.exp()))


def _kto(
    settings: Loss, reference: Tensor, right: Tensor, kl: Tensor, sums: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    moved = sums[: len(right)] - reference.to(sums)
    sign = right.to(sums) * 2 - 1
    weights = torch.where(right, settings.desirable_weight, settings.undesirable_weight).to(sums)
    return weights * (1 - torch.sigmoid(settings.strength * sign * (moved - kl))), settings.strength * sign * moved


@torch.no_grad()
def _divergence(context: RunContext, batch: dict[str, Tensor], comm: Communicator) -> Tensor:
    """kto's z of a micro-batch of all ranks: a scalar. Collective."""
    other = {"input_ids": batch["kl_input_ids"], "labels": batch["kl_labels"]}
    reference = to_device(batch["kl_reference"], batch["input_ids"].device)
    sums = row_scores(context, other, len(reference)) - reference.to(torch.float64)
    both = torch.stack([sums.sum(), sums.new_tensor(float(len(sums)))])
    total, count = comm.all_gather(both[None], "kto").sum(0)
    context.weights.after_step()
    return (total / count.clamp(min=1)).clamp(min=0).float()


@torch.no_grad()
def row_scores(context: RunContext, batch: dict[str, Tensor], rows: int) -> Tensor:
    """Log-probability of the labelled tokens of the first ``rows`` rows: float64, (rows)."""
    kept: list[Tensor] = []

    def objective(scores: Tensor, numbers: Tensor) -> Tensor:
        sums = torch.zeros(len(batch["labels"]), dtype=torch.float64, device=scores.device)
        kept.append(sums.index_add(0, numbers, scores.double())[:rows])
        return scores.sum()

    training = context.weights.module.training
    context.weights.module.eval()
    token_losses(context.weights, batch, objective=objective)
    context.weights.module.train(training)
    return kept[-1]


def disable_dropout(module: nn.Module) -> None:
    """Without it: a model with dropout is not the model that it is compared with. Changes ``module``."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "hidden_dropout", "activation_dropout", "dropout"):
            if isinstance(getattr(part, name, None), float):  # what a layer's code hands to a function
                setattr(part, name, 0.0)


def reference(context: RunContext, sequences: Sequences, model: str) -> numpy.ndarray | None:
    """Log-probabilities of all rows under the model as it is now: float64, (sequences, 2). From the cache where they
    are in it. None where the loss does not ask for them. Collective.

    model: its fingerprint. Batches do not depend on the number of ranks, and so neither does a result.
    """
    recipe, comm = context.recipe, context.runtime.comm
    if recipe.loss.name not in REFERENCE or not len(sequences):
        return None
    facts: tuple[Any, ...] = (
        sequences.digest,
        model,
        recipe.model.dtype,
        recipe.model.frozen,
        recipe.train.eval_batch_size,
    )
    if recipe.model.frozen == "nf4":  # whose codes depend on them
        facts += (context.digests["data.train"],)
    name = hashlib.blake2b(repr(facts).encode(), digest_size=20).hexdigest()
    path = cache.place(recipe.data) / f"{name}.reference.safetensors"
    found = _read(path, len(sequences)) if comm.rank == 0 else None
    kept = comm.broadcast_object(None if found is None else found.tolist())
    if kept is not None:
        return numpy.array(kept)
    if comm.rank == 0:
        logger.info("%s: asking the model about %s rows before training", recipe.loss.name, f"{2 * len(sequences):,}")
    found = _reference(context, sequences)
    if comm.rank == 0:
        cache.keep(path, lambda to: save_file({"reference": torch.from_numpy(found)}, to))
    return found


@torch.no_grad()
def _reference(context: RunContext, sequences: Sequences) -> numpy.ndarray:
    comm, size = context.runtime.comm, context.recipe.train.eval_batch_size
    rows = [(at, which) for at in range(len(sequences)) for which in (0, 1)]
    lengths = numpy.concatenate([part.lengths for part in sequences.parts])
    order = numpy.argsort(-lengths, kind="stable")
    groups = [order[i : i + size].tolist() for i in range(0, len(order), size)]
    found: dict[int, float] = {}
    for turn in range(0, len(groups), comm.world_size):
        mine = groups[turn + comm.rank] if turn + comm.rank < len(groups) else []
        some = [[sequences[rows[i][0]][rows[i][1]]] for i in mine]
        batch = collate(some, context.pad_id)
        del batch["attention_mask"]
        found.update(zip(mine, row_scores(context, context.to_device(batch), len(mine)).tolist(), strict=True))
        context.weights.after_step()
    pairs = [pair for part in comm.all_gather_object(list(found.items()), "reference") for pair in part]
    return numpy.array([score for _, score in sorted(pairs)]).reshape(-1, 2)


def _read(path: Path, count: int) -> numpy.ndarray | None:
    try:
        found: Any = load_file(path)["reference"].numpy()
    except Exception:  # of a file that is not there, or not whole: it is made again
        return None
    return found if found.shape == (count, 2) else None
