"""The wheel in an environment of its own: recipes come along, and one of them trains."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel; its dependencies are this one's."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    [wheel] = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True, timeout=300)
    [packages] = (folder / "env").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    prefix = [*pip, "--python", str(folder / "env" / "bin" / "python")]
    subprocess.run([*prefix, "install", "-q", "--no-deps", "--force-reinstall", str(wheel)], check=True, timeout=300)
    return folder / "env" / "bin" / "python"


def run(python: Path, folder: Path, *words: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [str(python), "-m", "ows_ds", *words]
    found = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_recipes_come_along_and_train(python: Path, inputs: Path, tmp_path: Path) -> None:
    words = [str(python), "-c", "import ows_ds; print(ows_ds.__file__)"]
    where = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True,
                           env={"PATH": os.environ["PATH"]}).stdout  # fmt: skip
    assert str(python.parent.parent) in where
    listed = run(python, tmp_path, "recipes")
    for file in (*ROOT.glob("launch/recipes/*.yaml"), *ROOT.glob("launch/slurm/*"), *ROOT.glob("ds_configs/*.json")):
        assert file.name in listed
    run(python, tmp_path, "recipes", "recipes/demo.yaml", "--output", "demo.yaml")
    small = ["--sampling.gamma=1.5", "--sampling.calibration_samples=4", "--optim.rank=4", "--optim.warmup_steps=0"]
    small += ["--train.steps=2", "--train.global_batch_size=4", "--log.trackers=[]", "--train.eval_steps=1"]
    files = ["--model.path", str(inputs / "model"), "--data.train", str(inputs / "train.jsonl")]
    files += ["--data.eval", str(inputs / "eval.jsonl")]
    run(python, tmp_path, "train", "--config", "demo.yaml", *files, *small)
    records = [json.loads(line) for line in (tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in records] == [0, 1, 2]
    assert (tmp_path / "runs/demo/model/model.safetensors").exists()
