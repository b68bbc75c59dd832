"""The parent's side of `ows_ds.bench.worker`: processes that wait until they are asked."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

from ows_ds.bench import worker
from ows_ds.bench.setting import Setting
from ows_ds.distributed.rendezvous import free_port

logger = logging.getLogger(__name__)
Result = dict[str, Any]


class WorkerError(Exception):
    """A worker could not do what it was asked; the message is one line for its row."""


class Workers:
    """One method on ``world_size`` ranks of its own, which meet on the loopback device.

    first: what each rank answers after the first step.
    """

    def __init__(self, setting: Setting, method: str, world_size: int = 1, seconds: float | None = None) -> None:
        """Returns after the first step. seconds: for all answers together; None: any. Raises WorkerError."""
        self._end = None if seconds is None else time.monotonic() + seconds
        # forked from a process that has imported everything; what CUDA has looked at cannot be forked
        context: Any = multiprocessing.get_context("spawn" if setting.device == "cuda" else "forkserver")
        context.set_forkserver_preload(["ows_ds.bench.worker", "transformers.models.llama.modeling_llama"])
        self._ranks: list[tuple[Any, Connection]] = []
        port = free_port()
        for rank in range(world_size):
            here, there = context.Pipe()
            arguments = (there, setting, method, rank, world_size, port)
            process = context.Process(target=worker.serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))
        self.first = self._answers()

    def ask(self, question: str, *arguments: Any) -> list[Result]:
        """The ranks' answers, in order. question: of `ows_ds.bench.worker.WORK`. Raises WorkerError."""
        for _, pipe in self._ranks:
            with contextlib.suppress(BrokenPipeError):  # the missing answer says why
                pipe.send((question, arguments))
        return self._answers()

    def _answers(self) -> list[Result]:
        answers: list[Result] = []
        for process, pipe in self._ranks:
            try:
                in_time = pipe.poll(None if self._end is None else max(0.0, self._end - time.monotonic()))
                answers.append(pipe.recv() if in_time else {"failed": "it took too long"})
            except (EOFError, ConnectionError):
                process.join()
                killed = "the process was killed, as the system does when memory runs out"
                ended = f"the process ended with status {process.exitcode}"
                answers.append({"failed": killed if process.exitcode == -9 else ended})
            if "failed" in answers[-1]:
                self.close()
                raise WorkerError(answers[-1]["failed"])
        return answers

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._ranks:
            process.kill()
            pipe.close()
        for process, _ in self._ranks:
            process.join()


def ask_each(setting: Setting, methods: Iterable[str], question: str, world_size: int = 1) -> dict[str, Any]:
    """Of each method, one after the other, its ranks' answers or {"failed": reason}."""
    results: dict[str, Any] = {}
    for name in methods:
        logger.info(name)
        try:
            with contextlib.closing(Workers(setting, name, world_size)) as workers:
                results[name] = workers.ask(question)
        except WorkerError as error:
            results[name] = {"failed": str(error)}
    return results
