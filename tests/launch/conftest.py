"""One run of two ranks without any launcher, which those of all launchers must equal, and two hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ows_ds import config
from tests.support.hosts import Hosts, need
from tests.support.pool import Pools
from tests.support.tiny_run import recipe
from tests.train.test_trainer import contents, run

PERIOD = 8  # a stop after a few steps falls within the first


def launched(inputs: Path, run_dir: Path, **train: Any) -> config.Recipe:
    """Two ranks accumulate two micro-batches each; one checkpoint is kept, the last."""
    all_of_them = {
        "sharding": "zero3",
        "steps": 12,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "save_total_limit": 1,
    }
    return recipe(inputs, run_dir, {"period": PERIOD}, **all_of_them | train)


@pytest.fixture(scope="session")
def expected(pools: Pools, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Records and digests that a run of `launched` on one host leaves behind, which nothing stops."""
    folder = tmp_path_factory.mktemp("expected") / "run"
    pools(2).run(run, launched(inputs, folder), None)
    return contents(folder)


def same(run_dir: Path, expected: Any) -> None:
    """The run in ``run_dir`` left behind what was expected."""
    records, files = contents(run_dir)
    assert files == expected[1]
    assert records == expected[0]
    assert records[2]["comm_bytes"]["gradients"] > 0  # of two ranks that share the work


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    need("ip")
    with Hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both
