"""Tables for a terminal, for Markdown and as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ows_ds.files import atomic_write


@dataclass(frozen=True)
class Table:
    """Rows of cells. A row of two cells where there are more columns spans them."""

    title: str
    head: list[str]
    rows: list[list[str]]


def number(value: float | None, digits: int, fixed: bool = False) -> str:
    """``digits`` significant ones, or behind the point where it is ``fixed``; n/a for None."""
    if value is None:
        return "n/a"
    if fixed or value == 0:
        return f"{value:.{digits}f}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def gib(size: float) -> str:
    """Bytes as "17.3 GiB"."""
    return f"{size / 2**30:.1f} GiB"


def size_in(sizes: Sequence[float | None]) -> tuple[str, Callable[[float | None], str]]:
    """GiB or MiB, as the largest of ``sizes`` (bytes) needs it, and what writes a number of bytes in it."""
    largest = max((size for size in sizes if size is not None), default=0)
    unit, factor, digits = ("GiB", 2**30, 2) if largest >= 2**32 else ("MiB", 2**20, 1)
    return unit, lambda size: number(None if size is None else size / factor, digits, fixed=True)


def terminal(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """For a terminal of 80 columns; colours only where there is one."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        for one in tables:
            table = RichTable(title=one.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
            for index, name in enumerate(one.head):
                table.add_column(name, justify="right" if index else "left", overflow="fold", no_wrap=index == 0)
            spanning = [row for row in one.rows if len(row) == 2 < len(one.head)]
            for row in one.rows:
                if row not in spanning:
                    table.add_row(*row)
            console.print(table, *(f"{name}: {text}" for name, text in spanning), "", sep="\n")
        console.print(*notes, sep="\n")
    return captured.get().rstrip()


@contextmanager
def thinking(text: str) -> Iterator[None]:
    """A spinner on standard error while the body runs, where that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(text) if console.is_terminal else nullcontext():
        yield


def markdown(table: Table) -> list[str]:
    """Lines of a table in Markdown."""
    rule = ["---", *["---:"] * (len(table.head) - 1)]
    rows = [row + [""] * (len(table.head) - len(row)) for row in table.rows]
    return [f"| {' | '.join(row)} |" for row in (table.head, rule, *rows)]


@contextmanager
def png(path: Path, width: float = 7.2, height: float = 4.2, rows: int = 1, columns: int = 1) -> Iterator[Any]:
    """A figure of ``rows`` x ``columns`` axes to draw in (inches); at the end it is a PNG at ``path``."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    yield figure
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def bars(parts: Mapping[str, Mapping[str, float]], label: str, path: Path) -> None:
    """A horizontal bar a method, of parts one after the other, as a PNG at ``path``. parts: {method: {part: size}}."""
    with png(path, height=1.2 + 0.3 * len(parts)) as figure:
        [axes] = figure.axes
        left = [0.0] * len(parts)
        kinds = list(dict.fromkeys(kind for one in parts.values() for kind in one))
        for kind in kinds:
            sizes = [one.get(kind, 0.0) for one in parts.values()]
            axes.barh(list(parts), sizes, 0.7, left, label=kind, color=None if len(kinds) > 1 else "#3b6fb6")
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
        if len(kinds) > 1:
            figure.legend(frameon=False, loc="outside upper center", ncols=min(len(kinds), 5))


def lines(series: Mapping[str, Mapping[int, float]], x: str, y: str, path: Path, log: bool = False) -> None:
    """A line a method over the values of a sweep, as a PNG at ``path``. log: both axes are logarithmic."""
    with png(path, height=4.2 if not log or len(series) <= 3 else 5.2) as figure:
        [axes] = figure.axes
        for index, (name, points) in enumerate(series.items()):
            style = ("-", "--", ":")[index // 10 % 3]  # there are ten colours
            axes.plot(list(points), list(points.values()), style, marker="o", markersize=3.5, linewidth=1.5, label=name)
        values = sorted({value for points in series.values() for value in points})
        if log:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.minorticks_off()
        else:
            axes.set_ylim(bottom=0)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        if log and len(series) > 3:  # long names
            figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize="small")
        else:
            axes.legend(frameon=False, ncols=2 if len(series) > 5 else 1)
