"""The shipped smoke study on the real model, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ows_ds.data import samples
from tests.conftest import ROOT

LIMIT = 900  # seconds; about two minutes on two idle cores


@pytest.mark.slow
def test_quality_of_five_methods_on_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """One seed of launch/bench/quality_smoke.yaml: every method learns, over the same tokens."""
    for package in ("reasoning_gym", "scipy", "peft"):
        pytest.importorskip(package)
    inputs = tmp_path / "runs"
    (inputs / "demo-inputs").mkdir(parents=True)
    (inputs / "demo-inputs" / smollm2.name).symlink_to(smollm2)
    options = {"max_terms": 2, "max_digits": 2}
    samples.word_problems(inputs / "bench-inputs" / "sums", 256, 16, 0, test=16, task="chain_sum", options=options)

    study = str(ROOT / "launch" / "bench" / "quality_smoke.yaml")
    words = [sys.executable, "-m", "ows_ds", "bench", "quality", "--config", study, "--output", "out"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*words, "--seeds", "0", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert (result["runs"], result["runs_complete"], result["rows_answered"]) == (11, 6, 2)
    assert list(result["variants"]) == ["ows", "lisa", "lora", "galore", "full"]
    for name, variant in result["variants"].items():
        assert variant["loss"]["mean"] < result["before"]["loss"], name
        assert variant["tokens"] == result["variants"]["ows"]["tokens"]
        assert variant["accuracy"]["values"][0] in (0.0, 50.0, 100.0)
        assert (variant["loss"]["std"], variant["loss"]["p"]) == (None, None)  # one seed
    assert (tmp_path / "out" / "loss.png").exists()
    assert (tmp_path / "out" / "scores.png").exists()
