"""Persistent worlds of ranks for tests: gloo on the CPU, a file store, hard time limits, every rank's traceback.

A test hands a function of a module to all ranks of a world and gets each rank's result back:

    def total(rank: int, world: int, start: int) -> int:
        tensor = torch.tensor([start + rank])
        torch.distributed.all_reduce(tensor)
        return int(tensor)

    def test_total(pools: Pools) -> None:
        assert pools(3).run(total, 10) == [33, 33, 33]

Ranks are forked from a process that has imported torch and DeepSpeed, and live on between calls; what these can share
by accident (random streams, garbage, the default dtype) is reset before each. After a failure the process group is
tried, and where it no longer works the ranks are replaced before the next call.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

START_LIMIT = 600.0  # seconds; DeepSpeed compiles a small operator on a machine's first start (minutes)
GRACE = 10.0  # seconds that the others get to come back once a rank has failed
CHECK_LIMIT = 10.0  # seconds for the collective that tells whether a world still works after a failure
LOG_LINES = 40  # of what a rank printed during a call that failed

# DeepSpeed names shared memory after the port, so that no two worlds of a machine may have the same.
_ports = itertools.count(20000 + os.getpid() % 4000 * 10)


def warm_context() -> Any:
    """Processes of this multiprocessing context are forked from one that has imported all that takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.warm"])
    return context


class RanksFailed(AssertionError):
    """A call failed, or did not come back, on some rank. The message shows every rank's part.

    errors: by rank, the traceback as text (where the rank hung: where it stood), None where it succeeded.
    """

    def __init__(self, summary: str, errors: list[str | None], logs: list[str] | None = None) -> None:
        self.errors = errors
        parts = [summary]
        for rank, error in enumerate(errors):
            parts.append(f"---- rank {rank} of {len(errors)}: {'succeeded' if error is None else 'FAILED'}")
            parts += [error.rstrip()] if error is not None else []
            if logs and logs[rank]:
                parts.append(f"     rank {rank} printed:\n{logs[rank].rstrip()}")
        super().__init__("\n".join(parts))


class Pool:
    """A world of ``world_size`` processes that run functions on demand.

    world_size: number of processes; 1 is a world too, with a process group and in a process of its own.
    collective_timeout: seconds after which a collective that not all ranks join raises.
    backend: gloo, or nccl where there is a GPU for each rank.

    The processes start with the first call. In each: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are
    set (nothing listens there), DS_ACCELERATOR is cpu or cuda, torch uses one thread, the default group is initialised.
    They are daemons, so a function cannot start ``multiprocessing`` children (data loaders with workers).
    """

    def __init__(self, world_size: int, collective_timeout: float = 60.0, backend: str = "gloo") -> None:
        self.world_size = world_size
        self.collective_timeout, self.backend = collective_timeout, backend
        self._folder: Path | None = None
        self._processes: list[Any] = []
        self._pipes: list[multiprocessing.connection.Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """``function(rank, world, *args)`` on every rank; the results by rank.

        function: a function of an importable module (the test's own will do); args and results must pickle.
        Raises RanksFailed where a rank raises or has not come back after ``timeout`` seconds.
        """
        results, errors, logs, how = self._call(function, args, timeout)
        if any(error is not None for error in errors):
            raise RanksFailed(f"{_name(function)} failed in a world of {self.world_size}{how}", errors, logs)
        return results

    def fail(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[str | None]:
        """As `run`, for a function that is expected to raise: each rank's traceback, None where it succeeded.

        A rank that hangs is no expected failure: RanksFailed is raised for it, and where no rank failed.
        """
        _, errors, logs, how = self._call(function, args, timeout)
        if how or not any(error is not None for error in errors):
            raise RanksFailed(
                f"{_name(function)} was expected to raise in a world of {self.world_size}{how}", errors, logs
            )
        return errors

    def close(self) -> None:
        """End the processes. A later call starts new ones."""
        for pipe in self._pipes:
            pipe.close()  # an idle worker leaves when its pipe ends
        for process in self._processes:
            process.join(10.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _call(
        self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float
    ) -> tuple[list[Any], list[str | None], list[str], str]:
        """Results, errors, printed text by rank, and in words what went wrong beyond exceptions."""
        if not (self._processes and all(process.is_alive() for process in self._processes)):
            self._start()
        assert self._folder is not None
        offsets = [_size(self._folder / f"rank{rank}.log") for rank in range(self.world_size)]
        # Pickled here, so that a mistake shows in the test; sys.path first, so that the module can be found.
        message = pickle.dumps((sys.path, pickle.dumps((function, args))))
        results, errors, how = self._ask(message, timeout)
        logs = [
            _tail(self._folder / f"rank{rank}.log", offset) if any(errors) else ""
            for rank, offset in enumerate(offsets)
        ]
        if how:
            self.close()
        elif any(errors):
            _, check_errors, check_how = self._ask(pickle.dumps((sys.path, pickle.dumps((_check, ())))), CHECK_LIMIT)
            if check_how or any(check_errors):
                self.close()
        return results, errors, logs, how

    def _start(self) -> None:
        self.close()
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        context = warm_context()
        port = next(_ports)
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(rank, self.world_size, port, self._folder, self.collective_timeout, self.backend, theirs),
                name=f"rank {rank} of {self.world_size}",
                daemon=True,
            )
            process.start()
            theirs.close()  # else the end of a dead worker's pipe would never be seen
            self._processes.append(process)
            self._pipes.append(ours)
        _, errors, how = self._ask(None, START_LIMIT)
        if how or any(errors):
            logs = [_tail(self._folder / f"rank{rank}.log", 0) for rank in range(self.world_size)]
            self.close()
            raise RanksFailed(f"a world of {self.world_size} could not be started{how}", errors, logs)

    def _ask(self, message: bytes | None, timeout: float) -> tuple[list[Any], list[str | None], str]:
        """Send ``message`` (None: nothing, wait for the start only) and wait for every rank's answer."""
        results: list[Any] = [None] * self.world_size
        errors: list[str | None] = [None] * self.world_size
        waiting: dict[Any, int] = dict(zip(self._pipes, range(self.world_size), strict=True))
        if message is not None:
            for pipe in self._pipes:
                with contextlib.suppress(OSError):  # of a process that died: its end of file is read below
                    pipe.send_bytes(message)
        deadline = time.monotonic() + timeout
        how = ""
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for answered in ready:
                rank = waiting.pop(answered)
                try:
                    good, value = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    self._processes[rank].join(5.0)
                    good, value = False, f"the process died with exit code {self._processes[rank].exitcode}"
                    how = ", and a process died"
                if good:
                    results[rank] = value
                else:
                    errors[rank] = value
                    # the others may wait for this one in a collective: no need to wait as long as that lasts
                    deadline = min(deadline, time.monotonic() + GRACE)
        if waiting:
            how += f", and {len(waiting)} of its processes did not come back (limit {timeout:g} s)"
        for rank in waiting.values():
            errors[rank] = "did not come back; it stood at\n" + self._where(rank)
        return results, errors, how

    def _where(self, rank: int) -> str:
        """The stack of a process that hangs."""
        assert self._folder is not None
        path = self._folder / f"rank{rank}.stack"
        if not path.exists():
            return "    (before it could tell)"
        with contextlib.suppress(OSError):
            os.kill(self._processes[rank].pid, signal.SIGUSR2)
        time.sleep(0.5)
        return path.read_text(errors="replace")


class Pools:
    """Worlds by size, each started when first asked for: ``pools(2).run(function)``.

    keep: how many worlds stay alive at once; the one that was used least recently goes. backend: see `Pool`.
    """

    def __init__(self, keep: int = 3, backend: str = "gloo") -> None:
        self.keep, self.backend = keep, backend
        self._pools: dict[int, Pool] = {}

    def __call__(self, world_size: int) -> Pool:
        pool = self._pools.pop(world_size, None) or Pool(world_size, backend=self.backend)
        while len(self._pools) >= self.keep:
            self._pools.pop(next(iter(self._pools))).close()
        self._pools[world_size] = pool  # last: used most recently
        return pool

    def close(self) -> None:
        """End all processes."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tail(path: Path, offset: int) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(offset)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(["..."] * (len(lines) > LOG_LINES) + lines[-LOG_LINES:])


# ---- in the worker processes


def _work(
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    collective_timeout: float,
    backend: str,
    pipe: multiprocessing.connection.Connection,
) -> None:
    log = os.open(folder / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stack = (folder / f"rank{rank}.stack").open("w")
    faulthandler.register(signal.SIGUSR2, file=stack)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it closes the pipes
    answer: tuple[bool, str | None] = (True, None)
    try:
        _join(rank, world_size, port, folder, collective_timeout, backend)
    except BaseException:
        answer = (False, traceback.format_exc())
    with contextlib.suppress(EOFError, OSError):
        pipe.send_bytes(pickle.dumps(answer))
        while True:
            path, call = pickle.loads(pipe.recv_bytes())
            sys.path[:] = path
            pipe.send_bytes(_answer(rank, world_size, call))
    # Not the interpreter's exit: destructors of process groups whose other end has died may wait for it.
    os._exit(0)


def _join(rank: int, world_size: int, port: int, folder: Path, collective_timeout: float, backend: str) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu" if backend == "gloo" else "cuda",
    )
    if backend == "gloo":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The same ninja whether or not the environment is activated: two versions of it would take turns at compiling
    # DeepSpeed's operator again, which takes minutes.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    os.environ.pop("LOCAL_SIZE", None)  # with it DeepSpeed reduces in shared memory that a killed world leaves behind

    import torch

    torch.set_num_threads(1)
    if backend != "gloo":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend,
        store=torch.distributed.FileStore(str(folder / "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=collective_timeout),
    )
    import deepspeed

    deepspeed.init_distributed(backend, timeout=timedelta(seconds=collective_timeout))


def _answer(rank: int, world_size: int, call: bytes) -> bytes:
    import torch

    try:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        function, args = pickle.loads(call)
        # pickled here and not by the pipe: torch would hand tensors over as file descriptors
        return pickle.dumps((True, function(rank, world_size, *args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))
    finally:
        function = args = None  # what they hold is garbage now
        sys.stdout.flush()  # who asked may read the log at once
        sys.stderr.flush()
        gc.collect()
        gc.freeze()  # the next collection need not look at what is left, mostly modules


def _check(rank: int, world_size: int) -> None:
    """Whether the ranks' collectives are in step: each must receive what the others send now."""
    import torch

    device = "cpu" if torch.distributed.get_backend() == "gloo" else "cuda"
    token = torch.tensor([rank + 0.25], dtype=torch.float64, device=device)
    parts = [torch.zeros_like(token) for _ in range(world_size)]
    torch.distributed.all_gather(parts, token)
    if [float(part) for part in parts] != [other + 0.25 for other in range(world_size)]:
        raise RuntimeError(f"the ranks are out of step: {parts}")
