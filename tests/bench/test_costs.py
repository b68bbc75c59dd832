"""`ows-ds bench time`, `memory` and `traffic` from the command line, on a slice of a few thousand weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ows_ds.cli.main import main

TINY = ["--hidden", "64", "--heads", "2", "--vocab", "64", "--tokens", "16", "--rank", "8", "--threads", "1"]


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs a verb and returns the methods' results."""

    def run(what: str, *options: str) -> dict[str, Any]:
        folder = tmp_path / "out"
        words = ["bench", what, *TINY, "--device", "cpu", "--output", str(folder), "--json", *options]
        assert main(words) == 0
        summary: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert summary["command"].startswith(f"ows-ds bench {what} --hidden 64")
        assert {f"{what}.{kind}" for kind in ("json", "md", "png")} == {path.name for path in folder.iterdir()}
        results: dict[str, Any] = summary["points"][0]["results"]
        return results

    return run


def test_time(bench: Callable[..., dict[str, Any]]) -> None:
    results = bench("time", "--methods", "ows,torch-adamw", "--rounds", "2", "--steps", "2")
    assert list(results) == ["limit", "ows", "torch-adamw"]
    assert all([len(some) for some in one["rounds"]] == [2, 2] for one in results.values())
    assert results["limit"]["of_limit"] == results["limit"]["flops_of_limit"] == 1
    # each of 7 matrices (n x m): x B, its product, dY times a factor, that times the other, R; 2 flops an entry and r
    shapes = [(64, 64)] * 4 + [(172, 64)] * 3
    more = sum(2 * 16 * 8 * (2 * (m + n) + max(m, n)) for m, n in shapes)
    head = 2 * 15 * 64 * 64  # the head and the embedding train at full rank, beside the layer
    assert results["ows"]["flops"] - results["limit"]["flops"] == more + head
    assert [one["refresh"] is None for one in results.values()] == [True, False, True]


def test_memory(bench: Callable[..., dict[str, Any]]) -> None:
    results = bench("memory", "--methods", "ows")
    # 2 x 64 x 64 x 2 + 3 x 64 x 172 + 2 x 64 in the layer, 2 x 64 x 64 + 64 outside
    assert [one["step"]["weights"] for one in results.values()] == [4 * (16384 + 33024 + 128 + 8192 + 64)] * 2
    assert results["limit"]["step"]["optimizer"] == 0


def test_traffic(bench: Callable[..., dict[str, Any]]) -> None:
    results = bench("traffic", "--methods", "ows-lean")["ows-lean"]
    # r x sum of longer sides, vectors in rows of r: 8 x (4 x 64 + 3 x 172 + 2 x 8), half of it each way, 4 bytes
    assert results["step"]["gradients"] == results["step"]["coordinates"] == 4 * 8 * 788 // 2
    sent = {op: size for op, size in results["refresh"].items() if op != "agree"}
    assert (results["step"], sent) == (results["step_planned"], results["refresh_planned"])
    assert results["full_rank"] == 4 * (16384 + 33024 + 128)
