"""Real launchers on one machine: the same recipe leaves the same files under each of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ows_ds import config
from ows_ds.distributed.rendezvous import free_port
from tests.conftest import ROOT
from tests.launch.conftest import same
from tests.support.tiny_run import recipe
from tests.train.test_trainer import contents

BIN = Path(sys.executable).parent
LIMIT = 300  # seconds for one launch; the first on a machine compiles DeepSpeed's operator


def launch(words: list[str], file: Path, **options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_"))}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    more = [word for key, value in options.items() for word in (f"--train.{key}", value)]
    command = [*words, "-m", "ows_ds", "train", "--config", str(file), *more]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)


def launchers() -> dict[str, tuple[list[str], dict[str, str]]]:
    port = str(free_port())
    accelerate = [str(BIN / "accelerate"), "launch", "--main_process_port", port]
    accelerate += ["--config_file", "launch/accelerate/zero3_cpu_2.yaml"]
    torchrun = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", port]
    return {
        "accelerate": (accelerate, {}),
        "torchrun": (torchrun, {"sharding": "zero3"}),
        "torchrun replicated": (torchrun, {"sharding": "replicated"}),
    }


@pytest.mark.parametrize(
    "name", ["torchrun", *(pytest.param(name, marks=pytest.mark.ci) for name in ("accelerate", "torchrun replicated"))]
)
def test_the_same_run_as_without_a_launcher(
    inputs: Path, straight: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    words, options = launchers()[name]
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe(inputs, tmp_path / "run")))
    result = launch(words, file, **options)
    assert result.returncode == 0, result.stderr[-4000:]
    same(tmp_path / "run", contents(straight(2, sharding=options.get("sharding", "zero3"))))


@pytest.mark.parametrize("sharding", ["replicated", pytest.param("zero3", marks=pytest.mark.ci)])
def test_alone_without_a_launcher(inputs: Path, tmp_path: Path, sharding: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe(inputs, tmp_path / "run", steps=2, sharding=sharding)))
    result = launch([sys.executable], file)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_cpu", "one_gpu"])  # the second takes the CPU where there is no GPU
def test_accelerate_alone(inputs: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe(inputs, tmp_path / "run", steps=2)))
    result = launch([str(BIN / "accelerate"), "launch", "--config_file", f"launch/accelerate/{name}.yaml"], file)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
