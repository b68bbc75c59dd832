"""A disk that fills up while a checkpoint is written."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from ows_ds import checkpoint, config
from ows_ds.distributed.communicator import Communicator
from ows_ds.train import log
from tests.support.pool import Pools
from tests.support.tiny_run import recipe
from tests.train.test_trainer import contents, run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def whole(straight: Callable[..., Path]) -> Any:
    """What a run with room leaves behind."""
    return contents(straight(2, sharding="zero3"))


def fill(disk: Path, saved: Path) -> None:
    """Leave room for a third of the checkpoint ``saved``."""
    free = os.statvfs(disk)
    room = sum(file.stat().st_size for file in saved.iterdir()) // 3
    (disk / "ballast").write_bytes(b"\0" * (free.f_bavail * free.f_frsize - room))


def run_out(rank: int, world_size: int, recipe: config.Recipe, disk: Path, room_again: bool) -> tuple[str, list[str]]:
    """Train; the disk is full from step 4 on, until a checkpoint has failed if there is to be ``room_again``.

    Returns how the run ended, and what it logged.
    """
    step, event = log.RunLog.step, log.RunLog.event
    lines: list[str] = []

    def filling(self: log.RunLog, record: dict[str, Any]) -> None:
        step(self, record)
        if record["step"] == 4 and rank == 0:
            fill(disk, Path(recipe.train.output_dir) / "checkpoints" / "step-3")

    def noting(self: log.RunLog, text: str) -> None:
        lines.append(text)
        event(self, text)
        if rank == 0 and room_again and "could not be written" in text:
            (disk / "ballast").unlink()

    with patch.object(log.RunLog, "event", noting), patch.object(log.RunLog, "step", filling):
        try:
            run(rank, world_size, recipe, None)
        except Exception as error:
            return f"{type(error).__name__}: {error}", lines
    return "done", lines


def opened(run_dir: Path) -> list[str]:
    """The checkpoints that are there, all of which have to be whole."""
    return [checkpoint.open_checkpoint(path, Communicator()).folder.name for path in checkpoint.checkpoints(run_dir)]


def test_it_continues_and_says_so(pools: Pools, inputs: Path, disk: Path, whole: Any) -> None:
    run_dir = disk / "run"
    answers = pools(2).run(run_out, recipe(inputs, run_dir, sharding="zero3"), disk, True)
    assert [ended for ended, _ in answers] == ["done", "done"]
    [line] = [text for text in answers[0][1] if "could not be written" in text]
    assert line.startswith("checkpoint step-6 could not be written on rank ")
    assert "No space left on device" in line
    assert line.endswith("training continues, the newest one is step-3 (1 not written so far)")
    assert answers[0][1][-1] == f"done: {run_dir / 'model'}, 3 of 3 layers trained, 1 checkpoints not written"
    assert opened(run_dir) == ["step-9", "step-3"]
    (records, files), (its_records, its_files) = whole, contents(run_dir)
    assert its_records == records
    assert {name: digest for name, digest in files.items() if "step-6" not in name}.items() <= its_files.items()


@pytest.mark.parametrize(
    ("on_save_error", "failed"), [("stop", "step-6"), pytest.param("continue", "step-9", marks=pytest.mark.slow)]
)
def test_it_ends_with_the_cause(
    pools: Pools, inputs: Path, disk: Path, whole: Any, on_save_error: str, failed: str
) -> None:
    """At once under stop, at the end in any case; with room it resumes from what is there."""
    run_dir = disk / "run"
    made = recipe(inputs, run_dir, sharding="zero3", on_save_error=on_save_error)
    for ended, lines in pools(2).run(run_out, made, disk, False):
        assert ended.startswith(f"SaveError: checkpoint {failed} could not be written on rank ")
        assert "No space left on device" in ended
        assert sum("could not be written" in text for text in lines) == (failed == "step-9")
    assert opened(run_dir) == ["step-3"]
    assert not list((run_dir / "checkpoints").glob("*.partial"))
    (disk / "ballast").unlink()
    lines = pools(2).run(run, recipe(inputs, run_dir, sharding="zero3", resume="auto"), None)[0]
    assert lines[0].startswith("resuming after step 3")
    assert contents(run_dir) == whole
