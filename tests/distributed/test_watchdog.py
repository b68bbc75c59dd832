"""Processes that watch each other, here as threads of one that share a store: who learns what, and who leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ows_ds.distributed import signals, watchdog
from ows_ds.distributed.communicator import Communicator, RankMismatchError
from ows_ds.distributed.watchdog import Watch, _who, exists
from ows_ds.errors import Failed, UserError

LIMIT = 20.0  # seconds for what happens in less than one


class World:
    """Watches of several processes on one store. left: (process, line, exit code) of those that ended."""

    def __init__(self) -> None:
        self.store: Any = torch.distributed.HashStore()
        self.watches: list[Watch] = []
        self.left: list[tuple[int, str, int]] = []

    def start(
        self,
        world_size: int,
        limit: float = 100.0,
        missing: int | None = None,
        begun: list[int] | None = None,
        **odd: Any,
    ) -> list[Watch]:
        """odd: of ``p1``, what process 1 says of itself. begun: collectives, by process; may change."""
        who = [{**_who(), "host": f"n{i}", "pid": os.getpid(), **odd.get(f"p{i}", {})} for i in range(world_size)]
        for index in range(world_size):
            if index != missing:
                count = (lambda index=index: begun[index]) if begun else lambda: 0
                self.watches.append(Watch(self.store, index, who, "run", limit, self._leaver(index), count))
        return self.watches

    def _leaver(self, index: int) -> Callable[[str, int], None]:
        return lambda line, code: self.left.append((index, line, code))

    def wait(self, count: int) -> list[tuple[int, str, int]]:
        """Until so many have left."""
        end = time.monotonic() + LIMIT
        while len(self.left) < count and time.monotonic() < end:
            time.sleep(0.01)
        return sorted(self.left)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(watchdog, "BEAT", 0.02)
    monkeypatch.setattr(watchdog, "GRACE", 0.3)
    monkeypatch.setattr(watchdog, "DOUBT", 0.5)
    world_size = World()
    yield world_size
    for one in world_size.watches:
        one.close()


ME = f"rank 1 (host n1, pid {os.getpid()})"


def test_an_error_is_told_to_all(run: World) -> None:
    watches = run.start(3)
    error = torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate 2 GiB")
    failed = watches[1].fail(error)
    line = f"{ME}: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert isinstance(failed, Failed)
    assert str(failed) == line
    assert failed.__cause__ is error
    # the third fails by itself, in a collective: a consequence
    late = watches[2].fail(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:34"))
    assert str(late) == line
    assert late.__cause__ is None
    watches[1].close()
    watches[2].close()
    assert run.wait(1) == [(0, line, 1)]  # the first waits in a collective for ever


def test_the_first_of_two_errors_is_the_cause(run: World) -> None:
    watches = run.start(2)
    first = watches[1].fail(OSError("no space left on device"))
    second = ValueError("another")
    failed = watches[0].fail(second)
    assert str(failed) == str(first) == f"{ME}: OSError: no space left on device"
    assert failed.__cause__ is second


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UserError("data.train", "x", "expected a file"), "data.train: 'x' is invalid: expected a file", 2),
        (KeyboardInterrupt(), f"{ME}: KeyboardInterrupt", 1),
    ],
    ids=["a mistake", "an interrupt"],
)
def test_mistakes_and_interrupts_stay_what_they_are(run: World, error: BaseException, line: str, code: int) -> None:
    watches = run.start(2)
    assert watches[1].fail(error) is error
    watches[1].close()
    assert run.wait(1) == [(0, line, code)]


@pytest.mark.parametrize("error", [signals.Stopped(), Failed("all know")])
def test_what_ends_all_at_once_is_told_to_none(run: World, error: Exception) -> None:
    watches = run.start(2)
    assert watches[0].fail(error) is error
    time.sleep(0.2)
    assert watches[1].cause is None


def test_a_disagreement_names_the_process_itself(run: World) -> None:
    failed = run.start(2)[0].fail(RankMismatchError("rank 1: OSError: disk full"))
    assert str(failed) == "rank 1: OSError: disk full"


def test_a_silent_process_is_named(run: World) -> None:
    run.start(3, limit=0.5, missing=1)
    for index, line, code in run.wait(2):
        assert index in (0, 2)
        assert line.startswith(f"{ME} has been silent for ")
        assert code == 1


def test_who_lives_but_does_not_come_on_is_named(run: World) -> None:
    """As under NCCL, which never raises: the others wait in a collective that one has not begun."""
    begun = [8, 7, 8]
    run.start(3, limit=0.5, begun=begun)
    for index, line, code in run.wait(3):
        assert (index, code) == (len([one for one in run.left if one[0] < index]), 1)
        assert line.startswith(f"{ME} does not come on: the others have waited for it ")


def test_who_comes_on_or_is_behind_nobody_is_not_blamed(run: World) -> None:
    begun = [8, 7, 8]
    watches = run.start(3, limit=0.5, begun=begun)
    for _ in range(8):  # slow, but it moves
        time.sleep(0.2)
        begun[1] += 1
        begun[0] = begun[2] = begun[1] + 1
    begun[1] += 1  # all compute
    time.sleep(1.0)
    assert watches[0].cause is None


def test_a_killed_process_is_named(run: World) -> None:
    child = subprocess.Popen(["sleep", "60"])
    who = {"pid": child.pid, "started": watchdog._started(child.pid)}
    try:
        run.start(3, missing=1, p1=who)
        assert exists(who)
        child.send_signal(signal.SIGKILL)
        while exists(who):
            time.sleep(0.01)
        assert [line for _, line, _ in run.wait(2)] == [
            f"rank 1 (host n1, pid {child.pid}) is gone: it was killed, or it crashed"
        ] * 2
    finally:
        child.kill()
        child.wait()
    assert not exists(who)


def test_a_process_that_left_in_good_order_is_not_missed(run: World) -> None:
    child = subprocess.Popen(["sleep", "60"])
    who = {"pid": child.pid, "started": watchdog._started(child.pid)}
    watches = run.start(2, limit=0.5, p1=who)
    watches[1].close()
    child.kill()
    child.wait()
    time.sleep(1.0)  # twice the limit
    assert watches[0].cause is None


def test_a_number_that_another_process_has_now_is_not_the_old_one() -> None:
    assert exists(_who())
    assert not exists({**_who(), "started": "1"})


def test_a_consequence_without_a_cause_names_who_is_silent(run: World) -> None:
    watches = run.start(3, missing=1)
    failed = watches[0].fail(RuntimeError("NCCL error: remote process exited"))
    assert str(failed) == f"{ME} is gone, or the network to it: RuntimeError: NCCL error: remote process exited"


def test_a_consequence_while_all_live_is_told_as_it_is(run: World) -> None:
    watches = run.start(2)
    error = RuntimeError("Timed out waiting 20000ms for recv operation to complete")
    failed = watches[1].fail(error)
    assert str(failed) == f"{ME}: RuntimeError: {error}"
    assert failed.__cause__ is error


class Gone:
    """A store whose host was cut off (``hangs``) or ended, after so many calls."""

    def __init__(self, store: Any, calls: int, hangs: threading.Event | None) -> None:
        self.store, self.calls, self.hangs = store, calls, hangs

    def __getattr__(self, name: str) -> Any:
        self.calls -= 1
        if self.calls < 0:
            if self.hangs is None:
                raise torch.distributed.DistNetworkError("Connection reset by peer")
            self.hangs.wait()
        return getattr(self.store, name)


@pytest.mark.parametrize("hangs", [None, threading.Event()])
def test_a_store_that_is_gone_ends_the_process(run: World, hangs: threading.Event | None) -> None:
    run.store = Gone(run.store, 20, hangs)
    run.start(2, limit=0.5, missing=0)
    [(index, line, code)] = run.wait(1)
    assert (index, code) == (1, 1)
    words = "has been silent for " if hangs else "is gone, or what started it: the store where ranks meet does not"
    assert line.startswith(f"rank 0 (host n0, pid {os.getpid()}) {words}")
    if hangs:
        hangs.set()


def test_alone_nothing_is_watched() -> None:
    before = threading.active_count()

    def alone() -> None:
        with watchdog.armed(Communicator(), 1.0):
            assert threading.active_count() == before
            raise OSError("as it is")

    with pytest.raises(OSError, match="as it is"):
        alone()
