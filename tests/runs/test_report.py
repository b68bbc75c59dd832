"""The verb `report`: a page that says what the run's files say, asks for nothing, and runs nothing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from ows_ds.checkpoint.manifest import Manifest, write_manifest
from ows_ds.cli.main import main
from ows_ds.importance.scores import Scores
from ows_ds.model.shapes import SHAPES, configuration
from ows_ds.runs.charts import curves, thinned
from ows_ds.runs.records import read

HOSTILE = "<script>alert('x')</script>\"&"
SETS = {1: [0, 3], 2: [0, 3], 3: [1], 4: []}


class Page(HTMLParser):
    """Tags with their attributes, and the text of cells by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data.strip()

    def row(self, name: str) -> list[str]:
        [found] = [row[1:] for row in self.rows if row and row[0] == name]
        return found


def write_run(folder: Path, path: str = "base", **recipe: Any) -> Path:
    folder.mkdir()
    tree = {
        "model": {"path": path},
        "data": {"train": "none"},
        "sampling": {"gamma": 2},
        "train": {"output_dir": "x", "steps": 4},
    } | recipe
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    Scores("outlier", 13.0, "0" * 64, (0.03, 0.01, 0.0, 0.01), 100).write(folder / "scores.json")
    records: list[dict[str, Any]] = [{"step": 0, "loss": None, "eval_loss": 2.0, "sampled_layers": []}]
    records += [
        {
            "step": step,
            "loss": 2.0 - 0.1 * step,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "sampled_layers": layers,
            "tokens": 10,
            "tokens_per_second": 5.0 * step,
            "step_seconds": 60.0,
            "peak_memory_bytes": 2**30 * step,
            "comm_bytes": {"gradients": 3 * 2**20, "coordinates": 2**20 * (step % 2)},
        }
        for step, layers in SETS.items()
    ]
    records[1] |= {"projector_energy": {"0": 0.9, "3": 0.5}}
    records[2] |= {"update_norm": {"0": 0.2, "3": 0.4}}
    records[3] |= {"projector_energy": {"1": 0.75}, "update_norm": {"1": 0.1}}
    records[-1] |= {"loss": None, "skipped": True, "eval_loss": 1.5}
    records[-2] |= {"grad_norm": None, "nonfinite": {"grad_norm": "inf"}}
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + '{"step": 5, "loss"')  # cut short
    return folder


def report(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["report", *words])
    said = capsys.readouterr()
    return code, said.err or said.out


def test_what_the_files_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    code, said = report(capsys, str(run))
    assert (code, said.strip()) == (0, str(run / "report.html"))
    page = Page((run / "report.html").read_text())
    assert page.row("state") == ["4 of 4 steps, not finished"]
    assert page.row("tokens") == ["40"]
    assert page.row("held-out loss") == ["2.0000 to 1.5000"]
    assert page.row("training loss, last 10 steps") == ["1.8000"]  # of three
    assert page.row("tokens a second, median") == ["12.5"]
    assert page.row("time in steps") == ["0:04:00"]
    assert page.row("peak memory of a rank") == ["4.00 GiB"]
    assert page.row("sent by a rank in a step") == ["3.5 MiB"]
    assert page.row("faults") == ["3"]
    assert page.row("step 3") == ["grad_norm was inf"]
    assert page.row("metrics.jsonl") == ["1 lines cannot be read"]
    assert page.row("sampling.gamma") == ["2.0"]
    assert "The largest is 0.4: layer 3, steps 1 to 2." in (run / "report.html").read_text()
    assert "From 50.0% to 90.0%." in (run / "report.html").read_text()
    assert report(capsys, str(run))[0] == 0  # an earlier report is written over


def test_answers_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    given = {0: [["1+1", "I\nwonder"], ["2+2", HOSTILE]], 2: [["1+1", "3"]], 4: [["1+1", "2"], ["2+2", "4"], ["x"], 1]}
    lines = [{"step": step, "samples": some} for step, some in given.items()]
    (runs[0] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (runs[1] / "metrics.jsonl").write_text(json.dumps({"step": 3, "samples": [["2+2", "5"]]}))
    assert report(capsys, str(runs[0]))[0] == 0
    page = Page((runs[0] / "report.html").read_text())
    assert page.row("message") == ["before", "after step 4"]
    assert page.row("1+1") == ["I\nwonder", "2"]
    assert page.row("2+2") == [HOSTILE, "4"]
    assert report(capsys, *map(str, runs), "--output", str(tmp_path / "all.html"))[0] == 0
    page = Page((tmp_path / "all.html").read_text())
    assert page.row("message") == [f"{runs[0]}, before", f"{runs[0]}, after step 4", f"{runs[1]}, after step 3"]
    assert page.row("1+1") == ["I\nwonder", "2", ""]
    assert report(capsys, str(runs[2]))[0] == 0
    assert "log.samples" not in re.sub("<details>.*", "", (runs[2] / "report.html").read_text(), flags=re.DOTALL)


def test_numbers_of_layers_that_are_none_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    strange = {"update_norm": {"x": 1, "0": "far", "99": 1.0, "9" * 5000: 1, "1": 0.5}, "projector_energy": [1]}
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "sampled_layers": [1], **strange}) + "\n")
    assert read(folder).update_norms == [(1, 1, 1, 0.5)]
    assert read(folder).energies == []


def test_layers_over_time_against_probabilities(tmp_path: Path) -> None:
    run = read(write_run(tmp_path / "run"))
    assert run.sets == [(1, 2, (0, 3)), (3, 3, (1,)), (4, 4, ())]
    assert run.shares == [0.5, 0.25, 0.0, 0.5]
    assert run.update_norms == [(1, 2, 0, 0.2), (1, 2, 3, 0.4), (3, 3, 1, 0.1)]
    assert sorted(run.energies) == [(1, 2, 0, 0.9), (1, 2, 3, 0.5), (3, 3, 1, 0.75)]
    # 2 * 0.03 / 0.05 is more than 1: the rest of 1 goes to the two others that have outliers
    assert run.probabilities == pytest.approx([1.0, 0.5, 0.0, 0.5])
    lora = read(write_run(tmp_path / "lora", method={"name": "lora"}))
    assert lora.probabilities is None


def test_memory_is_planned_where_the_shapes_are_known(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    shape = configuration(SHAPES["llama2-7b"]) | {"num_hidden_layers": 4, "hidden_size": 256, "vocab_size": 64}
    (tmp_path / "base" / "config.json").write_text(json.dumps(shape | {"num_attention_heads": 2}))
    run = write_run(tmp_path / "run", str(tmp_path / "base"))
    assert read(run).planned is None  # of how many processes?
    write_manifest(run / "checkpoints" / "step-4", Manifest(2, {"sharding": "zero3"}, [], {}))
    assert read(run).n_layers == 4
    sharded = read(run).planned
    write_manifest(run / "checkpoints" / "step-4", Manifest(2, {}, [], {}))
    replicated = read(run).planned
    assert sharded is not None
    assert replicated is not None
    assert sharded.state["weights"] == replicated.state["weights"] // 2


def test_several_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name, optim={"rank": 8 * (i + 1)})) for i, name in enumerate("abc")]
    (tmp_path / "c" / "metrics.jsonl").unlink()
    (tmp_path / "c" / "scores.json").unlink()
    code, _ = report(capsys, *runs, runs[0], "--output", str(tmp_path / "all.html"))
    assert code == 0
    page = Page((tmp_path / "all.html").read_text())
    assert page.row("optim.rank") == ["8", "16", "24"]
    assert page.row("tokens") == ["40", "40", "0"]
    settings = [row[0] for row in page.rows if row[0].startswith(("optim.", "train.", "model.", "sampling."))]
    assert settings[0] == "optim.rank"  # what differs comes first


def test_nothing_is_asked_for_and_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "<b>&run"
    run = write_run(folder, HOSTILE)
    assert report(capsys, str(run))[0] == 0
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.row("model") == [HOSTILE]
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "img", "b"}
    asked = [value for _, attributes in page.tags for name, value in attributes.items()
             if name in ("src", "href", "xlink:href", "data", "action", "poster")]  # fmt: skip
    assert asked
    assert all(str(value).startswith("#") for value in asked)
    assert not re.search(r"url\((?!#)|@import", text)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {str(value)[1:] for value in asked} <= set(ids)
    assert not re.search(r"#0102\w\w", text)  # stand-in colours


@pytest.mark.parametrize(
    ("words", "key", "said"),
    [
        ([], "RUN_DIR", "it is required"),
        (["nowhere"], "RUN_DIR", "expected the folder of a run"),
        (["run", "--output", "page.txt"], "--output", "or an earlier report"),
        (["run", "--output", "no/where.html"], "--output", "in a folder that exists"),
        (["run", "--output", "run"], "--output", "or an earlier report"),
    ],
)
def test_mistakes(
    words: list[str], key: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "page.txt").write_text("mine")
    code, error = report(capsys, *words)
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith(f"ows-ds: error: {key}: ")
    assert said in error
    assert (tmp_path / "page.txt").read_text() == "mine"


def test_a_run_that_has_only_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    for file in ("metrics.jsonl", "scores.json"):
        (run / file).unlink()
    assert report(capsys, str(run))[0] == 0
    assert "No step is recorded yet." in (run / "report.html").read_text()


def test_long_curves_arethinned() -> None:
    points = [(step, float(step)) for step in range(1, 10_001)]
    thin = thinned(points)
    assert len(thin) == 400
    assert thin[-1] == (10_000, 9_988.0)  # the mean of 25
    assert len(curves({"a": points}, "x", "y", "label")) < 40_000
