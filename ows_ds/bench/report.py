"""What a study found, as tables and pictures; and what all reports of a benchmark share."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ows_ds import tables
from ows_ds.bench.study import Run, Study, choose, size
from ows_ds.checkpoint import version
from ows_ds.files import write_text
from ows_ds.importance.plot import plot
from ows_ds.importance.scores import Scores
from ows_ds.tables import Table

METRICS = {"accuracy": ("right answers [%]", 1), "loss": ("loss on test", 4)}  # title, digits
_PACKAGES = (
    "ows_ds", "torch", "transformers", "accelerate", "deepspeed", "peft", "galore-torch", "reasoning-gym", "scipy"
)  # fmt: skip
SIGNIFICANT = 0.05
_NAME = 4.0, 8.0  # width of a letter and height of a name in `_plot_front`, in points
_WINDOW = 0.05  # of the steps: half the window that the training loss is averaged over
Values = Sequence[float | None]


# ---- all reports


def facts(command: str, world_size: int) -> dict[str, Any]:
    """Date, command, hardware and versions."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    processor = model[1].strip() if model else platform.machine()
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": command,
        "processes": world_size,
        "hardware": f"{os.cpu_count()} cores of {processor}, {memory:.0f} GiB, {', '.join(gpus) or 'no GPU'}",
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in _PACKAGES if (found := version(name)) is not None},
        },
    }


def heading(title: str, known: Mapping[str, Any], more: str = "") -> list[str]:
    """Lines of Markdown with `facts`. more: behind the command."""
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    command = f"* command: `{known['command']}`{more}"
    return [f"# {title}, {known['date']}", "", command, f"* hardware: {known['hardware']}", f"* versions: {versions}"]


def sections(shown: Iterable[Table]) -> list[str]:
    """Lines of Markdown, a section a table."""
    lines: list[str] = []
    for one in shown:
        lines += ["", f"## {one.title[0].upper()}{one.title[1:]}", "", *tables.markdown(one)]
    return lines


def cells(results: Mapping[str, Any], row: Callable[[Any], list[str]]) -> list[list[str]]:
    """A table's rows, a method each. row: the cells after the method's name."""
    return [[n, f"failed: {one['failed']}"] if "failed" in one else [n, *row(one)] for n, one in results.items()]


def write(output: Path, name: str, summary: Mapping[str, Any], lines: Iterable[str]) -> None:
    """NAME.json and NAME.md in ``output``."""
    write_text(output / f"{name}.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_text(output / f"{name}.md", "\n".join(lines) + "\n")


# ---- a study's numbers


def describe(values: Values) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1) over seeds, each None where there is none.

    A value of None is a run without a finite result; then there is no mean.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def t_test(values: Values, baseline: Values) -> tuple[float | None, float | None]:
    """t and two-sided p of the independent samples t-test (equal variances); t > 0: ``values`` are larger.

    (None, None) where a side has fewer than two values, or none vary.
    """
    from scipy import stats

    if None in (*values, *baseline) or min(len(values), len(baseline)) < 2 or len({*values}) == len({*baseline}) == 1:
        return None, None
    t, p = map(float, stats.ttest_ind(values, baseline, equal_var=True))
    return (t, p) if math.isfinite(t) and math.isfinite(p) else (None, None)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values of one family of tests, corrected so that one false finding among all of them is as rare as each said
    (Holm, Scand. J. Stat. 6, 1979)."""
    order = sorted((i for i, p in enumerate(values) if p is not None), key=lambda i: values[i] or 0.0)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * (values[i] or 0.0)))
        corrected[i] = largest
    return corrected


def summarize(
    plan: Study, base: Mapping[str, Any], results: Mapping[Run, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """quality.json: statistics of every variant at its chosen learning rate, over the seeds that are complete.

    Accuracies are in percent, losses in nats per token. mean, std (n - 1), t and p are null where there is none; t and
    p compare with the baseline, t > 0 where the variant's numbers are the larger ones; p is corrected by `holm` for the
    number of variants.
    """
    chosen_on = {run: result["chosen_on"] for run, result in results.items()}
    variants: dict[str, Any] = {}
    for name, variant in plan.variants.items():
        lr = choose(plan, name, chosen_on)
        runs = [] if lr is None else [Run(name, lr, seed) for seed in plan.seeds]
        found = {run.seed: results[run] for run in runs if run in results}
        accuracies = [_percent(one) for one in found.values()]
        variants[name] = {
            "lr": lr,
            "lr_at_edge": len(variant.lrs) > 1 and lr in (variant.lrs[0], variant.lrs[-1]),
            "lrs_tried": [
                {"lr": rate, "loss_on_eval": chosen_on.get(Run(name, rate, plan.seeds[0]))} for rate in variant.lrs
            ],
            "seeds": list(found),
            "tokens": [one["tokens"] for one in found.values()],
            "seconds": [round(one["seconds"], 3) for one in found.values()],
            "planned_bytes": max((one["planned_bytes"] for one in found.values()), default=None),
            "loss": _metric([one["loss"] for one in found.values()]),
            "accuracy": _metric(accuracies) if plan.accuracy else None,
        }
    for name, one in variants.items():
        for metric in METRICS if plan.baseline not in (None, name) else ():
            if one[metric] is not None:
                other = variants[str(plan.baseline)][metric]
                one[metric]["t"], one[metric]["p"] = t_test(one[metric]["values"], other["values"])
    for metric in METRICS:
        some = [one[metric] for one in variants.values() if one[metric] is not None]
        for each, p in zip(some, holm([one["p"] for one in some]), strict=True):
            each["p"] = p
    return {
        "format": 1,
        **facts,
        "runs": size(plan),
        "runs_complete": len(results),
        "hours": sum(one["seconds"] for one in results.values()) / 3600,
        "seeds": list(plan.seeds),
        "baseline": plan.baseline,
        "rows_answered": base["rows"],
        "before": {"loss": base["loss"], "accuracy": _percent(base) if plan.accuracy else None},
        "variants": variants,
    }


def _metric(values: Values) -> dict[str, Any]:
    mean, std = describe(values)
    return {"values": values, "mean": mean, "std": std, "t": None, "p": None}


def _percent(result: Mapping[str, Any]) -> float | None:
    return 100 * result["right"] / result["rows"] if result["rows"] else None


# ---- a study's tables and pictures


def _prefix(task: str) -> str:
    """What a title begins with. task: its name; "" where there is one."""
    return f"{task}: " if task else ""


def study_tables(summary: Mapping[str, Any], task: str = "") -> list[Table]:
    """One a metric, and what variants cost; n/a where something is missing. task: its name, where there are several."""
    found = []
    prefix = _prefix(task)
    for metric, (what, digits) in METRICS.items():

        def fixed(value: float | None, digits: int = digits) -> str:
            return tables.number(value, digits, fixed=True)

        rows = []
        for name, variant in summary["variants"].items():
            if (one := variant[metric]) is None:
                continue
            lr = "n/a" if variant["lr"] is None else f"{variant['lr']:g}" + ("*" if variant["lr_at_edge"] else "")
            seeds = f"{len(variant['seeds'])} of {len(summary['seeds'])}"
            compared = [fixed(one["t"], 2), "n/a" if one["p"] is None else f"{one['p']:.2g}"]
            compared = ["baseline", ""] if name == summary["baseline"] else compared
            rows.append([name, lr, seeds, f"{fixed(one['mean'])} ± {fixed(one['std'])}", *compared])
        if rows:
            title = f"{prefix}{what}, {fixed(summary['before'][metric])} before training"
            found.append(Table(title, ["variant", "lr", "seeds", "mean ± std", "t", "p"], rows))
    unit, sized = tables.size_in([one["planned_bytes"] for one in summary["variants"].values()])
    costs = [
        [name, sized(one["planned_bytes"]), tables.number(describe(one["seconds"])[0], 3)]
        for name, one in summary["variants"].items()
        if one["seeds"]
    ]
    if costs:
        found.append(Table(f"{prefix}cost of a run", ["variant", f"peak, planned [{unit}]", "steps [s]"], costs))
    return found


def tasks_table(summaries: Mapping[str, Any]) -> Table:
    """What several tasks say together: the mean of each variant's loss, and right answers, on each."""
    rows = []
    for name in dict.fromkeys(name for summary in summaries.values() for name in summary["variants"]):
        row = [name]
        for summary in summaries.values():
            one = summary["variants"].get(name)
            for metric, (_, digits) in METRICS.items() if one else ():
                found = one[metric]
                mark = "" if found is None or found["p"] is None or found["p"] >= SIGNIFICANT else "*"
                row.append("n/a" if found is None else tables.number(found["mean"], digits, fixed=True) + mark)
        rows.append(row)
    head = [f"{name}: {what}" for name in summaries for what in ("right [%]", "loss")]
    return Table("all tasks, means over seeds", ["variant", *head], rows)


def study_notes(summary: Mapping[str, Any]) -> list[str]:
    """How to read the tables."""
    notes, variants = [], summary["variants"].values()
    if summary["runs_complete"] < summary["runs"]:
        notes.append(f"Not complete: {summary['runs_complete']} of {summary['runs']} runs.")
    if any(variant["lr_at_edge"] for variant in variants):
        notes.append("* The learning rate is at an end of those that were tried; a better one may lie beyond.")
    if any(None in variant["loss"]["values"] for variant in variants):
        notes.append("A run ended without a finite loss; its variant has no mean.")
    if summary["baseline"] is not None:
        notes.append(
            f"t, p: independent samples t-test over seeds against {summary['baseline']}; t > 0: larger than there; p "
            "corrected for the number of variants (Holm). n/a: fewer than two seeds on a side, or no variation."
        )
    if any(len(variant["lrs_tried"]) > 1 for variant in variants):
        notes.append("Learning rates are chosen on data.eval at the first seed; the tables are on test.")
    return notes


def _details(summary: Mapping[str, Any], task: str = "") -> list[str]:
    """Lines of Markdown: `study_tables`, and the learning rates that were tried."""
    tried = [
        [name, f"{one['lr']:g}", tables.number(one["loss_on_eval"], 4, fixed=True),
         "chosen" if one["lr"] == variant["lr"] else ""]
        for name, variant in summary["variants"].items()
        for one in variant["lrs_tried"]
        if len(variant["lrs_tried"]) > 1
    ]  # fmt: skip
    title = f"{_prefix(task)}learning rates tried, seed {summary['seeds'][0]}"
    grids = [Table(title, ["variant", "lr", "loss on data.eval", ""], tried)] if tried else []
    return sections([*study_tables(summary, task), *grids])


def _effort(summary: Mapping[str, Any], task: str = "") -> list[str]:
    """Lines of Markdown: what was trained and marked."""
    prefix = _prefix(task)
    lines = [f"* {prefix}{summary['runs_complete']} runs, {summary['hours']:.1f} h of training"]
    if summary["rows_answered"]:
        lines.append(f"* {prefix}right answers are of {summary['rows_answered']} rows of test, generated greedily")
    return lines


def markdown(summary: Mapping[str, Any]) -> list[str]:
    """The lines of quality.md."""
    lines = heading("Quality", summary, f", {summary['processes']} process(es)")
    notes = (f"* {note.removeprefix('* ')}" for note in study_notes(summary))
    return [*lines, *_effort(summary), *_details(summary), "", *notes]


def write_tasks(summaries: Mapping[str, Any], output: Path) -> None:
    """tasks.md: `tasks_table`, and what the quality.md of each task has."""
    first = next(iter(summaries.values()))
    lines = heading(f"Quality on {len(summaries)} tasks", first, f", {first['processes']} process(es)")
    for name, summary in summaries.items():
        lines += _effort(summary, name)
    lines += sections([tasks_table(summaries)])
    lines += ["", f"\\*: p < {SIGNIFICANT} against {first['baseline']}, corrected for the number of variants (Holm)."]
    for name, summary in summaries.items():
        lines += _details(summary, name)
    notes = dict.fromkeys(note.removeprefix("* ") for summary in summaries.values() for note in study_notes(summary))
    write_text(output / "tasks.md", "\n".join([*lines, "", *(f"* {note}" for note in notes)]) + "\n")


def write_study(plan: Study, summary: Mapping[str, Any], results: Mapping[Run, Any], output: Path) -> None:
    """quality.json, quality.md and the pictures in ``output``, each complete or as it was before."""
    write(output, "quality", summary, markdown(summary))
    curves = {
        name: [results[Run(name, variant["lr"], seed)]["losses"] for seed in variant["seeds"]]
        for name, variant in summary["variants"].items()
        if variant["seeds"]
    }
    if curves:
        _plot_losses(curves, output / "loss.png")
    front = {
        name: (one["planned_bytes"] / 2**30, one["loss"]["mean"], one["loss"]["std"] or 0.0)
        for name, one in summary["variants"].items()
        if one["seeds"] and one["loss"]["mean"] is not None
    }
    if front:
        _plot_front(front, output / "front.png")
    found = {(s.metric, s.tau): s for s in map(Scores.read, sorted(output.glob("runs/*/*/scores.json")))}
    if found:
        taus = {tau for metric, tau in found if metric == "outlier"}
        model = Path(plan.recipe["model"]["path"]).name
        labelled = [(model if len(taus) < 2 else f"tau = {tau:g}", found[m, tau]) for m, tau in sorted(found)]
        plot(labelled, output / "scores.png")


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def smooth(losses: Values) -> Values:
    """Mean over a window around each step, a tenth of the run wide, of the steps in it that have a loss."""
    reach = round(_WINDOW * len(losses))
    windows = (losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses)))
    known = ([loss for loss in window if loss is not None] for window in windows)
    return [statistics.fmean(window) if window else None for window in known]


def _plot_front(points: Mapping[str, tuple[float, float, float]], path: Path) -> None:
    """Loss over memory, (GiB, mean, standard deviation) a variant: what is below and left of others is better."""
    with tables.png(path) as figure:
        [axes] = figure.axes
        for size, mean, deviation in points.values():
            axes.errorbar(size, mean, deviation, fmt="o", ms=4, lw=1)
        axes.autoscale_view()
        placed: list[tuple[float, float, float]] = []  # names: left, bottom and width in points
        for name, (size, mean, _) in sorted(points.items(), key=lambda item: item[1][1]):
            x, y = axes.transData.transform((size, mean)) * 72 / figure.dpi
            wide, bottom = _NAME[0] * len(name), y
            for left, below, length in sorted(placed, key=lambda one: one[1]):
                if left - wide < x < left + length and abs(below - bottom) < _NAME[1]:
                    bottom = below + _NAME[1]
            placed.append((x, bottom, wide))
            axes.annotate(name, (size, mean), xytext=(4, 3 + bottom - y), textcoords="offset points", fontsize=7)
        axes.set(xlabel="peak memory, planned [GiB]", ylabel="loss on test [nats per token]")
        axes.grid(alpha=0.3)


def _plot_losses(curves: Mapping[str, list[Values]], path: Path) -> None:
    """Training loss over steps, a line a variant: the mean over seeds, in a band from the least to the largest."""
    with tables.png(path) as figure:
        [axes] = figure.axes
        for number, (name, seeds) in enumerate(curves.items()):
            steps = enumerate(zip(*map(smooth, seeds), strict=False), start=1)
            points = {step: some for step, values in steps if (some := [v for v in values if v is not None])}
            style = ("-", "--", ":")[number // 10 % 3]  # there are ten colours
            [line] = axes.plot([*points], [statistics.fmean(some) for some in points.values()], style, label=name)
            band = [*map(min, points.values())], [*map(max, points.values())]
            axes.fill_between([*points], *band, color=line.get_color(), alpha=0.15, lw=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="optimizer step", ylabel="training loss [nats per token]")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, ncols=2 if len(curves) > 5 else 1)
