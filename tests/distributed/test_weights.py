"""merging.py: merging into bfloat16, to the nearest value and stochastically, in one piece and in any pieces."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ows_ds.distributed import merging
from ows_ds.distributed.merging import add_low_rank, draw_bits, round_stochastically
from ows_ds.distributed.weights import interval

CPU = torch.device("cpu")
ROWS, COLUMNS, RANK = 37, 11, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def merged(world_size: int, dtype: torch.dtype, noise: str | None) -> Tensor:
    """A matrix of ``dtype`` after a merge, each process's interval by itself, put together."""
    matrix = random(ROWS, COLUMNS).to(dtype).flatten()
    left, right = 0.1 * random(ROWS, RANK, seed=1), random(COLUMNS, RANK, seed=2)
    for index in range(world_size):
        start, stop = interval(ROWS * COLUMNS, index, world_size)
        add_low_rank(matrix[start:stop], start, left, right, 0.99, noise)
    return matrix.view(ROWS, COLUMNS)


def exact() -> Tensor:
    """What is rounded, in float64."""
    product = 0.1 * random(ROWS, RANK, seed=1).double() @ random(COLUMNS, RANK, seed=2).double().T
    return 0.99 * random(ROWS, COLUMNS).to(torch.bfloat16).double() + product


def test_nearest_by_default() -> None:
    assert torch.equal(merged(1, torch.bfloat16, None), exact().float().to(torch.bfloat16))


@pytest.mark.parametrize("entries", [1, 4 * COLUMNS, 1 << 20])
@pytest.mark.parametrize("noise", [None, "0/1/a"])
def test_all_shardings_merge_to_the_same_bits(monkeypatch: pytest.MonkeyPatch, entries: int, noise: str | None) -> None:
    monkeypatch.setattr(merging, "MERGE_ENTRIES", entries)
    whole = merged(1, torch.bfloat16, noise)
    for world_size in (2, 3, 5, 36, 500):
        assert torch.equal(merged(world_size, torch.bfloat16, noise), whole)


def test_stochastic_rounding_gives_a_neighbour_and_the_value_on_average() -> None:
    draws = 2000
    samples = torch.stack([merged(1, torch.bfloat16, f"0/{step}/a") for step in range(draws)]).double()
    value = exact()
    low, high = samples.amin(0), samples.amax(0)
    assert (low <= value).all()
    assert (value <= high).all()
    assert ((samples == low) | (samples == high)).all()  # two neighbours and nothing else
    gap = torch.nextafter(low.to(torch.bfloat16), torch.tensor(math.inf, dtype=torch.bfloat16)).double() - low
    assert ((high - low) <= gap).all()
    # each entry's mean is within 5 standard errors, and so is the mean over all entries in units of the gap
    error = (samples.mean(0) - value) / gap
    share = (value - low) / gap
    assert (error.abs() <= 5 * (share * (1 - share) / draws).sqrt() + 1e-4).all()
    assert abs(float(error.mean())) <= 5 * 0.5 / math.sqrt(draws * error.numel())
    # nearest rounding is wrong by up to half a gap each time
    assert float(((merged(1, torch.bfloat16, None).double() - value) / gap).abs().max()) > 0.4


def test_noise_depends_on_the_key_and_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [merged(1, torch.bfloat16, noise) for noise in ("0/1/a", "0/2/a", "1/1/a", "0/1/b", "0/1/a")]
    assert torch.equal(runs[0], runs[4])
    assert len({tuple(run.flatten().tolist()) for run in runs}) == 4
    monkeypatch.setattr(merging, "MERGE_ENTRIES", COLUMNS)
    ones = torch.ones(ROWS * COLUMNS, dtype=torch.bfloat16)
    add_low_rank(ones, 0, torch.full((ROWS, 1), 2.0**-9), torch.ones(COLUMNS, 1), noise="0/1/a")
    assert len({tuple(row.tolist()) for row in ones.view(ROWS, COLUMNS)}) > ROWS // 2


def test_what_bfloat16_holds_stays() -> None:
    kept = random(10_000).to(torch.bfloat16).float()
    kept[:6] = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.3895313892515355e38, -(2.0**-130)])
    for key in ("a", "b"):
        bits = draw_bits(kept.numel(), key, CPU)
        assert (int(bits.min()) >= 0, int(bits.max()) < 1 << 16) == (True, True)
        assert torch.equal(round_stochastically(kept, bits).view(torch.int32), kept.view(torch.int32))
    # the NaN of GPUs has all bits set: one more would make it -0
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(nan, torch.full((3,), 0xFFFF, dtype=torch.int32)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_weights_are_not_rounded(dtype: torch.dtype) -> None:
    assert torch.equal(merged(1, dtype, "0/1/a"), merged(1, dtype, None))
