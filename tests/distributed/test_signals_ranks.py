"""A signal stops all processes after the same step, saved; the run that resumes is the one that was not stopped."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from ows_ds import config
from ows_ds.distributed import signals
from ows_ds.train import log, trainer
from ows_ds.train import step as step_module
from tests.support.pool import Pools
from tests.support.tiny_run import recipe
from tests.train.test_trainer import contents, run


def signalled(
    rank: int, world_size: int, recipe: config.Recipe, at: int, order: Sequence[int], within: bool = False
) -> bool:
    """Train; process r gets ``order[r]`` (0: nothing) once step ``at`` is logged. Whether it stopped.

    within: in the middle of the step after it, between two micro-batches.
    """
    step, losses, passes = log.RunLog.step, step_module.token_losses, -1

    def signalling(self: log.RunLog, record: dict[str, Any]) -> None:
        nonlocal passes
        step(self, record)
        if record["step"] == at and order[rank]:
            passes = 0
            if not within:
                os.kill(os.getpid(), order[rank])

    def computing(*args: Any) -> Any:
        nonlocal passes
        passes += passes >= 0
        if within and passes == 2:
            os.kill(os.getpid(), order[rank])
        return losses(*args)

    with patch.object(log.RunLog, "step", signalling), patch.object(step_module, "token_losses", computing):
        try:
            trainer.train(recipe)
        except signals.Stopped:
            return True
    return False


@pytest.fixture(scope="module")
def whole(pools: Pools, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run that nothing stops leaves behind."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pools(2).run(run, recipe(inputs, folder, sharding="zero3", eval_steps=5, save_total_limit=1), None)
    return contents(folder)


@pytest.mark.parametrize(
    ("order", "within"),
    [((0, signal.SIGUSR1), False), ((signal.SIGTERM, signal.SIGUSR1), False), ((0, signal.SIGTERM), True)],
)
def test_all_stop_after_the_same_step_and_resume(
    pools: Pools, inputs: Path, tmp_path: Path, whole: Any, order: Sequence[int], within: bool
) -> None:
    """The signals come when step 4 is logged, the last of a period, or within step 5, after which one is due."""
    settings: dict[str, Any] = {"sharding": "zero3", "eval_steps": 5, "save_total_limit": 1}
    assert pools(2).run(signalled, recipe(inputs, tmp_path / "run", **settings), 4, order, within) == [True, True]
    [newest] = (tmp_path / "run" / "checkpoints").iterdir()
    assert newest.name in ("step-5", "step-6")  # the second where the signal reached the thread late
    assert not (tmp_path / "run" / "model").exists()
    going_on = recipe(inputs, tmp_path / "run", **settings, resume="auto")
    assert pools(2).run(signalled, going_on, -1, (0, 0)) == [False, False]
    (records, files), (its_records, its_files) = copy.deepcopy(whole), contents(tmp_path / "run")
    assert its_files == files
    late = newest.name == "step-6"
    assert ("eval_loss" in its_records[5]) == late  # left out where it falls on the stop, and its bytes with it
    for five in () if late else (its_records[5], records[5]):
        five.pop("eval_loss", None)
        five["comm_bytes"].pop("evaluation", None)
    assert its_records == records


def test_a_signal_in_the_last_step_leaves_the_model_to_the_next_start(
    pools: Pools, inputs: Path, tmp_path: Path
) -> None:
    optim = {"warmup_steps": 1}
    short = recipe(inputs, tmp_path / "run", optim=optim, steps=1)
    assert pools(2).run(signalled, short, 0, (signal.SIGUSR1, signal.SIGUSR1)) == [True, True]
    assert not (tmp_path / "run" / "model").exists()
    again = recipe(inputs, tmp_path / "run", optim=optim, steps=1, resume="auto")
    assert pools(2).run(signalled, again, -1, (0, 0)) == [False, False]
    assert (tmp_path / "run" / "model").exists()
    assert contents(tmp_path / "run")[0][-1]["eval_loss"] > 0
