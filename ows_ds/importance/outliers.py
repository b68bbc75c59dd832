"""The ratio of outliers in each layer (equation 2), computed on shards.

Letters: layer l with linear weights W (C_out x C_in); X (tokens x C_in) the inputs of one of them over all calibration
tokens; A_ij = ||X_j||_2 * |W_ij|, a layer's A being that of all its linear weights together; tau the threshold;

    D_l = ratio of entries of A with A_ij > tau * mean(A)

mean(A) needs no pass of its own: it is the sum over input features j of ||X_j|| * sum_i |W_ij|, over the entries.
Every rank sees its part of the tokens and its interval of every W, and sends

    [sums of X_j^2 | sums of |W_ij| over i]  --all_reduce, float64-->  ||X_j|| and the threshold of every layer
    [entries above the threshold | tokens]   --all_reduce, int64----> D
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ows_ds.distributed.weights import Weights, entries_at_once
from ows_ds.importance.calibrate import Batches, Select, calibrate, require_tokens
from ows_ds.importance.scores import Scores
from ows_ds.model.fingerprint import fingerprint
from ows_ds.model.layers import Matrix, ModelLayers

BLOCK = 1 << 20  # entries of a weight whose float64 copy a CPU makes at once: small enough for its cache


def outlier_scores(
    weights: Weights, layers: ModelLayers, batches: Batches, tau: float, model: str | None = None
) -> Scores:
    """Equation 2 over the ``batches`` of all ranks (see `calibrate`). Collective; the result is the same on all.

    model: its fingerprint, where it is known. Everything but the forward pass is float64. Raises UserError
    (``data.train``) if there is no token at all, RuntimeError if a layer's activations are not finite.
    """
    matrices = [matrix for layer in layers.layers for matrix in layer.matrices]
    squares, tokens = input_squares(weights, matrices, batches)

    parameters = dict(weights.module.named_parameters())
    heights = {name: torch.zeros_like(value) for name, value in squares.items()}  # columns of |W|, summed
    for matrix in matrices:
        for features, block in blocks(weights, matrix, parameters[matrix.name]):
            heights[matrix.name][features] += block.abs().double().sum(0).to(weights.device)

    both = torch.stack([torch.cat(list(squares.values())), torch.cat(list(heights.values()))])
    both = weights.comm.all_reduce(both, "score")
    squares, heights = (dict(zip(squares, half.split([m.in_features for m in matrices]), strict=True)) for half in both)
    norms = {name: value.sqrt() for name, value in squares.items()}

    counts = torch.zeros(len(layers.layers) + 1, dtype=torch.int64, device=weights.device)
    counts[-1] = tokens
    entries = [sum(m.shape[0] * m.shape[1] for m in layer.matrices) for layer in layers.layers]
    for index, layer in enumerate(layers.layers):
        mean = sum(float(norms[m.name] @ heights[m.name]) for m in layer.matrices) / max(1, entries[index])
        if not math.isfinite(mean):  # the same on all ranks
            raise RuntimeError(f"activations or weights of {layer.name} are not finite: no scores can be computed")
        for matrix in layer.matrices:
            for features, block in blocks(weights, matrix, parameters[matrix.name]):
                norm = norms[matrix.name][features].to(block.device)
                above = block.abs().double().mul_(norm) > tau * mean
                counts[index] += above.sum().to(weights.device)
    *above_threshold, all_tokens = weights.comm.all_reduce(counts, "score").tolist()
    require_tokens(all_tokens)
    ratios = tuple(count / max(1, number) for count, number in zip(above_threshold, entries, strict=True))
    return Scores("outlier", tau, model or fingerprint(weights), ratios, all_tokens)


def input_squares(weights: Weights, matrices: Sequence[Matrix], batches: Batches) -> tuple[dict[str, Tensor], int]:
    """The sum of squares of every matrix's input features over this rank's tokens that are not padding.

    Returns ({matrix name: float64, (C_in,)}, number of tokens).
    """
    squares = {m.name: torch.zeros(m.in_features, dtype=torch.float64, device=weights.device) for m in matrices}

    def attach(select: Select) -> Iterator[RemovableHandle]:
        def add(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = select(f"the input of {name}", inputs[0])
            x = x if x.dtype == torch.float64 else x.float()
            squares[name] += x.square().sum(0, dtype=torch.float64)

        for matrix in matrices:
            for name in matrix.modules:
                hook = functools.partial(add, matrix.name)
                yield weights.module.get_submodule(name).register_forward_pre_hook(hook)

    return squares, calibrate(weights, batches, attach)


def blocks(weights: Weights, matrix: Matrix, parameter: nn.Parameter) -> Iterator[tuple[slice, Tensor]]:
    """This rank's interval of a matrix as blocks (any, features) of some entries: about `BLOCK` on a CPU.

    Yields the slice of input features that are a block's columns, and the block.
    """
    start, _ = weights.interval(parameter)
    width = matrix.shape[1]
    flat = weights.local(parameter).to(weights.device)  # DeepSpeed may keep the shards on the CPU
    position, at_once = 0, max(1, entries_at_once(flat.device, BLOCK) // width)
    while position < len(flat):
        row, column = divmod(start + position, width)
        rows = min((len(flat) - position) // width, at_once) if column == 0 else 0
        if rows:
            block = flat[position : position + rows * width].view(rows, width)
        else:  # the interval begins or ends within this row
            rows = 1
            block = flat[position : position + width - column].view(1, -1)
        position += block.numel()
        if matrix.inputs_first:
            yield slice(row, row + rows), block.T
        else:
            yield slice(column, column + block.shape[1]), block
