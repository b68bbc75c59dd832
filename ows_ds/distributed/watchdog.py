"""Which rank ended, and why: all ranks of a run end soon after the first one, each with that cause.

Ranks share a store, torch's, in which they met. Each has two threads here, which never touch the accelerator. One
talks to the store about once a second:

    beat/I      "3 17", ...     rank I lives, and has begun so many collectives; "left": it has ended as it should
    cause       {"line", "code"}   why the run ends; the first rank that knows writes it
    seen        how many ranks know the cause

It checks that the beat of the next rank changes, and that the other processes of the host exist; rank 0's also that no
rank stays behind the others, who would wait for it, for longer than the limit. The other thread never waits for
anything: when a cause is known, or the store is silent for too long, and the program does not end by itself, it writes
the cause as the last line to standard error and ends the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from ows_ds.distributed import signals
from ows_ds.distributed.communicator import Communicator, RankMismatchError
from ows_ds.errors import Failed, UserError

BEAT = 1.0  # seconds between two rounds of talk with the store
GRACE = 5.0  # seconds that the program has to end by itself once a cause is known, and to tell the others
DOUBT = 4.0  # seconds in which the beat of a rank that lives has changed for certain
SHARE = 0.8  # of the limit, the longest silence: found out before collectives run into the limit
LONGEST = 600  # characters of a cause

# how torch, gloo and NCCL say that a collective or the store has failed: as a rule because another process has ended
CONSEQUENCE = re.compile(
    r"gloo|NCCL|nccl|Connection (closed|reset|refused)|Broken pipe|[Tt]imed out|[Tt]imeout|ProcessGroup|TCPStore|"
    r"DistNetworkError|DistStoreError|DistBackendError"
)


@contextlib.contextmanager
def armed(comm: Communicator, limit: float) -> Iterator[None]:
    """Within it no rank waits longer than ``limit`` seconds for one that has ended. Collective.

    The other ranks learn of an error that leaves it. Raises Failed, with the first cause in one line, in place of an
    error that is neither the user's mistake nor an interrupt; its ``__cause__`` is this rank's own error, unless that
    is a consequence of another rank's end. At world size 1 nothing is watched and errors pass as they are.
    """
    store = comm.store()
    if store is None:
        yield
        return
    watch = Watch(
        store,
        comm.rank,
        comm.all_gather_object(_who()),
        comm.broadcast_object(f"{os.getpid()}-{time.time_ns()}"),
        limit,
        begun=lambda: comm.begun,
    )
    try:
        yield
    except Exception as error:
        failed = watch.fail(error)
        if failed is error:
            raise
        raise failed from failed.__cause__
    except BaseException as error:
        watch.fail(error)
        raise
    finally:
        watch.close()


class Watch:
    """The two threads of one rank, until `close`."""

    def __init__(
        self,
        store: Any,
        rank: int,
        who: list[dict[str, Any]],
        name: str,
        limit: float,
        leave: Callable[[str, int], None] | None = None,
        begun: Callable[[], int] = lambda: 0,
    ) -> None:
        """store: torch's, for this object alone. who: by rank, what `_who` gives. name: the same on all ranks, of no
        other watch. limit: seconds. leave: (line, exit code) is called instead of ending the process. begun: number of
        collectives that this rank has begun.
        """
        self._store, self.rank, self.who, self._prefix = store, rank, who, f"watch/{name}"
        self.limit, self.silence = limit, SHARE * limit
        self._begun = begun
        self._behind: dict[int, tuple[int, float]] = {}  # rank -> collectives begun, fewer than others'; seconds since
        self._leave = leave or _leave
        store.set_timeout(timedelta(seconds=max(1.0, min(limit, 10.0))))
        self.cause: dict[str, Any] | None = None
        self._mine: dict[str, Any] | None = None  # what this rank proposes as the cause
        self._doubtful: str | None = None  # its error, which may be a consequence
        self._all_know = threading.Event()  # the cause
        self._known, self._wake, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._answers = 0  # of the store, to whole rounds of talk
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._judge)]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------ the program's side

    def fail(self, error: BaseException) -> BaseException:
        """Let the other ranks know of an error. Returns what to raise: it, or a Failed with the first cause.

        Takes at most 2 `DOUBT` + `GRACE` seconds.
        """
        if isinstance(error, (signals.Stopped, Failed)):  # on all ranks at once
            return error
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        mistake = isinstance(error, UserError)
        agreed = mistake or isinstance(error, RankMismatchError)  # names the rank itself
        own = str(error) if agreed else f"{self.name_of(self.rank)}: {text}"
        consequence = not agreed and CONSEQUENCE.search(text) is not None
        if consequence:
            self._doubtful = text
        else:
            self._propose(own, 2 if mistake else 1, own=True)
        self._wake.set()
        self._known.wait(2 * DOUBT)
        if self.rank == 0 or self._is_mine():  # the store may end with rank 0
            self._all_know.wait(GRACE)
        if mistake or not isinstance(error, Exception):
            return error
        failed = Failed(_one_line(own) if self.cause is None else self.cause["line"])
        alone = self._is_mine() and self.cause is not None and self.cause["own"]
        failed.__cause__ = error if alone or not consequence else None
        return failed

    def close(self) -> None:
        """Stop watching. The others see that this rank has ended as it should, or with a cause that they know."""
        self._closed.set()
        self._wake.set()
        self._threads[0].join(GRACE)

    def name_of(self, rank: int) -> str:
        """A rank, in words."""
        return f"rank {rank} (host {self.who[rank]['host']}, pid {self.who[rank]['pid']})"

    def _silent(self, rank: int, seconds: float) -> str:
        return f"{self.name_of(rank)} has been silent for {seconds:.0f} s: it is gone, or the network to it"

    def _propose(self, line: str, code: int = 1, own: bool = False) -> None:
        """own: it is this rank's error, not what it has found out about another."""
        if self._mine is None:
            self._mine = {"line": _one_line(line), "code": code, "from": self.rank, "own": own}

    def _is_mine(self) -> bool:
        return self.cause is not None and self.cause.get("from") == self.rank

    # ------------------------------------------------------------------ talking

    def _key(self, name: object) -> str:
        return f"{self._prefix}/{name}"

    def _get(self, name: object) -> str | None:
        return self._store.get(self._key(name)).decode() if self._store.check([self._key(name)]) else None

    def _talk(self) -> None:
        try:
            self._talk_until_closed()
        except Exception as error:  # torch has many kinds for a store that has ended
            if not self._closed.is_set():
                line = f"{self.name_of(0)} is gone, or what started it: the store where ranks meet does not answer"
                self._know({"line": _one_line(f"{line} ({type(error).__name__}: {error})")})

    def _talk_until_closed(self) -> None:
        world_size, beats, seen, pause = len(self.who), 0, False, 0.0
        after = (self.rank + 1) % world_size
        # seconds are those that this thread has waited: clocks run while a job is suspended
        last, quiet = None, 0.0
        space = self.who[self.rank]["space"]
        neighbours = [i for i, one in enumerate(self.who) if i != self.rank and one["space"] == space]
        doubt, doubted = None, 0.0
        while not self._closed.is_set():
            self._store.set(self._key(f"beat/{self.rank}"), f"{beats} {self._begun()}")
            beats += 1
            if self.cause is None and (text := self._get("cause")) is not None:
                self._know(json.loads(text))
            elif self.cause is None:
                beat = self._get(f"beat/{after}")
                if beat != last or beat == "left":
                    last, quiet = beat, 0.0
                elif quiet > self.silence:
                    self._propose(self._silent(after, quiet))
                for other in neighbours:
                    if not exists(self.who[other]) and self._get(f"beat/{other}") != "left":
                        self._propose(f"{self.name_of(other)} is gone: it was killed, or it crashed")
                if self.rank == 0:
                    self._find_behind(pause)
                if self._doubtful is not None and doubt is None:
                    doubt, doubted = [self._get(f"beat/{i}") for i in range(world_size)], 0.0
                elif doubt is not None and doubted > DOUBT:
                    self._blame(doubt)
                if self._mine is not None:
                    self._write_cause()
            if self.cause is not None and not seen:
                self._store.add(self._key("seen"), 1)
                seen = True
            if seen and self.rank != 0 and not self._is_mine():
                return
            if seen and self._store.add(self._key("seen"), 0) >= world_size:
                self._all_know.set()
            self._answers += 1
            pause = BEAT / 10 if seen or self._mine is not None else BEAT
            if not self._wake.wait(pause):
                quiet, doubted = quiet + pause, doubted + pause
            self._wake.clear()
        self._store.set(self._key(f"beat/{self.rank}"), "left")

    def _find_behind(self, seconds: float) -> None:
        """Propose the rank that others have waited for longer than the limit. seconds: since the last call.

        NCCL would end such a run without a word of who is to blame; gloo names who waits.
        """
        beats = {rank: self._get(f"beat/{rank}") or "left" for rank in range(len(self.who))}
        counts = {rank: int(beat.split()[1]) for rank, beat in beats.items() if beat != "left"}
        for rank, count in counts.items():
            before, waited = self._behind.get(rank, (count, 0.0))
            waited = waited + seconds if count == before and count < max(counts.values()) else 0.0
            self._behind[rank] = count, waited
            if waited > self.limit:
                self._propose(f"{self.name_of(rank)} does not come on: the others have waited for it {waited:.0f} s")

    def _write_cause(self) -> None:
        assert self._mine is not None
        if self._store.add(self._key("first"), 1) == 1:
            self._store.set(self._key("cause"), json.dumps(self._mine))
            self._know(self._mine)
        elif (text := self._get("cause")) is not None:  # else the first rank is about to write it
            self._know(json.loads(text))

    def _blame(self, before: list[str | None]) -> None:
        """Propose the cause of an error of a collective, where nobody has given one. before: the beats `DOUBT` ago."""
        for other, beat in enumerate(before):
            if other != self.rank and beat != "left" and self._get(f"beat/{other}") == beat:
                self._propose(f"{self.name_of(other)} is gone, or the network to it: {self._doubtful}")
        self._propose(f"{self.name_of(self.rank)}: {self._doubtful}", own=True)

    def _know(self, cause: dict[str, Any]) -> None:
        if self.cause is None:
            self.cause = cause
            self._known.set()

    # ------------------------------------------------------------------ judging

    def _judge(self) -> None:
        answers, quiet, known = 0, 0.0, 0.0
        while not self._closed.wait(BEAT / 4):
            quiet = quiet + BEAT / 4 if self._answers == answers else 0.0
            answers = self._answers
            if quiet > self.silence:
                self._know({"line": self._silent(0, quiet)})
            known += BEAT / 4 if self.cause is not None else 0.0
            if self.cause is not None and known > GRACE:
                self._leave(self.cause["line"], int(self.cause.get("code", 1)))
                return


def exists(who: dict[str, Any]) -> bool:
    """Whether a process of this host exists and is no zombie. who: as `_who` gives it."""
    return _started(who["pid"]) == who["started"]


def _started(pid: int) -> str | None:
    """When a process of this host was started, in the kernel's words; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _who() -> dict[str, Any]:
    """This process. space: equal where processes see each other's ids."""
    host, pid = socket.gethostname(), os.getpid()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    space = f"{host} {boot} {os.readlink('/proc/self/ns/pid')}"
    return {"host": host, "pid": pid, "started": _started(pid), "space": space}


def _one_line(text: str) -> str:
    return " ".join(text.split())[:LONGEST]


def _leave(line: str, code: int) -> None:
    """End this process at once, whatever its other threads do."""
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)  # the line must be the last one; a pipe may be full
    flush.start()
    flush.join(1.0)
    os.write(2, f"ows-ds: failed: {line}\n".encode())
    os._exit(code)
