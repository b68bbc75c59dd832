"""Runs of two ranks that are killed at some moment and started again, until they end.

    python -m tests.faults.kills [KILLS] [SEED]

prints what was hit, as tables. A killed rank gets SIGKILL, at a place in the program (before or after the n-th call
of a function) or at a time. The other one is killed with it, or left to find out by itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from ows_ds import checkpoint, config
from ows_ds.checkpoint import saver, writer
from ows_ds.distributed.communicator import Communicator
from ows_ds.model import tensor_files
from ows_ds.optim.active_set import ActiveSet
from ows_ds.optim.full_rank import FullRank
from ows_ds.optim.ows import OWS
from ows_ds.optim.update import CoordinateBuffer
from ows_ds.train import log, trainer
from tests.support import pool
from tests.support.tiny_run import recipe, write_inputs
from tests.train.test_trainer import contents

WORLD = 2
LIMIT = 120.0  # seconds for a run of a tiny model
GRACE = 20.0  # seconds in which a rank whose peer is dead has to end by itself
PLACES: dict[str, tuple[Any, str, int]] = {
    # a function, and up to which of its calls is hit
    "in a backward pass": (OWS, "backward", 20),
    "in an update": (CoordinateBuffer, "update", 7),
    "in an update at full rank": (FullRank, "update", 7),
    "in a merge": (ActiveSet, "merge", 8),
    "in a refresh": (ActiveSet, "take", 3),
    "in a change of the set": (ActiveSet, "change", 2),
    "recording a step": (log.RunLog, "step", 7),
    "beginning a checkpoint": (checkpoint.Saver, "start", 3),
    "writing state": (tensor_files.Writer, "write", 60),
    "syncing state": (tensor_files.Writer, "close", 4),
    "reading state back": (writer, "sha256", 6),
    "agreeing on a checkpoint": (writer.Writing, "complete", 4),
    "writing the manifest": (writer, "write_manifest", 4),
    "renaming": (Path, "rename", 6),
    "deleting old checkpoints": (saver, "prune", 4),
    "deleting": (shutil, "rmtree", 8),
    "writing the model": (trainer, "save_model", 1),
}
OF_RANK_0 = ("writing the manifest", "renaming", "deleting old checkpoints", "deleting")
AT_A_TIME = "at a time"


@dataclass(frozen=True)
class Plan:
    """place: of `PLACES` or `AT_A_TIME`. call: number of the call there; after: its end. seconds: since the start.

    together: both ranks die."""

    rank: int
    together: bool
    place: str
    call: int = 0
    after: bool = False
    seconds: float = 0.0


@dataclass
class Outcome:
    """hit: kills by place; alone: how many left the other rank behind; opened: checkpoints that were verified."""

    hit: Counter[str] = field(default_factory=Counter)
    alone: int = 0
    runs: int = 0
    starts: int = 0
    opened: int = 0


def draw(chance: random.Random, seconds: float) -> Plan:
    """seconds: that a whole run takes."""
    rank, together = chance.randrange(WORLD), chance.random() < 0.5
    if chance.random() < 0.25:  # perhaps before they have met, where one alone would wait for the other
        return Plan(rank, True, AT_A_TIME, seconds=chance.uniform(0, seconds))
    place = chance.choice(list(PLACES))
    rank = 0 if place in OF_RANK_0 else rank
    return Plan(rank, together, place, chance.randint(1, PLACES[place][2]), chance.random() < 0.5)


def arm(plan: Plan) -> None:
    """Let this process kill itself where the plan says."""
    owner, name, _ = PLACES[plan.place]
    function, calls = getattr(owner, name), Counter[str]()

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        now = calls[name] == plan.call
        if now and not plan.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def victim(rank: int, port: int, folder: Path, job: config.Recipe, plan: Plan | None) -> None:
    """A rank of a run, in a process of its own."""
    output = os.open(folder / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        pool._join(rank, WORLD, port, folder, LIMIT, "gloo")
        if plan is not None and plan.place != AT_A_TIME and rank == plan.rank:
            arm(plan)
        trainer.train(job)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # not the interpreter's exit: destructors of a group whose other end is dead may wait for it


def attempt(job: config.Recipe, plan: Plan | None) -> list[int]:
    """Start the ranks, kill as planned; exit codes. Raises AssertionError, with what they printed, for a hang."""
    context = pool.warm_context()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    port = next(pool._ports)
    args = [(rank, port, folder, job, plan) for rank in range(WORLD)]
    processes: list[Any] = [context.Process(target=victim, args=some, daemon=True) for some in args]
    for process in processes:
        process.start()
    if plan is not None and plan.place == AT_A_TIME:
        processes[plan.rank].join(plan.seconds)
        processes[plan.rank].kill()
    multiprocessing.connection.wait([process.sentinel for process in processes], LIMIT)
    deadline = time.monotonic() + GRACE
    if plan is not None and plan.together and any(process.exitcode for process in processes):
        for process in processes:
            process.kill()
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hung:
        processes[rank].kill()
        processes[rank].join()
    printed = "\n".join(
        (folder / f"rank{rank}.log").read_text() for rank in range(WORLD) if (folder / f"rank{rank}.log").exists()
    )
    shutil.rmtree(folder)
    assert not hung, f"{plan}: processes {hung} did not end:\n{printed}"
    codes = [int(process.exitcode) for process in processes]
    assert plan is not None or codes == [0] * WORLD, f"a run that nobody killed ended with {codes}:\n{printed}"
    return codes


def kill(inputs: Path, folder: Path, kills: int, sharding: str, seed: int, frozen: str = "same") -> Outcome:
    """Kill runs until ``kills`` were hit. Raises AssertionError unless each ends as one that was not interrupted, with
    no checkpoint ever there that is not whole."""

    def job(name: str) -> config.Recipe:
        more = {"steps": 10, "save_steps": 2, "sharding": sharding, "resume": "auto"}
        made = config.to_dict(recipe(inputs, folder / name, **more))
        made["log"]["trackers"] = []
        made["data"]["eval"] = None
        made["model"]["frozen"] = frozen
        return config.from_dict(made)

    attempt(job("whole"), None)  # starts what processes are forked from
    shutil.rmtree(folder / "whole")
    began = time.monotonic()
    attempt(job("whole"), None)
    seconds = time.monotonic() - began
    records, files = contents(folder / "whole")
    chance, outcome = random.Random(f"{seed}/{sharding}"), Outcome()
    while outcome.hit.total() < kills:
        outcome.runs += 1
        run_dir = folder / f"run{outcome.runs}"
        ended = False
        while not ended:
            plan = draw(chance, seconds) if outcome.hit.total() < kills else None
            codes = attempt(job(run_dir.name), plan)
            outcome.starts += 1
            if -signal.SIGKILL in codes:
                assert plan is not None
                outcome.hit[plan.place] += 1
                outcome.alone += not plan.together
            ended = codes == [0] * WORLD
            for path in checkpoint.checkpoints(run_dir):
                checkpoint.open_checkpoint(path, Communicator())
                outcome.opened += 1
        its_records, its_files = contents(run_dir)
        assert its_records == records
        assert {name: its_files.get(name) for name in files} == files
        assert not list((run_dir / "checkpoints").glob("*.partial"))
        shutil.rmtree(run_dir)
    return outcome


def main(kills: int = 100, seed: int = 0) -> None:
    """Print a table for half of the kills with weights on each rank, and for half under ZeRO-3."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        inputs = write_inputs(folder / "inputs")
        for home, count in (("replicated", kills - kills // 2), ("zero3", kills // 2)):
            outcome = kill(inputs, folder / home, count, home, seed)
            hit = f"{outcome.hit.total()} kills, {home}: {outcome.alone} of one rank alone"
            runs = f"{outcome.runs} runs that ended, {outcome.starts} starts, {outcome.opened} checkpoints verified"
            print(f"\n{hit}, {runs}\n\n| moment | kills |\n|---|---|")
            for place in (*PLACES, AT_A_TIME):
                print(f"| {place} | {outcome.hit[place]} |", flush=True)


if __name__ == "__main__":
    from tests.faults import kills  # processes that are forked know its functions by this name

    kills.main(*map(int, sys.argv[1:]))
