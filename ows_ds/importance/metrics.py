"""Scores of layers: `score` for scripts, and the metrics relative magnitude, block influence and heavy tails.

Letters: x, a layer's input hidden state of one token; f(x), what the layer adds; y = x + f(x), its output. Hidden
states and weights are converted to float64, and tokens are summed over all ranks before they are averaged.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ows_ds import config
from ows_ds.distributed.adopt import as_weights
from ows_ds.distributed.communicator import join
from ows_ds.distributed.merging import CHUNK
from ows_ds.distributed.weights import Weights
from ows_ds.errors import UserError
from ows_ds.importance.calibrate import Batches, Select, calibrate, require_tokens
from ows_ds.importance.outliers import outlier_scores
from ows_ds.importance.probabilities import METRIC_OF
from ows_ds.importance.scores import Scores
from ows_ds.model.blocks import ModelLayers
from ows_ds.model.fingerprint import fingerprint
from ows_ds.model.layers import find_layers
from ows_ds.model.pretrained import pretrained


def score(model: Any, batches: Batches, metric: str = "outlier", tau: float = 13.0) -> Scores:
    """How much each layer of ``model`` matters: what `ows_ds.OWS` takes as ``scores``. Collective.

    Args:
        model: A causal language model, a DeepSpeed engine with ZeRO-3, `Weights`, or the path or name of a model,
            which is loaded in bfloat16, on the GPU if there is one. No weight and no mode changes.
        batches: This rank's calibration batches, on any device: dicts of the forward pass's arguments (``labels`` are
            ignored). Under ZeRO-3 every rank must give the same number of them.
        metric: ``outlier`` (the paper's equation 2), ``rm``, ``bi`` or ``alpha`` (which uses no batches).
        tau: The threshold of an outlier.

    Raises:
        UserError: for another metric, a model whose layers are not found, or batches without any token.
    """
    if metric not in METRIC_OF.values():
        raise UserError("metric", metric, f"expected one of {', '.join(dict.fromkeys(METRIC_OF.values()))}")
    weights = as_weights(_load(str(model)) if isinstance(model, (str, os.PathLike)) else model)
    on_device = (
        batch and {key: value.to(weights.device) for key, value in batch.items() if key != "labels"}
        for batch in batches
    )
    return measure(weights, find_layers(weights.module, weights.shape), [metric], lambda: on_device, tau)[metric]


def _load(path: str) -> Any:
    # a recipe's model, of which no other key counts
    recipe = config.from_dict({"model": {"path": path}, "data": {"train": "none"}, "train": {"output_dir": "none"}})
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return pretrained(recipe, join(device), device)


def measure(
    weights: Weights,
    layers: ModelLayers,
    metrics: Collection[str],
    batches: Callable[[], Batches],
    tau: float,
    model: str | None = None,
) -> dict[str, Scores]:
    """Scores of every one of ``metrics`` (outlier, rm, bi, alpha), in their order. Collective; the same on all.

    batches: gives this rank's calibration batches each time it is called: once for outlier and once for rm and bi
    together. model: its fingerprint, where it is known. Errors as for the functions below.
    """
    model = model or fingerprint(weights)
    found: dict[str, Scores] = {}
    if "outlier" in metrics:
        found["outlier"] = outlier_scores(weights, layers, batches(), tau, model)
    if "rm" in metrics or "bi" in metrics:
        found["rm"], found["bi"] = magnitude_and_influence(weights, layers, batches(), model)
    if "alpha" in metrics:
        found["alpha"] = tail_exponents(weights, layers, model)
    return {metric: found[metric] for metric in metrics}


def magnitude_and_influence(
    weights: Weights, layers: ModelLayers, batches: Batches, model: str | None = None
) -> tuple[Scores, Scores]:
    """Relative magnitude (rm) and block influence (bi) of every layer, from the same forward passes.

    rm: mean over tokens of ||f(x)||_2 / ||x + f(x)||_2 (Samragh et al. 2023, "Weight subcloning", in the form that
    Men et al. compare with). bi: 1 - mean over tokens of the cosine similarity of x and y (Men et al. 2024,
    "ShortGPT"). A ratio or a cosine of 0 / 0 counts as 0; rounding below 0 is cut off.

    Collective. Raises UserError (``data.train``) if there is no token at all, RuntimeError if a layer's activations
    are not finite.
    """
    n_layers = len(layers.layers)
    sums = torch.zeros(2 * n_layers + 1, dtype=torch.float64, device=weights.device)  # rm | bi | tokens

    def attach(select: Select) -> Iterator[RemovableHandle]:
        def add(
            index: int, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            x = select(f"the input of {name}", args[0] if args else kwargs["hidden_states"])
            y = select(f"the output of {name}", output[0] if isinstance(output, (tuple, list)) else output)
            rows = max(1, CHUNK // x.shape[-1])
            for part in zip(x.split(rows), y.split(rows), strict=True):
                before, after = part[0].double(), part[1].double()
                change, size = (after - before).norm(dim=1), after.norm(dim=1)
                product = (before * after).sum(1)
                # where, so that 0 / 0 is 0 and NaN stays NaN
                cosine = torch.where(product == 0, product, product / (before.norm(dim=1) * size))
                sums[index] += torch.where(change == 0, change, change / size).sum()
                sums[n_layers + index] += (1 - cosine).sum()

        for index, layer in enumerate(layers.layers):
            hook = functools.partial(add, index, layer.name)
            yield weights.module.get_submodule(layer.name).register_forward_hook(hook, with_kwargs=True)

    sums[-1] = calibrate(weights, batches, attach)
    *totals, tokens = weights.comm.all_reduce(sums, "score").tolist()
    require_tokens(tokens)
    for total, layer in zip(totals, (*layers.layers, *layers.layers), strict=True):
        if not math.isfinite(total):  # the same on all ranks
            raise RuntimeError(f"activations of {layer.name} are not finite: no scores can be computed")
    means = [max(0.0, total / tokens) for total in totals]
    model = model or fingerprint(weights)
    magnitude = Scores("rm", 0.0, model, tuple(means[:n_layers]), int(tokens))
    return magnitude, Scores("bi", 0.0, model, tuple(means[n_layers:]), int(tokens))


def tail_exponents(weights: Weights, layers: ModelLayers, model: str | None = None) -> Scores:
    """alpha of every layer: the mean of `hill` over its matrices (Lu et al. 2024, "AlphaPruning").

    The smaller alpha, the heavier the tails and the better trained the layer (OwLore, abstract). Each expert's matrix
    in a stack counts as one. Matrices without a tail are left out of the mean. No data is needed. Raises UserError
    (``sampling.importance``) for a layer in which no matrix has a tail, RuntimeError for weights that are not finite.

    Collective: under ZeRO-3 matrices, or stacks, are gathered one by one; rank i mod w computes the spectrum of matrix
    i, and one all-reduce shares the results, whose bits therefore do not depend on w.
    """
    matrices = [
        (layer.name, matrix) for layer in layers.layers for matrix in layer.matrices for _ in range(matrix.count)
    ]
    alphas = torch.zeros(len(matrices), dtype=torch.float64, device=weights.device)
    parameters = weights.parameters()
    rank, world_size = weights.comm.rank, weights.comm.world_size
    first = done = 0
    own: dict[int, Tensor] = {}
    while first < len(matrices):
        _, matrix = matrices[first]
        full = weights.full_tensor(parameters[matrix.name]).view(-1, *matrix.shape)
        own |= {i: one for i, one in enumerate(full, first) if i % world_size == rank}
        first += len(full)
        if first - done >= world_size or first == len(matrices):  # each rank has one before any computes a spectrum
            for i, one in own.items():
                alphas[i] = hill(one.to(weights.device))
            own, done = {}, first
        del full  # before the next is gathered
    found: dict[str, list[float]] = {layer.name: [] for layer in layers.layers}
    for (name, matrix), alpha in zip(matrices, weights.comm.all_reduce(alphas, "score").tolist(), strict=True):
        if math.isnan(alpha):
            raise RuntimeError(f"{matrix.name} is not finite: no scores can be computed")
        if alpha:
            found[name].append(alpha)
    for name, values in found.items():
        if not values:
            right = f"expected another one: no weight of {name} has two different eigenvalues above 0, and so a tail"
            raise UserError("sampling.importance", "alpha", right)
    means = tuple(sum(values) / len(values) for values in found.values())
    return Scores("alpha", 0.0, model or fingerprint(weights), means, 0)


def hill(matrix: Tensor) -> float:
    """PL_Alpha_Hill: Hill's estimator of the exponent of a power law in the upper half of a matrix's spectrum.

        alpha = 1 + k / sum_{i = 1..k} ln(lambda_{n-i+1} / lambda_{n-k}),  k = floor(n / 2)

    lambda_1 <= ... <= lambda_n, n = min(rows, columns): the eigenvalues of W^T W (squared singular values). Where
    lambda_{n-k} is 0 to the rounding of float64, n counts those above it. Source: Lu et al. 2024, "AlphaPruning".

    matrix: (rows, columns), any float dtype; the spectrum is that of the smaller Gram matrix in float64, where squaring
    costs the upper half nothing. Returns 0 where there is no tail (fewer than two eigenvalues above 0, or equal ones),
    NaN for entries that are not finite; otherwise a number above 1.
    """
    if not matrix.isfinite().all():
        return math.nan
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    eigenvalues = torch.linalg.eigvalsh(wide @ wide.T)
    rounding = eigenvalues[-1] * max(matrix.shape) * torch.finfo(torch.float64).eps
    n, above = len(eigenvalues), int((eigenvalues > rounding).sum())
    k = (n if above > n // 2 else above) // 2
    if k == 0:
        return 0.0
    logs = eigenvalues[-k - 1 :].log()
    total = float((logs[1:] - logs[0]).sum())
    return 1 + k / total if total > 0 else 0.0
