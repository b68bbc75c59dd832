"""Sums of gradients that are kept as their leading directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ows_ds.config import OWSConfig, parse
from ows_ds.errors import UserError
from ows_ds.optim import compressed
from ows_ds.optim.projection import choose, exact_projector
from tests.support.alive import Alive
from tests.support.pool import Pools
from tests.support.training import HOMES, distance, run_ows, worlds

R = 8


def gradients(shape: tuple[int, ...], count: int = 6, noise: float = 0.3) -> list[Tensor]:
    """Micro-batches that share a decaying spectrum, each with as much noise of its own."""
    torch.manual_seed(0)
    *stack, m, n = shape
    left, right = torch.randn(*stack, m, 12), torch.randn(*stack, n, 12)
    shared = (left * 0.7 ** torch.arange(12)) @ right.mT
    return [shared + noise * torch.randn(shape) for _ in range(count)]


def energy(total: Tensor, projector: Tensor) -> float:
    """The share of ||G||^2 that a projector keeps."""
    side = total if total.shape[-2] >= total.shape[-1] else total.mT
    return float((side @ projector).square().sum() / total.square().sum())


@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (3, 64, 48)])
@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_the_directions_are_those_of_the_sum(shape: tuple[int, ...], noise: float) -> None:
    """As much of the sum's energy as its best projector keeps, or nearly; and the gradient inside it."""
    some = gradients(shape, noise=noise)
    total: compressed.Compressed | None = None
    for number, one in enumerate(some):
        seed = number if len(shape) == 2 else [number * 10 + expert for expert in range(shape[0])]
        total = compressed.add(total, one, R, seed)
    assert total is not None
    exact = torch.stack(some).sum(0)
    found = choose({"g": total.range(R)}, {}, lambda _: torch.zeros(0))["g"]
    projector = found.projector(total.range(R), torch.float32)
    best = energy(exact, exact_projector(exact, R))
    assert energy(exact, projector) > (0.999 if noise < 1 else 0.97) * best
    tall = exact if exact.shape[-2] >= exact.shape[-1] else exact.mT
    inside = total.left @ (total.right.mT @ projector)
    assert float((inside - tall @ projector).norm() / (tall @ projector).norm()) < (1e-2 if noise < 1 else 0.2)
    gram = total.right.mT @ total.right
    torch.testing.assert_close(gram, torch.eye(gram.shape[-1]).expand_as(gram), rtol=0, atol=1e-4)


def test_one_gradient_is_as_without_a_sum() -> None:
    [one] = gradients((96, 40), 1, 0.1)
    total = compressed.add(None, one, R, 0)
    chosen = choose({"g": total.range(R)}, {}, lambda _: torch.zeros(0))["g"].projector(total.range(R), torch.float32)
    assert energy(one, chosen) > 0.9999 * energy(one, exact_projector(one, R))


def test_a_sum_is_never_there() -> None:
    """Of what is made, no tensor has a gradient's entries beside the gradient itself."""
    some = gradients((512, 256), 3)
    total: compressed.Compressed | None = None
    with Alive() as alive:
        for number, one in enumerate(some):
            total = compressed.add(total, one, R, number)
    assert alive.largest < some[0].nbytes / 2


SETTINGS: dict[str, Any] = {
    "gamma": 1.5, "rank": 4, "period": 2, "update_proj_gap": 2, "lr": 1e-2, "accumulation": 4, "refresh": "compressed",
}  # fmt: skip


@pytest.mark.parametrize(("world_size", "sharding"), worlds(HOMES))
def test_shards_are_replicas(pools: Pools, world_size: int, sharding: str) -> None:
    """Owners compress the same sums whatever the home of weights, and training is near that on whole sums."""
    run = (run_ows, sharding, "llama", False, torch.float64, 5)
    found = pools(world_size).run(*run, SETTINGS)
    other = pools(world_size).run(run_ows, "replicated", "llama", False, torch.float64, 5, SETTINGS)
    assert distance(found[0]["weights"], other[0]["weights"]) < 1e-10
    whole = pools(world_size).run(*run, SETTINGS | {"refresh": "full"})
    assert 0 < distance(found[0]["weights"], whole[0]["weights"]) < 0.1


def test_one_micro_batch_is_exactly_the_full_way(pools: Pools) -> None:
    run = (run_ows, "replicated", "llama", False, torch.float64, 4)
    ends = [pools(1).run(*run, SETTINGS | {"accumulation": 1, "refresh": how})[0] for how in ("full", "compressed")]
    assert distance(ends[0]["weights"], ends[1]["weights"]) == 0


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"expected randomized under optim\.refresh compressed"):
        parse(OWSConfig, {"refresh": "compressed", "projector": "svd"}, "")
