"""Small training runs that tests start on several ranks and compare with one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ows_ds.distributed.communicator import join
from ows_ds.distributed.ds_config import DEFAULT_CONFIG, resolve_config
from ows_ds.distributed.weights import Replicated, Weights
from ows_ds.distributed.zero3 import InShards, Zero3, join_deepspeed
from ows_ds.model.layers import find_layers
from ows_ds.model.loading import Unsharded
from ows_ds.model.pretrained import formats, let_freeze
from ows_ds.optim.hooks import hook_frozen
from ows_ds.optim.ows import OWS
from tests.support.families import tiny

SEQUENCES, LENGTH, VOCABULARY = 24, 9, 64
NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
RATIOS = [0.3, 0.1, 0.4]  # of the three layers of the tiny models
HOMES = ("replicated", "zero3")
SHARDINGS = pytest.mark.parametrize("sharding", HOMES)


def worlds(*axes: Iterable[Any], also: Container[tuple[Any, ...]] = ()) -> list[Any]:
    """Arguments (world_size, one of each axis, of which the first is `HOMES`).

    At two ranks all in float64, replicated and in shards by turns, and the last in float32; ``also``. The rest is slow.
    """
    cases = list(itertools.product((2, 1, 3), *axes))
    two = [case for case in cases if case[0] == 2]
    rest = list(dict.fromkeys(case[2:] for case in two if torch.float32 not in case))
    often = [
        case for case in two if case[2:] in rest and (len(rest) == 1 or case[1] == HOMES[rest.index(case[2:]) % 2])
    ]
    often += [case for case in two if torch.float32 in case][-1:]
    return [pytest.param(*case, marks=() if case in often or case in also else pytest.mark.slow) for case in cases]


def batch(step: int) -> Tensor:
    """The global batch of a step, (SEQUENCES, LENGTH), the same whatever the world."""
    return torch.randint(3, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(step))


def micro_batches(step: int, rank: int, world_size: int, accumulation: int) -> list[Tensor]:
    """This rank's micro-batches of a step; over all ranks they make up `batch`."""
    return [part[rank] for part in batch(step).view(accumulation, world_size, -1, LENGTH)]


def mean_loss(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Mean cross entropy of the next token."""
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def home(model: nn.Module, sharding: str, world_size: int, frozen: str = "same", products: bool = False) -> Weights:
    """``model`` replicated, or under ZeRO-3. frozen: the format of its frozen matrices; products: of fp8."""
    comm, dtype = join("cpu"), next(model.parameters()).dtype
    found = formats(find_layers(model), frozen, dtype, products)
    if sharding == "replicated":
        real = let_freeze(model, found, Unsharded(torch.device("cpu"), True))
        weights: Weights = Replicated(model, comm)
    else:
        config = tight_config(NAMES[dtype], world_size)
        if found:
            join_deepspeed()
        real = let_freeze(model, found, InShards(config)) if found else []
        weights = Zero3(model, config, comm)
    weights.freeze(real)
    hook_frozen(weights)
    return weights


def tight_config(dtype: str, world_size: int) -> dict[str, Any]:
    """Tiny layers: without this DeepSpeed would keep the whole model gathered."""
    config = resolve_config(DEFAULT_CONFIG, dtype, 1, 1, world_size)
    config["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0,
                                    "stage3_max_reuse_distance": 0}  # fmt: skip
    return config


def whole_weights(weights: Weights) -> dict[str, Tensor]:
    """All weights, put together, as copies."""
    weights.after_step()
    return {name: weights.full_tensor(p).clone() for name, p in weights.parameters().items()}


def one_step(ows: OWS, rank: int, world_size: int) -> None:
    """Train on the step's global batch."""
    if not ows.nothing_to_train:
        for ids in micro_batches(ows.steps, rank, world_size, ows.accumulation):
            ows.backward(mean_loss(ows.weights, ids) / ows.accumulation)
    ows.step()
    ows.zero_grad()


def run_ows(
    rank: int,
    world_size: int,
    sharding: str,
    family: str,
    tied: bool,
    dtype: torch.dtype,
    steps: int,
    settings: dict[str, Any],
    checkpointing: bool = False,
    frozen: str = "same",
) -> dict[str, Any]:
    """Train a tiny model with OWS; weights after merging, layer sets, skipped steps."""
    model: Any = tiny(family, tied, dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
        model.train()
    weights = home(model, sharding, world_size, frozen)
    ows = OWS(weights, RATIOS, **settings)
    sets = []
    for _ in range(steps):
        sets.append(ows.block_set)
        one_step(ows, rank, world_size)
    ows.merge()
    result = {"weights": whole_weights(weights), "sets": sets, "skipped": ows.skipped, "sent": dict(ows.comm.sent)}
    ows.close()
    return result


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest relative difference (Frobenius) of a tensor in two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).norm() / b[n].double().norm()) for n in a)
