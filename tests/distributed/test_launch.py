"""What is looked at before processes meet and before a model is loaded: a lock left behind, devices, memory."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ows_ds.config import changed, exact
from ows_ds.distributed import launch, zero3
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.launch import Runtime
from ows_ds.distributed.sequence import SequenceParallel
from ows_ds.errors import UserError
from ows_ds.model.shapes import read_model
from ows_ds.planner.forecast import Planner
from ows_ds.tables import gib
from ows_ds.train import memory_check
from ows_ds.train.memory_check import available, fit_memory
from tests.support.tiny_run import recipe

# ------------------------------------------------------------------ DeepSpeed's operator


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that torch makes while it compiles the operator."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    file = tmp_path / "deepspeed_shm_comm" / "lock"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setattr(logging.getLogger("ows_ds"), "propagate", True)  # off where the command line has run
    monkeypatch.setattr(logging.getLogger("ows_ds"), "level", logging.INFO)
    return file


def test_an_old_lock_that_nobody_holds_is_removed(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    then = time.time() - 4000
    os.utime(lock, (then, then))
    zero3.free_operator()
    assert not lock.exists()
    assert caplog.messages == [f"{lock} removed: nobody has been compiling DeepSpeed's operator for 4000 s"]


def test_a_lock_that_is_open_stays(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    then = time.time() - 4000
    os.utime(lock, (then, then))
    with lock.open():
        zero3.free_operator()
    assert lock.exists()
    assert not caplog.messages


def test_a_young_lock_gets_its_time(
    lock: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be of a process on another host."""
    monkeypatch.setattr(zero3, "COMPILING", 1.0)
    zero3.free_operator()
    assert not lock.exists()
    first, second = caplog.messages
    assert first.startswith(f"{lock}: waiting up to ")
    assert second.startswith(f"{lock} removed: ")


def test_without_a_lock_nothing_is_said(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock.unlink()
    zero3.free_operator()
    assert not caplog.messages


# ------------------------------------------------------------------ devices


def test_a_torch_that_cannot_use_the_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "DRIVER", tmp_path / "version")
    assert not launch._uses_gpus({})
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.12\nGCC version:\n")
    with pytest.raises(UserError, match=r"torch: '.*' is invalid: .*\(NVRM version: .* 535\.12\)"):
        launch._uses_gpus({})
    for asked in ({"ACCELERATE_USE_CPU": "true"}, {"CUDA_VISIBLE_DEVICES": ""}):
        assert not launch._uses_gpus(asked)


# ------------------------------------------------------------------ memory


def alone(**zero: Any) -> Runtime:
    accelerator: Any = SimpleNamespace()
    config = {"zero_optimization": zero} if zero else None
    return Runtime(accelerator, Communicator(), torch.device("cpu"), config, SequenceParallel(Communicator()))


def test_what_cannot_fit_is_refused_with_the_figure(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = exact(recipe(inputs, tmp_path))
    planner = Planner(asked, read_model(asked.model.path))
    needed = planner.peak(planner.choice(1, "replicated"))
    monkeypatch.setattr(memory_check, "available", lambda: needed)
    fit_memory(asked, alone(), 64)
    monkeypatch.setattr(memory_check, "available", lambda: int(needed / 1.3))
    with pytest.raises(UserError) as caught:
        fit_memory(asked, alone(), 64)
    words = f"train.sharding: 'replicated' is invalid: a step needs {gib(needed)} of a process that has "
    assert str(caught.value).startswith(words)
    fit_memory(asked, alone(), 8)  # shorter rows than data.max_length
    fit_memory(changed(asked, {"train.check_memory": False}), alone(), 64)


def test_what_cannot_be_planned_is_not_refused(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "available", lambda: 0)
    asked = exact(recipe(inputs, tmp_path))
    fit_memory(asked, alone(stage=3, offload_param={"device": "cpu"}), 64)
    with pytest.raises(UserError):
        fit_memory(asked, alone(stage=3), 64)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "nobody knows it"}')
    fit_memory(recipe(tmp_path, tmp_path), alone(), 64)


def test_the_memory_that_is_available() -> None:
    assert 0 < available() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
