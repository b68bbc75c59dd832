"""The cross entropy of a batch, without the logits of all its tokens at once.

    hidden states --labelled rows--> (N, C) --a run of rows at a time--> logits --> loss, and its gradients, at once

The head's forward pass is replaced while the model's runs: there its weight is present (ZeRO-3 has gathered it), with
a low-rank update or without. Each run's logits are turned into the gradients of hidden states and of what trains in the
head, and freed, as Liger's fused linear cross entropy does (Hsu et al. 2024); the backward pass only multiplies them.
So a weight is used once, and its hooks see its full gradient once, as usual.
"""

from __future__ import annotations

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


def token_losses(weights: Weights, batch: dict[str, Tensor], balance: list[Tensor] | None = None) -> Tensor:
    """Sum of the cross entropies of all labelled tokens of a batch (rows, tokens): a float32 scalar.

    balance: in training, a list: a model of experts whose configuration asks for it (``output_router_logits``) has its
    own loss for their balance, times its coefficient and the number of labelled tokens, added to the sum, and to the
    list, detached. So the loss of a step has the mean of it over tokens, as of the cross entropies.

    Float64 under float64 weights. batch: as `batches.collate` makes it, where the model runs; labels, if possible, on
    the CPU: counting them then needs no wait for a GPU.

    A model that changes its head's output (soft-capping, scaling) is detected in its first pass; from then on all its
    logits are computed at once.
    """
    seen: list[Any] = []  # what the model gave
    with known_rows(batch.get("row_ids")):
        loss = _token_losses(weights, batch, inputs(weights, batch), seen)
    coefficient = balance_coefficient(weights.module)
    if balance is not None and coefficient is not None and getattr(seen[-1], "aux_loss", None) is not None:
        count = (batch["labels"][:, 1:] != IGNORE).sum()
        term = seen[-1].aux_loss * (coefficient * to_device(count, loss.device))
        balance.append(term.detach())
        loss = loss + term.to(loss.dtype)
    return loss


def _token_losses(weights: Weights, batch: dict[str, Tensor], inputs: dict[str, Any], seen: list[Any]) -> Tensor:
    head: Any = getattr(weights.module, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Linear) and _fits.get(head, True):
        device = batch["input_ids"].device
        random = None if head in _fits else _random(device)
        loss = _in_chunks(weights, head, inputs, pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten(), seen)
        _fits[head] = loss is not None
        if loss is not None:
            return loss
        weights.after_step()
        _random(device, random)  # the same dropout as if nothing had been tried
    labels = batch["labels"][:, 1:].reshape(-1)
    seen.append(weights(**inputs))
    logits = seen[-1].logits[:, :-1].reshape(labels.numel(), -1)
    labels = labels.to(logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits.to(dtype), labels, ignore_index=IGNORE, reduction="sum")


def _in_chunks(
    weights: Weights, head: nn.Linear, inputs: dict[str, Any], labels: Tensor, seen: list[Any]
) -> Tensor | None:
    """The loss, computed where the model asks for logits; None where it does not give them as the head made them.

    labels: (rows * tokens), of the token that follows each.
    """
    wanted = (labels != IGNORE).nonzero().squeeze(1)
    device = inputs["input_ids"].device
    targets, wanted = to_device(labels[wanted], device), to_device(wanted, device)
    own, leaves = head.forward, trained(head)
    made: list[tuple[Tensor, int]] = []  # the loss, and how often it was written to

    def forward(hidden: Tensor) -> Tensor:
        if hidden.shape[:-1] != inputs["input_ids"].shape:
            return own(hidden)
        rows = hidden.flatten(0, -2).index_select(0, wanted)
        at_once = max(1, CHUNK // head.out_features)
        loss: Tensor = _CrossEntropy.apply(own, targets, at_once, torch.is_grad_enabled(), rows, *leaves)
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


class _CrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of rows x (N, C) with targets (N); differentiated once, in its forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        targets: Tensor,
        at_once: int,
        differentiate: bool,
        rows: Tensor,
        *leaves: Tensor,
    ) -> Tensor:
        """head: (n, C) -> (n, vocabulary), differentiable in its argument and in ``leaves``. at_once: largest n."""
        needed = differentiate and any(ctx.needs_input_grad)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=rows.device)
        grad_rows, grads = torch.empty_like(rows) if needed else None, [torch.empty(0)] * len(leaves)
        for start in range(0, max(1, len(rows)), at_once):  # once without rows too: hooks expect zeros
            some = slice(start, start + at_once)
            loss, more = _one_run(head, rows[some], targets[some], leaves, needed)
            total += loss
            if grad_rows is None:
                continue
            grad_rows[some] = more.pop(0)
            if start:
                grads = [one.add_(other) for one, other in zip(grads, more, strict=True)]
            else:  # sums over many runs are taken in float32
                grads = [g.to(dtype) if len(rows) > at_once else g for g in more]
        ctx.grads = [grad_rows, *(g.to(leaf.dtype) for g, leaf in zip(grads, leaves, strict=True))] if needed else []
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad: a scalar."""
        grads, ctx.grads = ctx.grads, None  # scaled in place: a second pass fails
        return None, None, None, None, *(g.mul_(grad) for g in grads)


def _one_run(
    head: Callable[[Tensor], Tensor], rows: Tensor, targets: Tensor, leaves: tuple[Tensor, ...], differentiate: bool
) -> tuple[Tensor, list[Tensor]]:
    """The summed cross entropy of rows (n, C) and, if asked for, its gradients with respect to them and ``leaves``."""
    x, target = rows.detach().requires_grad_(differentiate), targets[:, None]
    with torch.set_grad_enabled(differentiate):
        logits = head(x)
    scores = log_softmax(logits.detach(), -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    loss = -scores.gather(1, target).sum()
    if not differentiate:
        return loss, []
    scores.exp_().scatter_add_(1, target, scores.new_full(target.shape, -1))
    return loss, list(torch.autograd.grad(logits, (x, *leaves), scores.to(logits.dtype)))
