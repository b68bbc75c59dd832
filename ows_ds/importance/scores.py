"""Files of scores; and the share of outliers in each layer (equation 2), computed on shards.

Letters: layer l with linear weights W (C_out x C_in); X (tokens x C_in) the inputs of one of them over all calibration
tokens; A_ij = ||X_j||_2 * |W_ij|, a layer's A being that of all its linear weights together; tau the threshold;

    D_l = share of entries of A with A_ij > tau * mean(A)

mean(A) needs no pass of its own: it is the sum over input features j of ||X_j|| * sum_i |W_ij|, over the entries.
Every process sees its part of the tokens and its interval of every W, and sends

    [sums of X_j^2 | sums of |W_ij| over i]  --all_reduce, float64-->  ||X_j|| and the threshold of every layer
    [entries above the threshold | tokens]   --all_reduce, int64----> D
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ows_ds.distributed.weights import Weights
from ows_ds.errors import UserError
from ows_ds.files import atomic_write, parse_json, read_text
from ows_ds.importance.calibrate import Select, calibrate
from ows_ds.importance.probabilities import METRIC_OF, importance
from ows_ds.model.fingerprint import fingerprint
from ows_ds.model.layers import Matrix, ModelLayers

_KEY = "sampling.scores"
_BLOCK = 1 << 20  # entries of a weight whose float64 copy is made at once: small enough for a CPU's cache


@dataclass(frozen=True)
class Scores:
    """The content of ``scores.json``.

    metric: what was computed: outlier (equation 2), rm, bi or alpha (`ows_ds.importance.metrics`). tau: the threshold of an
    outlier, 0 for the other metrics. model: fingerprint of the base model. layers: the metric of every layer, input
    side first; for outlier D as a share (not percent). tokens: calibration tokens, masked ones left out; 0 for alpha,
    which sees none. format: version of the file.
    """

    metric: str
    tau: float
    model: str
    layers: tuple[float, ...]
    tokens: int
    format: int = 1

    def write(self, path: Path) -> None:
        """Write as JSON; ``path`` is complete or as it was before."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Read what `write` wrote. Raises UserError (``sampling.scores``) for anything else."""
        try:
            data = parse_json(read_text(path))
        except OSError as error:
            right = f"expected a file that can be read ({error.strerror}); `ows-ds score` writes one"
            raise UserError(_KEY, str(path), right) from error
        except ValueError as error:
            raise UserError(_KEY, str(path), f"expected a JSON file that `ows-ds score` wrote ({error})") from error
        if not isinstance(data, dict) or data.get("format") != 1 or not {"layers", "model", "metric"} <= data.keys():
            raise UserError(_KEY, str(path), "expected a file that `ows-ds score` wrote (scores of format 1)")
        for key, kind in (("metric", str), ("model", str), ("tokens", int), ("tau", (int, float))):
            value = data.get(key)
            if not isinstance(value, kind) or isinstance(value, bool) or not (kind is str or _is_ratio(value)):
                raise UserError(f"{_KEY}: {key}", value, f"compute {path} again with `ows-ds score`")
        if data["metric"] not in METRIC_OF.values():
            right = f"expected scores of one of {', '.join(dict.fromkeys(METRIC_OF.values()))}"
            raise UserError(f"{_KEY}: metric", data["metric"], right)
        layers = data["layers"]
        if not isinstance(layers, list) or not layers or not all(map(_is_ratio, layers)):
            raise UserError(f"{_KEY}: layers", layers, f"{path} must hold one finite number >= 0 for each layer")
        ratios = tuple(float(ratio) for ratio in layers)
        return cls(data["metric"], float(data["tau"]), data["model"], ratios, data["tokens"])

    def check(
        self, model_fingerprint: str, n_layers: int, importance: str | None = None, tau: float | None = None
    ) -> None:
        """Refuse (UserError) scores of another model, of another number of layers, or made for something else.

        importance: the kind that they are for, one of `METRIC_OF`; None: any. tau: ``sampling.tau``, compared where
        the metric has one.
        """
        again = "compute the scores again with `ows-ds score`, or leave sampling.scores out"
        if len(self.layers) != n_layers:
            raise UserError(_KEY, f"scores of {len(self.layers)} layers", f"this model has {n_layers}; {again}")
        if self.model != model_fingerprint:
            short = f"scores of model {self.model[:12]}"
            raise UserError(_KEY, short, f"this model's weights are {model_fingerprint[:12]}; {again}")
        if importance is None:
            return
        metric = METRIC_OF[importance]
        if self.metric != metric:
            right = f"sampling.importance is {importance}, which needs scores of metric {metric}; {again}"
            raise UserError(_KEY, f"scores of metric {self.metric}", right)
        if metric == "outlier" and self.tau != tau:
            raise UserError(_KEY, f"scores with tau {self.tau:g}", f"sampling.tau is {tau:g}; {again}")


def score(
    weights: Weights,
    layers: ModelLayers,
    batches: Iterable[dict[str, Tensor] | None],
    tau: float,
    model: str | None = None,
) -> Scores:
    """Equation 2 over this process's ``batches`` and all others'. Collective; the result is the same on all.

    batches: keyword arguments of the model's forward pass on its device, ``labels`` left out: input_ids (batch,
    length), attention_mask (batch, length), 0 where a token is padding; without it all count. Every process must give
    the same number of them (the forward pass is collective under ZeRO-3); one that runs out gives None.
    model: its fingerprint, where it is known.

    The module runs in eval mode without gradients and is left in the mode it was in; no weight changes. Everything
    but the forward pass is float64. Raises UserError (``data.train``) if there is no token at all, RuntimeError if a
    layer's activations are not finite.
    """
    matrices = [matrix for layer in layers.layers for matrix in layer.matrices]
    squares, tokens = input_squares(weights, matrices, batches)

    parameters = dict(weights.module.named_parameters())
    heights = {name: torch.zeros_like(value) for name, value in squares.items()}  # columns of |W|, summed
    for matrix in matrices:
        for features, block in _blocks(weights, matrix, parameters[matrix.name]):
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
        if not math.isfinite(mean):  # the same on all processes
            raise RuntimeError(f"activations or weights of {layer.name} are not finite: no scores can be computed")
        for matrix in layer.matrices:
            for features, block in _blocks(weights, matrix, parameters[matrix.name]):
                norm = norms[matrix.name][features].to(block.device)
                above = block.abs().double().mul_(norm) > tau * mean
                counts[index] += above.sum().to(weights.device)
    *above_threshold, all_tokens = weights.comm.all_reduce(counts, "score").tolist()
    if not all_tokens:
        raise UserError(
            "data.train", "0 calibration tokens", "expected rows of which something is left after tokenizing"
        )
    ratios = tuple(count / max(1, number) for count, number in zip(above_threshold, entries, strict=True))
    return Scores("outlier", tau, model or fingerprint(weights), ratios, all_tokens)


def input_squares(
    weights: Weights, matrices: Sequence[Matrix], batches: Iterable[dict[str, Tensor] | None]
) -> tuple[dict[str, Tensor], int]:
    """Per input feature of every matrix the sum of its squares over this process's tokens that are not padding.

    Returns ({matrix name: float64, (C_in,)}, number of tokens). Arguments as for `score`.
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


def _blocks(weights: Weights, matrix: Matrix, parameter: nn.Parameter) -> Iterator[tuple[slice, Tensor]]:
    """This process's interval of a matrix as blocks (any, features) of at most about _BLOCK entries.

    Yields the slice of input features that a block's columns are, and the block.
    """
    start, _ = weights.interval(parameter)
    width = matrix.shape[1]
    flat = weights.local(parameter).to(weights.device)  # DeepSpeed may keep the shards on the CPU
    position = 0
    while position < len(flat):
        row, column = divmod(start + position, width)
        rows = min((len(flat) - position) // width, max(1, _BLOCK // width)) if column == 0 else 0
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


def _is_ratio(value: Any) -> bool:
    """Whether a value from JSON is a number that a float can hold, finite and not below 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def ratios_of(scores: str | Path | Scores | Sequence[float], weights: Weights, n_layers: int) -> Sequence[float]:
    """One number >= 0 a layer, from a file of scores (refused for another model), `Scores`, or the numbers themselves.

    Raises UserError (``sampling.scores``). Collective for a file.
    """
    if isinstance(scores, str | Path):
        scores = Scores.read(Path(scores))
        scores.check(fingerprint(weights), n_layers)
    ratios = importance(scores.metric, n_layers, scores.layers) if isinstance(scores, Scores) else scores
    if len(ratios) != n_layers:
        raise UserError(_KEY, f"{len(ratios)} ratios", f"expected one for each of the {n_layers} layers")
    return ratios
