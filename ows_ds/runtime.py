"""From a recipe and a launcher's environment to processes that know each other, and a model spread over them."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ows_ds.communicate import Communicator, join
from ows_ds.config import Recipe, accumulation
from ows_ds.errors import UserError
from ows_ds.layers import ModelLayers, find_layers
from ows_ds.weights import Replicated, Weights
from ows_ds.zero3 import DEFAULT_CONFIG, Zero3, Zero3AdamW, join_deepspeed, resolve_config, whole_shape

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass
class Runtime:
    """The processes of this run. ds_config: the DeepSpeed configuration, None where weights are replicated."""

    accelerator: Accelerator
    comm: Communicator
    device: torch.device
    ds_config: dict[str, Any] | None


def start(recipe: Recipe) -> Runtime:
    """Join the processes that the launcher started (one alone is a world of one). Collective.

    Raises UserError for a sharding or a DeepSpeed file that cannot be had.
    """
    import accelerate
    from accelerate.utils import InitProcessGroupKwargs

    environment = os.environ
    launched = "LOCAL_RANK" in environment
    cuda = torch.cuda.is_available() and environment.get("ACCELERATE_USE_CPU", "false").lower() not in ("true", "1")
    deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    timeout = timedelta(seconds=recipe.train.timeout_seconds)
    backend = "nccl" if cuda else "gloo"
    # without the backend, Accelerate with DeepSpeed on CPUs believes in a world of one on every process; with cpu=True
    # it ignores DeepSpeed
    handlers = [InitProcessGroupKwargs(backend=backend, timeout=timeout)] if launched else []
    if not cuda:
        environment.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it has to find out
        # two versions of ninja, the activated environment's and the system's, would take turns at compiling DeepSpeed's
        # CPU operator anew
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    quieten()
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints that its CPU operator is there
        accelerator = accelerate.Accelerator(cpu=not cuda and not deepspeed, kwargs_handlers=handlers)
    sharded = recipe.train.sharding == "zero3" or (
        recipe.train.sharding == "auto" and accelerator.distributed_type == accelerate.DistributedType.DEEPSPEED
    )
    if sharded and not dist.is_initialized():
        _alone(backend, timeout)
    elif dist.is_initialized() and accelerator.num_processes != dist.get_world_size():
        raise RuntimeError(f"Accelerate counts {accelerator.num_processes} of {dist.get_world_size()} processes")
    if sharded:
        join_deepspeed()
    comm = join(accelerator.device)
    config = None
    if sharded:
        raw = _ds_config(recipe, accelerator)
        steps = accumulation(recipe, comm.world)
        config = resolve_config(raw, recipe.model.dtype, recipe.train.micro_batch_size, steps, comm.world)
    return Runtime(accelerator, comm, accelerator.device, config)


def quieten() -> None:
    """Progress has one bar, ours; and optional kernels that nothing here uses need no mention."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch is about to rename
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    # and peft asks transformers by an old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)


def _alone(backend: str, timeout: timedelta) -> None:
    """A process group of one, which DeepSpeed wants, without a port."""
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _ds_config(recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """The DeepSpeed file of the recipe, else the launcher's, else ours."""
    if recipe.train.ds_config is not None:
        try:
            config: dict[str, Any] = json.loads(Path(recipe.train.ds_config).read_text())
        except (OSError, ValueError) as error:
            raise UserError("train.ds_config", recipe.train.ds_config, f"give a JSON file ({error})") from None
        return config
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return dict(plugin.deepspeed_config) if plugin is not None else DEFAULT_CONFIG


def load_model(
    recipe: Recipe, runtime: Runtime, adapt: Callable[[Any], Any] | None = None, deepspeed_trains: bool = False
) -> tuple[Weights, ModelLayers]:
    """The pre-trained model on the run's devices, whole or straight into shards, and its layers. Collective.

    adapt: what is done to the model before it is spread, such as adding adapters; the layers are those before.
    deepspeed_trains: under ZeRO-3 DeepSpeed's own optimizer trains what requires gradients.
    Raises UserError (``model.path``) for what transformers cannot load and for models that have no layers.
    """
    from transformers.integrations import HfDeepSpeedConfig

    config = runtime.ds_config
    # while this object lives, transformers builds models in shards and peft knows of them; not in float64
    keep = HfDeepSpeedConfig(config) if config is not None and recipe.model.dtype != "float64" else None
    model = pretrained(recipe)
    layers = find_layers(model, None if config is None else whole_shape)
    model.config.use_cache = False
    if adapt is not None:
        model = adapt(model)
    del keep
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers makes the embedding's output require gradients, which would drag every backward pass to the input
        model.disable_input_require_grads()
    if config is None:
        return Replicated(model.to(runtime.device), runtime.comm), layers
    if deepspeed_trains:
        return Zero3AdamW(model, config, runtime.comm, recipe.optim.max_grad_norm), layers
    return Zero3(model, config, runtime.comm), layers


def pretrained(recipe: Recipe) -> Any:
    """``model.path`` as transformers loads it. Raises UserError (``model.path``) where it cannot."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            recipe.model.path,
            revision=recipe.model.revision,
            dtype=DTYPES[recipe.model.dtype],
            attn_implementation=recipe.model.attention,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise _refuse(recipe, "give a model that transformers can load", error) from error


def load_tokenizer(recipe: Recipe) -> Any:
    """The model's tokenizer. Raises UserError (``model.path``) where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            recipe.model.path, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _refuse(recipe, "give a model with a tokenizer", error) from error


def _refuse(recipe: Recipe, right: str, error: Exception) -> UserError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError("model.path", recipe.model.path, f"{right} ({first})")
