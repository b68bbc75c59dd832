"""The benchmarks' scripts: they run, and what they compare with is what it says."""

from __future__ import annotations

import functools
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("galore_torch")
pytest.importorskip("reasoning_gym")

from benchmarks import bf16_drift as drift

SMALL = Namespace(steps=4, every=2, pretrain=2, lr=1e-3, hidden=32, layers=2, gamma=1, period=2, rank=4, refresh_gap=2)


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
