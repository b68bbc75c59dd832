"""Full fine-tuning, LoRA, DoRA, HiFT and MeZO, over ranks and shards, against independent implementations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from ows_ds import config, methods
from ows_ds.distributed.communicator import join
from ows_ds.distributed.ds_config import DEFAULT_CONFIG, resolve_config
from ows_ds.distributed.weights import Replicated, Weights
from ows_ds.distributed.zero3 import Zero3, Zero3AdamW
from ows_ds.methods.hift import groups, turns
from ows_ds.methods.mezo import BLOCK, noise
from ows_ds.model.layers import find_layers
from tests.methods.test_methods import DTYPES, TOLERANCE
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.tiny_run import cut, recipe
from tests.support.training import HOMES, NAMES, batch, distance, mean_loss, micro_batches, whole_weights, worlds
from tests.train.test_trainer import contents, run

STEPS, ACCUMULATION = 11, 2
LR, DECAY, NORM = 5e-3, 0.1, 0.5


def settings(method: str, dtype: torch.dtype, **sampling: Any) -> config.Recipe:
    return config.from_dict(
        {
            "model": {"path": "none", "dtype": NAMES[dtype]},
            "data": {"train": "none"},
            "method": {"name": method, "lora_alpha": 4.0, "epsilon": 1e-2},
            "sampling": sampling,
            "optim": {"lr": LR, "weight_decay": DECAY, "max_grad_norm": NORM},
            "train": {"output_dir": "none", "global_batch_size": 24, "seed": 3},
        }
    )


def start(method: str, dtype: torch.dtype, family: str = "llama", tied: bool = False) -> Any:
    """The model that a method trains, with adapters that change its output."""
    model = methods.adapt(settings(method, dtype), tiny(family, tied, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # peft starts with zeros, under which half of the gradients are zero
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.copy_(0.05 * noise)
    return model


def place(model: Any, sharding: str, world_size: int, recipe: config.Recipe) -> Weights:
    comm = join("cpu")
    if sharding == "replicated":
        return Replicated(model, comm)
    ds_config = resolve_config(
        DEFAULT_CONFIG, recipe.model.dtype, 24 // world_size // ACCUMULATION, ACCUMULATION, world_size
    )
    if methods.deepspeed_trains(recipe):
        return Zero3AdamW(model, ds_config, comm, recipe.optim.max_grad_norm)
    return Zero3(model, ds_config, comm)


def rate(step: int) -> float:
    """A schedule that falls to the end."""
    return LR * (1 - step / STEPS)


def run_method(
    rank: int, world_size: int, method: str, sharding: str, dtype: torch.dtype, family: str, tied: bool, sampling: Any
) -> Any:
    """Train; weights before the end, the merged model's after it, learning rates and layers of every step."""
    one = settings(method, dtype, **sampling)
    layers = find_layers(tiny(family, tied, dtype))
    weights = place(start(method, dtype, family, tied), sharding, world_size, one)
    trained = methods.build(one, weights, layers, [1.0] * len(layers.layers), ACCUMULATION)
    course = []
    for step in range(STEPS):
        trained.param_groups[0]["lr"] = rate(step)
        course.append((trained.lr, trained.layer_set))
        weights.module.train()
        losses = [
            functools.partial(lambda ids: mean_loss(weights, ids) / ACCUMULATION, ids)
            for ids in micro_batches(step, rank, world_size, ACCUMULATION)
        ]
        trained.train_step(losses)
    before = whole_weights(weights)
    trained.close()
    return before, whole_weights(weights), course, trained.grad_norm


def split(parameters: list[Any]) -> list[dict[str, Any]]:
    """Neither biases nor norms decay."""
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


@functools.lru_cache
def adamw(method: str, dtype: torch.dtype, family: str, tied: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """torch's AdamW on the model, or on what peft leaves trainable, and peft's merge."""
    model = start(method, dtype, family, tied)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(split(trained), lr=LR)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        mean_loss(model, batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(trained, NORM)
        optimizer.step()
        optimizer.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged = model.merge_and_unload() if isinstance(model, peft.PeftModel) else model
    return before, {name: p.detach().clone() for name, p in merged.named_parameters()}


@pytest.mark.parametrize(
    ("world_size", "sharding", "dtype", "which"),
    worlds(
        HOMES,
        DTYPES,
        [("full", True), ("full", False), ("lora", False), ("dora", False)],
        also=[(1, "zero3", DTYPES[0], ("full", True)), (3, "zero3", DTYPES[0], ("full", False)),
              (3, "zero3", DTYPES[0], ("lora", False)), (3, "replicated", DTYPES[0], ("dora", False))],
    ),
)  # fmt: skip
def test_equals_torch_adamw_and_peft(
    pools: Pools, world_size: int, sharding: str, dtype: torch.dtype, which: tuple[str, bool]
) -> None:
    method, tied = which
    expected, merged = adamw(method, dtype, "llama", tied)
    first = dict(start(method, dtype, "llama", tied).named_parameters())
    for weights, final, course, _ in pools(world_size).run(run_method, method, sharding, dtype, "llama", tied, {}):
        assert distance(weights, expected) < TOLERANCE[dtype]
        assert distance(final, merged) < TOLERANCE[dtype]
        assert [rate for rate, _ in course] == [rate(step) for step in range(STEPS)]
        frozen = {name for name in first if method != "full" and "lora_" not in name}
        assert all(torch.equal(weights[name], first[name]) for name in frozen)
        assert (len(frozen) > 0) == (method != "full")


@functools.lru_cache
def hift(dtype: torch.dtype, order: str, tied: bool) -> tuple[dict[str, Tensor], list[list[str]], list[float]]:
    """Algorithm 1 of HiFT in plain torch: an AdamW for each group, a learning rate for each round."""
    model: Any = tiny("llama", tied, dtype)
    parameters = dict(model.named_parameters())
    stack = [[n for n in parameters if f"layers.{i}." in n] for i in range(3)]
    last = ["model.norm.weight"] + ([] if tied else ["lm_head.weight"])
    names = [["model.embed_tokens.weight"], *stack, last]
    if order == "descending":
        names = names[::-1]
    if order == "random":
        made = turns(groups(find_layers(model), {"lm_head"}), "random", 3)
        assert sorted(sorted(g.names) for g in made) == sorted(sorted(n) for n in names)
        names = [list(group.names) for group in made]
    optimizers = [torch.optim.AdamW(split([parameters[n] for n in some])) for some in names]
    model.requires_grad_(False)
    rates = []
    for step in range(STEPS):
        turn = step % len(names)
        if turn == 0:
            now = rate(step)
        rates.append(now)
        trained = [parameters[n].requires_grad_(True) for n in names[turn]]
        mean_loss(model, batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(trained, NORM)
        for group in optimizers[turn].param_groups:
            group["lr"] = now
        optimizers[turn].step()
        optimizers[turn].zero_grad()
        model.requires_grad_(False)
    return {name: p.detach().clone() for name, p in parameters.items()}, names, rates


@pytest.mark.parametrize(
    ("world_size", "sharding", "dtype", "order"),
    worlds(HOMES, DTYPES, ["ascending", "descending", "random"], also=[(3, "zero3", DTYPES[0], "random")]),
)
def test_hift_equals_its_algorithm(
    pools: Pools, world_size: int, sharding: str, dtype: torch.dtype, order: str
) -> None:
    tied = order == "ascending"
    expected, names, rates = hift(dtype, order, tied)
    assert len(names) == 5
    assert 2 * len(names) < STEPS  # the third round has begun, with the moments of the second
    for weights, _, course, _ in pools(world_size).run(
        run_method, "hift", sharding, dtype, "llama", tied, {"order": order}
    ):
        assert distance(weights, expected) < TOLERANCE[dtype]
        assert [rate for rate, _ in course] == rates
        for (_, layers), step in zip(course, range(STEPS), strict=True):
            assert {f"layers.{i}." in name for name in names[step % 5] for i in layers} <= {True}
    assert len(set(rates)) == 3


@functools.lru_cache
def mezo(dtype: torch.dtype) -> dict[str, Tensor]:
    """The two-point formula on whole weights, with the whole noise at once."""
    model: Any = tiny("llama", False, dtype)
    parameters = dict(model.named_parameters())
    epsilon = 1e-2
    for step in range(STEPS):
        old = {name: p.detach().clone() for name, p in parameters.items()}
        z = {
            name: torch.cat([run for _, run in noise(3, step, name, 0, p.numel(), p.numel(), p.device)])
            .view_as(p)
            .to(dtype)
            for name, p in parameters.items()
        }
        losses = []
        with torch.no_grad():
            for way in (1, -1):
                for name, p in parameters.items():
                    p.copy_(old[name] + way * epsilon * z[name])
                losses.append(float(mean_loss(model, batch(step)).double()))
            slope = (losses[0] - losses[1]) / (2 * epsilon)
            slope = max(-NORM, min(NORM, slope))
            for name, p in parameters.items():
                decay = 1 - rate(step) * DECAY if p.dim() > 1 else 1.0
                p.copy_(decay * old[name] - rate(step) * slope * z[name])
    return {name: p.detach().clone() for name, p in parameters.items()}


@pytest.mark.parametrize(("world_size", "sharding", "dtype"), worlds(HOMES, DTYPES, also=[(3, "zero3", DTYPES[0])]))
def test_mezo_equals_the_two_point_formula(pools: Pools, world_size: int, sharding: str, dtype: torch.dtype) -> None:
    results = pools(world_size).run(run_method, "mezo", sharding, dtype, "llama", False, {})
    for weights, _, _, norm in results:
        assert distance(weights, mezo(dtype)) < TOLERANCE[dtype]
        assert norm > 0
        assert all(torch.equal(weights[name], results[0][0][name]) for name in weights)


def moved(rank: int, world_size: int, sharding: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What MeZO's first move does to weights of zero, put together: epsilon times the noise."""
    model: Any = tiny("llama", False, dtype)
    model.resize_token_embeddings(2 * BLOCK // 32 + 77)  # more than one block, and shards that begin within one
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    weights = place(model, sharding, world_size, settings("mezo", dtype))
    method = methods.build(settings("mezo", dtype), weights, find_layers(tiny("llama")), [], 1)
    method._move(1.0, 1.0)  # type: ignore[attr-defined]
    return whole_weights(weights)


@pytest.mark.parametrize(("world_size", "sharding"), worlds(HOMES, also=[(1, "replicated"), (3, "zero3")]))
def test_mezo_noise_is_the_same_at_any_world_size(pools: Pools, world_size: int, sharding: str) -> None:
    device = torch.device("cpu")
    for weights in pools(world_size).run(moved, sharding, torch.float32):
        for name, z in weights.items():
            whole = torch.cat([run for _, run in noise(3, 0, name, 0, z.numel(), z.numel(), device)])
            assert torch.equal(z.flatten(), whole)
    entries = torch.cat([z.flatten() for z in weights.values()])
    assert len(entries) > 2 * BLOCK
    assert abs(float(entries.mean())) < 0.01
    assert abs(float(entries.std()) - 1) < 0.01
    assert len(set(entries.tolist())) > 0.98 * len(entries)  # no block is drawn twice


@pytest.mark.parametrize(
    ("method", "sharding"),
    [("lora", "zero3"), ("hift", "zero3"), ("full", "replicated")]
    + [
        pytest.param(method, sharding, marks=pytest.mark.slow)
        for sharding, methods in {
            "zero3": ("full", "dora", "mezo"),
            "replicated": ("lora", "dora", "hift", "mezo"),
        }.items()
        for method in methods
    ],
)
def test_resumes_bit_identically_and_exports(
    pools: Pools, inputs: Path, straight: Callable[..., Path], tmp_path: Path, method: str, sharding: str
) -> None:
    optim = {"lr": 1e-2 if method != "mezo" else 1e-3}
    settings: dict[str, Any] = {"method": method, "sharding": sharding, "optim": optim}
    whole = straight(2, **settings)
    parts = cut(whole, tmp_path / "parts")
    pools(2).run(run, recipe(inputs, parts, resume="auto", **settings), None)
    records, files = contents(whole)
    assert contents(parts) == (records, files)
    assert "model/model.safetensors" in files
    assert not any("adapter" in name for name in files)
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert losses[-1] < losses[0] or method == "mezo"
