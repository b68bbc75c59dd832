"""Whatever is wrong with a checkpoint's files is found, and the one before it is taken."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ows_ds import checkpoint
from ows_ds.checkpoint import saver as savers
from ows_ds.checkpoint import writer
from ows_ds.checkpoint.manifest import seal
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Shard
from ows_ds.errors import UserError
from tests.support.pool import Pools
from tests.support.tiny_run import cut, recipe
from tests.train.test_trainer import contents, refused, run

ALONE = Communicator()
SETTINGS: dict[str, Any] = {"sharding": "zero3", "save_total_limit": 3}


@pytest.fixture
def run_dir(straight: Callable[..., Path], tmp_path: Path) -> Path:
    """A run that died with checkpoints after 3 and 6 of 9 steps."""
    return cut(straight(2, **SETTINGS), tmp_path / "run")


def files() -> list[str]:
    return ["manifest.json", "state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors"]


def found(run_dir: Path, file: str) -> None:
    """The newest is skipped for what is wrong with ``file``, the one before is opened."""
    opened, passed = checkpoint.find(run_dir, "auto", ALONE)
    assert opened is not None
    assert opened.folder.name == "step-3"
    assert len(passed) == 1
    assert file in passed[0]
    assert "step-6" in passed[0]
    with pytest.raises(UserError, match=file):
        checkpoint.find(run_dir, str(run_dir / "checkpoints" / "step-6"), ALONE)


def test_both_are_good(run_dir: Path) -> None:
    opened, passed = checkpoint.find(run_dir, "auto", ALONE)
    assert opened is not None
    assert (opened.folder.name, passed) == ("step-6", [])
    assert sorted(p.name for p in opened.folder.iterdir()) == files()


@pytest.mark.parametrize("file", files())
def test_one_flipped_bit(run_dir: Path, file: str) -> None:
    path = run_dir / "checkpoints" / "step-6" / file
    content = path.read_bytes()
    chance = random.Random(file)
    # anywhere, and in what says how to read the rest
    places = {0, len(content) - 1, *chance.choices(range(len(content)), k=20), *chance.choices(range(400), k=10)}
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        found(run_dir, file)


def test_flipped_bits_of_a_manifest(run_dir: Path) -> None:
    folder = run_dir / "checkpoints" / "step-6"
    content = (folder / checkpoint.MANIFEST).read_bytes()
    for place in (*range(100), *range(100, len(content), 17)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (folder / checkpoint.MANIFEST).write_bytes(flipped)
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            checkpoint.read_manifest(folder)


@pytest.mark.parametrize("file", files())
@pytest.mark.parametrize("keep", [None, 0.0, 0.5, -1], ids=["missing", "empty", "half", "one byte short"])
def test_missing_and_truncated(run_dir: Path, file: str, keep: float | None) -> None:
    path = run_dir / "checkpoints" / "step-6" / file
    content = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(content[: -1 if keep == -1 else int(len(content) * keep)])
    found(run_dir, file)


def test_the_run_says_so_and_resumes(pools: Pools, inputs: Path, run_dir: Path, straight: Callable[..., Path]) -> None:
    (run_dir / "checkpoints" / "step-6" / "manifest.json").unlink()
    lines = pools(2).run(run, recipe(inputs, run_dir, resume="auto", **SETTINGS), None)[0]
    assert "manifest.json cannot be read" in lines[0]
    assert lines[1] == f"resuming after step 3 from {run_dir / 'checkpoints' / 'step-3'}"
    assert contents(run_dir) == contents(straight(2, **SETTINGS))


def test_nothing_starts_over_damaged_checkpoints(pools: Pools, inputs: Path, run_dir: Path) -> None:
    for name in ("step-3", "step-6"):
        (run_dir / "checkpoints" / name / "manifest.json").unlink()
    records = (run_dir / "metrics.jsonl").read_bytes()
    for answer in pools(2).run(refused, recipe(inputs, run_dir, resume="auto", **SETTINGS)):
        assert answer.startswith(f"train.resume: 'auto' is invalid: remove {run_dir / 'checkpoints'} to start again")
        assert "step-6" in answer
    assert (run_dir / "metrics.jsonl").read_bytes() == records


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(format=2),
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.update(files={"a": 1}),
        lambda manifest: manifest["files"][0].update(name="../../outside"),
        lambda manifest: manifest["files"][0].update(shards={"a": None}),
    ],
)
def test_a_forged_manifest_is_refused(run_dir: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Its digest is right: such a one was not damaged, but made by something else."""
    path = run_dir / "checkpoints" / "step-6" / checkpoint.MANIFEST
    manifest = json.loads(path.read_bytes())
    del manifest["sha256"]
    path.write_bytes(seal(manifest))
    assert checkpoint.read_manifest(path.parent).world_size == 2
    change(manifest)
    path.write_bytes(seal(manifest))
    found(run_dir, "manifest.json")


def test_what_goes_and_what_stays(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        shard = Shard("weight/a", (4,), 0, torch.full((4,), float(step)))
        checkpoint.save(checkpoint.folder_of(tmp_path, step), [shard], {"step": step}, ALONE)
    (tmp_path / "checkpoints" / "step-11.partial").mkdir()
    savers.prune(tmp_path, keep=2, newest=6)  # a run that was resumed after 4: what is later was damaged, or is left
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-4", "step-6"]
    opened, _ = checkpoint.find(tmp_path, "auto", ALONE)
    assert opened is not None
    assert opened.state == {"step": 6}
    assert opened.read("weight/a", 1, 3).tolist() == [6.0, 6.0]
    assert set(opened.versions) == {"ows_ds", "torch", "transformers", "deepspeed"}


def test_without_memory_for_copies_the_step_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(shards: list[Shard]) -> list[Shard]:
        raise MemoryError

    monkeypatch.setattr(writer, "copies", no_memory)
    entries = torch.arange(4.0)
    with checkpoint.Saver(tmp_path, 1, ALONE, {}) as saver:
        assert not saver.done
        saver.start(1, [Shard("weight/a", (4,), 0, entries)], {})
        assert saver.done
        entries += 1  # too late
        saver.complete()
    assert saver.failed == 0
    opened = checkpoint.open_checkpoint(checkpoint.folder_of(tmp_path, 1), ALONE)
    assert opened.read("weight/a", 0, 4).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_the_last_good_one_stays_beside_a_damaged_newer_one(pools: Pools, inputs: Path, run_dir: Path) -> None:
    """Of the checkpoints after 3 and 6 the second is damaged; a run that keeps 1 resumes, and dies after 5."""
    (run_dir / "checkpoints" / "step-6" / "manifest.json").unlink()
    going_on = recipe(inputs, run_dir, sharding="zero3", resume="auto", save_steps=1, save_total_limit=1)
    pools(2).run(run, going_on, 5)
    opened, passed = checkpoint.find(run_dir, "auto", ALONE)
    assert opened is not None
    assert (opened.folder.name, passed) == ("step-4", [])
