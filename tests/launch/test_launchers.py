"""Real launchers on one machine: the same recipe gives the same weights under each of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ows_ds import config
from tests.conftest import ROOT
from tests.support.tiny_run import recipe

BIN = Path(sys.executable).parent
LIMIT = 300  # seconds for one launch; the first on a machine compiles DeepSpeed's operator


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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


def test_same_weights_under_every_launcher(inputs: Path, tmp_path: Path) -> None:
    models = {}
    for name, (words, options) in launchers().items():
        run_dir = tmp_path / name.replace(" ", "-")
        file = tmp_path / "recipe.yaml"
        file.write_text(config.to_yaml(recipe(inputs, run_dir, steps=5)))
        result = launch(words, file, **options)
        assert result.returncode == 0, result.stderr[-4000:]
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5]
        # two processes that share the work, not two that each think they are alone
        assert records[2]["comm_bytes"]["gradients"] > 0
        assert ("weights" in records[2]["comm_bytes"]) == ("replicated" not in name)
        models[name] = load_file(run_dir / "model" / "model.safetensors")
    first = models["accelerate"]
    assert all(bool((models["torchrun"][n] == first[n]).all()) for n in first)
    # replicated: sums in another order where whole matrices are merged at once
    assert all(bool(((models["torchrun replicated"][n] - first[n]).abs() <= 0.05).all()) for n in first)


def test_alone_without_a_launcher(inputs: Path, tmp_path: Path) -> None:
    """Replicated and in shards, at the same time: one process needs one core."""

    def one(sharding: str) -> None:
        file = tmp_path / f"{sharding}.yaml"
        file.write_text(config.to_yaml(recipe(inputs, tmp_path / sharding, steps=2, sharding=sharding)))
        result = launch([sys.executable], file)
        assert result.returncode == 0, result.stderr[-4000:]
        assert (tmp_path / sharding / "model" / "model.safetensors").exists()

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, ("replicated", "zero3")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_cpu", "one_gpu"])  # the second takes the CPU where there is no GPU
def test_accelerate_alone(inputs: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe(inputs, tmp_path / "run", steps=2)))
    result = launch([str(BIN / "accelerate"), "launch", "--config_file", f"launch/accelerate/{name}.yaml"], file)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_mistake_is_one_line_and_exit_code_2(inputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe(inputs, tmp_path / "run", steps=2)).replace("rank: 4", "rank: 4000"))
    result = launch([sys.executable], file)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("ows-ds: error: optim.rank: 4000 is invalid: expected at most ")
    assert not (tmp_path / "run").exists()
