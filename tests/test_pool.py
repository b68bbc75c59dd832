"""The harness itself: results, every rank's traceback, hangs, deaths, and a world that works again afterwards."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.pool import Pool, Pools, RanksFailed


def total(rank: int, world_size: int, start: int) -> int:
    tensor = torch.tensor([start + rank])
    dist.all_reduce(tensor)
    return int(tensor)


def who(rank: int, world_size: int) -> tuple[int, int, int, str, float]:
    return os.getpid(), dist.get_rank(), dist.get_world_size(), dist.get_backend(), float(torch.rand(()))


def raises_on(rank: int, world_size: int, which: int) -> None:
    print(f"rank {rank} is here")
    if rank == which:
        raise ValueError(f"rank {rank} does not like it")


def leaves_others_waiting(rank: int, world_size: int) -> None:
    if rank == 0:
        raise ValueError("rank 0 went away")
    dist.barrier()


def sleeps(rank: int, world_size: int, which: int) -> None:
    if rank == which:
        time.sleep(600)


def dies(rank: int, world_size: int) -> None:
    os._exit(7)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_by_rank(pools: Pools, world_size: int) -> None:
    assert pools(world_size).run(total, 10) == [10 * world_size + sum(range(world_size))] * world_size
    first, second = pools(world_size).run(who), pools(world_size).run(who)
    assert [answer[1:4] for answer in first] == [(rank, world_size, "gloo") for rank in range(world_size)]
    assert first == second  # the same processes, the same random numbers


def test_failure_shows_every_rank_and_the_world_lives_on(pools: Pools) -> None:
    pids = [answer[0] for answer in pools(2).run(who)]
    with pytest.raises(RanksFailed) as caught:
        pools(2).run(raises_on, 1)
    assert "ValueError: rank 1 does not like it" in str(caught.value)
    assert "rank 0 of 2: succeeded" in str(caught.value)
    assert "rank 0 is here" in str(caught.value)
    assert caught.value.errors[0] is None
    errors = pools(2).fail(raises_on, 1)
    assert errors[0] is None
    assert "ValueError" in str(errors[1])
    assert [answer[0] for answer in pools(2).run(who)] == pids
    with pytest.raises(RanksFailed, match="expected to raise"):
        pools(2).fail(who)


@pytest.mark.slow
def test_hangs_and_deaths_end_and_the_world_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.pool.GRACE", 1.0)
    pool = Pool(2)
    try:
        with pytest.raises(RanksFailed, match="rank 0 went away") as caught:
            pool.run(leaves_others_waiting)
        assert "leaves_others_waiting" in str(caught.value.errors[1])  # where rank 1 stood
        start = time.monotonic()
        with pytest.raises(RanksFailed, match="did not come back"):
            pool.run(sleeps, 1, timeout=1.0)
        assert time.monotonic() - start < 60
        with pytest.raises(RanksFailed, match="exit code 7"):
            pool.run(dies)
        assert pool.run(total, 0) == [1, 1]
    finally:
        pool.close()
