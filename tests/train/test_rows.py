"""Rows that differ between ranks, or since a run began, or that cannot be used when their turn has come."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

from ows_ds import config
from ows_ds.checkpoint import checkpoints
from ows_ds.errors import UserError
from ows_ds.train.trainer import train
from tests.support.pool import Pools
from tests.support.tiny_run import cut, recipe
from tests.train.test_trainer import run


def refusal(rank: int, world_size: int, recipe: config.Recipe, path: str) -> str:
    """Why a run ends in which each rank reads a file of its own."""
    try:
        train(config.changed(recipe, {"data.train": path.format(rank)}))
    except UserError as error:
        return str(error)
    return "done"


def changed(recipe: config.Recipe, **values: Any) -> config.Recipe:
    return config.changed(recipe, {f"data.{name}": value for name, value in values.items()})


def test_ranks_that_read_different_rows_are_refused(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    lines = (inputs / "train.jsonl").read_text().splitlines(keepends=True)
    for rank in range(2):
        (tmp_path / f"{rank}.jsonl").write_text("".join(lines[: 20 - rank]))
    found = pools(2).run(refusal, recipe(inputs, tmp_path / "run", steps=2), str(tmp_path / "{}.jsonl"))
    for rank, text in enumerate(found):
        assert text.endswith(
            f"expected the same rows on every rank: rank {rank} and rank {1 - rank} read different ones"
        )
        assert text.startswith("data.train: ")
    assert not (tmp_path / "run").exists()


def resumed(rank: int, world_size: int, recipe: config.Recipe) -> str:
    """What a run says of its data."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("ows_ds").addHandler(handler)
    try:
        train(recipe)
    finally:
        logging.getLogger("ows_ds").removeHandler(handler)
    return said.getvalue()


def test_a_resumed_run_says_where_its_rows_differ(pools: Pools, inputs: Path, straight: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text((inputs / "train.jsonl").read_text().replace('"2"', '"3"'))
    for path, says in ((inputs / "train.jsonl", False), (other, True)):
        parts = cut(straight(2, sharding="zero3", save_total_limit=3), tmp_path / path.stem)
        settings = {"sharding": "zero3", "save_total_limit": 3, "resume": "auto"}
        [said, silent] = pools(2).run(resumed, changed(recipe(inputs, parts, **settings), train=str(path)))
        assert ("data.train: not the rows that the run began with" in said) is says
        assert "data.eval: not" not in said
        assert "not the rows" not in silent


def test_a_bad_row_in_a_later_block_loses_nothing(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    rows, lines = tmp_path / "rows.jsonl", (inputs / "train.jsonl").read_text().splitlines(keepends=True)
    rows.write_text("".join([*lines[:16], '{"txt": 3}\n', *lines[16:]]))
    settings = {"steps": 6, "global_batch_size": 4, "save_steps": None, "sharding": "zero3"}
    late = changed(recipe(inputs, tmp_path / "run", **settings), train=str(rows), streaming=True, buffer_size=8)
    for text in pools(2).run(refusal, late, str(rows)):
        assert "rows.jsonl:17" in text
    saved = [folder.name for folder in checkpoints(tmp_path / "run")]
    rows.write_text("".join(lines))
    pools(2).run(run, config.changed(late, {"train.resume": "auto"}), None)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (saved, records[-1]["step"]) == (["step-4"], 6)
