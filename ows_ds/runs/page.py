"""Runs -> one page: what was run, how it went, and several of them side by side. The verb `report`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ows_ds import config
from ows_ds.runs import results
from ows_ds.errors import UserError, one_line
from ows_ds.runs import charts
from ows_ds.runs.records import Run, read
from ows_ds.runs.results import Score
from ows_ds.files import atomic_write
from ows_ds.tables import number, size_in

MARK = b'name="generator" content="ows_ds report"'  # in the head of every report
_FAULTS = 50  # of a run that are listed


@dataclass(frozen=True)
class Row:
    """A line of a table. differs: the runs do not agree in it."""

    name: str
    cells: list[str]

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


@dataclass(frozen=True)
class Grid:
    """A table with a run in each column. head: empty for the first column, then the runs' names."""

    head: list[str]
    rows: list[Row]


@dataclass(frozen=True)
class Chart:
    """A picture with its title, and what a reader must know."""

    title: str
    svg: str
    text: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page. closed: what stands on the table's lid; empty: it has none."""

    title: str
    text: str = ""
    charts: list[Chart] = field(default_factory=list)
    table: Grid | None = None
    closed: str = ""


def report(folders: Sequence[Path], output: Path | None) -> Path:
    """Write a page about the runs in ``folders``. output: its file; None: report.html in the first folder.

    Returns the file. Raises UserError for folders that are no runs, and for a file that is there and no report.
    """
    runs = [read(folder) for folder in dict.fromkeys(folders)]
    path = output or runs[0].folder / "report.html"
    if path.is_dir() or (path.exists() and MARK not in path.read_bytes()[:4096]):
        raise UserError("--output", str(path), "expected a file that does not exist yet, or an earlier report")
    if not path.parent.is_dir():
        raise UserError("--output", str(path), f"expected a file in a folder that exists: {path.parent} does not")
    text = page(runs)
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def page(runs: Sequence[Run]) -> str:
    """The page as HTML: its style and pictures are in it, and nothing in it asks for anything else."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ows_ds.runs", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    parts = (_training, _evaluation, _layers, _costs, _traffic, _faults, _settings)
    sections = [part(runs) for part in parts]
    names = ", ".join(run.name for run in runs)
    return environment.get_template("page.html").render(
        title=names if len(runs) <= 3 else f"{len(runs)} runs",
        subtitle=f"fine-tuned with ows_ds; {runs[0].state}" if len(runs) == 1 else names,
        summary=_summary(runs),
        sections=[section for section in sections if section is not None],
        colours=charts.COLOURS,
        footer=f"ows_ds report, {datetime.now():%Y-%m-%d %H:%M}, of {names}",
    )


def _grid(runs: Sequence[Run], rows: list[Row]) -> Grid:
    return Grid(["", *(run.name for run in runs)], rows)


def _summary(runs: Sequence[Run]) -> Grid:
    def row(name: str, tell: Any) -> Row:
        return Row(name, [str(tell(run)) for run in runs])

    def held_out(run: Run) -> str:
        losses = run.series("eval_loss")
        if not losses:
            return "n/a"
        first, last = losses[0][1], losses[-1][1]
        return f"{last:.4f}" if len(losses) == 1 else f"{first:.4f} to {last:.4f}"

    def loss(run: Run) -> str:
        values = [value for _, value in run.series("loss")][-10:]
        return f"{statistics.mean(values):.4f}" if values else "n/a"

    def peak(run: Run) -> str:
        largest = max((value for _, value in run.series("peak_memory_bytes")), default=None)
        unit, write = size_in([largest])
        return "n/a" if largest is None else f"{write(largest)} {unit}"

    def sent(run: Run) -> str:
        total = sum(run.sent.values())
        unit, write = size_in([total])
        return f"{write(total)} {unit}"

    def took(run: Run) -> str:
        return str(timedelta(seconds=round(sum(value for _, value in run.series("step_seconds")))))

    rows = [
        row("state", lambda run: run.state),
        row("method", lambda run: run.recipe.method.name),
        row("model", lambda run: run.recipe.model.path),
        row("processes", lambda run: run.world_size or "n/a"),
        row("tokens", lambda run: f"{sum(record.get('tokens', 0) for record in run.steps):,}"),
        row("held-out loss", held_out),
        row("training loss, last 10 steps", loss),
        row("tokens a second, median", lambda run: number(run.median("tokens_per_second"), 3)),
        row("time in steps", took),
        row("peak memory of a process", peak),
        row("sent by a process in a step", sent),
        row("faults", lambda run: len(run.faults) + run.damaged + len(run.evaluations[1]) or "none"),
    ]
    return _grid(runs, rows)


def _training(runs: Sequence[Run]) -> Section | None:
    if not any(run.steps for run in runs):
        return Section("Training", "No step is recorded yet.")
    held_out = {run.name: run.series("eval_loss") for run in runs}
    text = "Lines: training loss; dots: held-out loss." if any(held_out.values()) else ""
    found = [
        Chart(
            "loss [nats a token]",
            charts.curves({run.name: run.series("loss") for run in runs}, "step", "loss", "loss by step", held_out),
            text,
        )
    ]
    for key, title in (("grad_norm", "gradient norm, before clipping"), ("lr", "learning rate")):
        series = {run.name: run.series(key) for run in runs}
        if any(series.values()):
            found.append(Chart(title, charts.curves(series, "step", title.split(",")[0], f"{title} by step")))
    return Section("Training", charts=found)


def _evaluation(runs: Sequence[Run]) -> Section | None:
    found = [results.newest(run.evaluations[0]) for run in runs]
    rows = []
    for key in dict.fromkeys(key for one in found for key in one):
        score = next(one[key][0] for one in found if key in one)
        name = one_line(", ".join(filter(None, (key[0], score.task, score.label))))
        rows.append(Row(name, [_score(*one[key]) if key in one else "n/a" for one in found]))
    text = "Benchmarks, by `ows-ds eval`, with their standard errors and numbers of questions."
    if any(before for one in found for _, before in one.values()):
        text += " Two numbers: before and after."
    return Section("Evaluation", text, table=_grid(runs, rows)) if rows else None


def _score(score: Score, before: Score | None) -> str:
    values = [number(one.value, 4, fixed=True) for one in ([] if before is None else [before]) + [score]]
    error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
    return f"{' to '.join(values)}{error}" + ("" if score.samples is None else f" (n = {score.samples:,})")


def _layers(runs: Sequence[Run]) -> Section | None:
    found = []
    for run in runs:
        if not run.steps or not run.n_layers:
            continue
        drawn = run.probabilities is not None
        text = "Left: the steps that each layer trained in. Right: their share"
        text += ", and as marks the probability that a draw takes the layer." if drawn else "."
        title = "layers in training"
        found.append(Chart(f"{run.name}: {title}", charts.layers(run, f"{title}, {run.name}"), text))
        if run.update_norms:
            first, last, layer, most = max(run.update_norms, key=lambda one: one[3])
            title = "update norms"
            text = (
                "How far the matrices of a layer had moved when they were merged, over the steps that moved them: the "
                f"Frobenius norm of their change, the darker the farther. The largest is {most:.3g}: layer {layer}, "
                f"steps {first:,} to {last:,}. Right: the mean."
            )
            svg = charts.heat(run, run.update_norms, most, f"{title}, {run.name}")
            found.append(Chart(f"{run.name}: {title}", svg, text))
        if run.energies:
            values = [share for _, _, _, share in run.energies]
            title = "energy that projectors keep"
            text = (
                "The share of a layer's squared gradient inside new projectors, over the steps that used them; full "
                f"colour is all of it. From {min(values):.1%} to {max(values):.1%}. Right: the mean."
            )
            svg = charts.heat(run, run.energies, 1.0, f"{title}, {run.name}")
            found.append(Chart(f"{run.name}: {title}", svg, text))
    return Section("Layers", charts=found) if found else None


def _costs(runs: Sequence[Run]) -> Section | None:
    found = []
    for key, title, y in (
        ("tokens_per_second", "speed", "tokens a second"),
        ("step_seconds", "time of a step", "seconds"),
    ):
        series = {run.name: [point for point in run.series(key) if point[0] > 0] for run in runs}
        if any(series.values()):
            found.append(Chart(title, charts.curves(series, "step", y, f"{title} by step")))
    memory, measured = {}, {}
    for run in runs:
        planned = run.planned
        if planned is None:
            continue
        inside = planned.phases[planned.largest]
        parts = {**planned.state, **{f"{name} ({planned.largest})": size for name, size in inside.items()}}
        memory[run.name] = {name: float(size) for name, size in parts.items() if size}
        if peaks := run.series("peak_memory_bytes"):
            measured[run.name] = max(value for _, value in peaks)
    if memory:
        text = (
            "As planned for a step with new projectors, on a GPU. Black marks: the largest that a process has had; on "
        )
        text += "a CPU that is all of its memory, programs included."
        found.append(Chart("memory of a process", charts.bars(memory, "memory by component", measured), text))
    return Section("Speed and memory", charts=found) if found else None


def _traffic(runs: Sequence[Run]) -> Section | None:
    sent = {run.name: run.sent for run in runs if run.sent}
    if not sent:
        return None
    text = "What rank 0 sends in a step, on average, by operation; evaluations are among them."
    return Section("Traffic", charts=[Chart("sent in a step", charts.bars(sent, "bytes by operation"), text)])


def _faults(runs: Sequence[Run]) -> Section | None:
    rows = []
    for run in runs:
        some = [(f"step {step:,}", what) for step, what in run.faults[:_FAULTS]]
        some += [("more", f"{len(run.faults) - _FAULTS:,} others")] if len(run.faults) > _FAULTS else []
        some += [("metrics.jsonl", f"{run.damaged} lines cannot be read")] if run.damaged else []
        some += [(one_line(name), "cannot be read") for name in run.evaluations[1]]
        rows += [Row(f"{run.name}, {where}" if len(runs) > 1 else where, [what]) for where, what in some]
    return Section("Faults", table=Grid(["", ""], rows)) if rows else None


def _settings(runs: Sequence[Run]) -> Section:
    trees = [config.to_dict(run.recipe) for run in runs]
    names = [f"{section}.{key}" for section, values in trees[0].items() for key in values]
    rows = [Row(name, [_written(tree, name) for tree in trees]) for name in names]
    if len(runs) > 1:
        rows.sort(key=lambda row: not row.differs)
    return Section("Settings", table=_grid(runs, rows), closed="all keys of the recipe")


def _written(tree: dict[str, Any], name: str) -> str:
    section, key = name.split(".", 1)
    value = tree[section][key]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
