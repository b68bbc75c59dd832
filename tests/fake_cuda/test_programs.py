"""Everything that runs on GPUs, on GPUs without one: nothing races, mixes devices or reads what is not there yet."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deepspeed.utils import groups
from safetensors.torch import load_file

from ows_ds import config
from tests.conftest import ROOT
from tests.evaluate.test_harness import ALL
from tests.fake_cuda import build
from tests.fake_cuda.environment import environment
from tests.fake_cuda.races import races_of_body
from tests.fake_cuda.worlds import FakeCuda
from tests.integrations.test_transformers import needs_trl
from tests.launch import test_examples as examples
from tests.launch.test_examples import EXAMPLES, model
from tests.support.offline_tasks import write_tasks
from tests.support.pool import Pools
from tests.support.tiny_run import cut, recipe
from tests.support.training import distance
from tests.train.test_trainer import contents, run

__all__ = ["model"]  # a fixture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(build.missing()), reason=str(build.missing())),
]

# ---------------------------------------------------------------- recipes

ONE: dict[str, dict[str, Any]] = {
    "plain": {},
    "one micro-batch": {"train.global_batch_size": 4},
    "sketch": {"optim.refresh": "sketch"},
    "always_on none": {"optim.always_on": "none"},
    "always_on low_rank": {"optim.always_on": "low_rank", "optim.merge_rounding": "stochastic"},
    "first": {"optim.refresh_batch": "first"},
    "svd": {"optim.projector": "svd"},
    "rotate": {"optim.moments_on_refresh": "rotate"},
    "packing": {"data.packing": True, "train.global_batch_size": 2, "train.micro_batch_size": 1},
    "checkpointing": {"train.gradient_checkpointing": True},
    "checkpointing, sketch": {"train.gradient_checkpointing": True, "optim.refresh": "sketch"},
    "inputs on the host": {"train.activation_offload": True, "train.tiled_mlp": True},
    "float32": {"model.dtype": "float32"},
    "float64": {"model.dtype": "float64"},
    "zero3": {"train.sharding": "zero3"},
    **{f"importance {name}": {"sampling.importance": name} for name in ("rm", "bi", "alpha", "reverse")},
    **{name: {"method.name": name} for name in ("lisa", "lisa-d", "galore", "badam", "hift", "full")},
    **{name: {"method.name": name} for name in ("lora", "dora", "mezo")},
}
TWO = [
    *("plain", "sketch", "always_on none", "always_on low_rank", "first", "one micro-batch", "checkpointing"),
    *("packing", "full", "lora", "dora", "mezo", "hift", "badam", "lisa", "galore"),
]
ZERO3 = {"train.sharding": "zero3"}
CASES = {
    **{f"1, {name}": (1, changes) for name, changes in ONE.items()},
    **{f"2, zero3, {name}": (2, ONE[name] | ZERO3) for name in TWO},
    "2, replicated": (2, {}),
    "2, zero3, offload": (2, ZERO3 | {"train.ds_config": str(ROOT / "ds_configs" / "zero3_offload_cpu.json")}),
    "3, replicated": (3, {}),
    "4, hpZ": (4, ZERO3 | {"train.ds_config": "hpz.json", "train.micro_batch_size": 1}),
}


def changed(whole: config.Recipe, changes: dict[str, Any]) -> config.Recipe:
    """With other values of keys such as train.steps."""
    tree = config.to_dict(whole)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    return config.from_dict(tree)


def train(rank: int, world_size: int, recipe: config.Recipe) -> dict[str, int]:
    """The races of a run."""
    try:
        with races_of_body() as found:
            run(rank, world_size, recipe, None)
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # which DeepSpeed keeps for the rest of a process
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_recipe(fake_cuda: FakeCuda, inputs: Path, tmp_path: Path, name: str) -> None:
    ranks, changes = CASES[name]
    if changes.get("train.ds_config") == "hpz.json":
        settings = json.loads((ROOT / "ds_configs" / "zero3_hpz.json").read_text())
        settings["zero_optimization"]["zero_hpz_partition_size"] = 2
        (tmp_path / "hpz.json").write_text(json.dumps(settings))
        changes = changes | {"train.ds_config": str(tmp_path / "hpz.json")}
    whole = changed(recipe(inputs, tmp_path / "run", steps=6, save_steps=4), changes)
    assert fake_cuda(ranks).run(train, whole) == [{}] * ranks
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(7))
    assert all(math.isfinite(line["loss"]) for line in lines if line["loss"] is not None)


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
def test_a_run_is_that_of_the_cpu_and_may_be_resumed(
    fake_cuda: FakeCuda, pools: Pools, inputs: Path, tmp_path: Path, sharding: str
) -> None:
    """Operators are the CPU's. Where a tensor lies in memory decides the order of some sums: nothing else differs."""

    def of(name: str, **more: Any) -> config.Recipe:
        whole = recipe(inputs, tmp_path / name, sharding=sharding, save_total_limit=3, **more)
        return changed(whole, {"model.dtype": "float64"})

    pools(2).run(run, of("cpu"), None)
    assert fake_cuda(2).run(train, of("whole")) == [{}, {}]
    records, of_cpu = (contents(tmp_path / name)[0] for name in ("whole", "cpu"))
    for record in (*records, *of_cpu):
        record.pop("projector_energy", None)
    assert records == of_cpu
    assert distance(*(load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cpu"))) < 1e-14
    cut(tmp_path / "whole", tmp_path / "resumed")
    assert fake_cuda(2).run(train, of("resumed", resume="auto")) == [{}, {}]
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


# ---------------------------------------------------------------- scripts and commands


def example(rank: int, world_size: int, path: Path, model: Path, out: Path) -> dict[str, int]:
    """The races of a script of docs/examples."""
    with races_of_body() as found:
        examples.run(rank, world_size, path, model, out)
    return found


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=needs_trl if p.stem == "sft" else (), id=p.stem) for p in EXAMPLES]
)
def test_an_example(fake_cuda: FakeCuda, model: Path, tmp_path: Path, path: Path) -> None:
    ranks = 1 if path.stem == "plain" else 2
    assert fake_cuda(ranks).run(example, path, model, tmp_path / "out") == [{}] * ranks
    assert examples.loss(tmp_path / "out") < examples.loss(model) - 0.05


TRAIN = "train --config recipe.yaml --train.output_dir run"
EVAL = f"eval model --tasks {ALL} --include-path tasks --output result.json"
BENCH = "--hidden 64 --heads 2 --layers 2 --gamma 1 --rank 4 --tokens 32"
COMMANDS = {
    "train": (1, TRAIN),
    "train, 2 ranks": (2, TRAIN),
    "train, 2 ranks, zero3": (2, f"{TRAIN} --train.sharding zero3"),
    "score": (1, "score --config recipe.yaml --train.output_dir run"),
    "score, 2 ranks, zero3": (2, "score --config recipe.yaml --train.output_dir run --train.sharding zero3"),
    "eval": (1, EVAL),
    "eval, 2 ranks": (2, EVAL),
    "bench time": (1, f"bench time {BENCH} --rounds 1 --steps 1 --methods ows,peft-lora"),
    "bench memory": (1, f"bench memory {BENCH} --methods ows"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(inputs: Path, tmp_path: Path, name: str) -> None:
    ranks, words = COMMANDS[name]
    (tmp_path / "model").symlink_to(inputs / "model")
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(recipe(inputs, tmp_path / "run", steps=4)))
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks")
    races = tmp_path / "races"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    around = environment(ranks, races=races) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, "-m", "ows_ds", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, env=around, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert races.read_text() == ""
    assert "failed" not in done.stdout  # a method's row


def test_what_a_gpu_shows(tmp_path: Path) -> None:
    """All parts of benchmarks/gpu.py, two ranks with a GPU each, whatever the first real GPU will be asked."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--shape", "tiny", "--minutes", "12", "--output", str(tmp_path)]
    around = environment(2) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    [found] = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert {row["part"] for row in found["rows"]} == {"runs", "mathematics", "streams", "frozen", "costs", "search"}
    assert [row for row in found["rows"] if row["result"] != "ok"] == []
    costs = [row for row in found["rows"] if row["part"] == "costs"]
    assert all(0 < row["allocated_gib"] <= row["reserved_gib"] for row in costs)
    assert all((row["waits"], row["waits_refresh"]) in ((0, 0), (0, 1)) for row in costs)
