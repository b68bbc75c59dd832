"""Packed and streamed rows in whole runs: the same training, whoever has them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ows_ds import config
from ows_ds.config import changed
from tests.support.pool import Pools
from tests.support.tiny_run import recipe
from tests.train.test_trainer import contents, run

# float64 sums in another order, through nine steps of Adam
CLOSE = 1e-7


@pytest.fixture(scope="module")
def calm(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same inputs, with a model that drops nothing out: what is dropped depends on the batch's shape."""
    folder = tmp_path_factory.mktemp("calm")
    shutil.copytree(inputs, folder, dirs_exist_ok=True)
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.0}))
    return folder


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """What a step's record says of the training; step 0 has no loss."""
    return {name: record[name] for name in ("loss", "grad_norm", "eval_loss") if record.get(name) is not None}


def in_data(one: config.Recipe, **data: Any) -> config.Recipe:
    return changed(one, {"model.dtype": "float64", **{f"data.{key}": value for key, value in data.items()}})


@pytest.mark.parametrize(
    ("sharding", "kernel"), [("zero3", None), pytest.param("replicated", "eager", marks=pytest.mark.slow)]
)
def test_packed_rows_train_as_rows_alone(
    pools: Pools, calm: Path, tmp_path: Path, sharding: str, kernel: str | None
) -> None:
    """Every step has all 20 rows: alone, or as 10 sequences of two of them, on two ranks."""
    records = []
    for packing, size in ((False, 20), (True, 10)):
        sizes = {"global_batch_size": size, "micro_batch_size": size // 2}
        one = recipe(calm, tmp_path / str(packing), sharding=sharding, **sizes)
        one = in_data(one, packing=packing, max_length=95)
        one = changed(one, {"model.attn_implementation": kernel})
        shown = pools(2).run(run, one, None)[0]
        assert shown
        records.append(contents(tmp_path / str(packing))[0])
    for alone, packed in zip(*records, strict=True):
        assert numbers(packed) == pytest.approx(numbers(alone), rel=CLOSE)
        assert packed["tokens"] == alone["tokens"]
    assert records[0][-1]["eval_loss"] < records[0][0]["eval_loss"]


def test_a_streamed_run_resumes_with_the_same_rows(pools: Pools, calm: Path, tmp_path: Path) -> None:
    """Blocks of 13 rows make two steps of 6 each; the run is stopped in the third block, and resumed from the second
    one, on three ranks."""
    more = {"sharding": "replicated", "global_batch_size": 6, "micro_batch_size": 1}
    data = {"streaming": True, "buffer_size": 13, "packing": False}
    whole = in_data(recipe(calm, tmp_path / "whole", **more), **data)
    pools(2).run(run, whole, None)
    parts = in_data(recipe(calm, tmp_path / "parts", **more), **data)
    pools(2).run(run, parts, 5)
    shown = pools(3).run(run, changed(parts, {"train.resume": "auto"}), None)[0]
    assert any("resuming after step 3" in line for line in shown)
    (records, _), (again, _) = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert [record["step"] for record in again] == list(range(10))
    for a, b in zip(records, again, strict=True):
        assert a["tokens"] == b["tokens"]
        assert numbers(a) == pytest.approx(numbers(b), rel=CLOSE)
    assert len({record["tokens"] for record in records[1:]}) > 3
    assert any(line.startswith("data.train: ") and " rows, " in line for line in shown)
