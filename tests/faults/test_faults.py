"""One rank of a run fails: all others end within the limit, and name it on their last line."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ows_ds import config
from ows_ds.distributed.rendezvous import free_port
from tests.conftest import ROOT
from tests.support.hosts import ADDRESSES, ENVIRONMENT, NAMES, Hosts, need
from tests.support.tiny_run import recipe

LIMIT = 20  # train.timeout_seconds
MORE = 10  # seconds beyond it, on a machine that has much to do
START = 240  # seconds until the fault


def meeting(world_size: int, rank: int, local: int, address: str, port: int) -> dict[str, str]:
    """What a launcher sets for a rank."""
    numbers = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": 0 if local == 1 else rank,
        "LOCAL_WORLD_SIZE": local,
    }
    return {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": address, "MASTER_PORT": str(port),
    }  # fmt: skip


@contextlib.contextmanager
def started(folder: Path, file: Path, world_size: int, fault: str, at: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many ranks without a launcher, which nothing else would end; stderr in ``folder``/RANK.log."""
    processes = []
    port = free_port()
    try:
        for rank in range(world_size):
            words = [sys.executable, "-m", "tests.faults.worker", fault, str(at), "3", "train", "--config", str(file)]
            environment = ENVIRONMENT | meeting(world_size, rank, world_size, "127.0.0.1", port)
            with (folder / f"{rank}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log)
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def await_fault(path: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + START
    while not path.exists():
        assert time.monotonic() < end
        early = any(process.poll() is not None for process in processes)
        if early and not path.exists():  # in this order: the fault may be a process's end
            pytest.fail("".join(log.read_text() for log in path.parent.parent.glob("*.log")))
        time.sleep(0.05)


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    return lines[-1] if lines else ""


MEMORY = ": OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
DATA = ": OSError: [Errno 5] Input/output error: 'train.arrow'"
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world_size", "sharding", "fault", "at", "words"),
    [
        (2, "replicated", "kill", 0, " is gone"),  # the one in whose store they met
        pytest.param(2, "replicated", "memory", 1, MEMORY, marks=pytest.mark.ci),
        *(
            pytest.param(*five, marks=SLOW)
            for five in [
                (3, "zero3", "kill", 1, " is gone"),
                (3, "replicated", "kill", 2, " is gone"),
                (2, "zero3", "memory", 0, MEMORY),
                (3, "zero3", "data", 2, DATA),
                (2, "replicated", "freeze", 1, " has been silent for "),
                (2, "replicated", "freeze", 0, " has been silent for "),
            ]
        ),
    ],
)
def test_all_end_with_the_first_cause(
    inputs: Path, tmp_path: Path, world_size: int, sharding: str, fault: str, at: int, words: str
) -> None:
    file, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(config.to_yaml(recipe(inputs, run_dir, sharding=sharding, timeout_seconds=LIMIT)))
    with started(tmp_path, file, world_size, fault, at) as processes:
        await_fault(run_dir / "fault", processes)
        end = time.monotonic() + LIMIT + MORE
        cause = f"ows-ds: failed: rank {at} (host {socket.gethostname()}, pid {processes[at].pid}){words}"
        for rank, process in enumerate(processes):
            if rank == at and fault in ("kill", "freeze"):
                continue
            assert process.wait(max(1.0, end - time.monotonic())) == 1
            assert last_line(tmp_path / f"{rank}.log").startswith(cause), rank
            # the traceback is the failing process's
            assert ("Traceback" in (tmp_path / f"{rank}.log").read_text()) == (rank == at)


@pytest.mark.slow
def test_a_rank_that_hangs_is_ended_by_the_others(inputs: Path, tmp_path: Path) -> None:
    """It lives, so that only the others, who wait for it, tell that something is wrong; under NCCL they cannot."""
    file, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(config.to_yaml(recipe(inputs, run_dir, sharding="replicated", timeout_seconds=LIMIT)))
    with started(tmp_path, file, 2, "hang", 1) as processes:
        await_fault(run_dir / "fault", processes)
        end = time.monotonic() + LIMIT + 2 * MORE
        for rank, process in enumerate(processes):
            assert process.wait(max(1.0, end - time.monotonic())) == 1
            cause = f"ows-ds: failed: rank 1 (host {socket.gethostname()}, pid {processes[1].pid}) does not come on: "
            assert last_line(tmp_path / f"{rank}.log").startswith(cause)


@pytest.mark.slow
@pytest.mark.parametrize("end_of", ["the cable", "a process"])
def test_a_host_that_is_cut_off(inputs: Path, tmp_path: Path, end_of: str) -> None:
    need("ip")
    file, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
    long = recipe(inputs, run_dir, sharding="zero3", timeout_seconds=LIMIT, steps=100000, save_steps=None)
    file.write_text(config.to_yaml(long))
    with Hosts(tmp_path) as hosts:
        processes = {
            name: hosts.start(
                name,
                [sys.executable, "-m", "ows_ds", "train", "--config", str(file)],
                tmp_path / f"{name}.log",
                **meeting(2, rank, 1, ADDRESSES["n0"], 29500),
            )
            for rank, name in enumerate(NAMES)
        }
        try:
            await_fault(run_dir / "metrics.jsonl", list(processes.values()))
            time.sleep(2)
            if end_of == "the cable":
                subprocess.run([*hosts.at("n1"), "ip", "link", "set", "eth0", "down"], check=True, env=ENVIRONMENT)
            else:
                os.kill(processes["n1"].pid, signal.SIGKILL)
            end = time.monotonic() + LIMIT + MORE
            for rank, name in enumerate(NAMES):
                if name == "n1" and end_of == "a process":
                    continue
                assert processes[name].wait(max(1.0, end - time.monotonic())) == 1
                other = NAMES[1 - rank]
                line = last_line(tmp_path / f"{name}.log")
                words = " has been silent for " if end_of == "the cable" else " is gone, or the network to it: "
                who = f"rank {1 - rank} (host {other}, pid {processes[other].pid})"
                assert line.startswith(f"ows-ds: failed: {who}{words}"), line
        finally:
            for process in processes.values():
                hosts.stop(process)
