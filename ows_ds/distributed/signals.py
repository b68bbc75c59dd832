"""Stopping on purpose: SIGTERM or SIGUSR1 lets the step in hand be finished and saved; a second one ends at once.

SLURM sends such a signal before a time limit and before a job is preempted. Processes that were asked to stop, and
saved, exit with `EXIT_CODE`; a job script takes it as "start me again".
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ows_ds.errors import Failed

EXIT_CODE = 75  # sysexits.h: EX_TEMPFAIL, a failure that another attempt mends
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# SLURM signals a step's launcher and its processes; launchers pass on what they get: one order arrives several times
SAME_SECONDS = 5.0


class Stopped(Exception):
    """A signal asked for it, and what was done so far is saved."""


def ignore() -> None:
    """Let nothing change the exit code any more: a launcher that sees one process leave may end the others."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Within it, the first of `SIGNALS` sets the event that is given; one after `SAME_SECONDS` more ends the process.

    Also while the main thread waits in a collective: a thread looks for signals, and Python's own handlers would wait
    until the collective returns. Outside of the main thread nothing is changed, and the event is never set.

    After a `Failed` signals are ignored: it is still to be told why, and the launcher may end all at once.
    """
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    earlier_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # the handlers do nothing, but with one Python writes the signal's number to the pipe, whatever runs
    earlier = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    threading.Thread(target=_watch, args=(reader, told), daemon=True).start()
    try:
        yield told
    except Failed:
        earlier = dict.fromkeys(SIGNALS, signal.SIG_IGN)
        raise
    finally:
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(earlier_fd)
        os.close(writer)  # which ends the thread


def _watch(reader: int, told: threading.Event) -> None:
    first = 0.0
    with open(reader, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] not in SIGNALS:
                continue
            if not told.is_set():
                first = time.monotonic()
                told.set()
            elif time.monotonic() - first > SAME_SECONDS:
                os._exit(128 + number[0])
