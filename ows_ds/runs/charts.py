"""Charts of runs as SVG for a page. matplotlib draws with placeholder colours, which become variables of the page's
style sheet, so that one file reads well in light and dark mode."""

from __future__ import annotations

import html
import io
import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ows_ds.runs.records import Run, Stretch
from ows_ds.tables import size_in

COLOURS = 8  # of runs and components; further ones repeat them with another line style
_INK, _FAINT = "#010203", "#010204"
_SERIES = [f"#0102{16 + index:02x}" for index in range(COLOURS)]
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--faint)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(_SERIES)
}
_POINTS = 400  # of a curve; a longer one is averaged over as many stretches
_WIDTH, _HEIGHT = 6.4, 3.2  # inches of 72 points, which are the page's pixels
Points = Sequence[tuple[int, float]]


def curves(series: Mapping[str, Points], x: str, y: str, label: str, dots: Mapping[str, Points] | None = None) -> str:
    """A line a run. dots: points of the same runs to mark. label: what screen readers say."""
    figure, axes = _figure(_HEIGHT)
    for index, (name, points) in enumerate(series.items()):
        colour, style = _SERIES[index % COLOURS], ("-", "--", ":")[index // COLOURS % 3]
        if points:
            axes.plot(*zip(*thinned(points), strict=True), style, color=colour, linewidth=1.4, label=name)
        if dots and dots.get(name):
            steps, values = zip(*dots[name], strict=True)
            axes.plot(steps, values, style, color=colour, linewidth=0.7, marker="o", markersize=4, alpha=0.9)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    if len(series) > 1:
        figure.legend(frameon=False, loc="outside upper left", ncols=2, fontsize=9, labelcolor=_INK)
    return _svg(figure, label)


def layers(run: Run, label: str) -> str:
    """Which layers trained when, and how often each did against its probability."""
    figure, time, share = _over_layers(run, run.shares, "share of steps", 1.0)
    for layer in range(run.n_layers):
        stretches = [(first - 0.5, last - first + 1) for first, last, some in run.sets if layer in some]
        time.broken_barh(_joined(stretches), (layer - 0.4, 0.8), color=_SERIES[0], linewidth=0)
    if run.probabilities is not None:
        share.plot(run.probabilities, range(run.n_layers), "|", color=_INK, markersize=5, markeredgewidth=1.2)
    return _svg(figure, label)


def heat(run: Run, stretches: Sequence[Stretch], top: float, label: str) -> str:
    """A number of each layer over time, the darker the nearer to ``top``, and the mean of its stretches."""
    by_layer = [[value for _, _, layer, value in stretches if layer == one] for one in range(run.n_layers)]
    figure, time, _ = _over_layers(run, [statistics.fmean(some) if some else 0.0 for some in by_layer], "mean", top)
    for first, last, layer, value in stretches:
        alpha = 0.1 + 0.9 * min(1.0, value / top) if top > 0 else 0.1  # never invisible
        bar = [(first - 0.5, last - first + 1)]
        time.broken_barh(bar, (layer - 0.4, 0.8), color=_SERIES[0], linewidth=0, alpha=alpha)
    return _svg(figure, label)


def _over_layers(run: Run, shares: Sequence[float], name: str, top: float) -> tuple[Any, Any, Any]:
    """A figure: empty axes with steps to the right and layers downwards, and a bar a layer, up to ``top``."""
    figure, (time, bars) = _figure(max(2.2, 0.9 + 0.085 * run.n_layers), widths=(4, 1))
    bars.barh(range(run.n_layers), shares, 0.8, color=_SERIES[0], linewidth=0)
    last = run.steps[-1]["step"] if run.steps else 1
    time.set(xlim=(0.5, last + 0.5), ylim=(run.n_layers - 0.5, -0.5), xlabel="step", ylabel="layer")
    bars.set(xlim=(0, 1.02 * (top or 1)), ylim=(run.n_layers - 0.5, -0.5), xlabel=name, yticks=[])
    bars.xaxis.get_major_locator().set_params(nbins=2)
    for axis in (time.xaxis, time.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return figure, time, bars


def bars(parts: Mapping[str, Mapping[str, float]], label: str, marks: Mapping[str, float] | None = None) -> str:
    """A bar of bytes a run, its parts one after the other. marks: a line across each bar, such as what was measured."""
    marks = marks or {}
    unit, _ = size_in([*(sum(one.values()) for one in parts.values()), *marks.values()])
    scale = 2**30 if unit == "GiB" else 2**20
    figure, axes = _figure(1.4 + 0.34 * len(parts))
    left = [0.0] * len(parts)
    for index, kind in enumerate(dict.fromkeys(kind for one in parts.values() for kind in one)):
        sizes = [one.get(kind, 0.0) / scale for one in parts.values()]
        alpha = 1.0 if index < COLOURS else 0.5
        axes.barh(list(parts), sizes, 0.62, left, color=_SERIES[index % COLOURS], label=kind, linewidth=0, alpha=alpha)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for name, mark in marks.items():
        position = list(parts).index(name)
        axes.plot([mark / scale] * 2, [position - 0.42, position + 0.42], color=_INK, linewidth=1.6)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.grid(axis="x", color=_FAINT, linewidth=0.6)
    figure.legend(frameon=False, loc="outside upper left", ncols=3, fontsize=9, labelcolor=_INK)
    return _svg(figure, label)


def _figure(height: float, widths: Sequence[float] = (1,)) -> tuple[Any, Any]:
    """An empty figure, and its one axes or several side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    found = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for axes in found:
        axes.patch.set_visible(False)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
        axes.tick_params(color=_FAINT, labelcolor=_INK, labelsize=9)
        axes.xaxis.label.set(color=_INK, fontsize=10)
        axes.yaxis.label.set(color=_INK, fontsize=10)
    figure.patch.set_visible(False)
    return figure, found[0] if len(widths) == 1 else found


def thinned(points: Points) -> Points:
    """At most `_POINTS`, each the mean of a stretch, at its last step."""
    if len(points) <= _POINTS:
        return points
    edges = [index * len(points) // _POINTS for index in range(_POINTS + 1)]
    stretches = [points[first:last] for first, last in itertools.pairwise(edges)]
    return [(some[-1][0], sum(value for _, value in some) / len(some)) for some in stretches]


def _joined(stretches: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(start, length) of stretches that touch as one."""
    found: list[tuple[float, float]] = []
    for start, length in stretches:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found


_count = itertools.count(1)  # of pictures: names inside of them must differ within a page


def _svg(figure: Any, label: str) -> str:
    import matplotlib

    content = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ows_ds", "font.family": "sans-serif"}):
        figure.savefig(content, format="svg", metadata=nothing)
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width, height = (round(72 * size) for size in figure.get_size_inches())
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
    head += f'viewBox="0 0 {width} {height}" aria-label="{html.escape(label)}">'
    text = re.sub(r"<svg\b[^>]*>", lambda _: head, text, count=1)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>g{next(_count)}-", text)
    # matplotlib's own fonts may not be installed
    text = re.sub(r"font: [^;\"]*?(\d+(?:\.\d+)?)px[^;\"]*", r"font-size: \1px", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text
