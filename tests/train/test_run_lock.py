"""Two runs never write to one folder, and a run that was killed leaves nothing behind that stops the next."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ows_ds.errors import UserError
from ows_ds.train import run_lock
from ows_ds.train.run_lock import RunLock


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
