"""New projectors: time at LLaMA 2 7B's shapes against an exact SVD, and the energy they keep of real gradients.

Energy of Q is ||G Q||^2, given as a share of what the exact top-r subspace keeps. Gradients are those of SmolLM2-135M
on generated word problems, every matrix of 5 of its 30 layers.

    python benchmarks/refresh.py --output benchmarks/results/DATE-refresh-cpu.md
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ows_ds.bench.report import facts, heading, sections
from ows_ds.bench.worker import timed
from ows_ds.data.batches import collate
from ows_ds.data.encode import encode
from ows_ds.data.rows import load_rows
from ows_ds.data.samples import smollm2, word_problems
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated
from ows_ds.model.layers import find_layers
from ows_ds.optim.projection import (
    exact_projector,
    find_projector,
    is_tall,
    leading,
    low_rank_gradient,
    orthonormal,
    start_basis,
)
from ows_ds.optim.sizes import sketch_width
from ows_ds.tables import Table
from ows_ds.train.loss import token_losses

SHAPES = {"4096 x 4096": (4096, 4096), "11008 x 4096": (11008, 4096)}  # of LLaMA 2 7B, the latter also transposed
TOKENS = 512  # a gradient's rank is at most the number of its tokens


def randomized_projector(gradient: Tensor, rank: int, seed: int, previous: Tensor | None = None) -> Tensor:
    """As OWS finds it by default."""
    return find_projector(gradient, rank, "randomized", seed, previous)


def times(shape: tuple[int, int], rank: int, rounds: int) -> dict[str, float]:
    """Seconds for a projector of a random gradient; medians of ``rounds``, of an exact SVD one."""
    noise = torch.Generator().manual_seed(0)
    gradient = torch.randn(shape[0], TOKENS, generator=noise) @ torch.randn(TOKENS, shape[1], generator=noise)
    first = randomized_projector(gradient, rank, 0)
    ways: dict[str, Callable[[], Any]] = {
        "cold": lambda: randomized_projector(gradient, rank, 1),
        "warm": lambda: randomized_projector(gradient, rank, 1, first),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            found[name].append(timed(work))
    exact = timed(lambda: exact_projector(gradient, rank))
    return {"exact": exact, **{name: statistics.median(some) for name, some in found.items()}}


def gradients(layers: Sequence[int], sequences: int) -> list[dict[str, Tensor]]:
    """Two batches' gradients of every matrix of these layers of SmolLM2, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = smollm2(Path(folder) / "model")
        train, _ = word_problems(Path(folder) / "data", train=2 * sequences, held_out=1, seed=0)
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
        rows = [encode(row, tokenizer, 512) for row in load_rows(str(train))]
    weights = Replicated(model.requires_grad_(False), Communicator())
    parts = find_layers(model)
    matrices = [m.name for i in layers for m in parts.layers[i].matrices]
    for name in matrices:
        model.get_parameter(name).requires_grad_(True)
    found = []
    for some in (rows[:sequences], rows[sequences:]):
        token_losses(weights, collate([[row] for row in some], tokenizer.pad_token_id or 0)).backward()  # type: ignore[no-untyped-call]
        found.append({name: model.get_parameter(name).grad.clone() for name in matrices})
        model.zero_grad()
    return found


def kept(gradient: Tensor, projector: Tensor, exact: Tensor) -> float:
    """The share of the exact subspace's energy."""
    found, most = (float(low_rank_gradient(gradient, q.float()).double().square().sum()) for q in (projector, exact))
    return found / most


def sketched(first: Tensor, second: Tensor, rank: int) -> Tensor:
    """The projector of two passes of sketches, as `ows_ds.optim.refresh.Sketch` takes them, of two batches or one."""
    tall = [g if is_tall(g.shape) else g.T for g in (first, second)]
    width = sketch_width(rank, min(first.shape))
    basis = orthonormal(tall[0] @ start_basis(tall[0].shape[1], width, 0))[0]
    return leading(tall[1].T @ basis, rank)


def projector_energy(batches: Sequence[dict[str, Tensor]], rank: int) -> dict[str, list[float]]:
    """By way: the share that each matrix's projector keeps."""
    found: dict[str, list[float]] = {}
    for name, before in batches[0].items():
        gradient = batches[1][name]
        exact = exact_projector(gradient, rank)
        ways = {
            "from noise": randomized_projector(gradient, rank, 0),
            "from the projector of another batch": randomized_projector(
                gradient, rank, 0, randomized_projector(before, rank, 0)
            ),
            "sketches, both of this batch": sketched(gradient, gradient, rank),
            "sketches, the first of another batch": sketched(before, gradient, rank),
        }
        for way, projector in ways.items():
            found.setdefault(way, []).append(kept(gradient, projector, exact))
    return found


def report(measured: dict[str, dict[str, float]], shares: dict[str, list[float]], lines: list[str]) -> str:
    """Markdown."""
    times = []
    for shape, one in measured.items():
        exact, cold, warm = one["exact"], one["cold"], one["warm"]
        row = [f"{exact:.1f}", f"{cold:.2f}", f"{exact / cold:.0f}", f"{warm:.2f}", f"{exact / warm:.0f}"]
        times.append([shape, *row])
    head = ["gradient", "exact SVD [s]", "from noise [s]", "x faster", "from the previous projector [s]", "x faster"]
    kept = [[way, f"{min(some):.5f}", f"{statistics.mean(some):.5f}"] for way, some in shares.items()]
    shown = [
        Table("time of a projector", head, times),
        Table("energy kept, as a share of the exact subspace's", ["projector", "least of all matrices", "mean"], kept),
    ]
    return "\n".join([*lines, *sections(shown)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=128, help="of the projectors (128)")
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken (3)")
    parser.add_argument("--layers", type=int, nargs="*", default=[0, 7, 14, 22, 29], help="of SmolLM2 (5 of 30)")
    parser.add_argument("--sequences", type=int, default=16, help="in a batch (16)")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES), help="to time (all)")
    parser.add_argument("--output", type=Path, help="file for the tables")
    args = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    torch.set_num_threads(2)
    command = shlex.join(["python", "benchmarks/refresh.py", *(sys.argv[1:] if arguments is None else arguments)])
    known = facts(command, 1)
    measured = {name: times(SHAPES[name], args.rank, args.rounds) for name in args.shapes}
    shares = projector_energy(gradients(args.layers, args.sequences), args.rank)
    count = len(next(iter(shares.values())))
    lines = heading("Refresh of projectors", known, ", on 2 threads")
    lines += [f"* rank {args.rank}, float32; {args.sequences} sequences a batch; {count} matrices"]
    text = report(measured, shares, lines)
    print(text)
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
