"""Stopping on purpose: after a signal the current step is finished and saved; a second one ends at once.

SLURM sends such a signal before a time limit and before a job is preempted. Processes that were asked to stop, and
saved, exit with `EXIT_CODE`, which tells a job script to start again.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ows_ds.errors import Failed

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)  # the last: a terminal that is closed
# SLURM signals a step's launcher and its processes, and launchers pass signals on: one request arrives several times
SAME_SECONDS = 5.0


class Stopped(Exception):
    """A signal asked for it, and the run is saved."""


def ignore() -> None:
    """Keep the exit code from here on: a launcher that sees one process exit may end the others by a signal."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Within it, the first of `SIGNALS` sets the event that is given; one after `SAME_SECONDS` more ends the process.

    Also while the main thread waits in a collective: a thread reads the signals, where Python's own handlers would run
    after the collective. Outside of the main thread nothing is changed, and the event is never set.

    After a `Failed` signals are ignored: the cause is still to be printed, and the launcher may end all processes.
    """
    stop_requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    earlier_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # the handlers do nothing, but where there is one Python writes the signal's number to the pipe, whatever runs
    obeyed = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    earlier = {number: signal.signal(number, lambda *_: None) for number in obeyed}
    threading.Thread(target=_watch, args=(reader, stop_requested), daemon=True).start()
    try:
        yield stop_requested
    except Failed:
        earlier = dict.fromkeys(SIGNALS, signal.SIG_IGN)
        raise
    finally:
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(earlier_fd)
        os.close(writer)  # which ends the thread


def _watch(reader: int, stop_requested: threading.Event) -> None:
    first = 0.0
    with open(reader, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] not in SIGNALS:
                continue
            if not stop_requested.is_set():
                first = time.monotonic()
                stop_requested.set()
                if number[0] == signal.SIGINT:
                    os.write(2, b"\nows-ds: stopping after this step, which is saved; Ctrl-C again ends at once\n")
            elif time.monotonic() - first > SAME_SECONDS:
                os._exit(128 + number[0])
