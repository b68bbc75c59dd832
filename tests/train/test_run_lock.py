"""Two runs never write to one folder, and a run that was killed leaves nothing behind that stops the next."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ows_ds.errors import UserError
from ows_ds.train import run_lock
from ows_ds.train.run_lock import RunLock
from tests.support.pool import Pools
from tests.support.tiny_run import recipe
from tests.train.test_rows import refusal


def hold(folder: Path, taken: Any) -> None:
    with RunLock(folder) as lock:
        lock.take()
        taken.set()
        signal.pause()


def test_the_second_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    taken = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", taken))
    other.start()
    assert taken.wait(60)
    with pytest.raises(UserError, match=rf"no other run is writing to: host .*, pid {other.pid}") as caught:
        RunLock(tmp_path / "run").take()
    assert caught.value.key == "train.output_dir"
    os.kill(other.pid or 0, signal.SIGKILL)
    other.join()
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        lock.take()
    assert not (tmp_path / "run" / run_lock.FILE).exists()


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_on_another_host_is_known_by_its_beat(tmp_path: Path, alive: bool) -> None:
    file, end = tmp_path / run_lock.FILE, threading.Event()
    file.write_text(json.dumps({"host": "other", "pid": 7}))

    def beat() -> None:
        while alive and not end.wait(0.05):
            os.utime(file)

    threading.Thread(target=beat, daemon=True).start()
    with mock.patch.multiple(run_lock, BEAT=0.1, QUIET=0.4), RunLock(tmp_path) as lock:
        if alive:
            with pytest.raises(UserError, match="host other, pid 7"):
                lock.take()
        else:
            lock.take()
    end.set()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can be made and written to"):
        RunLock(tmp_path / "file" / "run").take()


def test_where_files_have_no_locks(tmp_path: Path) -> None:
    """The beat is what is left, on the same host too."""
    quick = mock.patch.multiple(run_lock, BEAT=0.1, QUIET=0.4)
    without = mock.patch.object(run_lock.fcntl, "flock", side_effect=OSError(95, "not supported"))
    with quick, without, RunLock(tmp_path) as lock:
        lock.take()
        assert json.loads((tmp_path / run_lock.FILE).read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"pid {os.getpid()}"):
            RunLock(tmp_path).take()


def test_a_file_that_was_replaced_meanwhile_is_no_lock(tmp_path: Path) -> None:
    """Its holder removed it after it was opened, and another process has made a new one."""
    flock = run_lock.fcntl.flock

    def replaced(file: Any, how: int) -> None:
        (tmp_path / run_lock.FILE).unlink()
        (tmp_path / run_lock.FILE).write_text(json.dumps({"host": "other", "pid": 7}))
        flock(file, how)

    with mock.patch.object(run_lock.fcntl, "flock", replaced), pytest.raises(UserError, match="host other, pid 7"):
        RunLock(tmp_path).take()


def test_a_run_in_a_folder_of_a_living_one_is_refused(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        found = pools(2).run(refusal, recipe(inputs, tmp_path / "run", resume="auto"), str(inputs / "train.jsonl"))
    assert all(f"no other run is writing to: host {socket.gethostname()}, pid {os.getpid()}" in one for one in found)
