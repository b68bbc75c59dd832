"""Launchers that restart all ranks after a fault: the run resumes from its newest checkpoint by itself."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ows_ds import config
from tests.conftest import ROOT
from tests.launch.test_launchers import LIMIT, launchers
from tests.support.tiny_run import recipe
from tests.train.test_trainer import contents


@pytest.mark.parametrize(
    ("launcher", "fault"),
    [
        pytest.param("torchrun", "kill", marks=pytest.mark.ci),
        pytest.param("torchrun", "memory", marks=pytest.mark.slow),
        pytest.param("accelerate", "kill", marks=pytest.mark.slow),
    ],
)
def test_a_restarted_run_resumes(
    inputs: Path, straight: Callable[..., Path], tmp_path: Path, launcher: str, fault: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe(inputs, tmp_path / "run", resume="auto", sharding="zero3")))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_"))}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    words, _ = launchers()[launcher]
    options = 2 if launcher == "accelerate" else 1  # where they begin
    words[options:options] = ["--max_restarts", "2"]
    faulty = [*words, "-m", "tests.faults.worker", fault, "1", "5"]
    command = [*faulty, "train", "--config", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "run" / "fault").exists()
    assert contents(tmp_path / "run") == contents(straight(2, sharding="zero3"))
