"""How much the layers matter: the share of outliers in each (equation 2), computed on shards.

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
import inspect
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ows_ds.errors import UserError
from ows_ds.fingerprint import fingerprint
from ows_ds.layers import Matrix, ModelLayers
from ows_ds.weights import Weights

_KEY = "sampling.scores"
_BLOCK = 1 << 20  # entries of a weight whose float64 copy is made at once: small enough for a CPU's cache


@dataclass(frozen=True)
class Scores:
    """The content of ``scores.json``.

    metric: what was computed ("outlier": equation 2). tau: its threshold. model: fingerprint of the base model.
    layers: D of every layer, input side first, as a share (not percent). tokens: calibration tokens, masked ones
    left out. format: version of the file.
    """

    metric: str
    tau: float
    model: str
    layers: tuple[float, ...]
    tokens: int
    format: int = 1

    def write(self, path: Path) -> None:
        """Write as JSON; ``path`` is complete or as it was before."""
        with _beside(path) as temporary:
            temporary.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Read what `write` wrote. Raises UserError (``sampling.scores``) for anything else."""
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            right = f"give a file that can be read ({error.strerror}); `ows-ds score` writes one"
            raise UserError(_KEY, str(path), right) from error
        except ValueError as error:
            raise UserError(_KEY, str(path), f"give a JSON file that `ows-ds score` wrote ({error})") from error
        if not isinstance(data, dict) or data.get("format") != 1 or not {"layers", "model", "metric"} <= data.keys():
            raise UserError(_KEY, str(path), "give a file that `ows-ds score` wrote (scores of format 1)")
        for key, kind in (("metric", str), ("model", str), ("tokens", int), ("tau", (int, float))):
            if not isinstance(data.get(key), kind) or isinstance(data.get(key), bool):
                raise UserError(f"{_KEY}: {key}", data.get(key), f"compute {path} again with `ows-ds score`")
        layers = data["layers"]
        if not isinstance(layers, list) or not layers or not all(map(_is_ratio, layers)):
            raise UserError(f"{_KEY}: layers", layers, f"{path} must hold one finite number >= 0 for each layer")
        ratios = tuple(float(ratio) for ratio in layers)
        return cls(data["metric"], float(data["tau"]), data["model"], ratios, data["tokens"])

    def check(self, model_fingerprint: str, n_layers: int, tau: float) -> None:
        """Refuse (UserError) scores of another model, of another number of layers, or with another tau."""
        again = "compute the scores again with `ows-ds score`, or leave sampling.scores out"
        if len(self.layers) != n_layers:
            raise UserError(_KEY, f"scores of {len(self.layers)} layers", f"this model has {n_layers}; {again}")
        if self.model != model_fingerprint:
            short = f"scores of model {self.model[:12]}"
            raise UserError(_KEY, short, f"this model's weights are {model_fingerprint[:12]}; {again}")
        if self.tau != tau:
            raise UserError(_KEY, f"scores with tau {self.tau:g}", f"sampling.tau is {tau:g}; {again}")


def score(weights: Weights, layers: ModelLayers, batches: Iterable[dict[str, Tensor] | None], tau: float) -> Scores:
    """Equation 2 over this process's ``batches`` and all others'. Collective; the result is the same on all.

    batches: keyword arguments of the model's forward pass on its device, ``labels`` left out: input_ids (batch,
    length), attention_mask (batch, length), 0 where a token is padding; without it all count. Every process must give
    the same number of them (the forward pass is collective under ZeRO-3); one that runs out gives None.

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
        raise UserError("data.train", "0 calibration tokens", "give rows of which something is left after tokenizing")
    ratios = tuple(count / max(1, number) for count, number in zip(above_threshold, entries, strict=True))
    return Scores("outlier", tau, fingerprint(weights), ratios, all_tokens)


def input_squares(
    weights: Weights, matrices: Sequence[Matrix], batches: Iterable[dict[str, Tensor] | None]
) -> tuple[dict[str, Tensor], int]:
    """Per input feature of every matrix the sum of its squares over this process's tokens that are not padding.

    Returns ({matrix name: float64, (C_in,)}, number of tokens). Arguments as for `score`.
    """
    module = weights.module
    squares = {m.name: torch.zeros(m.in_features, dtype=torch.float64, device=weights.device) for m in matrices}
    kept = torch.empty(0, dtype=torch.int64, device=weights.device)  # the tokens of this batch, flattened
    positions = 0
    tokens = 0

    def add(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach()
        x = x.reshape(-1, x.shape[-1])
        if len(x) != positions:
            raise RuntimeError(f"the input of {name} has {len(x)} rows where the batch has {positions} tokens")
        x = x.index_select(0, kept)  # not a product with the mask: padding may be NaN
        x = x if x.dtype == torch.float64 else x.float()
        squares[name] += x.square().sum(0, dtype=torch.float64)

    extra = _without_needless_work(module.forward)
    training = [m for m in module.modules() if m.training]
    handles = []
    try:
        module.eval()
        for matrix in matrices:
            for name in matrix.modules:
                hook = functools.partial(add, matrix.name)
                handles.append(module.get_submodule(name).register_forward_pre_hook(hook))
        with torch.no_grad():
            for batch in batches:
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
    return squares, tokens


def _without_needless_work(forward: Callable[..., Any]) -> dict[str, Any]:
    """Arguments that spare the cache and the head's work on all positions but the last, where they are understood."""
    known = inspect.signature(forward).parameters
    return {key: value for key, value in (("use_cache", False), ("logits_to_keep", 1)) if key in known}


def _blocks(weights: Weights, matrix: Matrix, parameter: nn.Parameter) -> Iterator[tuple[slice, Tensor]]:
    """This process's interval of a matrix as blocks (any, features) of at most about _BLOCK entries.

    Yields the slice of input features that a block's columns are, and the block: a view of the weight.
    """
    start, _ = weights.interval(parameter)
    width = matrix.shape[1]
    flat = weights.local(parameter)
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


def plot(scores: list[tuple[str, Scores]], path: Path) -> None:
    """The distribution over layers as a PNG at ``path`` (complete or absent): the paper's Figure 2.

    scores: (label, scores) of one model, as bars, or of several, as lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 3.6), dpi=150, layout="constrained")  # not pyplot: no global state, no display
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, one in scores:
        percent = [100 * ratio for ratio in one.layers]
        if len(scores) == 1:
            axes.bar(range(len(percent)), percent, width=0.8, color="#3b6fb6", label=label)
        else:
            axes.plot(percent, marker="o", markersize=3.5, linewidth=1.5, label=label)
    taus = ", ".join(dict.fromkeys(f"{one.tau:g}" for _, one in scores))
    axes.set_title(f"Outlier ratio per layer (tau = {taus})" + (f": {scores[0][0]}" if len(scores) == 1 else ""))
    axes.set_xlabel("layer")
    axes.set_ylabel("outlier ratio [%]")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(scores) > 1:
        axes.legend(frameon=False)
    with _beside(path) as temporary:
        figure.savefig(temporary, format="png")


def strip(scores: Scores, height: int = 4) -> str:
    """The distribution over layers for a terminal: ``height`` lines of columns and one that numbers the layers."""
    top = max(scores.layers)
    width = 2 if len(scores.layers) <= 36 else 1
    eighths = [round(8 * height * ratio / top) if top else 0 for ratio in scores.layers]
    left = max(len(f"{100 * top:.2f} %"), 6)
    lines = []
    for line in range(height, 0, -1):
        label = f"{100 * top:.2f} %" if line == height else ""
        cells = ((" ▁▂▃▄▅▆▇█"[min(8, max(0, value - 8 * (line - 1)))]) for value in eighths)
        lines.append(f"{label:>{left}} │" + "".join(cell.ljust(width) for cell in cells).rstrip())
    numbers = "".join(str(layer).ljust(5 * width) for layer in range(0, len(scores.layers), 5)).rstrip()
    low = min(scores.layers)
    lines.append(f"{'layer':>{left}}  {numbers}")
    lines.append(
        f"{'':>{left}}  outliers above {scores.tau:g} times the mean: {100 * low:.3f} % (layer "
        f"{scores.layers.index(low)}) to {100 * top:.3f} % (layer {scores.layers.index(top)})"
    )
    return "\n".join(lines)


def _is_ratio(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A file next to ``path`` that becomes ``path`` when all went well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
