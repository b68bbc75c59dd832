"""`ows-ds bench time`, `memory` and `traffic` as a user starts them, on a slice of a few thousand weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

TINY = ["--hidden", "64", "--heads", "2", "--vocab", "64", "--tokens", "16", "--rank", "8", "--threads", "1"]


def bench(what: str, folder: Path, *options: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "ows_ds", "bench", what, *TINY, "--device", "cpu", "--output", "out", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, *options], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    summary: dict[str, Any] = json.loads(done.stdout)
    assert summary["command"].startswith(f"ows-ds bench {what} --hidden 64")
    assert {f"{what}.{kind}" for kind in ("json", "md", "png")} <= {path.name for path in (folder / "out").iterdir()}
    results: dict[str, Any] = summary["points"][0]["results"]
    return results


def test_time(tmp_path: Path) -> None:
    results = bench("time", tmp_path, "--methods", "ows,torch-adamw", "--rounds", "2", "--steps", "2")
    assert list(results) == ["limit", "ows", "torch-adamw"]
    assert all([len(some) for some in one["rounds"]] == [2, 2] for one in results.values())
    assert results["limit"]["of_limit"] == results["limit"]["flops_of_limit"] == 1
    # each of 7 matrices (n x m): x B, its product, dY times a factor, that times the other, R; 2 flops an entry and r
    shapes = [(64, 64)] * 4 + [(172, 64)] * 3
    more = sum(2 * 16 * 8 * (2 * (m + n) + max(m, n)) for m, n in shapes)
    head = 2 * 15 * 64 * 64  # the head and the embedding train at full rank, beside the layer
    assert results["ows"]["flops"] - results["limit"]["flops"] == more + head
    assert [one["refresh"] is None for one in results.values()] == [True, False, True]


def test_memory(tmp_path: Path) -> None:
    results = bench("memory", tmp_path, "--methods", "ows")
    # 2 x 64 x 64 x 2 + 3 x 64 x 172 + 2 x 64 in the layer, 2 x 64 x 64 + 64 outside
    assert [one["step"]["weights"] for one in results.values()] == [4 * (16384 + 33024 + 128 + 8192 + 64)] * 2
    assert results["limit"]["step"]["optimizer"] == 0


def test_traffic(tmp_path: Path) -> None:
    results = bench("traffic", tmp_path, "--methods", "ows-lean")["ows-lean"]
    # r x sum of longer sides, vectors in rows of r: 8 x (4 x 64 + 3 x 172 + 2 x 8), half of it each way, 4 bytes
    assert results["step"]["gradients"] == results["step"]["coordinates"] == 4 * 8 * 788 // 2
    sent = {op: size for op, size in results["refresh"].items() if op != "agree"}
    assert (results["step"], sent) == (results["step_planned"], results["refresh_planned"])
    assert results["full_rank"] == 4 * (16384 + 33024 + 128)
