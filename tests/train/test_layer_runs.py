"""Layers that run compiled, tiled, with other kernels, or with their inputs on the host: the same training, counted."""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.models.llama import modeling_llama

from ows_ds.compat.torch import graphs
from ows_ds.distributed.communicator import join
from ows_ds.distributed.weights import Replicated, Weights
from ows_ds.distributed.zero3 import Zero3
from ows_ds.errors import UserError
from ows_ds.model.layers import find_layers
from ows_ds.model.parts import find_mlps, gathered_at_once, tile_length
from ows_ds.optim.ows import OWS
from ows_ds.train import layer_runs
from ows_ds.train.layer_runs import LayerRuns, Ways
from tests.support.alive import Alive
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import mean_loss, micro_batches, tight_config

LAYERS, HIDDEN, TOKENS = 5, 32, 40


class Given:
    """Draws sets that are given."""

    def __init__(self, *sets: tuple[int, ...]) -> None:
        self.sets = [*sets, sets[-1]]

    def draw(self) -> tuple[int, ...]:
        return self.sets.pop(0)


def llama(dtype: torch.dtype = torch.float32, checkpointing: bool = False, layers: int = LAYERS) -> Any:
    model: Any = tiny("llama", False, dtype, num_hidden_layers=layers)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    return model.train()


def home_of(model: Any, sharding: str, world_size: int, ways: Ways, dtype: str = "float32") -> Weights:
    if sharding == "replicated":
        return Replicated(model, join("cpu"))
    at_once = gathered_at_once(find_layers(model), ways.kernels == "compile", ways.tile)
    return Zero3(model, tight_config(dtype, world_size), join("cpu"), at_once)


def ids_of(step: int, rows: int = 2) -> Tensor:
    return torch.randint(3, 64, (rows, TOKENS), generator=torch.Generator().manual_seed(step))


# ---- below the lowest layer that trains nothing is saved


@contextmanager
def saved_by_layer(model: Any) -> Iterator[Counter[int]]:
    """Bytes that autograd saves while each layer's forward pass runs; -1: outside of them."""
    now, found = [-1], Counter[int]()
    handles = []

    def leave(*_: Any) -> None:
        now.pop()

    for index, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, index=index: now.append(index), prepend=True))
        handles.append(layer.register_forward_hook(leave))

    def pack(tensor: Tensor) -> Tensor:
        found[now[-1]] += tensor.numel() * tensor.element_size() * (not isinstance(tensor, nn.Parameter))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    for handle in handles:
        handle.remove()


def saved(rank: int, world_size: int, sharding: str, checkpointing: bool, ways: Ways) -> list[int]:
    """By layer, where layers 2 and 3 of five train: in a step with new projectors, and in the next one."""
    model = llama(checkpointing=checkpointing)
    weights = home_of(model, sharding, world_size, ways)
    ows = OWS(weights, [1.0] * LAYERS, gamma=2, rank=4, period=9, sampler=Given((2, 3)), always_on="none")
    runs = LayerRuns(weights, ows.layers, ways)
    found = []
    for step in range(2):
        with saved_by_layer(model) as bytes_of:
            loss = mean_loss(weights, ids_of(step))
        found += [bytes_of[index] for index in range(LAYERS)]
        ows.backward(loss)
        ows.step()
        ows.zero_grad()
    runs.close()
    ows.close()
    return found


@pytest.mark.parametrize(
    ("sharding", "checkpointing", "kernels"),
    [
        ("replicated", False, "torch"),
        ("replicated", True, "torch"),
        ("zero3", True, "torch"),
        pytest.param("replicated", False, "compile", marks=pytest.mark.slow),
        pytest.param("replicated", True, "compile", marks=pytest.mark.slow),
        pytest.param("zero3", True, "compile", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_saved_below_the_lowest_layer(
    pools: Pools, sharding: str, checkpointing: bool, kernels: str
) -> None:
    ways = Ways(kernels, backend="aot_eager")
    given = sharding, checkpointing, ways
    for found in [saved(0, 1, *given)] if sharding == "replicated" else pools(2).run(saved, *given, timeout=900.0):
        for first in (0, LAYERS):
            assert found[first : first + 2] == [0, 0]
            assert all(found[first + 2 : first + LAYERS])


# ---- inputs on the host


def test_at_most_one_input_stays_on_the_device() -> None:
    """Of layers that are checkpointed: all others' inputs are freed, and what comes back is what was there."""
    losses, inputs = list[float](), list[StorageWeakRef]()
    size = 2 * TOKENS * HIDDEN * 4
    for offload in (False, True):
        model = llama(checkpointing=True)
        weights = Replicated(model, join("cpu"))
        ows = OWS(weights, [1.0] * LAYERS, gamma=2, rank=4, period=9, sampler=Given((1, 3)), always_on="none")
        runs = LayerRuns(weights, ows.layers, Ways(offload=offload))
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
        for step in range(4):
            inputs.clear()
            with saved_by_layer(model) as bytes_of:
                loss = mean_loss(weights, ids_of(step))
            stays = [not one.expired() for one in inputs]
            on_device = sum(bytes_of[index] for index in range(LAYERS))
            if offload:
                assert runs.offload is not None
                assert stays[:-1] == [False] * (LAYERS - 1)
                assert on_device + runs.offload.kept == size
                assert runs.offload.moved == (step + 1) * 3 * size  # of layers 1, 2 and 3; nothing of layer 0
            else:
                assert stays[1:] == [True] * (LAYERS - 1)
                assert on_device == 4 * size
            losses.append(loss.item())
            ows.backward(loss)
            ows.step()
            ows.zero_grad()
        runs.close()
        ows.close()
        assert "forward" not in vars(model.model.layers[0])
    assert losses[:4] == losses[4:]


def test_layers_that_do_not_checkpoint_themselves_are_refused() -> None:
    weights = Replicated(llama(), join("cpu"))
    with pytest.raises(UserError, match=r"train\.activation_offload: True is invalid: expected false"):
        LayerRuns(weights, find_layers(weights.module), Ways(offload=True))


# ---- MLPs in runs of tokens


def trained(
    rank: int, world_size: int, sharding: str, settings: dict[str, Any], checkpointing: bool, ways: Ways
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and merged weights of some steps, in float64."""
    model = llama(torch.float64, checkpointing, layers=3)
    weights = home_of(model, sharding, world_size, ways, "float64")
    fixed = {"gamma": 2, "scheme": "fixed", "period": 3, "update_proj_gap": 2, "accumulation": 2, "lr": 1e-2}
    ows = OWS(weights, [1.0] * 3, **(fixed | settings))
    runs = LayerRuns(weights, ows.layers, ways)
    losses = []
    for step in range(6):
        for ids in micro_batches(step, rank, world_size, 2):
            loss = mean_loss(weights, ids) / 2
            ows.backward(loss)
            losses.append(loss.item())
        ows.step()
        ows.zero_grad()
    runs.close()
    ows.close()
    return losses, {name: weights.full_tensor(p).clone() for name, p in weights.parameters().items()}


@pytest.mark.parametrize(
    ("sharding", "settings", "checkpointing"),
    [
        ("replicated", {"rank": 4}, False),
        ("replicated", {"rank": 4, "refresh": "sketch", "always_on": "low_rank"}, True),
        ("zero3", {"rank": 4, "always_on": "none"}, False),
        ("zero3", {"rank": None}, True),
    ],
)
def test_tiles_train_the_same(pools: Pools, sharding: str, settings: dict[str, Any], checkpointing: bool) -> None:
    """Gradients of coordinates add up over runs, and hooks of weights see each gradient once, whole."""
    plain = pools(2).run(trained, sharding, settings, checkpointing, Ways())
    tiles = pools(2).run(trained, sharding, settings, checkpointing, Ways(tile=16))
    for (losses, weights), (other, others) in zip(plain, tiles, strict=True):
        torch.testing.assert_close(losses, other, rtol=1e-10, atol=0)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, others[name], rtol=1e-8, atol=1e-9, msg=name)


def test_no_more_than_a_run_is_there_at_once() -> None:
    model = llama(layers=2)
    ows = OWS(model, [1.0] * 2, gamma=2, rank=4, always_on="none")
    inner = model.config.intermediate_size
    runs = LayerRuns(ows.weights, ows.layers, Ways(tile=16))
    with Alive(lambda t: t.untyped_storage().nbytes() if t.shape[-1:] == (inner,) and t.dim() > 2 else 0) as alive:
        ows.backward(mean_loss(ows.weights, ids_of(0, rows=4)))
    assert alive.made
    assert alive.largest == 4 * 4 * inner * 4  # 16 tokens: 4 of each of four rows
    runs.close()
    assert "forward" not in vars(model.model.layers[0].mlp)


def test_which_modules_are_mlps() -> None:
    found = {name: find_mlps(find_layers(tiny(name))) for name in ("llama", "phi3", "qwen3_moe")}
    gpt2 = tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    found["gpt2"] = find_mlps(find_layers(tf.AutoModelForCausalLM.from_config(gpt2)))
    assert found["llama"] == found["phi3"] == [f"model.layers.{index}.mlp" for index in range(3)]
    assert found["gpt2"] == [f"transformer.h.{index}.mlp" for index in range(3)]
    assert found["qwen3_moe"] == []  # tokens go to experts one by one
    assert [tile_length("auto", tokens, 4096) for tokens in (16383, 16384)] == [None, 4096]
    assert [tile_length(setting, 10**6, 64) for setting in (True, False)] == [1024, None]


# ---- compiled layers


def compiled_run(ways: Ways, steps: int, family: str = "llama") -> tuple[list[float], list[int]]:
    """Losses of steps and how many graphs each compiled: 8 of a first set, then three changes of the set, each with new
    projectors, which every second step finds again; and a merge between steps."""
    model: Any = tiny(family, False, num_hidden_layers=4)
    model.config.use_cache = False
    sets = Given((1, 3), (0, 2), (2, 3), (0, 1), (1, 2))
    ows = OWS(
        model.train(), [1.0] * 4, gamma=2, rank=4, period=8, update_proj_gap=2, lr=1e-3, sampler=sets,
        always_on="none", weight_decay=0.01,
    )  # fmt: skip
    runs = LayerRuns(ows.weights, ows.layers, ways)
    losses, made = [], []
    for step in range(steps):
        before = graphs()
        if step == 11:
            ows.merge()
        ids = ids_of(step)[:, : TOKENS - step % 3 * 8]  # rows of several lengths
        loss = mean_loss(ows.weights, ids)
        ows.backward(loss)
        ows.step()
        ows.zero_grad()
        losses.append(loss.item())
        made.append(graphs() - before)
    runs.close()
    ows.close()
    return losses, made


@pytest.mark.parametrize(
    ("backend", "family", "steps"),
    [("inductor", "llama", 26), ("eager", "qwen3_moe", 12)],  # the latter with modules of experts, which stay outside
)
@pytest.mark.slow
def test_compiled_layers(backend: str, family: str, steps: int) -> None:
    losses, _ = compiled_run(Ways(), steps, family)
    compiled, made = compiled_run(Ways("compile", backend=backend), steps, family)
    torch.testing.assert_close(compiled, losses, rtol=0, atol=1e-5)
    assert made[0] > 0
    assert sum(made[2:]) == 0, made  # in three changes of the set and more than two refreshes of one


# ---- Liger's kernels


LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


class LigerNorm:
    @staticmethod
    def forward(self: Any, x: Tensor) -> Tensor:
        self.liger_calls = getattr(self, "liger_calls", 0) + 1
        wide = x.float()
        return self.weight * (wide * (wide.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()).to(x.dtype)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stub in Liger's place, which does to a LLaMA what Liger does. Returns the modules it has patched."""
    patched: list[Any] = []

    def to_instance(model: Any, **kernels: bool) -> None:
        assert {name: on for name, on in kernels.items() if not on} == dict.fromkeys(LOSSES, False)
        if model.config.model_type != "llama":
            return
        rope = modeling_llama.apply_rotary_pos_emb
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *args, **more: rope(*args, **more))
        for module in model.modules():
            if isinstance(module, modeling_llama.LlamaRMSNorm):
                module.forward = types.MethodType(LigerNorm.forward, module)
                module.in_place = True
                patched.append(module)

    package, inner = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    inner._apply_liger_kernel_to_instance = to_instance  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda *_: True)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda *_: True)
    return patched


def test_liger_patches_once_and_is_given_back(liger: list[Any]) -> None:
    model, rope = llama(), modeling_llama.apply_rotary_pos_emb
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    ows = OWS(model, [1.0] * LAYERS, gamma=2, rank=4, always_on="none", period=9, sampler=Given((2, 3)))
    runs = LayerRuns(ows.weights, ows.layers, Ways("liger"))
    assert len(liger) == len(set(liger)) == runs.patched == 2 * LAYERS + 1
    assert modeling_llama.apply_rotary_pos_emb is not rope
    ows.backward(mean_loss(ows.weights, ids_of(0)))
    assert {module.liger_calls for module in liger} == {1}
    ows.step()
    runs.close()
    ows.close()
    assert modeling_llama.apply_rotary_pos_emb is rope
    for name, module in model.named_modules():
        left = {key for key in vars(module) if key not in before[name] or vars(module)[key] is not before[name][key]}
        assert left <= {"liger_calls"}, name


def test_liger_where_it_is_not_to_be_had(liger: list[Any]) -> None:
    other = Replicated(tiny("qwen3"), join("cpu"))
    LayerRuns(other, find_layers(other.module), Ways("liger"), asked=False).close()
    with pytest.raises(UserError, match=r"train\.kernels: 'liger' is invalid: .*does not know Qwen3ForCausalLM"):
        LayerRuns(other, find_layers(other.module), Ways("liger"))
    assert not liger
    assert layer_runs.has_liger()
    assert tf.utils.is_liger_kernel_available()
