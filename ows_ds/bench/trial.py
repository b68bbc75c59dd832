"""One method over one model in this process: steps that can be timed, watched and counted.

Every method works on the same random tokens with one layer set, the same for all, and clips gradients to norm 1, as
transformers' Trainer does by default. Ours are built as training builds them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ows_ds import methods
from ows_ds.bench.setting import ITEMSIZE, Setting
from ows_ds.config import Method, Model, Optim, Recipe, Sampling, Train
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.launch import start
from ows_ds.distributed.weights import Replicated, Weights
from ows_ds.distributed.zero3 import Zero3, Zero3AdamW
from ows_ds.importance.probabilities import probabilities
from ows_ds.model.layers import find_layers
from ows_ds.model.pretrained import DTYPES
from ows_ds.optim.ows import OWS
from ows_ds.optim.sampling import LayerSet, Sampler
from ows_ds.planner import memory
from ows_ds.planner.forecast import Replays
from ows_ds.train.loss import token_losses

NEVER = 10**9  # steps: no draw and no refresh but those that are asked for
SEED = 0
LR = 1e-5


@dataclass
class Trial:
    """A method that is ready to take steps.

    model: what is trained. weights: its tensors on this process. state: what holds the method's. step: one whole step.
    refresh: takes a step or more with new projectors and returns how many; None: there are none. first_refreshes: that
    is what the first step did, and it takes too long to be asked for. job: what the planner is told, None for what it
    does not know. watch: entered around each forward pass.
    """

    model: Any
    weights: list[Tensor]
    step: Callable[[], None]
    state: Any = None
    comm: Communicator | None = None
    refresh: Callable[[], int] | None = None
    first_refreshes: bool = False
    job: memory.Job | None = None
    watch: Callable[[], AbstractContextManager[None]] = nullcontext


def build_model(setting: Setting) -> Any:
    """The setting's model on its device, in training mode: a folder's, or a LLaMA with random weights."""
    import transformers as tf

    dtype = DTYPES[setting.dtype]
    if setting.model is not None:
        model = tf.AutoModelForCausalLM.from_pretrained(setting.model, dtype=dtype).to(setting.device)
    else:
        shape = setting.widths
        config = tf.LlamaConfig(
            vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            max_position_embeddings=max(2048, setting.tokens), tie_word_embeddings=False, pad_token_id=None,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(SEED)
        with torch.device(setting.device):
            model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.use_cache = False
    if setting.inside:
        differentiate_input(model, 0)
    if setting.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # see `ows_ds.model.pretrained.load_model`
    return model.train()


def differentiate_input(model: Any, layer: int) -> None:
    """Let every backward pass run down to the input of ``layer``, if nothing below it needs a gradient anyway."""

    def enter(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        needed = args[0].requires_grad or not torch.is_grad_enabled()
        return (args[0] if needed else args[0].detach().requires_grad_(), *args[1:]), kwargs

    name = find_layers(model).layers[layer].name
    model.get_submodule(name).register_forward_pre_hook(enter, with_kwargs=True)


def batch_of(setting: Setting, index: int = 0) -> dict[str, Tensor]:
    """One sequence of random tokens, all of them trained; another one on each process."""
    generator = torch.Generator().manual_seed(SEED + index)
    ids = torch.randint(int(setting.vocab or 0), (1, setting.tokens), generator=generator)
    return {"input_ids": ids.to(setting.device), "labels": ids}


def sampled(setting: Setting) -> LayerSet:
    """The layers that ows and lisa draw, and whoever else trains some of them."""
    return Sampler(probabilities([1.0] * setting.n_layers, int(setting.gamma or 1)), "fixed", SEED).draw()


def recipe_of(setting: Setting, name: str) -> Recipe:
    """The recipe of one of our methods: nothing is drawn or refreshed after the first step by itself."""
    lean = name in ("ows-lean", "badam")  # badam's definition
    zero3 = setting.sharding == "zero3" or name == "deepspeed"
    method = {"ows-lean": "ows", "deepspeed": "full"}.get(name, name)
    return Recipe(
        Model("random", dtype=setting.dtype),  # type: ignore[arg-type]
        Train(".", global_batch_size=1, seed=SEED, sharding="zero3" if zero3 else "replicated"),
        method=Method(method, lora_rank=setting.lora_rank),  # type: ignore[arg-type]
        sampling=Sampling("uniform", float(setting.gamma or 1), NEVER, "fixed", "ascending"),
        optim=Optim(
            LR, rank=setting.rank, update_proj_gap=NEVER, refresh=setting.refresh, always_on="none" if lean else "full"
        ),
    )


def ours(setting: Setting, name: str, world_size: int) -> Trial:
    """One of our methods, or DeepSpeed's own optimizer, over weights on every process or in shards. Collective."""
    recipe = recipe_of(setting, name)
    recipe = replace(recipe, train=replace(recipe.train, global_batch_size=world_size))
    sharded = recipe.train.sharding == "zero3"
    runtime = start(recipe) if sharded or world_size > 1 else None
    comm = Communicator() if runtime is None else runtime.comm
    model = build_model(setting)
    layers = find_layers(model)
    methods.check(recipe, layers)
    model = methods.adapt(recipe, model)
    weights: Weights
    if runtime is None or runtime.ds_config is None:
        weights = Replicated(model, comm)
    elif methods.deepspeed_trains(recipe):
        weights = Zero3AdamW(model, runtime.ds_config, comm, recipe.optim.max_grad_norm)
    else:
        weights = Zero3(model, runtime.ds_config, comm)
    method = methods.build(recipe, weights, layers, [1.0] * len(layers.layers), 1)
    batch = batch_of(setting, comm.rank)

    def loss() -> Tensor:
        with trial.watch():
            return token_losses(weights, batch) / (setting.tokens - 1)

    def step() -> None:
        method.train_step([loss])

    def refresh() -> int:
        assert isinstance(method, OWS)
        method.active.update_proj_gap = 1  # at its end the coming step decides what is due
        step()
        method.active.update_proj_gap = NEVER
        steps = 2 if setting.refresh == "sketch" else 1
        for _ in range(steps):
            step()
        return steps + 1

    job = memory.Job(
        layers,
        recipe.method.name,
        tuple(method.layer_set),
        setting.rank,
        recipe.optim.always_on,
        setting.refresh,
        lora_rank=setting.lora_rank,
        itemsize=ITEMSIZE[setting.dtype],
        length=setting.tokens,
        checkpointing=setting.gradient_checkpointing,
        world_size=world_size,
        sharded=sharded,
        foreach=setting.device == "cuda",
    )
    if runtime is not None and runtime.ds_config is not None and not setting.inside:
        adapt = functools.partial(methods.adapt, recipe)
        job = Replays(model.config, runtime.ds_config["zero_optimization"], adapt).complete(job)
    kept = [weights.local(p) if sharded else p.data for p in weights.module.parameters()]
    trial = Trial(weights.module, kept, step, method, comm, job=job)
    if isinstance(method, OWS) and method.active.low_rank:
        trial.refresh = refresh
    return trial


def full_rank_bytes(setting: Setting, world_size: int, layers: Any) -> int:
    """What a process sends where gradients of the sampled layers' weights are all-reduced whole, in their dtype."""
    blocks = [layers.layers[i] for i in sampled(setting)]
    count = sum(math.prod(m.shape) for u in blocks for m in u.matrices) + sum(
        v.numel for u in blocks for v in u.vectors
    )
    return 2 * math.ceil(count / world_size) * ITEMSIZE[setting.dtype] * (world_size - 1)
