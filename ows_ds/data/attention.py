"""What keeps the rows of a packed sequence apart in transformers' attention, whichever kernel runs it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from ows_ds.compat.transformers import attn_implementation, known_rows
from ows_ds.data.batches import HOST, collate, cut
from ows_ds.data.encoded import Encoded
from ows_ds.distributed.sequence import SequenceParallel
from ows_ds.distributed.weights import Weights
from ows_ds.errors import first_line

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
    if "row_ends" in batch and "flash" in attn_implementation(module.config):
        longest = int(batch["longest"])  # on the CPU
        found |= {"cu_seq_lens_q": batch["row_ends"], "cu_seq_lens_k": batch["row_ends"]}
        found |= {"max_length_q": longest, "max_length_k": longest}
    return found


@torch.no_grad()
def why_not_shared(weights: Weights, shared: SequenceParallel, vocabulary: int) -> str | None:
    """Why ranks cannot share the tokens of rows, in words; None: they can. Collective: three forward passes of 16
    tokens for each rank of a group, which compare a row that is cut with a whole one, as `keeps_apart` does.
    """
    module: Any = weights.module
    base = module.get_base_model() if hasattr(module, "get_base_model") else module  # of one with adapters
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "its code takes no positions"
    tokens = 16 * shared.size
    ids = numpy.arange(1, tokens + 1, dtype=numpy.int32) % vocabulary
    row = Encoded(ids, numpy.ones(tokens, bool), 0)
    whole = collate([[row]], 0)
    piece = cut(whole, shared.part, shared.size)
    own = slice(16 * shared.part, 16 * (shared.part + 1))

    def logits(batch: dict[str, Tensor]) -> Tensor:
        batch = {name: t if name in HOST else t.to(weights.device) for name, t in batch.items()}
        shared.begin(batch)
        with known_rows(None):
            found: Tensor = weights(**inputs(weights, batch)).logits[0]
        weights.after_step()
        return found

    training = module.training
    module.eval()
    alone, expected = logits(piece), logits(whole)[own]
    try:
        with shared.passes():
            found = logits(piece)
    except (AssertionError, ValueError) as error:  # of shapes, on all ranks
        return first_line(error)
    module.train(training)
    changes = torch.stack([(found - expected).double().square().sum(), (alone - expected).double().square().sum()])
    wrong, apart = weights.comm.all_reduce(changes, "agree").tolist()
    return None if wrong <= LEAK**2 * apart else "not all of its layers exchange what they need by attention"


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
