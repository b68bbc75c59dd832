"""Signals of one process: the first is noted, a later one ends it, also while it cannot run Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from ows_ds.distributed import signals

WAITING = """
import ctypes, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):  # shells start what runs behind them without
    signal.signal(number, signal.SIG_DFL)
from ows_ds.distributed import signals
signals.SAME_SECONDS = float(sys.argv[1])
with signals.stop_on_signal() as stop_requested:
    print("ready", flush=True)
    while not stop_requested.wait(0.01):
        pass
    print("asked", flush=True)
    ctypes.CDLL(None).sleep(60)  # a signal ends a sleep, so there may be two
    ctypes.CDLL(None).sleep(60)
"""


def waiting(seconds: float, first: signal.Signals = signal.SIGUSR1) -> subprocess.Popen[str]:
    """A process that says "asked" after its first signal, and then waits in C, where no Python runs."""
    words = [sys.executable, "-c", WAITING, str(seconds)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(first)
    assert child.stdout.readline() == "asked\n"
    return child


def test_a_second_signal_ends_at_once() -> None:
    child = waiting(0.0)
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 128 + signal.SIGTERM


def test_ctrl_c_and_a_closed_terminal_are_such_signals() -> None:
    closed = waiting(60.0, signal.SIGHUP)
    closed.kill()
    closed.wait()
    child = waiting(0.0, signal.SIGINT)
    child.send_signal(signal.SIGINT)
    assert child.wait(20) == 128 + signal.SIGINT
    assert child.stderr is not None
    assert child.stderr.read().strip() == "ows-ds: stopping after this step, which is saved; Ctrl-C again ends at once"


def test_the_same_order_passed_on_by_a_launcher_is_one() -> None:
    child = waiting(60.0)
    child.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(1)
    child.kill()
    child.wait()


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.stop_on_signal() as stop_requested:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop_requested.wait(20)
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with signals.stop_on_signal() as stop_requested:
            seen.append((stop_requested.is_set(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
