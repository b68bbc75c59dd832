"""How far bfloat16 training drifts from float32 training with the same data, layer sets and projectors, on the CPU.

Every method runs in float32 and in bfloat16, from the same weights (a small LLaMA, trained briefly in float32 and
rounded to bfloat16), over the same batches of bytes of generated word problems, with the same layer sets and the
projectors that its float32 run found. With U = W_T - W_0 of a matrix the drift is |U - U_float32| / |U_float32|
(Frobenius). Weights are measured as they would be saved: merged, in the run's number format.

    python benchmarks/bf16_drift.py --json drift.json --plot drift.png
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as tf
from galore_torch import GaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector
from torch import Tensor, nn

import ows_ds.optim.refresh
from ows_ds.data.samples import word_problems
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.merging import add_low_rank
from ows_ds.distributed.weights import Replicated
from ows_ds.importance.probabilities import probabilities
from ows_ds.optim.ows import OWS
from ows_ds.optim.sampling import Sampler
from ows_ds.tables import png

BATCH, LENGTH, VOCABULARY = 4, 32, 256  # sequences, tokens, bytes
SEED = 0
Weights = dict[str, Tensor]
Method = tuple[Callable[[Tensor, float], float], Callable[[], None]]
"""A step, (token ids, learning rate) -> loss, and what merges before weights are looked at."""


def text() -> tuple[Tensor, Tensor]:
    """Bytes of word problems with worked answers, to train on and held out: 1-D, uint8."""
    with tempfile.TemporaryDirectory() as folder:
        files = word_problems(Path(folder) / "problems", train=2000, held_out=200, seed=SEED)
        parts = []
        for file in files:
            rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
            joined = "\n\n".join(message["content"] for row in rows for message in row)
            parts.append(torch.frombuffer(bytearray(joined, "utf-8"), dtype=torch.uint8))
    return parts[0], parts[1]


def batch(data: Tensor, number: int) -> Tensor:
    """Token ids (BATCH, LENGTH) that depend on ``number`` alone."""
    starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(number))
    return torch.stack([data[start : start + LENGTH] for start in starts.tolist()]).long()


def model_of(args: argparse.Namespace, dtype: torch.dtype, weights: Weights | None = None) -> Any:
    """A LLaMA of ``dtype``, with random weights or with ``weights``."""
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=args.hidden, intermediate_size=11 * args.hidden // 4,
        num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model = tf.AutoModelForCausalLM.from_config(config).to(dtype)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Mean cross entropy of the next byte: float32, ()."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def start(args: argparse.Namespace, data: Tensor) -> Weights:
    """What all runs begin from: float32 weights that bfloat16 holds exactly, trained for ``args.pretrain`` steps."""
    model = model_of(args, torch.float32)
    step, _ = plain(model, functools.partial(torch.optim.AdamW, model.parameters()), False)
    for number in range(args.pretrain):
        step(batch(data, 1_000_000 + number), 3e-3 * (1 - number / args.pretrain))
    return {name: tensor.to(torch.bfloat16).float() for name, tensor in model.state_dict().items()}


# ---- methods


class Mastered(Replicated):
    """Weights with float32 masters beside them, as mixed precision has them: merges add up in these."""

    def __init__(self, module: nn.Module, comm: Communicator) -> None:
        super().__init__(module, comm)
        self.masters = {parameter: parameter.detach().float() for parameter in module.parameters()}

    def merge(
        self, parameter: nn.Parameter, left: Tensor, right: Tensor, decay: float, noise: str | None = None
    ) -> None:
        master = self.masters[parameter]
        add_low_rank(master.view(-1), 0, left, right, decay)
        parameter.data.copy_(master)


def ours(
    model: Any, args: argparse.Namespace, gamma: int, rank: int | None, rounding: str = "nearest", master: bool = False
) -> Method:
    """`OWS`, ``gamma`` layers a period. rank: None trains them at full rank (LISA)."""
    optimizer = OWS(
        (Mastered if master else Replicated)(model, Communicator()),
        scores=[1.0] * args.layers, gamma=gamma, scheme="fixed", period=args.period, rank=rank,
        update_proj_gap=args.update_proj_gap, projector="svd", merge_rounding=rounding, seed=SEED,
    )  # fmt: skip

    def step(ids: Tensor, lr: float) -> float:
        optimizer.param_groups[0]["lr"] = lr
        return float(optimizer.train_step([lambda: loss_of(model, ids)]))

    return step, optimizer.merge


def plain(
    model: Any, make: Callable[..., torch.optim.Optimizer], master: bool, before: Callable[[], None] = lambda: None
) -> Method:
    """A torch optimizer, ``make()``, on the weights themselves; or on float32 masters of them, in their order.

    before: called before each step.
    """
    parameters = list(model.parameters())
    optimizer = make(lr=0.0)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len(parameters)
    if master:
        for group in optimizer.param_groups:
            group["params"] = [p.detach().float() for p in group["params"]]
    masters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(ids: Tensor, lr: float) -> float:
        before()
        loss = loss_of(model, ids)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr
        if master:
            for parameter, copy in zip(trained, masters, strict=True):
                copy.grad = None if parameter.grad is None else parameter.grad.float()
        optimizer.step()
        model.zero_grad()
        if master:
            for parameter, copy in zip(trained, masters, strict=True):
                parameter.data.copy_(copy)
        return float(loss.detach())

    return step, lambda: None


def galore_torch(model: Any, args: argparse.Namespace, master: bool = False) -> Method:
    """GaLore's own AdamW: the layers' matrices in subspaces, everything else at full rank."""
    matrices = [p for name, p in model.named_parameters() if is_layers(name) and p.dim() == 2]
    others = [p for name, p in model.named_parameters() if not (is_layers(name) and p.dim() == 2)]
    low_rank = {"rank": args.rank, "update_proj_gap": args.update_proj_gap, "scale": 1.0, "proj_type": "std"}
    groups = [{"params": matrices, **low_rank}, {"params": others}]
    return plain(model, functools.partial(GaLoreAdamW, groups, eps=1e-8, no_deprecation_warning=True), master)


def lisa(model: Any, args: argparse.Namespace, master: bool = False) -> Method:
    """LISA as LMFlow's callback does it: one AdamW over all weights, and layers that are frozen and thawed.

    Embedding, head and final norm always train. A frozen layer has no gradient, so that AdamW skips it; its moments
    stay until it returns.
    """
    sampler = Sampler(probabilities([1.0] * args.layers, args.gamma), "fixed", SEED)
    steps = itertools.count()

    def switch() -> None:
        if next(steps) % args.period == 0:
            active = [f"layers.{index}." for index in sampler.draw()]
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not is_layers(name) or any(layer in name for layer in active))

    make = functools.partial(torch.optim.AdamW, list(model.parameters()), weight_decay=0.0)
    return plain(model, make, master, before=switch)


def is_layers(name: str) -> bool:
    """Whether a weight belongs to a transformer layer."""
    return ".layers." in name


def methods(args: argparse.Namespace) -> dict[str, tuple[Callable[..., Method], dict[str, dict[str, Any]]]]:
    """By title: what makes the method, and its variants in bfloat16, by what they do about rounding."""
    masters: dict[str, Any] = {"float32 masters": {"master": True}}
    merges = {"nearest merge": {}, "stochastic merge": {"rounding": "stochastic"}, **masters}
    no_master = {"no masters": {}, **masters}
    return {
        "OWS": (functools.partial(ours, gamma=args.gamma, rank=args.rank), merges),
        "OWS, all layers": (functools.partial(ours, gamma=args.layers, rank=args.rank), merges),
        "GaLore (galore_torch)": (galore_torch, no_master),
        "LISA": (functools.partial(ours, gamma=args.gamma, rank=None), {"masters while active": {}}),
        "LISA (LMFlow's callback)": (lisa, no_master),
    }


# ---- measuring


@contextmanager
def same_projectors(found: dict[int, Any]) -> Iterator[None]:
    """Within it projectors are those of ``found``; what is not there is computed and kept there."""
    exact, theirs, calls = ows_ds.optim.refresh.find_range, GaLoreProjector.get_orthogonal_matrix, itertools.count()

    def find(gradient: Tensor, rank: int, method: str, seed: int, *more: Any) -> Any:
        if seed not in found:  # it stands for step and matrix
            found[seed] = exact(gradient, rank, method, seed, *more)
        return found[seed]

    def get(self: Any, gradient: Tensor, rank: int, type: str) -> Tensor:
        call = next(calls)
        if call not in found:
            found[call] = theirs(self, gradient, rank, type)
        return found[call].to(gradient.dtype)

    with (
        mock.patch("ows_ds.optim.refresh.find_range", find),
        mock.patch.object(GaLoreProjector, "get_orthogonal_matrix", get),
    ):
        yield


def train(
    args: argparse.Namespace, begin: Weights, data: Tensor, make: Callable[..., Method], dtype: torch.dtype, **more: Any
) -> tuple[dict[int, Weights], float]:
    """The matrices' updates U, float32, after every ``args.every`` steps, the last weights under 0, and the mean
    training loss of the last tenth of the steps."""
    model = model_of(args, dtype, begin)
    step, merge = make(model, args, **more)
    losses, updates = [], {}
    for number in range(1, args.steps + 1):
        losses.append(step(batch(data, number), args.lr * (1 - (number - 1) / args.steps)))
        if number % args.every == 0 or number == args.steps:
            merge()
            updates[number] = {n: p.detach().float() - begin[n] for n, p in model.named_parameters() if p.dim() == 2}
    last = losses[-max(1, args.steps // 10) :]
    updates[0] = {name: p.detach().float() for name, p in model.named_parameters()}
    return updates, sum(last) / len(last)


def compare(updates: dict[int, Weights], exact: dict[int, Weights]) -> dict[str, list[float]]:
    """Drift by measured step: mean and worst of the layers' matrices, worst of embedding and head, and how large the
    layers' updates are in mean."""
    result: dict[str, list[float]] = {"step": [], "mean": [], "worst": [], "outside": [], "size": []}
    for step in sorted(set(exact) - {0}):
        drift = {
            name: (float((updates[step][name] - u).norm() / u.norm()), float(updates[step][name].norm() / u.norm()))
            for name, u in exact[step].items()
            if u.any()
        }
        inside = [pair for name, pair in drift.items() if is_layers(name)]
        result["step"].append(step)
        result["mean"].append(sum(d for d, _ in inside) / len(inside))
        result["worst"].append(max(d for d, _ in inside))
        result["outside"].append(max(d for name, (d, _) in drift.items() if not is_layers(name)))
        result["size"].append(sum(s for _, s in inside) / len(inside))
    return result


def settle() -> None:
    """Make steps fast in this process: one thread, as methods run side by side; numbers near 0 become 0."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def study(args: argparse.Namespace, begin: Weights, data: Tensor, held_out: Tensor, title: str) -> dict[str, Any]:
    """One method in float32 and in all its variants in bfloat16."""
    settle()
    make, variants = methods(args)[title]
    found: dict[int, Tensor] = {}

    def evaluate(weights: Weights) -> float:
        model = model_of(args, torch.float32, weights)
        with torch.no_grad():
            return sum(float(loss_of(model, batch(held_out, number))) for number in range(32)) / 32

    def run(label: str, dtype: torch.dtype, **more: Any) -> tuple[dict[int, Weights], float]:
        began = time.monotonic()
        with same_projectors(found):
            result = train(args, begin, data, make, dtype, **more)
        print(f"{title}, {label}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return result

    exact, exact_loss = run("float32", torch.float32)
    exact_held_out = evaluate(exact[0])
    rounded = {step: {n: (begin[n] + u).to(torch.bfloat16).float() - begin[n] for n, u in updates.items()}
               for step, updates in exact.items() if step}  # fmt: skip
    results = {
        "float32, rounded when measured": {
            **compare(rounded, exact),
            "train_loss": 0.0,
            "held_out_loss": evaluate({n: w.to(torch.bfloat16).float() for n, w in exact[0].items()}) - exact_held_out,
        }
    }
    for label, more in variants.items():
        updates, loss = run(f"bfloat16, {label}", torch.bfloat16, **more)
        results[f"bfloat16, {label}"] = {
            **compare(updates, exact),
            "train_loss": loss - exact_loss,
            "held_out_loss": evaluate(updates[0]) - exact_held_out,
        }
    lengths = [float(u.norm() / begin[n].norm()) for n, u in exact[args.steps].items() if is_layers(n)]
    return {
        "train_loss": exact_loss,
        "held_out_loss": exact_held_out,
        "held_out_loss_before": evaluate(begin),
        "relative_update": sum(lengths) / len(lengths),
        "variants": results,
    }


# ---- output


def table(results: dict[str, Any], steps: Sequence[int]) -> str:
    """Markdown: drift in percent, differences of losses in units of 0.001."""
    head = ["method", "weights"]
    head += itertools.chain(*([f"drift after {step:,} steps: mean", "worst"] for step in steps))
    head += ["embedding, head", "size of the update", "training loss", "held-out loss"]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    for title, result in results.items():
        cells = [title, "float32", *["0"] * (2 * len(steps) + 1), f"{100 * result['relative_update']:.1f} % of W"]
        lines.append(f"| {' | '.join(cells)} | {result['train_loss']:.4f} | {result['held_out_loss']:.4f} |")
        for label, found in result["variants"].items():
            at = [found["step"].index(step) for step in steps]
            cells = [f"{100 * found[kind][i]:.1f} %" for i in at for kind in ("mean", "worst")]
            cells += [f"{100 * found['outside'][-1]:.1f} %", f"{100 * found['size'][-1]:.1f} %"]
            cells += [f"{1000 * found[kind]:+.1f}e-3" for kind in ("train_loss", "held_out_loss")]
            lines.append(f"| | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Mean drift of the layers' matrices over the steps, a panel a method."""
    labels = list(dict.fromkeys(label for result in results.values() for label in result["variants"]))
    with png(path, 3.2 * len(results), 3.6, columns=len(results)) as figure:
        for axis, (title, result) in zip(figure.axes, results.items(), strict=True):
            for label, found in result["variants"].items():
                percent = [100 * value for value in found["mean"]]
                axis.plot(found["step"], percent, color=f"C{labels.index(label)}", marker=".", label=label)
            axis.set(title=title, xlabel="step", yscale="log")
            axis.sharey(figure.axes[0])
            axis.grid(alpha=0.3, which="both")
        figure.axes[0].set_ylabel("drift from float32 (% of the update)")
        lines = {line.get_label(): line for axis in figure.axes for line in axis.lines}
        figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=len(lines))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the table, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default, meaning in (
        ("steps", int, 2000, "optimizer steps"),
        ("every", int, 200, "steps between two measurements; each merges"),
        ("pretrain", int, 500, "steps in float32 before"),
        ("lr", float, 3e-4, "peak learning rate, linear to 0"),
        ("hidden", int, 128, "size of the model"),
        ("layers", int, 4, "of the model"),
        ("gamma", int, 2, "sampled layers"),
        ("period", int, 50, "steps between two draws"),
        ("rank", int, 16, "of the subspaces"),
        ("update-proj-gap", int, 200, "steps between two projectors"),
        ("workers", int, 2, "methods that run side by side, on one thread each"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{meaning} ({default})")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    args = parser.parse_args(arguments)

    began = time.monotonic()
    settle()
    data, held_out = text()
    run = functools.partial(study, args, start(args, data), data, held_out)
    titles = list(methods(args))
    if args.workers == 1:
        results = {title: run(title) for title in titles}
    else:
        with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
            results = dict(zip(titles, pool.map(run, titles), strict=True))
    measured = results[titles[0]]["variants"]["bfloat16, nearest merge"]["step"]
    print(table(results, sorted({measured[0], measured[-1]})))
    print(f"\n{time.monotonic() - began:.0f} s; held-out loss before: {results['OWS']['held_out_loss_before']:.4f}")
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
        args.json.write_text(json.dumps({"settings": settings, "methods": results}, indent=1) + "\n")
    if args.plot is not None:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
