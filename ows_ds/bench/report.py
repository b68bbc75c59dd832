"""What a study found, as tables and pictures."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ows_ds import tables
from ows_ds.bench.statistics import describe, t_test
from ows_ds.bench.study import Run, Study, choose, size
from ows_ds.files import atomic_write
from ows_ds.importance.plot import plot
from ows_ds.importance.scores import Scores
from ows_ds.tables import Table

METRICS = {"accuracy": "right answers [%]", "loss": "loss on test"}
_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "galore-torch", "reasoning-gym", "scipy")
_WINDOW = 0.05  # of the steps: half the window that the training loss is averaged over
Result = Mapping[str, Any]


def facts(command: str, world_size: int) -> dict[str, Any]:
    """When, with what and on what."""
    versions = {"python": platform.python_version()}
    for name in ("ows_ds", *_PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    hardware = f"{os.cpu_count()} cores of {_processor()}, {memory:.0f} GiB, {', '.join(gpus) or 'no GPU'}"
    date = datetime.now(timezone.utc).date().isoformat()
    return {"date": date, "command": command, "processes": world_size, "hardware": hardware, "versions": versions}


def heading(title: str, known: Mapping[str, Any], processes: str = "", threads: str = "") -> list[str]:
    """Lines of Markdown that say what `facts` has found. processes, threads: behind the command and the hardware."""
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    return [
        f"# {title}, {known['date']}",
        "",
        f"* command: `{known['command']}`{processes}",
        f"* hardware: {known['hardware']}{threads}",
        f"* versions: {versions}",
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def summarize(plan: Study, base: Result, results: Mapping[Run, Result], facts: Mapping[str, Any]) -> dict[str, Any]:
    """quality.json: statistics of every variant at its chosen learning rate, over the seeds that are complete.

    Accuracies are in percent, losses in nats per token. mean, std (n - 1), t and p are null where there is none; t and
    p compare with the baseline, t > 0 where the variant's numbers are the larger ones.
    """
    chosen_on = {run: result["chosen_on"] for run, result in results.items()}
    variants: dict[str, Any] = {}
    for name, variant in plan.variants.items():
        lr = choose(plan, name, chosen_on)
        seeds = [seed for seed in plan.seeds if lr is not None and Run(name, lr, seed) in results]
        found = [results[Run(name, lr, seed)] for seed in seeds if lr is not None]
        tried = [[rate, chosen_on.get(Run(name, rate, plan.seeds[0]))] for rate in variant.lrs]
        variants[name] = {
            "lr": lr,
            "lr_at_edge": len(variant.lrs) > 1 and lr in (variant.lrs[0], variant.lrs[-1]),
            "lrs_tried": [{"lr": rate, "loss_on_eval": loss} for rate, loss in tried],
            "seeds": seeds,
            "tokens": [result["tokens"] for result in found],
            "seconds": [round(result["seconds"], 3) for result in found],
            "loss": _metric([result["loss"] for result in found]),
            "accuracy": _metric([_percent(result) for result in found]) if plan.accuracy else None,
        }
    for name, variant in variants.items():
        for metric in METRICS:
            if variant[metric] is not None and plan.baseline not in (None, name):
                other = variants[str(plan.baseline)][metric]
                t, p = t_test(variant[metric]["values"], other["values"])
                variant[metric] |= {"t": t, "p": p}
    return {
        "format": 1,
        **facts,
        "runs": size(plan),
        "runs_complete": len(results),
        "seeds": list(plan.seeds),
        "baseline": plan.baseline,
        "rows_answered": base["rows"],
        "before": {"loss": base["loss"], "accuracy": _percent(base) if plan.accuracy else None},
        "variants": variants,
    }


def _metric(values: list[float | None]) -> dict[str, Any]:
    mean, std = describe(values)
    return {"values": values, "mean": mean, "std": std, "t": None, "p": None}


def _percent(result: Result) -> float | None:
    return 100 * result["right"] / result["rows"] if result["rows"] else None


def _tables(summary: Mapping[str, Any]) -> list[Table]:
    """Everything that is missing says so."""
    tables = []
    total = len(summary["seeds"])
    for metric, what in METRICS.items():
        digits = 1 if metric == "accuracy" else 4
        before = summary["before"][metric]
        if all(variant[metric] is None for variant in summary["variants"].values()):
            continue
        title = f"{what}, {_number(before, digits)} before training"
        rows = []
        for name, variant in summary["variants"].items():
            one = variant[metric]
            rows.append(
                [
                    name,
                    "n/a" if variant["lr"] is None else f"{variant['lr']:g}" + ("*" if variant["lr_at_edge"] else ""),
                    f"{len(variant['seeds'])} of {total}",
                    f"{_number(one['mean'], digits)} ± {_number(one['std'], digits)}",
                    "baseline" if name == summary["baseline"] else _number(one["t"], 2),
                    "" if name == summary["baseline"] else "n/a" if one["p"] is None else f"{one['p']:.2g}",
                ]
            )
        tables.append(Table(title, ["variant", "lr", "seeds", "mean ± std", "t", "p"], rows))
    return tables


def _number(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know to read the tables rightly."""
    notes = []
    if summary["runs_complete"] < summary["runs"]:
        notes.append(f"Not complete: {summary['runs_complete']} of {summary['runs']} runs.")
    variants = summary["variants"].values()
    if any(variant["lr_at_edge"] for variant in variants):
        notes.append("* The learning rate is at an end of those that were tried; a better one may lie beyond.")
    if any(None in variant["loss"]["values"] for variant in variants):
        notes.append("A run ended without a finite loss; its variant has no mean.")
    if summary["baseline"] is not None:
        notes.append(
            f"t, p: independent samples t-test over seeds against {summary['baseline']}; t > 0: larger than there. "
            "n/a: fewer than two seeds on a side, or no variation."
        )
    if any(len(variant["lrs_tried"]) > 1 for variant in variants):
        notes.append("Learning rates are chosen on data.eval at the first seed; the tables are on test.")
    return notes


def terminal(summary: Mapping[str, Any]) -> str:
    """The tables for a terminal of 80 columns; colours only where there is one."""
    return tables.terminal(_tables(summary), _notes(summary))


def markdown(summary: Mapping[str, Any]) -> str:
    """quality.md."""
    lines = heading("Quality", summary, f", {summary['processes']} process(es)")
    if summary["rows_answered"]:
        lines.append(f"* right answers: of {summary['rows_answered']} rows of test, generated greedily")
    for one in _tables(summary):
        lines += ["", f"## {one.title[0].upper()}{one.title[1:]}", "", *tables.markdown(one)]
    grids = [
        [name, f"{one['lr']:g}", _number(one["loss_on_eval"], 4), "chosen" if one["lr"] == variant["lr"] else ""]
        for name, variant in summary["variants"].items()
        if len(variant["lrs_tried"]) > 1
        for one in variant["lrs_tried"]
    ]
    if grids:
        tried = Table("", ["variant", "lr", "loss on data.eval", ""], grids)
        lines += ["", f"## Learning rates tried, seed {summary['seeds'][0]}", "", *tables.markdown(tried)]
    lines += ["", *(f"* {note.removeprefix('* ')}" for note in _notes(summary))]
    return "\n".join(lines) + "\n"


def write(plan: Study, summary: Mapping[str, Any], output: Path) -> None:
    """quality.json, quality.md, loss.png and scores.png in ``output``, each complete or as it was before."""
    for name, text in {
        "quality.json": json.dumps(summary, indent=2, allow_nan=False) + "\n",
        "quality.md": markdown(summary),
    }.items():
        with atomic_write(output / name) as partial:
            partial.write_text(text, encoding="utf-8")
    curves = {
        name: [_losses(output / Run(name, variant["lr"], seed).folder) for seed in variant["seeds"]]
        for name, variant in summary["variants"].items()
        if variant["seeds"]
    }
    if curves:
        _plot_losses(curves, output / "loss.png")
    found = {(s.metric, s.tau): s for s in map(Scores.read, sorted(output.glob("runs/*/*/scores.json")))}
    if found:
        taus = {tau for metric, tau in found if metric == "outlier"}
        model = Path(plan.recipe["model"]["path"]).name
        labelled = [(model if len(taus) < 2 else f"tau = {tau:g}", found[m, tau]) for m, tau in sorted(found)]
        plot(labelled, output / "scores.png")


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _losses(folder: Path) -> list[float | None]:
    """Training loss of every step; None where nothing trained."""
    return [record["loss"] for record in records(folder) if record["step"] > 0]


def smooth(losses: Sequence[float | None]) -> list[float | None]:
    """Mean over a window around each step, a tenth of the run wide, of the steps in it that have a loss."""
    reach = round(_WINDOW * len(losses))
    windows = (losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses)))
    known = ([loss for loss in window if loss is not None] for window in windows)
    return [statistics.fmean(window) if window else None for window in known]


def _plot_losses(curves: Mapping[str, list[list[float | None]]], path: Path) -> None:
    """Training loss over steps, a line a variant: the mean over seeds, in a band from the least to the largest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, seeds) in enumerate(curves.items()):
        smoothed = list(zip(*map(smooth, seeds), strict=False))
        points = [(step, [v for v in values if v is not None]) for step, values in enumerate(smoothed, start=1)]
        points = [(step, values) for step, values in points if values]
        steps = [step for step, _ in points]
        style = ("-", "--", ":")[number // 10 % 3]  # there are ten colours
        [line] = axes.plot(steps, [statistics.fmean(v) for _, v in points], style, linewidth=1.5, label=name)
        axes.fill_between(
            steps, [min(v) for _, v in points], [max(v) for _, v in points], color=line.get_color(), alpha=0.15, lw=0
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss [nats per token]")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2 if len(curves) > 5 else 1)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png")
