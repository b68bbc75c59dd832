"""Runs -> one page: what was run, how it went, and several of them side by side. The verb `report`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ows_ds import config
from ows_ds.errors import UserError, one_line
from ows_ds.files import write_text
from ows_ds.runs import charts, results
from ows_ds.runs.records import Run, read
from ows_ds.runs.results import Score
from ows_ds.tables import number, size_in

MARK = b'name="generator" content="ows_ds report"'  # in the head of every report
_FAULTS = 50  # of a run that are listed


@dataclass(frozen=True)
class Row:
    """A line of a table. differs: whether the runs disagree in it."""

    name: str
    cells: list[str]

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


@dataclass(frozen=True)
class Grid:
    """A table with a run in each column. head: empty for the first column, then the runs' names.

    texts: cells are what people wrote, in columns of another kind.
    """

    head: list[str]
    rows: list[Row]
    texts: bool = False


@dataclass(frozen=True)
class Chart:
    """A picture with its title, and what a reader must know."""

    title: str
    svg: str
    text: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page. closed: the summary that hides the table until a click; empty: the table is shown."""

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
    write_text(path, page(runs))
    return path


def page(runs: Sequence[Run]) -> str:
    """The page as HTML, with its style and pictures; it loads nothing else."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ows_ds.runs", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    parts = (_training, _evaluation, _samples, _layers, _costs, _traffic, _faults, _settings)
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


def _bytes(size: float | None) -> str:
    unit, write = size_in([size])
    return "n/a" if size is None else f"{write(size)} {unit}"


def _summary(runs: Sequence[Run]) -> Grid:
    def held_out(run: Run) -> str:
        losses = [f"{value:.4f}" for _, value in run.series("eval_loss")]
        return " to ".join(losses if len(losses) < 2 else [losses[0], losses[-1]]) or "n/a"

    def loss(run: Run) -> str:
        values = [value for _, value in run.series("loss")][-10:]
        return f"{statistics.mean(values):.4f}" if values else "n/a"

    tell: dict[str, Callable[[Run], Any]] = {
        "state": lambda run: run.state,
        "method": lambda run: run.recipe.method.name,
        "model": lambda run: run.recipe.model.path,
        "ranks": lambda run: run.world_size or "n/a",
        "tokens": lambda run: f"{sum(record.get('tokens', 0) for record in run.steps):,}",
        "held-out loss": held_out,
        "layers trained": lambda run: f"{sum(share > 0 for share in run.shares)} of {run.n_layers}" if run.steps else "n/a",
        "training loss, last 10 steps": loss,
        "tokens a second, median": lambda run: number(run.median("tokens_per_second"), 3),
        "time in steps": lambda run: timedelta(seconds=round(sum(value for _, value in run.series("step_seconds")))),
        "peak memory of a rank": lambda run: _bytes(_peak(run)),
        "sent by a rank in a step": lambda run: _bytes(sum(run.sent.values())),
        "faults": lambda run: len(run.faults) + run.damaged + len(run.evaluations[1]) or "none",
    }
    return _grid(runs, [Row(name, [str(of(run)) for run in runs]) for name, of in tell.items()])


def _peak(run: Run) -> float | None:
    return max((value for _, value in run.series("peak_memory_bytes")), default=None)


def _training(runs: Sequence[Run]) -> Section | None:
    if not any(run.steps for run in runs):
        return Section("Training", "No step is recorded yet.")
    held_out = {run.name: run.series("eval_loss") for run in runs}
    text = "Lines: training loss; dots: held-out loss." if any(held_out.values()) else ""
    losses = {run.name: run.series("loss") for run in runs}
    svg = charts.curves(losses, "step", "loss", "loss by step", held_out)
    norm, rate = (
        ("grad_norm", "gradient norm, before clipping", "gradient norm"),
        ("lr", "learning rate", "learning rate"),
    )
    return Section("Training", charts=[Chart("loss [nats a token]", svg, text), *_curves(runs, norm, rate)])


def _curves(runs: Sequence[Run], *lines: tuple[str, str, str]) -> list[Chart]:
    """A chart of each (key of the records, title, name of the y axis) that a run has numbers of."""
    found = []
    for key, title, y in lines:
        series = {run.name: [point for point in run.series(key) if point[0] > 0] for run in runs}
        if any(series.values()):
            found.append(Chart(title, charts.curves(series, "step", y, f"{title} by step")))
    return found


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


def _samples(runs: Sequence[Run]) -> Section | None:
    """The first answers beside the last ones."""
    columns: list[tuple[Run, int]] = []
    for run in runs:
        steps = sorted({step for answers in run.samples.values() for step in answers})
        columns += [(run, step) for step in dict.fromkeys(steps[:1] + steps[-1:])]
    if not columns:
        return None
    when = [f"{run.name}, " * (len(runs) > 1) + (f"after step {step:,}" if step else "before") for run, step in columns]
    rows = [
        Row(message, [run.samples.get(message, {}).get(step, "") for run, step in columns])
        for message in dict.fromkeys(message for run in runs for message in run.samples)
    ]
    return Section("Answers", "To the messages of log.samples.", table=Grid(["message", *when], rows, texts=True))


def _layers(runs: Sequence[Run]) -> Section | None:
    found = []

    def add(run: Run, title: str, draw: Callable[..., str], *data: Any, text: str) -> None:
        found.append(Chart(f"{run.name}: {title}", draw(run, *data, f"{title}, {run.name}"), text))

    for run in runs:
        if not run.steps or not run.n_layers:
            continue
        text = "Left: the steps that each layer trained in. Right: their share"
        text += "." if run.probabilities is None else ", and as marks the probability that a draw takes the layer."
        add(run, "layers in training", charts.layers, text=text)
        if run.update_norms:
            first, last, layer, most = max(run.update_norms, key=lambda one: one[3])
            text = (
                "How far the matrices of a layer had moved when they were merged, over the steps that moved them: the "
                f"Frobenius norm of their change, the darker the farther. The largest is {most:.3g}: layer {layer}, "
                f"steps {first:,} to {last:,}. Right: the mean."
            )
            add(run, "update norms", charts.heat, run.update_norms, most, text=text)
        if run.energies:
            values = [energy for _, _, _, energy in run.energies]
            text = (
                "The share of a layer's squared gradient inside new projectors, over the steps that used them; full "
                f"colour is all of it. From {min(values):.1%} to {max(values):.1%}. Right: the mean."
            )
            add(run, "energy that projectors keep", charts.heat, run.energies, 1.0, text=text)
    return Section("Layers", charts=found) if found else None


def _costs(runs: Sequence[Run]) -> Section | None:
    found = _curves(
        runs, ("tokens_per_second", "speed", "tokens a second"), ("step_seconds", "time of a step", "seconds")
    )
    memory: dict[str, dict[str, float]] = {}
    for run in runs:
        if (planned := run.planned) is not None:
            inside = {f"{name} ({planned.largest})": size for name, size in planned.phases[planned.largest].items()}
            memory[run.name] = {name: float(size) for name, size in {**planned.state, **inside}.items() if size}
    if memory:
        text = (
            "As planned for a step with new projectors, on a GPU. Black marks: the largest that a rank has had; on a "
            "CPU that is all of its memory, programs included."
        )
        peaks = {run.name: peak for run in runs if run.name in memory and (peak := _peak(run)) is not None}
        found.append(Chart("memory of a rank", charts.bars(memory, "memory by component", peaks), text))
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
    names = [(section, key) for section, values in trees[0].items() for key in values]
    rows = [Row(f"{section}.{key}", [_written(tree[section][key]) for tree in trees]) for section, key in names]
    rows.sort(key=lambda row: not row.differs)
    return Section("Settings", table=_grid(runs, rows), closed="all keys of the recipe")


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
