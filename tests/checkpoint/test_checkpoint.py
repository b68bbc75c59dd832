"""Checkpoints over processes: written beside the steps, read by any number of processes, of this base model alone."""

from __future__ import annotations

import functools
import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ows_ds import checkpoint, config, methods
from ows_ds.checkpoint import writer
from ows_ds.distributed.communicator import Communicator, join
from ows_ds.distributed.weights import Shard
from ows_ds.errors import UserError
from ows_ds.model import tensor_files
from ows_ds.model.layers import find_layers
from ows_ds.train import export, log, resume
from ows_ds.train.trainer import train
from tests.methods.test_whole import place
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.tiny_run import recipe
from tests.support.training import RATIOS, distance, mean_loss, micro_batches, whole_weights
from tests.train.test_trainer import contents, refused, run

SLOW = pytest.mark.slow

# ------------------------------------------------------------------ beside the steps


def slow_disk(rank: int, world_size: int, recipe: config.Recipe, until: int) -> tuple[list[list[str]], int]:
    """Train on a disk that takes its first file when step ``until`` is recorded, and is fast from then on.

    Returns the checkpoints that were there at each record, and how many files were written at once at most.
    """
    step, write, go = log.RunLog.step, writer.write_shards, threading.Event()
    there: list[list[str]] = []
    now, most = 0, 0

    def recording(self: log.RunLog, record: dict[str, Any]) -> None:
        step(self, record)
        there.append([path.name for path in checkpoint.checkpoints(Path(recipe.train.output_dir))])
        if record["step"] == until:
            go.set()

    def slowly(*args: Any) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        assert go.wait(60)
        entry = write(*args)
        now -= 1
        return entry

    with patch.object(log.RunLog, "step", recording), patch.object(writer, "write_shards", slowly):
        train(recipe)
    return there, most


def test_steps_do_not_wait_for_the_disk(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    ranks = pools(2).run(slow_disk, recipe(inputs, tmp_path / "run", sharding="zero3", steps=12, save_steps=5), 8)
    for there, most in ranks:
        assert there[:9] == [[]] * 9  # three steps were taken with the state of step 5 on its way
        assert there[11][-1] == "step-5"
        assert most == 1
    pools(2).run(run, recipe(inputs, tmp_path / "whole", sharding="zero3", steps=12, save_steps=5), None)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_one_at_a_time(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    """A checkpoint that is due while one is under way waits for it: none is left out."""
    made = recipe(inputs, tmp_path / "run", sharding="zero3", steps=6, save_steps=1, save_total_limit=6)
    assert {most for _, most in pools(2).run(slow_disk, made, 2)} == {1}
    assert len(checkpoint.checkpoints(tmp_path / "run")) == 6


def fails(rank: int, world_size: int, folder: Path) -> list[str]:
    """Save; then let one process's disk fail; the errors."""
    comm = join("cpu")
    shard = Shard("weight/a", (4,), 2 * rank, torch.full((2,), float(rank)))
    checkpoint.save(folder / "step-1", [shard], {}, comm)

    def broken(*args: Any) -> None:
        raise OSError(5, "Input/output error")

    errors = []
    for owner, name, at, instead in (
        (tensor_files.Writer, "close", 1, broken),
        (writer, "write_manifest", 0, broken),
        (writer, "sha256", 1, lambda *args, **more: "other"),  # one rank reads back what it did not write
    ):
        with patch.object(owner, name, instead if rank == at else getattr(owner, name)):
            try:
                checkpoint.save(folder / "step-1", [shard], {}, comm)
            except checkpoint.SaveError as error:
                errors.append(str(error))
    assert checkpoint.open_checkpoint(folder / "step-1", comm).read("weight/a", 0, 4).tolist() == [0, 0, 1, 1]
    assert [path.name for path in folder.iterdir()] == ["step-1"]
    return errors


def test_a_failure_of_one_process_is_all_processes_and_changes_nothing(pools: Pools, tmp_path: Path) -> None:
    ranks = pools(2).run(fails, tmp_path / "checkpoints")
    assert ranks[0] == ranks[1]
    assert [error.partition(" could not be written ")[2] for error in ranks[0][:2]] == [
        "on rank 1 (OSError: [Errno 5] Input/output error)",
        "on rank 0 (OSError: [Errno 5] Input/output error)",
    ]
    assert "does not hold what was written to it" in ranks[0][2]


# ------------------------------------------------------------------ what is in it


def test_manifest(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    made = recipe(inputs, tmp_path / "run", sharding="zero3", steps=2)
    pools(2).run(run, made, None)
    opened, _ = checkpoint.find(tmp_path / "run", "auto", Communicator())
    assert opened is not None
    assert opened.versions["torch"] == torch.__version__
    assert config.from_dict(opened.facts["recipe"]) == config.exact(made)
    assert opened.facts["sharding"] == "zero3"
    assert opened.facts["model"] == export_fingerprint(inputs)


def export_fingerprint(inputs: Path) -> str:
    from transformers import AutoModelForCausalLM

    from ows_ds.distributed.weights import Replicated
    from ows_ds.model.fingerprint import fingerprint

    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.bfloat16)
    return fingerprint(Replicated(model, Communicator()))


@pytest.fixture(scope="module")
def other(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same inputs with another base model: every entry of all its weights is another."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(inputs, folder, dirs_exist_ok=True)
    weights = {name: tensor + 1 for name, tensor in load_file(folder / "model" / "model.safetensors").items()}
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("method", ["lisa", pytest.param("ows", marks=SLOW), pytest.param("lora", marks=SLOW)])
def test_another_base_model_is_refused(pools: Pools, inputs: Path, other: Path, tmp_path: Path, method: str) -> None:
    run_dir = tmp_path / "run"
    pools(2).run(run, recipe(inputs, run_dir, method=method, sharding="zero3"), 4)
    before = contents_of(run_dir)
    for answer in pools(2).run(refused, recipe(other, run_dir, method=method, sharding="zero3", resume="auto")):
        assert answer.startswith(
            f"model.path: '{other / 'model'}' is invalid: expected the model that step-3 began with"
        )
    assert contents_of(run_dir) == before
    (run_dir / "config.yaml").write_text(config.to_yaml(recipe(other, run_dir, method=method, sharding="zero3")))
    with pytest.raises(UserError, match=r"model\.path"):
        export.export(run_dir, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
    # whose fingerprint is that of the model alone, adapters or not
    opened, _ = checkpoint.find(run_dir, "auto", Communicator())
    assert opened is not None
    assert opened.facts["model"] == export_fingerprint(inputs)


def contents_of(run_dir: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("method", "sharding"), [("ows", "zero3"), pytest.param("lora", "replicated", marks=SLOW)])
def test_full_needs_nothing_of_the_base_model(
    pools: Pools, inputs: Path, other: Path, tmp_path: Path, method: str, sharding: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings: dict[str, Any] = {
        "method": method,
        "sharding": sharding,
        "sampling": {"gamma": 0.5},
        "save_total_limit": 3,
    }
    settings["optim"] = {"always_on": "none"}
    pools(2).run(run, recipe(inputs, whole, **settings), None)
    pools(2).run(run, recipe(inputs, parts, checkpoint="full", **settings), 4)

    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    assert size(parts / "checkpoints" / "step-3") > size(whole / "checkpoints" / "step-3")
    again = recipe(other, parts, resume="auto", **settings)
    for answer in pools(2).run(refused, again):  # what it writes would count on the wrong model
        assert answer.endswith("or train.checkpoint full")
    pools(2).run(run, recipe(other, parts, checkpoint="full", resume="auto", **settings), None)
    (records, files), (its_records, its_files) = contents(whole), contents(parts)
    assert its_records == records
    assert its_files["model/model.safetensors"] == files["model/model.safetensors"]

    made = recipe(other, parts, checkpoint="full", **settings)
    (parts / "config.yaml").write_text(config.to_yaml(made))
    export.export(parts, tmp_path / "from full", "step-6")
    export.export(whole, tmp_path / "from incremental", "step-6")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("from full", "from incremental"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------ other worlds

STEPS, MORE = 7, 5


def build(name: str, sharding: str, world_size: int) -> methods.Method:
    settings = config.from_dict(
        {
            "model": {"path": "none", "dtype": "float32"},
            "data": {"train": "none"},
            "method": {"name": name},
            "sampling": {"gamma": 1.5, "period": 3},
            "optim": {"rank": 4, "update_proj_gap": 2, "lr": 5e-3, "weight_decay": 0.1, "max_grad_norm": 0.5},
            "train": {"output_dir": "none", "global_batch_size": 24, "seed": 3},
        }
    )
    model = tiny("llama", True)
    layers = find_layers(model)
    return methods.build(settings, place(model, sharding, world_size, settings), layers, RATIOS, 2)


def take(method: methods.Method, rank: int, world_size: int, steps: int) -> None:
    for _ in range(steps):
        losses = micro_batches(method.steps, rank, world_size, 2)
        method.train_step([functools.partial(lambda ids: mean_loss(method.weights, ids) / 2, ids) for ids in losses])


def save_and_continue(rank: int, world_size: int, name: str, sharding: str, folder: Path) -> dict[str, Tensor]:
    """The weights at the end."""
    method = build(name, sharding, world_size)
    take(method, rank, world_size, STEPS)
    checkpoint.save(folder, *resume.contents(method, True), method.comm)
    take(method, rank, world_size, MORE)
    method.close()
    return whole_weights(method.weights)


def load_save_and_continue(
    rank: int, world_size: int, name: str, sharding: str, folder: Path, copy: Path
) -> dict[str, Tensor]:
    method = build(name, sharding, world_size)
    resume.restore(method, checkpoint.open_checkpoint(folder, method.comm))
    checkpoint.save(copy, *resume.contents(method, True), method.comm)
    take(method, rank, world_size, MORE)
    method.close()
    return whole_weights(method.weights)


@pytest.fixture(scope="module")
def saved(
    pools: Pools, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, dict[str, Tensor]]]:
    """Of a method and a sharding: a checkpoint of two processes, and the weights at the end of their run."""

    @functools.cache
    def make(name: str, sharding: str) -> tuple[Path, dict[str, Tensor]]:
        folder = tmp_path_factory.mktemp("saved") / "step-7"
        return folder, pools(2).run(save_and_continue, name, sharding, folder)[0]

    return make


FAST = [("ows", "replicated", "zero3", 3), ("ows", "zero3", "replicated", 1)]
SHARDINGS = ["zero3", "replicated"]
ALL = itertools.product(["ows", "full", "hift"], SHARDINGS, SHARDINGS, [1, 3, 4])


@pytest.mark.parametrize(
    ("name", "source", "target", "world_size"),
    [*FAST, *(pytest.param(*case, marks=SLOW) for case in ALL if case not in FAST)],
)
def test_other_worlds_hold_the_same_and_continue(
    pools: Pools, tmp_path: Path, saved: Any, name: str, source: str, target: str, world_size: int
) -> None:
    folder, expected = saved(name, source)
    copy = tmp_path / "step-7"
    for weights in pools(world_size).run(load_save_and_continue, name, target, folder, copy):
        assert distance(weights, expected) < 1e-4  # float32, sums in another order
    alone = Communicator()
    ours, theirs = checkpoint.open_checkpoint(copy, alone), checkpoint.open_checkpoint(folder, alone)
    assert ours.state == theirs.state
    assert ours.shapes == theirs.shapes
    assert len({tensor.partition("/")[0] for tensor in ours.shapes}) == {"ows": 6, "full": 2, "hift": 2}[name]
    for tensor, shape in ours.shapes.items():
        entries = torch.Size(shape).numel()
        assert torch.equal(ours.read(tensor, 0, entries), theirs.read(tensor, 0, entries)), tensor
