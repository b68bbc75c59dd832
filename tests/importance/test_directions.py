"""The leading directions of inputs, and what nf4 makes of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ows_ds.compat.deepspeed import shard
from ows_ds.distributed.frozen import Frozen, frozen_of
from ows_ds.distributed.weights import Weights
from ows_ds.importance.directions import find_directions, needs_directions
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import home

WIDE = {"hidden_size": 256, "intermediate_size": 320, "head_dim": 64}  # tiny matrices have no direction to spare
DTYPE = torch.float64


def batches() -> list[dict[str, Tensor]]:
    """One with padding, in which no token is, and one without."""
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids.flip(0)}]


def inputs_of(weights: Weights, frozen: Frozen) -> Tensor:
    """(tokens, C_in) without padding, as the first pass saw them."""
    seen: list[Tensor] = []
    [(module, _)] = frozen.places

    def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach().clone())

    handle = module.register_forward_pre_hook(see)
    with torch.no_grad():
        for batch in batches():
            weights(**batch)
    handle.remove()
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches()]
    return torch.cat([x[mask.bool()] for x, mask in zip(seen, masks, strict=True)])


def frozen_in(weights: Weights) -> dict[str, Frozen]:
    found = {name: frozen_of(parameter) for name, parameter in weights.parameters().items()}
    return {name: frozen for name, frozen in found.items() if frozen is not None}


def test_nearly_those_of_an_exact_decomposition() -> None:
    """Of random weights inputs have all directions alike, so that the best ones are hard to find, and of little use;
    yet products come nearer to the real ones."""
    model = tiny("llama", dtype=DTYPE, **WIDE)
    real = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = home(model, "replicated", 1, "nf4")
    found = frozen_in(weights)
    x = {name: inputs_of(weights, frozen) for name, frozen in found.items()}
    before = {name: frozen.format.dense(frozen.codes, frozen.scales) for name, frozen in found.items()}
    find_directions(weights, batches())
    for name, frozen in found.items():
        u = frozen.directions
        assert u is not None
        r = frozen.format.directions
        assert u.shape == (frozen.format.in_features, r)
        assert r > 0
        u = u.to(DTYPE)
        torch.testing.assert_close(u.t() @ u, torch.eye(r, dtype=DTYPE), rtol=0, atol=0.01)
        most = torch.linalg.svdvals(x[name])[:r].square().sum()
        assert (x[name] @ u).square().sum() > 0.5 * most
        after = frozen.format.dense(frozen.codes, frozen.scales)
        errors = [((one - real[name]) @ x[name].t()).norm() for one in (before[name], after)]
        assert errors[1] < errors[0]


def made(rank: int, world_size: int, sharding: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of every matrix directions, and this rank's codes and scales put together."""
    weights = home(tiny("llama", dtype=DTYPE, **WIDE), sharding, world_size, "nf4")
    assert needs_directions(weights)
    find_directions(weights, batches())
    result = {}
    for name, frozen in frozen_in(weights).items():
        parts = []
        for parameter in (frozen.codes, frozen.scales):
            (start, stop), numel = weights.interval(parameter), math.prod(weights.shape(parameter))
            own = shard(parameter)[: stop - start] if weights.sharded else parameter.data.flatten()[start:stop]
            own = nn.functional.pad(own, (0, math.ceil(numel / world_size) - len(own)))
            parts.append(weights.comm.all_gather(own)[:numel])
        assert frozen.directions is not None
        result[name] = (frozen.directions, *parts)
    return result


def test_the_same_bits_in_all_worlds(pools: Pools) -> None:
    [expected] = pools(1).run(made, "replicated")
    for world_size, sharding in ((2, "replicated"), (2, "zero3"), (3, "zero3")):
        for found in pools(world_size).run(made, sharding):
            assert found.keys() == expected.keys()
            for name, tensors in found.items():
                assert all(torch.equal(a, b) for a, b in zip(tensors, expected[name], strict=True)), (sharding, name)


@pytest.mark.parametrize(("frozen", "shape"), [("int8", WIDE), ("same", WIDE), ("nf4", {})])
def test_not_needed(frozen: str, shape: dict[str, Any]) -> None:
    assert not needs_directions(home(tiny("llama", dtype=DTYPE, **shape), "replicated", 1, frozen))


def test_activations_that_are_not_finite_are_refused() -> None:
    model = tiny("llama", dtype=DTYPE, **WIDE)
    weights = home(model, "replicated", 1, "nf4")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        find_directions(weights, batches())
