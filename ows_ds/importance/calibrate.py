"""Forward passes over calibration batches, watched by hooks that see the tokens which are not padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ows_ds.distributed.weights import Weights
from ows_ds.errors import UserError

Batches = Iterable[dict[str, Tensor] | None]
"""A rank's calibration batches: keyword arguments of the model's forward pass, on its device.

input_ids (batch, length) and, unless all tokens count, attention_mask (batch, length), 0 for padding; ``labels`` are
left out. Under ZeRO-3 every rank must give the same number of them: one that runs out gives None.
"""

Select = Callable[[str, Tensor], Tensor]
"""(what it is, activations of the batch whose last dimension is features) -> those of tokens: (tokens, features)."""


def calibrate(
    weights: Weights, batches: Batches, attach: Callable[[Select], Iterable[RemovableHandle]], padding: bool = True
) -> int:
    """Run this rank's ``batches`` through the model; returns the number of their tokens that are not padding.

    attach: registers hooks on ``weights.module`` and gives their handles, which are removed at the end; the hooks may
    call the `Select` that it gets, which raises RuntimeError for activations that are not one row a token of the batch.
    padding: whether the model sees it. If not, only rows of one length share a pass, and `Select` takes activations of
    any number of rows in any order, as experts have them: all of them are tokens'.

    The module runs in eval mode without gradients and is left in the mode it was in. Collective under ZeRO-3.
    """
    module = weights.module
    kept = torch.empty(0, dtype=torch.int64, device=weights.device)  # the tokens of this batch, flattened
    positions = 0
    tokens = 0

    def select(what: str, x: Tensor) -> Tensor:
        x = x.detach().reshape(-1, x.shape[-1])
        if not padding:
            return x if len(kept) else x[:0]
        if len(x) != positions:
            raise RuntimeError(f"{what} has {len(x)} rows where the batch has {positions} tokens")
        return x.index_select(0, kept)  # not a product with the mask: padding may be NaN

    # no cache, and no logits but the last position's, where the model knows these arguments
    known = inspect.signature(module.forward).parameters
    extra = {key: value for key, value in (("use_cache", False), ("logits_to_keep", 1)) if key in known}
    training = [m for m in module.modules() if m.training]
    handles: list[RemovableHandle] = []
    try:
        module.eval()
        handles.extend(attach(select))
        with torch.no_grad():
            for batch in batches if padding else without_padding(weights, batches):
                if batch is None:  # one token, only to take part
                    batch = {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=weights.device)}
                    mask = torch.zeros_like(batch["input_ids"])
                else:
                    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                kept = mask.flatten().nonzero().squeeze(1)
                positions = mask.numel()
                tokens += len(kept)
                weights(**{key: value for key, value in batch.items() if key != "labels"}, **extra)
                weights.after_step()
    finally:
        for handle in handles:
            handle.remove()
        for m in training:
            m.training = True
    return tokens


def without_padding(weights: Weights, batches: Batches) -> Iterator[dict[str, Tensor] | None]:
    """The same tokens in batches without padding. Under ZeRO-3 as many on all ranks: collective."""
    for batch in batches:
        parts: list[dict[str, Tensor] | None] = [] if batch is None else [*split_lengths(batch)]
        if weights.sharded:
            parts += [None] * (max(weights.comm.all_gather_object(len(parts), "score")) - len(parts))
        yield from parts


def split_lengths(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The rows of a batch, those that have padding in the same places together, without it.

    Raises UserError (``sampling.calibration_batch_size``) where rows cannot be distinguished in one of its tensors.
    """
    ids = batch["input_ids"]
    kept = batch.get("attention_mask", torch.ones_like(ids)) != 0
    masks, of_row = kept.unique(dim=0, return_inverse=True)
    for number, mask in enumerate(masks):
        rows, columns = (of_row == number).nonzero().squeeze(1), mask.nonzero().squeeze(1)

        def take(name: str, x: Tensor, rows: Tensor = rows, columns: Tensor = columns) -> Tensor:
            if x.shape[:2] == ids.shape:
                return x.index_select(0, rows).index_select(1, columns)
            if len(masks) > 1 and x.shape[:1] != ids.shape[:1]:
                right = f"expected 1: experts are scored without padding, and {name} does not have a row for each row"
                raise UserError("sampling.calibration_batch_size", len(ids), right)
            return x if len(masks) == 1 else x.index_select(0, rows)

        if len(columns):
            yield {name: take(name, x) for name, x in batch.items()}


def require_tokens(tokens: float) -> None:
    """Raises UserError (``data.train``) where all ranks together have no token."""
    if not tokens:
        right = "expected rows of which something is left after tokenizing"
        raise UserError("data.train", "0 calibration tokens", right)
