"""From a recipe and a launcher's environment to processes that know each other, and a model spread over them."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
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
from ows_ds.weights import Replicated, Weights

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
    _quieten()
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
        from ows_ds.zero3 import join_deepspeed

        join_deepspeed()
    comm = join(accelerator.device)
    config = None
    if sharded:
        from ows_ds.zero3 import resolve_config

        raw = _ds_config(recipe, accelerator)
        steps = accumulation(recipe, comm.world)
        config = resolve_config(raw, recipe.model.dtype, recipe.train.micro_batch_size, steps, comm.world)
    return Runtime(accelerator, comm, accelerator.device, config)


def _quieten() -> None:
    """Progress has one bar, ours; and optional kernels that nothing here uses need no mention."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch is about to rename
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)


def _alone(backend: str, timeout: timedelta) -> None:
    """A process group of one, which DeepSpeed wants, without a port."""
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _ds_config(recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """The DeepSpeed file of the recipe, else the launcher's, else ours."""
    from ows_ds.zero3 import DEFAULT_CONFIG

    if recipe.train.ds_config is not None:
        try:
            config: dict[str, Any] = json.loads(Path(recipe.train.ds_config).read_text())
        except (OSError, ValueError) as error:
            raise UserError("train.ds_config", recipe.train.ds_config, f"give a JSON file ({error})") from None
        return config
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return dict(plugin.deepspeed_config) if plugin is not None else DEFAULT_CONFIG


def load_model(recipe: Recipe, runtime: Runtime) -> Weights:
    """The pre-trained model, frozen, on the run's devices: whole, or straight into shards. Collective.

    Raises UserError (``model.path``) for what transformers cannot load.
    """
    from transformers.integrations import HfDeepSpeedConfig

    # under this object's life, transformers builds models in shards; DeepSpeed knows no float64 there
    shards = runtime.ds_config is not None and recipe.model.dtype != "float64"
    keep = HfDeepSpeedConfig(runtime.ds_config) if shards else None
    model = pretrained(recipe)
    del keep
    model.config.use_cache = False
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers makes the embedding's output require gradients, which would drag every backward pass to the input
        model.disable_input_require_grads()
    if runtime.ds_config is None:
        return Replicated(model.to(runtime.device), runtime.comm)
    from ows_ds.zero3 import Zero3

    return Zero3(model, runtime.ds_config, runtime.comm)


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
