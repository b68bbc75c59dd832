"""Metrics of layers that outliers are compared with: relative magnitude, block influence, and heavy tails.

Letters: x, a layer's input hidden state of one token; f(x), what the layer adds; y = x + f(x), its output. Hidden
states and weights are taken to float64, and tokens are added up over all processes before they are averaged.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ows_ds.distributed.weights import CHUNK, Weights
from ows_ds.errors import UserError
from ows_ds.importance.calibrate import Select, calibrate
from ows_ds.importance.scores import Scores, score
from ows_ds.model.fingerprint import fingerprint
from ows_ds.model.layers import ModelLayers

Batches = Iterable[dict[str, Tensor] | None]


def measure(
    weights: Weights,
    layers: ModelLayers,
    metrics: Collection[str],
    batches: Callable[[], Batches],
    tau: float,
    model: str | None = None,
) -> dict[str, Scores]:
    """Scores of every one of ``metrics`` (outlier, rm, bi, alpha), in their order. Collective; the same on all.

    batches: gives this process's calibration batches, as for `ows_ds.importance.scores.score`, each time it is called: once for
    outlier and once for rm and bi together. tau: threshold of an outlier. model: its fingerprint, where it is known.
    Errors as for the functions below.
    """
    model = model or fingerprint(weights)
    found: dict[str, Scores] = {}
    if "outlier" in metrics:
        found["outlier"] = score(weights, layers, batches(), tau, model)
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

    Arguments, modes and collectives as for `ows_ds.importance.scores.score`. Raises UserError (``data.train``) if there is no token
    at all, RuntimeError if a layer's activations are not finite.
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
    if not tokens:
        raise UserError(
            "data.train", "0 calibration tokens", "expected rows of which something is left after tokenizing"
        )
    for total, layer in zip(totals, (*layers.layers, *layers.layers), strict=True):
        if not math.isfinite(total):  # the same on all processes
            raise RuntimeError(f"activations of {layer.name} are not finite: no scores can be computed")
    means = [max(0.0, total / tokens) for total in totals]
    model = model or fingerprint(weights)
    magnitude = Scores("rm", 0.0, model, tuple(means[:n_layers]), int(tokens))
    return magnitude, Scores("bi", 0.0, model, tuple(means[n_layers:]), int(tokens))


def tail_exponents(weights: Weights, layers: ModelLayers, model: str | None = None) -> Scores:
    """alpha of every layer: the mean of `hill` over its matrices (Lu et al. 2024, "AlphaPruning").

    The smaller alpha, the heavier the tails and the better trained the layer (OwLore, abstract). Matrices without a
    tail are left out of the mean. No data is needed. Raises UserError (``sampling.importance``) for a layer in which no
    matrix has a tail, RuntimeError for weights that are not finite.

    Collective: under ZeRO-3 one matrix after the other is gathered; process i mod w computes the spectrum of matrix i,
    and one all-reduce shares the results. Their bits therefore do not depend on w.
    """
    matrices = [(layer.name, matrix) for layer in layers.layers for matrix in layer.matrices]
    alphas = torch.zeros(len(matrices), dtype=torch.float64, device=weights.device)
    parameters = dict(weights.module.named_parameters())
    index, world_size = weights.comm.rank, weights.comm.world_size
    for first in range(0, len(matrices), world_size):  # w matrices are gathered before any spectrum holds the others up
        own = None
        for i, (_, matrix) in enumerate(matrices[first : first + world_size]):
            whole = weights.full_tensor(parameters[matrix.name])
            own = whole if i == index else own
        if own is not None:
            alphas[first + index] = hill(own.to(weights.device))
    found: dict[str, list[float]] = {layer.name: [] for layer in layers.layers}
    for (name, matrix), alpha in zip(matrices, weights.comm.all_reduce(alphas, "score").tolist(), strict=True):
        if math.isnan(alpha):
            raise RuntimeError(f"{matrix.name} is not finite: no scores can be computed")
        if alpha:
            found[name].append(alpha)
    for name, values in found.items():
        if not values:
            right = (
                f"expected another one: no weight of {name} has two different eigenvalues above 0, so none has a tail"
            )
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
