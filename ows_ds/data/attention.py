"""What keeps the rows of a packed sequence apart in transformers' attention, whichever kernel runs it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from ows_ds.compat.transformers import attn_implementation, known_rows
from ows_ds.data.batches import HOST, collate
from ows_ds.data.encoded import Encoded
from ows_ds.distributed.weights import Weights

LEAK = 0.1  # of what a row's neighbour may do to it; rounding does less, attention all


def inputs(weights: Weights, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The model's arguments for a batch. There is no mask: padding is on the right, where under causal attention no
    token sees it; but a model that balances its experts must know it."""
    found: dict[str, Any] = {"input_ids": batch["input_ids"]}
    if "position_ids" not in batch:
        if balance_coefficient(weights.module) is not None and "attention_mask" in batch:
            found["attention_mask"] = batch["attention_mask"]
        return found
    found |= {"position_ids": batch["position_ids"], "use_cache": False}  # with a cache, rows would not be kept apart
    module: Any = weights.module
    if "flash" in attn_implementation(module.config):
        longest = int(batch["longest"])  # on the CPU
        found |= {"cu_seq_lens_q": batch["row_ends"], "cu_seq_lens_k": batch["row_ends"]}
        found |= {"max_length_q": longest, "max_length_k": longest}
    return found


def balance_coefficient(module: Any) -> float | None:
    """What a model multiplies its own loss for the balance of experts with; None where its configuration does not ask
    for that loss."""
    config: Any = getattr(module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not getattr(config, "output_router_logits", False):
        return None
    found = (getattr(config, name, None) for name in ("router_aux_loss_coef", "aux_loss_coef"))
    return next((float(one) for one in found if one is not None), None)


@torch.no_grad()
def keeps_apart(weights: Weights, vocabulary: int) -> bool:
    """Whether a packed row gives the same logits as alone, up to rounding, in the second of two sequences. Collective:
    two forward passes of 32 tokens. A model's code, not its name, says what it does with positions."""
    module: Any = weights.module
    base = module.get_base_model() if hasattr(module, "get_base_model") else module  # of one with adapters
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return False

    def row(first: int, last: int) -> Encoded:
        ids = numpy.arange(first, last, dtype=numpy.int32) % vocabulary
        return Encoded(ids, numpy.ones(len(ids), bool), 0)

    def logits(sequences: Sequence[Sequence[Encoded]], packed: bool) -> Tensor:
        batch = collate(sequences, 0, packed)
        batch = {name: t if name in HOST else t.to(weights.device) for name, t in batch.items()}
        with known_rows(batch.get("row_ids")):
            found: Tensor = weights(**inputs(weights, batch)).logits
        weights.after_step()
        return found

    first, second, joined = row(1, 8), row(8, 17), row(1, 17)
    training = module.training
    module.eval()
    together = logits([[second], [first, second]], True)[1, 7:16]
    alone, seen = logits([[second], [joined]], False)
    module.train(training)
    difference = (together - alone[:9]).norm()
    return bool(difference <= LEAK * (seen[7:16] - alone[:9]).norm())
