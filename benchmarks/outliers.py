"""How stable are the layers' outlier ratios D? SmolLM2-135M over three calibration sets, three sizes, nine thresholds.

The paper's Figure 2 shows D of LLaMA2-7B and Mistral-7B over one set; its Table 11 varies tau.

    python -m benchmarks.outliers --output benchmarks/results/DATE-outliers-cpu.md
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ows_ds.bench.report import facts, heading, sections
from ows_ds.data.batches import collate
from ows_ds.data.encode import encode
from ows_ds.data.rows import load_rows
from ows_ds.data.samples import smollm2, word_problems
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated
from ows_ds.importance.outliers import outlier_scores_of
from ows_ds.importance.probabilities import probabilities
from ows_ds.model.layers import find_layers
from ows_ds.tables import Table, png

SETS = {"word problems": "gsm_symbolic", "sums": "chain_sum", "family": "family_relationships"}
SIZES = (8, 32, 128)  # rows
TAUS = (3, 5, 7, 9, 11, 13, 15, 17, 19)
TAU, GAMMA = 13, 5  # what a run uses

Ratios = dict[tuple[str, int, int], list[float]]  # by set, rows and tau


def batches(tokenizer: Any, file: Path, rows: int) -> Iterator[dict[str, Tensor]]:
    """Calibration batches of 8 rows."""
    found = [encode(row, tokenizer, 256) for row in load_rows(str(file))[:rows]]
    for start in range(0, len(found), 8):
        yield collate([[row] for row in found[start : start + 8]], tokenizer.pad_token_id)


def measure(folder: Path) -> Ratios:
    """D of every layer for every set, size and threshold."""
    path = smollm2(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights, layers, found = Replicated(model, Communicator()), find_layers(model), Ratios()
    for name, task in SETS.items():
        file, *_ = word_problems(folder / task, max(SIZES), 1, 0, task=task)
        for rows in SIZES:
            for scores in outlier_scores_of(weights, layers, list(batches(tokenizer, file, rows)), TAUS, "model"):
                found[name, rows, int(scores.tau)] = list(scores.layers)
    return found


def compare(one: list[float], other: list[float]) -> tuple[float, float]:
    """Correlation of two distributions over layers, and how many of gamma layers a draw takes elsewhere on average."""
    p, q = (np.asarray(probabilities(ratios, GAMMA)) for ratios in (one, other))
    return float(np.corrcoef(one, other)[0, 1]), float(np.abs(p - q).sum() / 2)


def rows_of(found: Ratios) -> list[Table]:
    """Over sets, sizes and thresholds."""
    most = max(SIZES)

    def table(title: str, pairs: Mapping[str, tuple[list[float], list[float]]]) -> Table:
        cells = [[name, *(f"{value:.3f}" for value in compare(*pair))] for name, pair in pairs.items()]
        return Table(title, ["", "correlation of D", f"of {GAMMA} layers, drawn elsewhere"], cells)

    sets = {f"{a} and {b}": (found[a, most, TAU], found[b, most, TAU]) for a, b in itertools.combinations(SETS, 2)}
    sizes = {
        f"{name}: {rows} and {most} rows": (found[name, rows, TAU], found[name, most, TAU])
        for name in SETS
        for rows in SIZES[:-1]
    }
    first = next(iter(SETS))
    taus = {f"{first}: {tau} and {TAU}": (found[first, most, tau], found[first, most, TAU]) for tau in TAUS}
    return [
        table(f"calibration sets, {most} rows, tau {TAU}", sets),
        table(f"calibration sizes, tau {TAU}", sizes),
        table(f"thresholds, {most} rows", taus),
    ]


def plot(found: Ratios, path: Path) -> None:
    """The share of D that each layer has: a panel a calibration set, a line a threshold."""
    with png(path, 10.8, 3.4, 1, len(SETS)) as figure:
        for axes, name in zip(figure.axes, SETS, strict=True):
            for number, tau in enumerate(TAUS):
                ratios = np.asarray(found[name, max(SIZES), tau])
                color = (0.15, 0.35, 0.65, 0.25 + 0.75 * number / len(TAUS))
                axes.plot(100 * ratios / ratios.sum(), color=color, lw=1.2, label=f"tau {tau}")
            axes.set(title=name, xlabel="layer", ylim=(0, None))
            axes.grid(alpha=0.3)
        figure.axes[0].set_ylabel("share of all layers' D [%]")
        figure.axes[-1].legend(frameon=False, fontsize=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="file of the report; a picture lies beside it")
    output = parser.parse_args().output
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    plot(found, output.with_suffix(".png"))
    command = shlex.join(["python", "-m", "benchmarks.outliers", *sys.argv[1:]])
    lines = heading("Outlier ratios of SmolLM2-135M", facts(command, 1))
    lines += ["", "Correlation is Pearson's, over the 30 layers. The last column is half the sum of |p - q|."]
    lines += [*sections(rows_of(found)), "", f"![D over layers]({output.with_suffix('.png').name})"]
    output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
