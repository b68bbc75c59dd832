"""OWS over ranks and shards against the one-process reference and against galore_torch."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ows_ds.errors import UserError
from ows_ds.importance.probabilities import probabilities
from ows_ds.optim.ows import OWS
from ows_ds.optim.reference import Reference
from ows_ds.optim.sampling import Sampler
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import (
    HOMES,
    RATIOS,
    SHARDINGS,
    batch,
    distance,
    home,
    mean_loss,
    micro_batches,
    run_ows,
    whole_weights,
    worlds,
)  # fmt: skip

STEPS = 9
BASE: dict[str, Any] = {
    "gamma": 1.5, "period": 4, "rank": 6, "update_proj_gap": 3, "lr": 5e-3, "scale": 0.5, "seed": 3, "projector": "svd",
    "max_grad_norm": None,
}  # fmt: skip
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "plain": ("llama", False, {}),
    "tied low-rank decay": ("llama with biases", True, {"always_on": "low_rank", "weight_decay": 0.1, "scale": "auto"}),
    "none clip rotate": (
        "qwen2", False, {"always_on": "none", "max_grad_norm": 0.5, "moments_on_refresh": "rotate", "eps": 1e-6},
    ),
    "conv1d reset fixed": (
        "gpt2", True, {"moments_on_refresh": "reset", "scheme": "fixed", "gamma": 2, "projector": "randomized"},
    ),
    "sketch": (
        "llama with biases", True,
        {"refresh": "sketch", "projector": "randomized", "always_on": "low_rank", "weight_decay": 0.1,
         "max_grad_norm": 0.5, "moments_on_refresh": "rotate", "scale": "auto"},
    ),
    "adaptive clip decay": (
        "llama", False,
        {"adaptive": True, "importance_floor": 0.1, "period": 2, "max_grad_norm": 0.5, "weight_decay": 0.1},
    ),
    "modules": ("llama with biases", True, {"block": "module", "always_on": "low_rank", "moments_on_refresh": "reset"}),
    "conv1d sketch reset": (
        "gpt2", False, {"refresh": "sketch", "projector": "randomized", "moments_on_refresh": "reset", "period": 2},
    ),
}  # fmt: skip
# k_proj's bias has no gradient but rounding, which Adam would blow up to steps of full size
BIASED = {"eps": 1e-6}


@functools.lru_cache
def reference(case: str, accumulation: int, refresh_batch: str = "full") -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    family, tied, more = CASES[case]
    model = tiny(family, tied, torch.float64)
    ows = Reference(model, RATIOS, **{**BASE, **BIASED, **more}, refresh_batch=refresh_batch)
    sets = []
    for step in range(STEPS):
        parts = batch(step).view(accumulation, -1, batch(step).shape[1])
        ows.step([functools.partial(mean_loss, model, ids) for ids in parts])
        sets.append(ows.layer_set)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, tuple(sets)


@pytest.mark.parametrize(
    ("world_size", "sharding", "case"),
    worlds(
        HOMES,
        CASES,
        also=[(1, "zero3", "tied low-rank decay"), (3, "zero3", "sketch"), (3, "replicated", "conv1d reset fixed")],
    ),
)
def test_equals_reference(pools: Pools, world_size: int, sharding: str, case: str) -> None:
    family, tied, more = CASES[case]
    accumulation = 1 if world_size == 3 else 2
    settings = {**BASE, **BIASED, **more, "accumulation": accumulation}
    results = pools(world_size).run(run_ows, sharding, family, tied, torch.float64, STEPS, settings)
    expected, sets = reference(case, accumulation)
    assert len(set(sets)) > 1
    for result in results:
        assert tuple(result["sets"]) == sets
        # float64, but projectors in float32: rounding of a gradient that crosses a float32 boundary moves them
        assert distance(result["weights"], expected) < 1e-6


@SHARDINGS
def test_first_micro_batch_refresh_and_checkpointing(pools: Pools, sharding: str) -> None:
    settings = {**BASE, **BIASED, "accumulation": 3, "refresh_batch": "first"}
    results = pools(1).run(run_ows, sharding, "llama", False, torch.float64, STEPS, settings, True)
    expected, _ = reference("plain", 3, "first")
    assert distance(results[0]["weights"], expected) < 1e-6
    settings["refresh_batch"] = "full"
    two = pools(2).run(run_ows, sharding, "llama", False, torch.float64, STEPS, settings, True)
    expected, _ = reference("plain", 3)
    assert distance(two[0]["weights"], expected) < 1e-6


@functools.lru_cache
def galore(dtype: torch.dtype, steps: int, gamma: float = BASE["gamma"]) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """galore_torch's AdamW in one process on whole batches; states of a layer that leaves are deleted."""
    from galore_torch import GaLoreAdamW

    model = tiny("llama", False, dtype)
    parameters = dict(model.named_parameters())
    sampler = Sampler(probabilities(RATIOS, gamma), "bernoulli", BASE["seed"])
    always = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    states: dict[str, dict[str, Any]] = {}
    sets = []
    for step in range(steps):
        if step % BASE["period"] == 0:
            layers = sampler.draw()
            names = [n for n in parameters if n in always or any(f"layers.{i}." in n for i in layers)]
            states = {name: states.get(name, {}) for name in names}
            low_rank = {"rank": BASE["rank"], "update_proj_gap": BASE["update_proj_gap"], "scale": BASE["scale"],
                        "proj_type": "std"}  # fmt: skip
            groups = [
                {"params": [parameters[n]], **({} if n in always or parameters[n].dim() == 1 else low_rank)}
                for n in names
            ]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                optimizer = GaLoreAdamW(groups, lr=BASE["lr"], eps=0.0)
            for name in names:
                optimizer.state[parameters[name]] = states[name]
            model.requires_grad_(False)
            for name in names:
                parameters[name].requires_grad_(True)
        mean_loss(model, batch(step)).backward()
        for group in optimizer.param_groups:
            # galore_torch adds eps before the bias correction, torch after it
            taken = optimizer.state[group["params"][0]].get("step", 0) + 1
            group["eps"] = 1e-8 * math.sqrt(1 - group["betas"][1] ** taken)
        optimizer.step()
        optimizer.zero_grad()
        sets.append(layers)
    return {name: p.detach().clone() for name, p in parameters.items()}, tuple(sets)


@pytest.mark.parametrize(
    ("world_size", "sharding", "accumulation", "dtype"),
    worlds(
        HOMES,
        [1, 4],
        [torch.float64, torch.float32],
        also=[(1, "replicated", 4, torch.float64), (3, "zero3", 1, torch.float64)],
    ),
)
def test_equals_galore_torch(
    pools: Pools, world_size: int, sharding: str, accumulation: int, dtype: torch.dtype
) -> None:
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}[dtype]
    settings = {**BASE, "eps": 1e-8, "accumulation": accumulation, "moments_on_refresh": "keep"}
    result = pools(world_size).run(run_ows, sharding, "llama", False, dtype, STEPS, settings)[0]
    expected, sets = galore(dtype, STEPS)
    assert tuple(result["sets"]) == sets
    assert len({sets[0], sets[4], sets[8]}) > 1
    start = dict(tiny("llama", False, dtype).named_parameters())
    assert distance({n: p.detach() for n, p in start.items()}, expected) > 100 * tolerance
    assert distance(result["weights"], expected) < tolerance


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("always_on", {"always_on": "ful"}),
        ("scheme", {"scheme": "uniform"}),
        ("projector", {"projector": "qr"}),
        ("refresh", {"refresh": "stream"}),
        ("projector", {"refresh": "sketch", "projector": "svd"}),
        ("refresh_batch", {"refresh": "sketch", "refresh_batch": "first"}),
        ("update_proj_gap", {"refresh": "sketch", "update_proj_gap": 1}),
        ("optim.rank", {"rank": 33}),
        ("rank", {"rank": 0}),
        ("sampling.gamma", {"gamma": 4}),
        ("gamma", {"gamma": 1.5, "scheme": "fixed"}),
        ("sampling.tau", {"scores": [0.0, 0.0, 0.0]}),
        ("sampling.scores", {"scores": [0.1, 0.2]}),
        ("sampling.scores", {"scores": [0.1, float("nan"), 0.2]}),
        ("accumulation", {"accumulation": 0}),
    ],
)
def test_what_cannot_work_is_refused(key: str, settings: dict[str, Any]) -> None:
    model = tiny("llama")
    with pytest.raises(UserError) as caught:
        OWS(model, **{"scores": RATIOS, "rank": 4, "gamma": 1, **settings})
    assert caught.value.key == key
    assert all(parameter.requires_grad for parameter in model.parameters())  # nothing was changed


def test_a_wrong_order_of_calls_is_refused() -> None:
    model = tiny("llama")
    ows = OWS(model, RATIOS, rank=4, gamma=1, accumulation=2)
    with pytest.raises(RuntimeError, match="step after 0 of accumulation = 2"):
        ows.step()
    for _ in range(2):
        ows.backward(mean_loss(model, batch(0)[:2]))
    with pytest.raises(RuntimeError, match="more than accumulation = 2"):
        ows.backward(mean_loss(model, batch(0)[:2]))


def test_autocast_around_the_loss() -> None:
    losses = []
    for autocast in (False, True):
        model: Any = tiny("llama with biases", False, torch.float32)
        ows = OWS(model, RATIOS, **{**BASE, "gamma": 3, "scheme": "fixed"})
        for step in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = mean_loss(model, batch(step))
            ows.backward(loss)
            ows.step()
            ows.zero_grad()
            losses.append(float(loss))
        ows.close()
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-2)
    assert losses[4:] != losses[:4]


def test_closing_gives_the_model_back() -> None:
    model, plain = tiny("llama", True), tiny("llama", True)
    ows = OWS(model, RATIOS, rank=4, gamma=2, period=2, always_on="low_rank", lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(ows, 1.0, 0.0, 4)
    for step in range(3):
        ows.backward(mean_loss(model, batch(step)[:4]))
        ows.step()
        scheduler.step()
        ows.zero_grad()
    assert ows.param_groups[0]["lr"] == pytest.approx(1e-2 / 4)
    attached = model(input_ids=batch(9)).logits
    ows.close()
    assert not any(p.requires_grad for p in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())
    torch.testing.assert_close(model(input_ids=batch(9)).logits, attached, rtol=1e-4, atol=1e-5)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(input_ids=batch(9)).logits, model(input_ids=batch(9)).logits)


def stepped(rank: int, world_size: int, sharding: str, refresh: str, sizes: list[int | None]) -> dict[str, Any]:
    """Train with so many micro-batches in each step; None: begin a step with one of two, and give it up.

    Weights inside and after `OWS.merged` after the steps, and those that further steps come to.
    """
    weights = home(tiny("llama", dtype=torch.float64), sharding, world_size)
    settings = {**BASE, **BIASED, "weight_decay": 0.1, "refresh": refresh, "projector": "randomized"}
    ows = OWS(weights, RATIOS, **settings)

    def take(size: int | None) -> None:
        ows.set_accumulation_steps(size or 2)
        parts = micro_batches(ows.steps - ows.skipped, rank, world_size, size or 2)
        for ids in parts[: 1 if size is None else size]:
            ows.backward(mean_loss(weights, ids) / len(parts))
        if size is not None:
            ows.step()
            ows.zero_grad()

    for size in sizes:
        take(size)
    before = whole_weights(weights)
    with ows.merged():
        inside = whole_weights(weights)
    after = whole_weights(weights)
    ows.merge()
    result = {"before": before, "inside": inside, "after": after, "merged": whole_weights(weights)}
    return {**result, "skipped": ows.skipped}


@pytest.mark.parametrize("refresh", ["full", "sketch"])
@SHARDINGS
def test_micro_batches_may_change_and_weights_be_merged_for_a_while(pools: Pools, sharding: str, refresh: str) -> None:
    [same, _] = pools(2).run(stepped, sharding, refresh, [1] * 6)
    [others, _] = pools(2).run(stepped, sharding, refresh, [3, 1, 2, 1, 3, 2])
    assert distance(others["inside"], same["inside"]) < 1e-10
    for run in (same, others):
        assert distance(run["inside"], run["merged"]) == 0
        assert distance(run["before"], run["after"]) == 0
        if refresh == "full":  # under sketch the last set has no coordinates yet
            assert distance(run["inside"], run["before"]) > 0


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


WAYS = [(1, "replicated", 1), (1, "replicated", 12), (2, "zero3", 3), (3, "replicated", 2)]
MORE = [(2, "replicated", 6), (3, "zero3", 1)]


@pytest.mark.parametrize(
    ("method", "projector", "seeds"),
    [
        ("galore", "svd", [0]),
        *(
            pytest.param(method, projector, range(5), marks=pytest.mark.slow)
            for method in ("ows", "galore")
            for projector in ("svd", "randomized")
        ),
    ],
)
def test_results_do_not_jump_with_rounding(pools: Pools, method: str, projector: str, seeds: Sequence[int]) -> None:
    """Ten refreshes: however the rows are dealt to ranks and micro-batches, and wherever the weights live."""
    chosen = {"gamma": 3, "scheme": "fixed"} if method == "galore" else {}
    same = {**BASE, **BIASED, **chosen, "projector": projector, "update_proj_gap": 1, "period": 10}
    for seed in seeds:
        runs = []
        for world_size, sharding, parts in WAYS + (MORE if len(seeds) > 1 else []):
            settings = {**same, "seed": seed, "accumulation": parts}
            found = pools(world_size).run(run_ows, sharding, "llama", False, torch.float64, 11, settings)
            runs.append(found[0]["weights"])
        assert max(far(run, runs[0]) for run in runs[1:]) < 1e-6


@SHARDINGS
def test_a_matrix_with_a_side_below_the_rank_trains_at_the_rank_it_has(pools: Pools, sharding: str) -> None:
    settings = {**BASE, "rank": 20, "accumulation": 2}  # keys and values are 16 x 32
    model = tiny("llama", False, torch.float64)
    ows = Reference(model, RATIOS, **{k: v for k, v in settings.items() if k != "accumulation"})
    for step in range(STEPS):
        ows.step([functools.partial(mean_loss, model, ids) for ids in batch(step).view(2, -1, batch(step).shape[1])])
    for found in pools(2).run(run_ows, sharding, "llama", False, torch.float64, STEPS, settings):
        assert distance(found["weights"], dict(model.named_parameters())) < 1e-6


@SHARDINGS
def test_a_step_that_was_given_up_is_one_that_was_skipped(pools: Pools, sharding: str) -> None:
    [begun, _] = pools(2).run(stepped, sharding, "full", [1, None, 2])
    [whole, _] = pools(2).run(stepped, sharding, "full", [1, 2])
    assert (begun["skipped"], whole["skipped"]) == (1, 0)
    assert distance(begun["inside"], whole["inside"]) < 1e-10
