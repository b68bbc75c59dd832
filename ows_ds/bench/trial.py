"""One method over one model in this process: steps that can be timed, watched and counted.

Every method works on the same random tokens with the same layer set, and clips gradients to norm 1, as transformers'
Trainer does by default. Ours are built as training builds them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ows_ds import config, methods
from ows_ds.bench.setting import ITEMSIZE, WAYS, Setting, ways_of
from ows_ds.config import Recipe
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.launch import start
from ows_ds.distributed.weights import Replicated, Weights
from ows_ds.distributed.zero3 import Zero3, Zero3AdamW
from ows_ds.importance.probabilities import probabilities
from ows_ds.model.blocks import ModelLayers
from ows_ds.model.layers import find_layers
from ows_ds.model.parts import gathered_at_once
from ows_ds.model.pretrained import DTYPES
from ows_ds.model.tiled import names_within
from ows_ds.optim.ows import OWS
from ows_ds.optim.sampling import LayerSet, Sampler
from ows_ds.optim.sizes import check
from ows_ds.planner.forecast import Replays
from ows_ds.planner.step import StepSpec
from ows_ds.train import layer_runs
from ows_ds.train.loss import token_losses

NEVER = 10**9  # steps: draws and refreshes only where they are asked for
SEED = 0
LR = 1e-5


@dataclass
class Trial:
    """A method that is ready to take steps.

    Attributes:
        weights: The model's tensors on this rank.
        step: Takes one whole step.
        state: Has the method's other tensors.
        refresh: Takes steps with new projectors and returns how many; None: there are no projectors.
        first_refreshes: The first step was a refresh, which takes too long to be asked for again.
        spec: The step as the planner sees it; None: the planner does not know the method.
        watch: Entered around each forward pass.
    """

    model: Any
    weights: list[Tensor]
    step: Callable[[], None]
    state: Any = None
    comm: Communicator | None = None
    refresh: Callable[[], int] | None = None
    first_refreshes: bool = False
    spec: StepSpec | None = None
    watch: Callable[[], AbstractContextManager[None]] = nullcontext


def build_model(setting: Setting) -> Any:
    """The setting's model on its device, in training mode: a folder's, or a LLaMA with random weights."""
    import transformers as tf

    dtype = DTYPES[setting.dtype]
    if setting.model is not None:
        model = tf.AutoModelForCausalLM.from_pretrained(setting.model, dtype=dtype).to(setting.device)
    else:
        shape = setting.widths
        llama = tf.LlamaConfig(
            vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            max_position_embeddings=max(2048, setting.tokens), tie_word_embeddings=False, pad_token_id=None,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(SEED)
        with torch.device(setting.device):
            model = tf.AutoModelForCausalLM.from_config(llama, dtype=dtype)
    model.config.use_cache = False
    if setting.inside:
        differentiate_input(model, 0)
    if setting.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # see `ows_ds.model.pretrained.load_model`
    return model.train()


def differentiate_input(model: Any, layer: int) -> None:
    """Let every backward pass run down to the input of ``layer``, even if nothing below it needs a gradient."""

    def enter(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        needed = args[0].requires_grad or not torch.is_grad_enabled()
        return (args[0] if needed else args[0].detach().requires_grad_(), *args[1:]), kwargs

    name = find_layers(model).layers[layer].name
    model.get_submodule(name).register_forward_pre_hook(enter, with_kwargs=True)


def batch_of(setting: Setting, rank: int = 0) -> dict[str, Tensor]:
    """One sequence of random tokens, all with labels; another one on each rank."""
    generator = torch.Generator().manual_seed(SEED + rank)
    ids = torch.randint(int(setting.vocab or 0), (1, setting.tokens), generator=generator)
    return {"input_ids": ids.to(setting.device), "labels": ids}


def sampled(setting: Setting) -> LayerSet:
    """The layers that train where a method trains some of them."""
    return Sampler(probabilities([1.0] * setting.n_layers, int(setting.gamma or 1)), "fixed", SEED).draw()


def recipe_of(setting: Setting, name: str, world_size: int, ways: Sequence[str] = ()) -> Recipe:
    """The recipe of one of our methods: no draw and no refresh after the first step. ways: of `WAYS`."""
    more = {key: value for way in ways for key, value in WAYS[way].items()}
    lean = name in ("ows-lean", "badam")  # badam's definition
    zero3 = setting.sharding == "zero3" or name == "deepspeed"
    method = {"ows-lean": "ows", "deepspeed": "full"}.get(name, name)
    return config.from_dict(
        {
            "model": {"path": "random", "dtype": setting.dtype},
            "method": {"name": method, "lora_rank": setting.lora_rank},
            "sampling": {
                "importance": "uniform", "gamma": float(setting.gamma or 1), "period": NEVER, "scheme": "fixed",
                "order": "ascending",
            },
            "optim": {
                "lr": LR, "rank": setting.rank, "update_proj_gap": NEVER, "refresh": setting.refresh,
                "always_on": "none" if lean else "full",
            },
            "train": {
                "output_dir": ".", "global_batch_size": world_size, "seed": SEED,
                "sharding": "zero3" if zero3 else "replicated", "kernels": "torch",
                "gradient_checkpointing": setting.gradient_checkpointing or "offload" in ways, **more,
            },
            "data": {"max_length": setting.tokens},
        }
    )  # fmt: skip


def ours(setting: Setting, name: str, world_size: int) -> Trial:
    """One of our methods, or DeepSpeed's own optimizer, over replicated weights or shards. Collective."""
    name, ways = ways_of(name)
    recipe = recipe_of(setting, name, world_size, ways)
    setting = setting.model_copy(update={"gradient_checkpointing": recipe.train.gradient_checkpointing})
    sharded = recipe.train.sharding == "zero3"
    runtime = start(recipe) if sharded or world_size > 1 else None
    comm = Communicator() if runtime is None else runtime.comm
    ds_config = None if runtime is None else runtime.ds_config
    model = build_model(setting)
    layers = find_layers(model)
    check(recipe, layers)
    device = torch.device(setting.device)
    layer_runs.check(recipe, device)
    runs = layer_runs.ways_of(recipe, layers, device)
    at_once = gathered_at_once(layers, runs.kernels == "compile", runs.tile)
    plain, model = model, methods.adapt(recipe, model)
    at_once = names_within(model, plain, at_once)
    weights: Weights
    if ds_config is None:
        weights = Replicated(model, comm)
    elif methods.deepspeed_trains(recipe):
        weights = Zero3AdamW(model, ds_config, comm, recipe.optim.max_grad_norm, at_once)
    else:
        weights = Zero3(model, ds_config, comm, at_once)
    method = methods.build(recipe, weights, layers, [1.0] * len(layers.layers), 1)
    layer_runs.LayerRuns(weights, layers, runs)
    batch = batch_of(setting, comm.rank)

    def loss() -> Tensor:
        with trial.watch():
            return token_losses(weights, batch) / (setting.tokens - 1)

    def step() -> None:
        method.train_step([loss])

    def refresh() -> int:
        assert isinstance(method, OWS)
        method.active.update_proj_gap = 1  # at its end a step decides what the next one refreshes
        step()
        method.active.update_proj_gap = NEVER
        steps = 2 if setting.refresh == "sketch" else 1
        for _ in range(steps):
            step()
        return steps + 1

    spec = StepSpec(
        layers, recipe.method.name, tuple(method.layer_set), setting.rank, recipe.optim.always_on, setting.refresh,
        lora_rank=setting.lora_rank, itemsize=ITEMSIZE[setting.dtype], length=setting.tokens,
        checkpointing=setting.gradient_checkpointing, world_size=world_size, sharded=sharded,
        on_gpu=setting.device == "cuda", offload=runs.offload, tile=runs.tile, fused=runs.kernels != "torch",
        compiled=runs.kernels == "compile",
    )  # fmt: skip
    if ds_config is not None and not setting.inside:
        replays = Replays(lambda: model.config, ds_config["zero_optimization"])
        spec = replays.complete(spec, functools.partial(methods.adapt, recipe))
    local = [weights.local(p) if sharded else p.data for p in weights.module.parameters()]
    trial = Trial(weights.module, local, step, method, comm, spec=spec)
    if isinstance(method, OWS) and method.active.low_rank:
        trial.refresh = refresh
    return trial


def full_rank_bytes(setting: Setting, world_size: int, layers: ModelLayers) -> int:
    """What a rank sends where the sampled layers' full gradients are all-reduced, in their dtype."""
    blocks = [layers.layers[i] for i in sampled(setting)]
    count = sum(matrix.numel for block in blocks for matrix in block.matrices)
    count += sum(vector.numel for block in blocks for vector in block.vectors)
    return 2 * math.ceil(count / world_size) * ITEMSIZE[setting.dtype] * (world_size - 1)
