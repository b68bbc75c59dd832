"""The cross entropy of a batch, without the logits of all its tokens at once.

    hidden states --labelled rows--> (N, C) --a run of rows at a time--> logits --> loss, and its gradients, at once

The head's forward pass is replaced while the model's runs: there its weight is present (ZeRO-3 has gathered it), with
a low-rank update or without. Each run's logits are turned into the gradients of hidden states and of what trains in the
head, and freed, as Liger's fused linear cross entropy does (Hsu et al. 2024); the backward pass only multiplies them.
So a weight is used once, and its hooks see its full gradient once, as usual.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, pad

from ows_ds.compat.torch import times_written, to_device
from ows_ds.compat.transformers import known_rows
from ows_ds.data.attention import balance_coefficient, inputs
from ows_ds.data.encoded import IGNORE
from ows_ds.distributed.weights import Weights
from ows_ds.optim.hooks import trained
from ows_ds.optim.layout import CHUNK

_fits: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # head -> its output is what the model gives


Objective = Callable[[Tensor, Tensor], Tensor]
"""Log-probabilities of labelled tokens, float32, and the row of each, int64, both (N) -> a scalar, differentiable."""


def token_losses(
    weights: Weights,
    batch: dict[str, Tensor],
    balance: list[Tensor] | None = None,
    objective: Objective | None = None,
    count: int | None = None,
) -> Tensor:
    """Sum of the cross entropies of all labelled tokens of a batch (rows, tokens): a float32 scalar.

    objective: in their place another function of the log-probabilities. It is called once, with what is known of all
    tokens; so logits are made twice where they do not all fit at once. count: what the sum counts, in place of tokens.

    balance: in training, a list: a model of experts whose configuration asks for it (``output_router_logits``) has its
    own loss for their balance, times its coefficient and the number of labelled tokens, added to the sum, and to the
    list, detached. So the loss of a step has the mean of it over tokens, as of the cross entropies.

    Float64 under float64 weights. batch: as `batches.collate` or `batches.cut` makes it, where the model runs; labels,
    if possible, on the CPU: counting them then needs no wait for a GPU.

    A model that changes its head's output (soft-capping, scaling) is detected in its first pass; from then on all its
    logits are computed at once.
    """
    seen: list[Any] = []  # what the model gave
    with known_rows(batch.get("row_ids")):
        loss = _token_losses(weights, batch, inputs(weights, batch), seen, objective)
    coefficient = balance_coefficient(weights.module)
    if balance is not None and coefficient is not None and getattr(seen[-1], "aux_loss", None) is not None:
        many = (batch["labels"][:, 1:] != IGNORE).sum() if count is None else torch.tensor(count)
        term = seen[-1].aux_loss * (coefficient * to_device(many, loss.device))
        balance.append(term.detach())
        loss = loss + term.to(loss.dtype)
    return loss


def _token_losses(
    weights: Weights,
    batch: dict[str, Tensor],
    inputs: dict[str, Any],
    seen: list[Any],
    objective: Objective | None = None,
) -> Tensor:
    head: Any = getattr(weights.module, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Linear) and _fits.get(head, True):
        device = batch["input_ids"].device
        random = None if head in _fits else _random(device)
        labels = batch["labels"][:, 1:]  # as many as tokens where these are a piece of their rows
        labels = pad(labels, (0, batch["input_ids"].shape[1] - labels.shape[1]), value=IGNORE).flatten()
        loss = _in_chunks(weights, head, inputs, labels, seen, objective)
        _fits[head] = loss is not None
        if loss is not None:
            return loss
        weights.after_step()
        _random(device, random)  # the same dropout as if nothing had been tried
    labels = batch["labels"][:, 1:].reshape(-1)
    seen.append(weights(**inputs))
    logits = seen[-1].logits[:, : batch["labels"].shape[1] - 1].reshape(labels.numel(), -1)
    labels = labels.to(logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if objective is not None:
        wanted = (labels != IGNORE).nonzero().squeeze(1)
        scores = log_softmax(logits[wanted], -1, dtype=dtype).gather(1, labels[wanted, None]).squeeze(1)
        return objective(scores, wanted // (batch["labels"].shape[1] - 1))
    return cross_entropy(logits.to(dtype), labels, ignore_index=IGNORE, reduction="sum")


def _in_chunks(
    weights: Weights,
    head: nn.Linear,
    inputs: dict[str, Any],
    labels: Tensor,
    seen: list[Any],
    objective: Objective | None = None,
) -> Tensor | None:
    """The loss, computed where the model asks for logits; None where it does not give them as the head made them.

    labels: (rows * tokens), of the token that follows each.
    """
    wanted = (labels != IGNORE).nonzero().squeeze(1)
    device = inputs["input_ids"].device
    targets, wanted = to_device(labels[wanted], device), to_device(wanted, device)
    of_tokens = None
    if objective is not None:
        numbers = wanted // inputs["input_ids"].shape[1]
        of_tokens = functools.partial(_weigh, objective, numbers)
    own, leaves = head.forward, trained(head)
    made: list[tuple[Tensor, int]] = []  # the loss, and how often it was written to

    def forward(hidden: Tensor) -> Tensor:
        if hidden.shape[:-1] != inputs["input_ids"].shape:
            return own(hidden)
        rows = hidden.flatten(0, -2).index_select(0, wanted)
        at_once = max(1, CHUNK // head.out_features)
        loss: Tensor = _CrossEntropy.apply(own, targets, at_once, torch.is_grad_enabled(), of_tokens, rows, *leaves)
        made.append((loss, times_written(loss)))
        return loss.view(1, 1, 1)

    with _replaced(head, forward):
        seen.append(weights(**inputs))
        logits: Tensor = seen[-1].logits
    if len(made) == 1 and (logits.data_ptr(), times_written(logits)) == (made[0][0].data_ptr(), made[0][1]):
        return logits.view(())
    return None


@contextmanager
def _replaced(module: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it ``module`` calls ``forward``, inside its hooks."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _random(device: torch.device, state: tuple[Tensor, Tensor | None] | None = None) -> tuple[Tensor, Tensor | None]:
    """The state of torch's generators for the CPU and ``device``, set to ``state`` where it is given."""
    cuda = device.type == "cuda"
    if state is not None:
        torch.set_rng_state(state[0])
        if cuda and state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None


Weigh = Callable[[Tensor, bool], tuple[Tensor, Tensor]]
"""Log-probabilities (n), and whether to differentiate -> a loss, and its derivatives by them (n), negated."""


def _weigh(objective: Objective, numbers: Tensor, scores: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
    """`Weigh` of an objective. numbers: the row of each token."""
    leaf = scores.detach().requires_grad_(differentiate)
    with torch.set_grad_enabled(differentiate):
        loss = objective(leaf, numbers)
    by_scores = torch.autograd.grad(loss, leaf)[0] if differentiate else scores
    return loss.detach(), -by_scores


class _CrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of rows x (N, C) with targets (N), or another function of them; differentiated once, in
    its forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        targets: Tensor,
        at_once: int,
        differentiate: bool,
        weigh: Weigh | None,
        rows: Tensor,
        *leaves: Tensor,
    ) -> Tensor:
        """head: (n, C) -> (n, vocabulary), differentiable in its argument and in ``leaves``. at_once: largest n.

        weigh: of all N log-probabilities; None: their negated sum.
        """
        needed = differentiate and any(ctx.needs_input_grad)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=rows.device)
        grad_rows, grads = torch.empty_like(rows) if needed else None, [torch.empty(0)] * len(leaves)
        runs = [slice(start, start + at_once) for start in range(0, max(1, len(rows)), at_once)]  # hooks expect zeros
        each: list[Weigh | None] = [weigh] * len(runs)
        if weigh is not None and len(runs) > 1:  # what all of them are, before any is differentiated
            seen: list[Tensor] = []
            for some in runs:
                _one_run(head, rows[some], targets[some], leaves, False, functools.partial(_keep, seen))
            total, weights = weigh(torch.cat(seen), needed)
            runs = runs if needed else []
            each = [functools.partial(_known, weights[some]) for some in runs]
        for some, own in zip(runs, each, strict=True):
            loss, more = _one_run(head, rows[some], targets[some], leaves, needed, own)
            total = total + loss
            if grad_rows is None:
                continue
            grad_rows[some] = more.pop(0)
            if some.start:
                grads = [one.add_(other) for one, other in zip(grads, more, strict=True)]
            else:  # sums over many runs are taken in float32
                grads = [g.to(dtype) if len(rows) > at_once else g for g in more]
        ctx.grads = [grad_rows, *(g.to(leaf.dtype) for g, leaf in zip(grads, leaves, strict=True))] if needed else []
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad: a scalar."""
        grads, ctx.grads = ctx.grads, None  # scaled in place: a second pass fails
        return None, None, None, None, None, *(g.mul_(grad) for g in grads)


def _keep(seen: list[Tensor], scores: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
    seen.append(scores)
    return scores.new_zeros(()), scores


def _known(weights: Tensor, scores: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
    return scores.new_zeros(()), weights


def _one_run(
    head: Callable[[Tensor], Tensor],
    rows: Tensor,
    targets: Tensor,
    leaves: tuple[Tensor, ...],
    differentiate: bool,
    weigh: Weigh | None,
) -> tuple[Tensor, list[Tensor]]:
    """The summed cross entropy of rows (n, C), or what ``weigh`` makes of it, and, if asked for, its gradients with
    respect to them and ``leaves``."""
    x, target = rows.detach().requires_grad_(differentiate), targets[:, None]
    with torch.set_grad_enabled(differentiate):
        logits = head(x)
    scores = log_softmax(logits.detach(), -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    of_targets, factors = scores.gather(1, target), None
    if weigh is None:
        loss = -of_targets.sum()
    else:
        loss, factors = weigh(of_targets.squeeze(1), differentiate)
    if not differentiate:
        return loss, []
    scores.exp_().scatter_add_(1, target, scores.new_full(target.shape, -1))
    if factors is not None:
        scores.mul_(factors[:, None])
    return loss, list(torch.autograd.grad(logits, (x, *leaves), scores.to(logits.dtype)))
