"""Evaluations that decide: the best checkpoint, stopping early; samples; rows that are held out and trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ows_ds import config
from ows_ds.cli.main import main
from ows_ds.config import Train
from ows_ds.train import trainer
from ows_ds.train.best import Best, restored
from ows_ds.train.trainer import train
from tests.support.pool import Pools
from tests.support.tiny_run import recipe


def run(rank: int, world_size: int, made: config.Recipe, losses: list[float] | None) -> None:
    """Train; losses: what the evaluations after the first are said to find."""
    if losses is None:
        train(made)
        return
    left, evaluate = list(losses), trainer.evaluate
    trainer.evaluate = lambda context: {"eval_loss": left.pop(0)}  # type: ignore[assignment]
    try:
        train(made)
    finally:
        trainer.evaluate = evaluate


def test_evaluations_are_counted() -> None:
    settings, best = Train(output_dir="o", early_stopping=2), Best()
    assert [best.add(loss, step, settings) for step, loss in enumerate((3.0, 2.0, 2.5, 2.0), 1)] == [
        True, True, False, False,
    ]  # fmt: skip
    assert (best.step, best.stopped) == (2, True)
    assert restored(json.loads(json.dumps(best.state()))) == best
    assert restored(Best().state()) == restored(None) == Best()


def test_the_best_model_is_exported_and_the_run_stops(
    pools: Pools, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint of the best evaluation stays, though others are newer, and its model is the run's."""
    more = {"eval_steps": 1, "early_stopping": 3, "load_best": True, "save_steps": None, "save_total_limit": 1}
    made = recipe(inputs, tmp_path / "run", **more, steps=9)
    pools(2).run(run, made, [3.0, 1.0, 2.0, 2.5, 1.5, 0.0, 0.0, 0.0, 0.0])
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 5  # three evaluations after the best one
    assert sorted(one.name for one in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-2", "step-5"]
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "best"), "--checkpoint", "step-2"]) == 0
    files = [folder / "model.safetensors" for folder in (tmp_path / "best", tmp_path / "run" / "model")]
    assert files[0].read_bytes() == files[1].read_bytes()
    again = config.changed(made, {"train.resume": "auto"})
    pools(2).run(run, again, [])  # nothing is trained any more
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(steps)


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
def test_samples_are_answered(sharding: str, pools: Pools, inputs: Path, tmp_path: Path) -> None:
    made = recipe(inputs, tmp_path / "run", steps=2, save_steps=None, sharding=sharding)
    made = config.changed(made, {"log.samples": ["1+1", "2+2"], "log.sample_tokens": 3})
    pools(2).run(run, made, None)
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [[message for message, _ in one["samples"]] for one in (found[0], found[-1])] == [["1+1", "2+2"]] * 2
    assert all(isinstance(answer, str) for _, answer in found[-1]["samples"])
    plain = recipe(inputs, tmp_path / "plain", steps=2, save_steps=None, sharding=sharding)
    pools(2).run(run, plain, None)  # they change nothing
    ends = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "plain")]
    assert ends[0] == ends[1]


def test_held_out_rows_that_are_trained_are_named(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = {"model.path": inputs / "model", "data.train": inputs / "train.jsonl", "data.eval": inputs / "train.jsonl"}
    more = {"train.output_dir": tmp_path / "run", "train.steps": 1, "optim.rank": 4, "sampling.gamma": 1}
    options = [word for key, value in (words | more).items() for word in (f"--{key}", str(value))]
    assert main(["train", *options, "--train.global_batch_size", "6", "--log.trackers", "[]"]) == 0
    shown = capfd.readouterr().out
    assert "data.eval: 20 of its 20 rows are training rows, too, the first is row 1" in shown
    assert "data.train: each epoch leaves out 2 of 20" in shown
    assert "batch 6 = " in shown
    assert "weights, ows: " in shown
    assert "1 steps in " in shown


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"early_stopping": 2}, {}, "train.early_stopping: 2 is invalid: leave it out, or give train.eval_steps"),
    ({"load_best": True}, {}, "train.load_best: True is invalid: leave it out, or give train.eval_steps"),
    ({"early_stopping": 0}, {}, "train.early_stopping: 0 is invalid: expected an integer of at least 1, or null"),
    ({}, {"samples": "hi"}, "log.samples: 'hi' is invalid: expected a list of texts"),
]


@pytest.mark.parametrize(("given", "log", "expected"), MISTAKES)
def test_mistakes(given: dict[str, Any], log: dict[str, Any], expected: str) -> None:
    with pytest.raises(Exception, match=expected):
        config.from_dict({"model": {"path": "m"}, "train": {"output_dir": "o", **given}, "log": log})
