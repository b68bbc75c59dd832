"""A user's model -> `Weights`, whatever it is: a plain module, a DeepSpeed engine, or `Weights` already."""

from __future__ import annotations

from typing import Any

from torch import nn

from ows_ds.distributed.communicator import join
from ows_ds.distributed.weights import Replicated, Weights
from ows_ds.errors import UserError


def as_weights(model: Any) -> Weights:
    """``model`` as `Weights`: it is one, or a DeepSpeed engine made with ZeRO-3, or a plain model. Collective."""
    if hasattr(model, "resident_slice") and hasattr(model, "merge"):
        weights: Weights = model
        return weights
    if hasattr(model, "zero_optimization_stage"):
        from ows_ds.distributed.zero3 import Zero3

        return Zero3.adopt(model, join(model.device))
    if isinstance(model, nn.parallel.DistributedDataParallel):
        right = "expected the model inside it: OWS averages gradients itself"
        raise UserError("model", "DistributedDataParallel", right)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("model", "weights on the meta device", "load its weights first")
    return Replicated(model, join(next(model.parameters()).device))
