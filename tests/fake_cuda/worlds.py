"""Worlds of ranks that see the devices: `tests.support.pool` in a process of its own, which starts with them."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tests.fake_cuda.environment import environment
from tests.support.pool import Pools, RanksFailed


class FakeCuda:
    """As `tests.support.pool.Pools`, of ranks with a GPU each, over NCCL, whose races are looked for:
    ``FakeCuda()(2).run(function, *args)``."""

    def __init__(self) -> None:
        around = environment(8, races=Path(os.devnull)) | {"DS_ACCELERATOR": "cuda"}
        command = [sys.executable, "-m", "tests.fake_cuda.worlds"]
        self._process = subprocess.Popen(command, env=around, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, world_size: int) -> World:
        return World(self, world_size)

    def run(self, world_size: int, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        _send(self._process.stdin, (world_size, pickle.dumps((function, args))))
        failed, answer = _receive(self._process.stdout)
        if failed:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """End all processes."""
        self._process.communicate()


class World:
    """One of them."""

    def __init__(self, worlds: FakeCuda, world_size: int) -> None:
        self._worlds, self._world_size = worlds, world_size

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(rank, world, *args)`` on every rank; the results by rank. Raises RuntimeError."""
        return self._worlds.run(self._world_size, function, args)


def call(rank: int, world_size: int, message: bytes) -> Any:
    """In a rank: what was asked for."""
    function, args = pickle.loads(message)
    return function(rank, world_size, *args)


def _send(pipe: IO[bytes], value: Any) -> None:
    message = pickle.dumps(value)
    pipe.write(struct.pack("Q", len(message)) + message)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    length = pipe.read(8)
    if not length:
        raise EOFError("the process that starts the ranks has died")
    return pickle.loads(pipe.read(*struct.unpack("Q", length)))


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    pools = Pools(backend="nccl")
    while sys.stdin.buffer.peek(1):
        world_size, message = _receive(sys.stdin.buffer)
        try:
            answer = (False, pools(world_size).run(call, message))
        except RanksFailed as error:
            answer = (True, str(error))
        _send(answers, answer)
    pools.close()


if __name__ == "__main__":
    from tests.fake_cuda import worlds

    worlds._serve()
