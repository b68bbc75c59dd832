"""One run, one folder: a lock that ends with the process that holds it.

The file's lock is the kernel's, which frees it whatever ends the process. Where hosts do not see each other's locks, as
on some network file systems, the file's time tells: who holds it sets the time every `BEAT` seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import IO

from ows_ds.errors import UserError

FILE = ".lock"
BEAT = 5.0  # seconds
QUIET = 3 * BEAT  # without a beat: the other host's process is gone


class RunLock:
    """The lock of a run's folder. One process takes it; leaving the context frees it."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._run_dir = run_dir / FILE, run_dir
        self._file: IO[str] | None = None
        self._free = threading.Event()

    def take(self) -> None:
        """Take the lock, unless this object has it. The folder is made.

        Raises UserError (``train.output_dir``) where another run has it, or where the folder cannot be made.
        """
        if self._file is not None:
            return
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            file = self._path.open("a+")
        except OSError as error:
            right = f"expected a folder that can be made and written to ({error})"
            raise UserError("train.output_dir", str(self._run_dir), right) from error
        locked = self._locked(file)
        if locked is False or self._beats(here=locked is None):
            file.close()
            raise self._taken()
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        self._file = file
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self._free.set()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._file.close()

    def _locked(self, file: IO[str]) -> bool | None:
        """Whether the lock of the open file is ours now, and the file still the one in the folder; None: on a file
        system without locks."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        # its holder may have removed it since it was opened: another process may have a new one
        return self._path.exists() and os.path.samestat(os.fstat(file.fileno()), self._path.stat())

    def _holder(self) -> dict[str, object]:
        try:
            found = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _taken(self) -> UserError:
        holder = self._holder()
        by = f": host {holder['host']}, pid {holder['pid']}" if holder else ""
        right = f"expected a folder that no other run is writing to{by}"
        return UserError("train.output_dir", str(self._run_dir), right)

    def _beats(self, here: bool) -> bool:
        """Whether a process of another host, or of this one (here), holds the lock: its beat is the file's time."""
        host = self._holder().get("host")
        if host is None or (host == socket.gethostname() and not here):
            return False
        before = self._path.stat().st_mtime_ns
        end = time.monotonic() + QUIET
        while time.monotonic() < end:
            if self._path.stat().st_mtime_ns != before:
                return True
            time.sleep(BEAT / 10)
        return False

    def _beat(self) -> None:
        while not self._free.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._path)
