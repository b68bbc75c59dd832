"""plot.py: what the pictures say, and how wide they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from ows_ds import config
from ows_ds.importance.plot import plot, text_chart
from ows_ds.importance.scores import Scores

SCORES = Scores("outlier", 13.0, "f" * 64, (0.0019, 0.0005, 0.0064), 1234)
KINDS = get_args(config.Sampling.model_fields["importance"].annotation)


@pytest.mark.parametrize(
    "scores",
    [
        [("one", SCORES)],
        [("one", SCORES), ("two", replace(SCORES, layers=(0.1, 0.2)))],
        [("one", replace(SCORES, metric=kind)) for kind in KINDS],
    ],
)
def test_plot(tmp_path: Path, scores: list[tuple[str, Scores]], monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    path = tmp_path / "new" / "layers.png"
    plot(scores, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert [p.name for p in path.parent.iterdir()] == ["layers.png"]
    panels = drawn[0].axes
    assert len(panels) == len({one.metric for _, one in scores})
    assert panels[0].get_title() == "outlier ratio (tau 13) [%]"
    assert [len(panel.lines) or len(panel.patches) // 3 for panel in panels] == [len(scores) // len(panels)] * len(
        panels
    )


def test_text_chart() -> None:
    assert text_chart(replace(SCORES, layers=(0.0, 0.005, 0.01)), height=2).splitlines() == [
        "1.00 % │    █",
        "       │  █ █",
        " layer  0",
        "        outlier ratio (tau 13): 0.000 % (layer 0) to 1.000 % (layer 2)",
    ]
    assert text_chart(Scores("alpha", 0.0, "", (2.0, 4.0, 3.0), 0), height=2).splitlines() == [
        "     4 │  █ ▄",
        "       │█ █ █",
        " layer  0",
        "        alpha (sampled by 1/alpha): 2 (layer 0) to 4 (layer 1)",
    ]
    assert "0.00 %" in text_chart(replace(SCORES, layers=(0.0, 0.0)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 35, 36, 70, 80, 126])
def test_strip_fits_in_80_columns(kind: str, layers: int) -> None:
    one = Scores(kind, 13.0, "", tuple(0.123456 + 1e-4 * layer for layer in range(layers)), 0)
    lines = text_chart(one).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("█") for line in lines) == 4 * layers - sum(
        line.count(mark) for line in lines for mark in "▁▂▃▄▅▆▇"
    )
    if layers == 80:
        assert [line.split()[0] for line in lines].count("layer") == 2
        assert lines[9].split()[:3] == ["layer", "40", "45"]
