"""The parent's side of `ows_ds.bench.worker`: processes that wait until they are asked."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
from typing import Any

from ows_ds.bench.setting import Setting


class Failed(Exception):
    """A worker could not do what it was asked; the message is one line for its row."""


class Worker:
    """One method in ``world_size`` processes of its own, which meet on the loopback device."""

    def __init__(self, setting: Setting, method: str, world_size: int = 1) -> None:
        """Returns at once; `hear` then gives what the first step told."""
        self.method = method
        self._errors = [tempfile.TemporaryFile("w+") for _ in range(world_size)]  # noqa: SIM115
        self._processes: list[subprocess.Popen[str]] = []
        port = _free_port() if world_size > 1 else 0
        for index, errors in enumerate(self._errors):
            command = [sys.executable, "-m", "ows_ds.bench.worker"]
            if world_size > 1:  # as a launcher tells its processes
                names: dict[str, Any] = {"RANK": index, "LOCAL_RANK": index, "LOCAL_WORLD_SIZE": world_size}
                names |= {
                    "WORLD_SIZE": world_size,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "ACCELERATE_USE_CPU": "true",
                }
                command = ["env", *(f"{name}={value}" for name, value in names.items()), *command]
            self._processes.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
                )
            )
        self._tell({"setting": setting.model_dump(), "method": method, "world_size": world_size})

    def ask(self, **question: Any) -> list[dict[str, Any]]:
        """The processes' answers, in order. Raises Failed."""
        self._tell(question)
        return self.hear()

    def _tell(self, what: dict[str, Any]) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # `hear` says why
                print(json.dumps(what), file=process.stdin, flush=True)

    def hear(self) -> list[dict[str, Any]]:
        """The processes' next answers, in order. Raises Failed."""
        answers = []
        for process, errors in zip(self._processes, self._errors, strict=True):
            assert process.stdout is not None
            line = process.stdout.readline()
            answer = json.loads(line) if line else {"failed": _last_words(process, errors)}
            if "failed" in answer:
                self.close()
                raise Failed(answer["failed"])
            answers.append(answer)
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process, errors in zip(self._processes, self._errors, strict=True):
            process.wait()
            errors.close()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


def _last_words(process: subprocess.Popen[str], errors: Any) -> str:
    code = process.wait()
    errors.seek(0)
    lines = errors.read().strip().splitlines()
    if code == -9:
        return "the process was killed, as the system does when memory runs out"
    return f"the process ended with status {code}" + (f": {lines[-1][:200]}" if lines else "")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
