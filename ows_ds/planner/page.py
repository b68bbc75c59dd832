"""A plan for the terminal: the verdict first, then tables."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from ows_ds.config import Recipe, sources
from ows_ds.planner import lengths
from ows_ds.planner.choices import HOMES, Choice
from ows_ds.planner.forecast import Forecast, ranked
from ows_ds.planner.report import Report
from ows_ds.planner.step import entries
from ows_ds.tables import Table, gib, number, terminal

STATE = ("weights", "second shards", "coordinates", "gradients", "moments", "masters", "projectors", "buckets")
PARTS = {  # of what a step adds: component, and the phases of which the largest counts
    "activations": ("activations", ("forward", "loss", "backward")),
    "logits": ("logits", ("loss",)),
    "one layer's pass": ("one layer", ("forward", "backward")),
    "gathered weights": ("gathered", ("arrival", "forward", "loss", "backward", "embedding")),
}
Rows = dict[str, list[float]]


WIDTH = 80  # columns of a terminal


class Page:
    """What is shown of a report."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def text(self) -> str:
        """For the terminal: the verdict, the tables, what a reader must know."""
        shown = [self._fitting(), self._methods(), self._memory(), self._traffic(), self._times()]
        shown += [lengths.table(self.report.by_length)] if self.report.by_length else []
        verdict = "\n".join(textwrap.fill(line, WIDTH) if line[:1] != " " else line for line in self.verdict())
        return f"{verdict}\n\n{terminal([table for table in shown if table.rows], self.notes())}"

    def verdict(self) -> list[str]:
        """Whether it fits, with what, how to start it, and how long it takes."""
        report = self.report
        c, train = report.cluster, report.recipe.train
        total, active = (f"{count / 1e9:.3g} B" for count in entries(report.planner.model.layers))
        size = total if active == total else f"{total}, of which {active} work on a token"
        found = [
            f"{report.planner.model.name} ({size}), {report.recipe.method.name}, {report.recipe.model.dtype}, length "
            f"{report.recipe.data.max_length}, batch {train.global_batch_size}; {c.nodes} x {gpus(c.gpus)} of "
            f"{c.memory:g} GiB, of which {c.reserve:g} GiB are not ours."
        ]
        changes: list[str] = []
        if report.proposal is not None:
            changes = report.proposal.options()[: 2 * len(report.proposal.changes)]
            pairs = " ".join(changes)
            if report.cheapest is None:
                least = f"the leanest, with {pairs}, needs {gib(report.proposal.peak)}"
                return [*found, f"Nothing fits: {least}. Take more GPUs, or a shorter data.max_length."]
            found.append(f"Nothing of this fits as it is. With {pairs} it does (what each costs: docs/quantised.md).")
        shown: dict[str, tuple[Forecast, Choice | None]] = {}  # and what needs no option
        if report.fitted.fits:
            found += report.fitted.lines(report.auto, "GPU", c.usable)
            shown["As it is"] = report.planner.forecast(c, report.fitted.choice), report.fitted.choice
        for name, one in {"Cheapest": report.cheapest, "Fastest": report.fastest}.items():
            if one is not None and not any(as_good(other, one, name) for other, _ in shown.values()):
                shown[name] = one, None
        for name, (one, plain) in shown.items():
            options = [word for pair in one.choice.options(plain) for word in pair]
            found.append(f"{name}: {gpus(one.choice.world_size)}, {HOMES[one.choice.home]}, {gib(one.peak)} of each, "
                         f"{self._duration(one)}")  # fmt: skip
            found.append(continued(report.command(one.choice, "RECIPE.yaml", *changes, *options)))
        return found

    @cached_property
    def _steps(self) -> int | None:
        return _steps(self.report.recipe)

    def _duration(self, one: Forecast) -> str:
        """Of the recipe's run where its steps are known, otherwise of 1e9 tokens; and its price."""
        report = self.report
        steps, hours = self._steps, one.gpu_hours / one.choice.world_size
        what = "1e9 tokens"
        if steps is not None:
            hours, what = steps * one.seconds / 3600, f"{steps:,} steps"
        price = (
            ""
            if report.cluster.price is None
            else f", price {hours * one.choice.world_size * report.cluster.price:,.2f}"
        )
        return f"{what} in {hours:,.2f} hours at best{price}"

    def notes(self) -> list[str]:
        """What a reader must know."""
        report = self.report
        return [
            f"Times are rooflines at {100 * report.cluster.reach:.0f} % (--reach) of the data sheets' numbers, no "
            "measurements. Formulas and their sources: docs/plan.md.",
        ]

    def _memory(self) -> Table:
        report = self.report
        asked = report.recipe.train.gradient_checkpointing
        some = [one for column in report.columns.values() for one in column]
        some = [one for one in some if one.choice.home != "hpz" or one.choice.checkpointing == asked]
        rows: Rows = {name: [one.plain.state.get(name, 0) for one in some] for name in STATE}
        rows |= {f"+ {part}": [_largest(one, *PARTS[part]) for one in some] for part in PARTS}
        least = min(one.peak for one in some) / 100
        rows = {name: values for name, values in rows.items() if max(values) >= least}
        rows |= {
            "peak of a step": [one.plain.peak for one in some],
            "with a refresh": [one.refresh.peak for one in some],
        }
        table = _table("memory of a GPU [GiB]", some, rows, lambda size: number(size / 2**30, 2, fixed=True))
        head = [f"{name}{', ckpt' * one.choice.checkpointing}" for name, one in zip(table.head[1:], some, strict=True)]
        return Table(table.title, ["", *head], [*table.rows, ["fits", *("yes" if one.fits else "no" for one in some)]])

    def _traffic(self) -> Table:
        report = self.report
        rows: Rows = {op: [one.sent[op].sent / 2**20 if op in one.sent else 0 for one in report.asked]
                      for op in (op for one in report.asked for op in one.sent)}  # fmt: skip
        rows["all"] = [one.sent_bytes / 2**20 for one in report.asked]
        rows = {name: values for name, values in rows.items() if max(values) >= max(rows["all"]) / 1000}
        return _table("sent by a GPU in a step [MiB]", report.asked, rows)

    def _times(self) -> Table:
        report = self.report
        rows: Rows = {phase: [one.times.work.get(phase, 0) for one in report.asked]
                      for phase in (phase for one in report.asked for phase in one.times.work)}  # fmt: skip
        rows["links"] = [sum(one.times.links.values()) for one in report.asked]
        rows = {name: values for name, values in rows.items() if max(values) >= report.asked[0].times.serial / 1000}
        rows["step, no overlap"] = [one.times.serial for one in report.asked]
        rows["step, overlapped"] = [one.times.overlapped for one in report.asked]
        rows["Mtokens a day"] = [one.tokens_per_day / 1e6 for one in report.asked]
        return _table("time of a step at best [s]", report.asked, rows)

    def _fitting(self) -> Table:
        report = self.report
        groups: dict[tuple[int, str], list[Forecast]] = {}
        for one in report.proposed or report.all:
            groups.setdefault((one.choice.world_size, one.choice.home), []).append(one)
        rows = []
        for (world_size, home), some in groups.items():
            best = next(iter(ranked(some)), None)
            mark = "too big" if best is None else "cheapest" if best is report.cheapest else ""
            mark = mark or ("fastest" if best is report.fastest else "")
            rows.append([str(world_size), HOMES[home], *self._row(best or min(some, key=lambda one: one.peak)), mark])
        return Table("what fits: the cheapest of each", ["GPUs", "weights", *self._columns(), ""], rows)

    def _columns(self) -> list[str]:
        report = self.report
        return [
            "micro",
            "ckpt",
            "GiB",
            "s",
            "Mtok/day",
            "GPU h/Gtok" if report.cluster.price is None else "price/Gtok",
        ]

    def _row(self, one: Forecast) -> list[str]:
        report = self.report
        numbers = (one.seconds, one.tokens_per_day / 1e6, one.gpu_hours * (report.cluster.price or 1))
        ckpt = "yes" if one.choice.checkpointing else "no"
        peak = number(one.peak / 2**30, 1, fixed=True)
        return [str(one.choice.micro_batch), ckpt, peak, *(number(value, 3) for value in numbers)]

    def _methods(self) -> Table:
        report = self.report
        found = report.compared if report.others else {}
        rows = [[name, HOMES[one.choice.home], *self._row(one), "" if one.fits else "too big"]
                for name, one in found.items()]  # fmt: skip
        return Table("methods: the fastest setting that fits", ["method", "weights", *self._columns(), ""], rows)


def gpus(count: int) -> str:
    """Their number."""
    return f"{count} GPU{'s' * (count > 1)}"


def continued(command: str) -> str:
    """A command as a shell takes it, on as many lines as it needs, indented."""
    first, *options = command.replace(" --", "\n--").split("\n")
    found = ["  " + first]
    for option in options:
        if len(found[-1]) + 1 + len(option) + 2 > WIDTH:
            found[-1] += " \\"
            found.append("    " + option)
        else:
            found[-1] += f" {option}"
    return "\n".join(found)


def as_good(other: Forecast, one: Forecast, name: str) -> bool:
    """Whether ``other`` does as well as the cheapest or the fastest, ``one``, or nearly."""
    if name == "Cheapest":
        return other.gpu_hours <= 1.05 * one.gpu_hours
    return other.tokens_per_day >= 0.95 * one.tokens_per_day


def _largest(one: Forecast, component: str, phases: Sequence[str]) -> int:
    """Bytes of a component in the phase in which it is largest."""
    return max(one.plain.phases.get(phase, {}).get(component, 0) for phase in phases)


def _table(
    title: str, columns: Sequence[Forecast], rows: Rows, show: Callable[[float], str] = lambda value: number(value, 3)
) -> Table:
    """A column a forecast; rows without a number are left out, zeros empty."""
    shown = [[name, *(show(x) if x else "" for x in values)] for name, values in rows.items() if any(values)]
    return Table(title, ["", *(HOMES[one.choice.home] for one in columns)], shown)


def _steps(recipe: Recipe) -> int | None:
    """Optimizer steps of the run, as far as that shows without reading more than the number of lines."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    files = [source.path for source in sources(recipe.data, "data.train")]
    if not files or not all(Path(file).suffix == ".jsonl" and os.path.isfile(file) for file in files):
        return None
    rows = 0
    for file in files:
        with open(file, "rb") as lines:
            rows += sum(1 for line in lines if line.strip())
    return max(1, round(recipe.train.epochs * rows / recipe.train.global_batch_size))
