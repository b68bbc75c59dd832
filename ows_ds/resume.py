"""What a checkpoint holds of a run, and how another process takes it up."""

from __future__ import annotations

from typing import Any

import torch

from ows_ds.checkpoint import Checkpoint
from ows_ds.errors import UserError
from ows_ds.methods import Method
from ows_ds.weights import Piece, Weights, pieces_of, read_weights


def contents(method: Method, everything: bool) -> tuple[list[Piece], dict[str, Any]]:
    """This process's pieces of a checkpoint, and its numbers. Between two steps only.

    everything: also the weights that have never trained, which otherwise are those of the base model.
    """
    pieces, rest = method.pieces(), []
    if everything:
        parameters, there = dict(method.weights.module.named_parameters()), {piece.name for piece in pieces}
        rest = [name for name in parameters if f"weight/{name}" not in there]
        pieces += pieces_of(method.weights, parameters, rest)
    return pieces, {"method": method.numbers(), "never_trained": rest}


def base_model(opened: Checkpoint, weights: Weights, model: str, path: str, everything: bool) -> str:
    """The fingerprint of the model that ``opened`` began with.

    weights: what was loaded from ``path``, with the fingerprint ``model``. everything: whether what follows needs no
    weight of it, given all that ``opened`` has. Raises UserError (``model.path``) where they are needed and are others.
    """
    began = str(opened.facts.get("model"))
    if model == began:
        return model
    parameters = weights.module.named_parameters()
    held = all(opened.shapes.get(f"weight/{name}") == weights.shape(parameter) for name, parameter in parameters)
    if not (held and everything):
        right = f"give the model that {opened.folder.name} began with ({began[:12]}): this one is {model[:12]}"
        raise UserError("model.path", path, right + (", or train.checkpoint full" if held else ""))
    return began


@torch.no_grad()
def restore(method: Method, opened: Checkpoint) -> None:
    """Set the method and its weights to what `contents` gave. Collective."""
    method.weights.after_step()
    parameters = dict(method.weights.module.named_parameters())
    read_weights(method.weights, parameters, opened.numbers["never_trained"], opened.read)
    method.restore(opened.numbers["method"], opened.read)
