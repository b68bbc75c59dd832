"""The ratio of outliers in each layer (equation 2), computed on shards.

Letters: layer l with linear weights W (C_out x C_in); X (tokens x C_in) the inputs of one of them over all calibration
tokens; A_ij = ||X_j||_2 * |W_ij|, a layer's A being that of all its linear weights together; tau the threshold;

    D_l = ratio of entries of A with A_ij > tau * mean(A)

Each matrix W in a stack of experts' weights has inputs X of its own: the tokens that go to this expert. Where none do,
its entries of A are 0, and count in the mean as any others.

mean(A) needs no pass of its own: it is the sum over input features j of ||X_j|| * sum_i |W_ij|, over the entries.
Every rank sees its part of the tokens and its interval of every W, and sends

    [sums of X_j^2 | sums of |W_ij| over i]  --all_reduce, float64-->  ||X_j|| and the threshold of every layer
    [entries above the threshold | tokens]   --all_reduce, int64----> D
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ows_ds.distributed.communicator import fail_together
from ows_ds.distributed.merging import entries_at_once
from ows_ds.distributed.weights import Weights
from ows_ds.importance.calibrate import Batches, Select, calibrate, require_tokens
from ows_ds.importance.experts import watch
from ows_ds.importance.scores import Scores
from ows_ds.model.blocks import Matrix, ModelLayers
from ows_ds.model.fingerprint import fingerprint

BLOCK = 1 << 20  # entries of a weight whose float64 copy a CPU makes at once: small enough for its cache


def outlier_scores(
    weights: Weights, layers: ModelLayers, batches: Batches, tau: float, model: str | None = None
) -> Scores:
    """`outlier_scores_of` at one threshold."""
    return outlier_scores_of(weights, layers, batches, [tau], model)[0]


def outlier_scores_of(
    weights: Weights, layers: ModelLayers, batches: Batches, taus: Sequence[float], model: str | None = None
) -> list[Scores]:
    """Equation 2 at each of ``taus`` over the ``batches`` of all ranks (see `calibrate`). Collective; the result is the
    same on all.

    model: its fingerprint, where it is known. Everything but the forward pass is float64. Raises UserError
    (``data.train``) if there is no token at all, RuntimeError if a layer's activations are not finite.
    """
    used, squares, tokens = input_squares(weights, [m for layer in layers.layers for m in layer.matrices], batches)
    matrices, of_layers = used.values(), [[used[m.name] for m in layer.matrices] for layer in layers.layers]

    parameters = weights.parameters()
    heights = {name: torch.zeros_like(value) for name, value in squares.items()}  # columns of |W|, summed
    for matrix in matrices:
        for expert, features, block in blocks(weights, matrix, parameters[matrix.name]):
            heights[matrix.name][expert, features] += block.abs().double().sum(0).to(weights.device)

    both = torch.stack([torch.cat([one.flatten() for one in some.values()]) for some in (squares, heights)])
    both = weights.comm.all_reduce(both, "score")
    sizes = [m.count * m.in_features for m in matrices]
    squares, heights = (dict(zip(squares, half.split(sizes), strict=True)) for half in both)
    norms = {name: value.sqrt() for name, value in squares.items()}

    n_layers = len(layers.layers)
    counts = torch.zeros(len(taus) * n_layers + 1, dtype=torch.int64, device=weights.device)
    counts[-1] = tokens
    entries = [sum(m.numel for m in some) for some in of_layers]
    for index, some in enumerate(of_layers):
        mean = sum(float(norms[m.name] @ heights[m.name]) for m in some) / max(1, entries[index])
        if not math.isfinite(mean):  # the same on all ranks
            raise RuntimeError(
                f"activations or weights of {layers.layers[index].name} are not finite: no scores can be computed"
            )
        for matrix in some:
            of_experts = norms[matrix.name].view(matrix.count, -1)
            for expert, features, block in blocks(weights, matrix, parameters[matrix.name]):
                norm = of_experts[expert, features].to(block.device)
                both = block.abs().double().mul_(norm)
                for number, tau in enumerate(taus):
                    counts[number * n_layers + index] += (both > tau * mean).sum().to(weights.device)
    *above, all_tokens = weights.comm.all_reduce(counts, "score").tolist()
    require_tokens(all_tokens)
    found, name = [], model or fingerprint(weights)
    for number, tau in enumerate(taus):
        own = above[number * n_layers : (number + 1) * n_layers]
        ratios = tuple(count / max(1, size) for count, size in zip(own, entries, strict=True))
        found.append(Scores("outlier", tau, name, ratios, all_tokens))
    return found


def input_squares(
    weights: Weights, matrices: Sequence[Matrix], batches: Batches
) -> tuple[dict[str, Matrix], dict[str, Tensor], int]:
    """The sum of squares of every matrix's input features over this rank's tokens that are not padding.

    Returns, by name, the matrices, stacks being stored as the model uses them, whatever ``matrices`` say; the sums:
    float64, (matrices of this name, C_in); and the number of tokens. Collective if there are stacks.

    Where tokens go to some of the experts, padding would go with them, out of its place: the model does not see it.
    """
    squares: dict[str, Tensor] = {}
    stored = {matrix.name: matrix.inputs_first for matrix in matrices}

    def zeros(matrix: Matrix) -> Tensor:
        return torch.zeros(matrix.count, matrix.in_features, dtype=torch.float64, device=weights.device)

    def attach(select: Select) -> Iterator[RemovableHandle]:
        def add(matrix: Matrix, expert: int, inputs_first: bool, x: Tensor) -> None:
            x = select(f"the input of {matrix.name}", x)
            x = x if x.dtype == torch.float64 else x.float()
            if matrix.name not in squares:
                stored[matrix.name] = inputs_first
                squares[matrix.name] = zeros(replace(matrix, inputs_first=inputs_first))
            squares[matrix.name][expert] += x.square().sum(0, dtype=torch.float64)

        def add_first(matrix: Matrix, _: nn.Module, inputs: tuple[Any, ...]) -> None:
            add(matrix, 0, matrix.inputs_first, inputs[0])

        parameters = weights.parameters()
        for matrix in matrices:
            for module in map(weights.module.get_submodule, matrix.modules):
                if matrix.experts is None:
                    yield module.register_forward_pre_hook(functools.partial(add_first, matrix))
                else:
                    add_expert = functools.partial(add, matrix)
                    yield from watch(module, matrix.name, parameters[matrix.name], add_expert)

    padding = not any(sees_some_tokens(weights.module, matrix) for matrix in matrices)
    # in shards, passes fail together
    with nullcontext() if weights.sharded or padding else fail_together(weights.comm):
        tokens = calibrate(weights, batches, attach, padding)
    if any(matrix.experts for matrix in matrices):
        for some in weights.comm.all_gather_object({name: stored[name] for name in squares}, "score"):
            stored |= some  # a rank without rows has seen none
    used = {matrix.name: replace(matrix, inputs_first=stored[matrix.name]) for matrix in matrices}
    return used, {name: squares[name] if name in squares else zeros(matrix) for name, matrix in used.items()}, tokens


def sees_some_tokens(module: nn.Module, matrix: Matrix) -> bool:
    """Whether a matrix may be an expert's: in a stack, or in a list of modules within a layer of ``module``."""
    parts = matrix.modules[0].split(".")
    above = (module.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))
    return matrix.experts is not None or sum(isinstance(one, nn.ModuleList) for one in above) > 1


def blocks(weights: Weights, matrix: Matrix, parameter: nn.Parameter) -> Iterator[tuple[int, slice, Tensor]]:
    """This rank's interval of a matrix, or of a stack, as blocks (any, features) of some entries: about `BLOCK` on a
    CPU, and of one matrix each.

    Yields the number of the matrix in the stack, the slice of input features that are a block's columns, and the block.
    """
    start, _ = weights.interval(parameter)
    height, width = matrix.shape
    flat = weights.local(parameter).to(weights.device)  # DeepSpeed may keep the shards on the CPU
    position, at_once = 0, max(1, entries_at_once(flat.device, BLOCK) // width)
    while position < len(flat):
        row, column = divmod(start + position, width)
        expert, row = divmod(row, height)
        rows = min((len(flat) - position) // width, at_once, height - row) if column == 0 else 0
        if rows:
            block = flat[position : position + rows * width].view(rows, width)
        else:  # the interval begins or ends within this row
            rows = 1
            block = flat[position : position + width - column].view(1, -1)
        position += block.numel()
        if matrix.inputs_first:
            yield expert, slice(row, row + rows), block.T
        else:
            yield expert, slice(column, column + block.shape[1]), block
