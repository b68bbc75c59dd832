"""The benchmarks' scripts: they run, and what they compare with is what it says."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("galore_torch")
pytest.importorskip("reasoning_gym")

from benchmarks import bf16_drift as drift
from benchmarks import gpu, refresh, same_weights
from ows_ds.optim.projection import exact_projector

SMALL = Namespace(
    steps=4, every=2, pretrain=2, lr=1e-3, hidden=32, layers=2, gamma=1, period=2, rank=4, update_proj_gap=2
)


def test_drift_study_writes_table_numbers_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "settle", lambda: None)  # would outlive the test
    files = {"--json": str(tmp_path / "d.json"), "--plot": str(tmp_path / "d.png"), "--workers": "1"}
    given = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(SMALL).items()} | files
    drift.main([word for pair in given.items() for word in pair])
    out = json.loads((tmp_path / "d.json").read_text())
    assert out["settings"].items() >= vars(SMALL).items()
    assert out["methods"].keys() == drift.methods(SMALL).keys()
    lines = capsys.readouterr().out
    for title, result in out["methods"].items():
        assert f"| {title} | float32 | 0 |" in lines
        assert result["held_out_loss"] < result["held_out_loss_before"]
        floor = result["variants"]["float32, rounded when measured"]
        for label, found in result["variants"].items():
            assert f"| | {label} |" in lines
            assert found["step"] == [2, 4]
            assert all(0 < mean <= worst < 1 for mean, worst in zip(found["mean"], found["worst"], strict=True))
            assert found["mean"][-1] >= 0.9 * floor["mean"][-1]  # rounding alone is the least there can be
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("make", [functools.partial(drift.ours, gamma=1, rank=4), drift.galore_torch, drift.lisa])
def test_masters_change_nothing_in_float32(make: Any) -> None:
    data = torch.randint(drift.VOCABULARY, (999,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    begin = drift.start(SMALL, data)
    runs = [drift.train(SMALL, begin, data, make, torch.float32, master=master)[0][0] for master in (False, True)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in begin)
    assert any(not torch.equal(runs[0][name], begin[name]) for name in begin)


def test_energies_of_projectors() -> None:
    """The exact subspace keeps all it can, another one less; noise that has no leading directions shows it."""
    noise = torch.Generator().manual_seed(0)
    flat = {"w": torch.randn(60, 40, generator=noise)}
    steep = {"w": flat["w"] * torch.logspace(0, -4, 40)}
    exact = exact_projector(steep["w"], 4)
    assert refresh.kept(steep["w"], exact, exact) == 1
    assert refresh.kept(steep["w"], torch.eye(40)[:, -4:], exact) < 0.01
    found = refresh.projector_energy([steep, steep], 4)
    assert all(0.99 < one <= 1 + 1e-6 for some in found.values() for one in some)
    other = refresh.projector_energy([flat, {"w": flat["w"].flip(0).roll(3, 1)}], 4)
    assert other["sketches, the first of another batch"][0] < other["from noise"][0] < 1


def test_table_of_refreshes() -> None:
    measured = {"60 x 40": refresh.times((60, 40), 4, 1)}
    assert measured["60 x 40"].keys() == {"exact", "cold", "warm"}
    assert all(value > 0 for value in measured["60 x 40"].values())
    lines = refresh.report({"a": {"exact": 8.0, "cold": 2.0, "warm": 0.5}}, {"way": [0.5, 1.0]}, ["# head"])
    assert "| a | 8.0 | 2.00 | 4 | 0.50 | 16 |" in lines
    assert "| way | 0.50000 | 0.75000 |" in lines


def test_weights_that_are_not_the_same() -> None:
    old = {"a": torch.ones(4, dtype=torch.float64), "b": torch.zeros(2)}
    assert same_weights.relative(old, {name: one.clone() for name, one in old.items()}) == 0
    other = old["a"].clone()
    other[1] += 2e-12
    assert same_weights.relative(old, {**old, "a": other}) == pytest.approx(1e-12, rel=1e-3)
    for wrong in ({"a": old["a"]}, {**old, "a": old["a"].float()}, {**old, "a": other * float("nan")}):
        assert same_weights.relative(old, wrong) == float("inf")
    recipe = same_weights.recipe(Path("inputs"), Path("out"), "ows", "zero3", "float64")
    assert same_weights.renamed(recipe)["train"].keys() ^ recipe["train"].keys() == {
        "global_batch_size", "batch_size", "save_steps", "save_every",
    }  # fmt: skip


@pytest.mark.ci
@pytest.mark.slow
def test_what_a_gpu_shows_is_the_same_on_a_cpu(tmp_path: Path) -> None:
    """The same parts, rows and columns, so that the first GPU finds a command that works."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--shape", "tiny", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [text] = [file.read_text() for file in tmp_path.glob("*-gpu-cpu.md")]
    [found] = [json.loads(file.read_text()) for file in tmp_path.glob("*-gpu-cpu.json")]
    assert found["parts"].keys() == gpu.PARTS.keys()
    assert all(re.fullmatch(r"\d+ s", said) for said in found["parts"].values()), found["parts"]
    rows = {part: [row for row in found["rows"] if row["part"] == part] for part in gpu.PARTS}
    for part, columns in gpu.TABLES.items():
        assert "| " + " | ".join(columns.values()) + " |" in text
        assert all(row.keys() == {"part", *columns} for row in rows[part])
        results = [row["result"] for row in rows[part]]
        assert results == (["ok"] * len(results) if part != "streams" else ["not measured: no GPU"]), rows[part]
    assert [row["what"] for row in rows["runs"]] == ["train", "resume", "zero3", "two ranks zero3"]
    assert len(rows["mathematics"]) == len(gpu.SETTINGS)
    assert [row["method"] for row in rows["costs"]] == list(gpu.METHODS)
    of_a_gpu = ("mfu", "planned_ms", "allocated_gib", "reserved_gib", "waits", "waits_refresh")
    for row in rows["costs"]:
        assert row["tokens_per_second"] > 0
        assert (row["refresh_ms"] == 0) == (row["method"] not in ("ows", "ows-lean", "galore"))
        assert [row[key] for key in of_a_gpu] == [None] * len(of_a_gpu)  # nothing is made up
    assert text.count(gpu.UNKNOWN) == len(gpu.METHODS) * len(of_a_gpu) + 1


def test_a_part_that_fails_or_takes_too_long_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = []
    assert gpu.measure("costs", ["--shape", "none"], 60, rows.append).startswith("failed after ")
    assert "invalid choice" in rows[0]["result"]
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho \'ROW {"result": "ok"}\'\nsleep 60 &\nsleep 60\n')  # the first keeps stdout
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(gpu, "LEAST", 0)
    began = time.monotonic()
    assert gpu.measure("runs", [], 0.5, rows.append).startswith("stopped after ")
    assert time.monotonic() - began < 30
    assert rows[1:] == [{"result": "ok"}, {"what": "all of it", "result": rows[2]["result"]}]
