"""Pictures of the distribution over layers: for a file, and for a terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ows_ds.importance.scores import Scores
from ows_ds.tables import png

# by metric, or by kind of importance where scores hold that
_TITLES = {
    "outlier": "outlier ratio",
    "reverse": "reverse",
    "uniform": "uniform importance",
    "decreasing": "decreasing importance",
    "rm": "relative magnitude (rm)",
    "bi": "block influence (bi)",
    "alpha": "alpha (sampled by 1/alpha)",
    "gradient": "gradient (uniform at first)",
}
_RATIOS = ("outlier", "reverse")  # shown in percent, at their tau
_COLUMNS = 4  # of panels
_WIDE = 70  # layers in a row of `text_chart`: with its label at most 80 columns


def plot(scores: list[tuple[str, Scores]], path: Path) -> None:
    """The distribution over layers as a PNG at ``path`` (complete or absent): the paper's Figure 2.

    scores: (label, scores), of which each metric (or kind of importance) has a panel: of one model, as bars, or of
    several, as lines.
    """
    panels: dict[str, list[tuple[str, Scores]]] = {}
    for label, one in scores:
        panels.setdefault(one.metric, []).append((label, one))
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (7.2, 3.6) if len(panels) == 1 else (3.6 * columns, 0.3 + 2.6 * rows)
    with png(path, *size, rows, columns) as figure:
        if len({label for label, _ in scores}) == 1:
            figure.suptitle(scores[0][0])
        for axes in figure.axes[len(panels) :]:
            axes.remove()
        for axes, lines in zip(figure.axes, panels.values(), strict=True):
            _panel(axes, lines, 16 if columns == 1 else 8)


def _panel(axes: Any, lines: list[tuple[str, Scores]], ticks: int) -> None:
    factor, unit = (100, " [%]") if lines[0][1].metric in _RATIOS else (1, "")
    for label, one in lines:
        values = [factor * value for value in one.layers]
        if len(lines) == 1:
            axes.bar(range(len(values)), values, width=0.8, color="#3b6fb6", label=label)
        else:
            axes.plot(values, marker="o", markersize=3.5, linewidth=1.5, label=label)
    axes.set_title(", ".join(dict.fromkeys(_title(one) for _, one in lines)) + unit, fontsize="medium")
    axes.set_xlabel("layer")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=ticks)
    axes.grid(axis="y", alpha=0.3)
    if len(lines) > 1:
        axes.legend(frameon=False)


def text_chart(scores: Scores, height: int = 4) -> str:
    """The distribution over layers for a terminal: ``height`` lines of columns and one that numbers the layers.

    At most 80 columns wide; more than 70 layers take several such rows.
    """
    values = scores.layers
    top, low = max(values), min(values)
    eighths = [round(8 * height * value / top) if top else 0 for value in values]
    left = max(len(_number(scores, top)), 6)
    width = 2 if left + 2 + 2 * len(values) <= 80 else 1
    length = 5 * math.ceil(len(values) / math.ceil(len(values) / _WIDE) / 5)
    lines = []
    for first in range(0, len(values), length):
        for line in range(height, 0, -1):
            label = _number(scores, top) if line == height else ""
            part = eighths[first : first + length]
            cells = ((" ▁▂▃▄▅▆▇█"[min(8, max(0, value - 8 * (line - 1)))]) for value in part)
            lines.append(f"{label:>{left}} │" + "".join(cell.ljust(width) for cell in cells).rstrip())
        numbers = "".join(f"{layer:<{5 * width}}" for layer in range(first, min(first + length, len(values)), 5))
        lines.append(f"{'layer':>{left}}  {numbers.rstrip()}")
    ends = (f"{_number(scores, end, 1)} (layer {values.index(end)})" for end in (low, top))
    lines.append(f"{'':>{left}}  {_title(scores)}: {' to '.join(ends)}")
    return "\n".join(lines)


def _title(scores: Scores) -> str:
    title = _TITLES[scores.metric]
    return f"{title} (tau {scores.tau:g})" if scores.metric in _RATIOS else title


def _number(scores: Scores, value: float, more: int = 0) -> str:
    """A value as it is shown; more: additional digits."""
    return f"{100 * value:.{2 + more}f} %" if scores.metric in _RATIOS else f"{value:.{3 + more}g}"
