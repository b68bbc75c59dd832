"""From a recipe and a launcher's environment to processes that know each other, and a model spread over them."""

from __future__ import annotations

import gc
import io
import logging
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from ows_ds import forecast, rendezvous
from ows_ds.communicate import Communicator, join, together
from ows_ds.config import Recipe, accumulation, read_text
from ows_ds.errors import UserError, first_line, one_line
from ows_ds.layers import ModelLayers, find_layers
from ows_ds.load import Source, whole
from ows_ds.shapes import read_model
from ows_ds.weights import Replicated, Weights
from ows_ds.zero3 import (
    DEFAULT_CONFIG,
    Zero3,
    Zero3AdamW,
    check_by_deepspeed,
    free_operator,
    in_shards,
    join_deepspeed,
    read_config,
    resolve_config,
    whole_shape,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMED = "ows_ds/formed"  # in torchrun's store: how many process groups have come to be there
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

    Raises UserError for a sharding or a DeepSpeed file that cannot be had, and for hosts that cannot meet.
    """
    import accelerate
    from accelerate.utils import InitProcessGroupKwargs

    environment = os.environ
    environment.update(rendezvous.discover(environment))
    launched = "LOCAL_RANK" in environment
    cuda = torch.cuda.is_available() and environment.get("ACCELERATE_USE_CPU", "false").lower() not in ("true", "1")
    deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    timeout = timedelta(seconds=recipe.train.timeout_seconds)
    backend = "nccl" if cuda else "gloo"
    if launched:
        rendezvous.check(environment, backend)
    if launched and cuda:
        _check_gpus(environment, torch.cuda.device_count())
    # without the backend, Accelerate with DeepSpeed on CPUs believes in a world of one on every process; with cpu=True
    # it ignores DeepSpeed
    handlers = [InitProcessGroupKwargs(backend=backend, timeout=timeout)] if launched else []
    if not cuda:
        environment.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it has to find out
        # two versions of ninja, the activated environment's and the system's, would take turns at compiling DeepSpeed's
        # CPU operator anew
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
        free_operator()
    store = None
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not dist.is_initialized():
        store = _join_torchrun(environment, backend, timeout)
    quieten()
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints that its CPU operator is there
        accelerator = accelerate.Accelerator(cpu=not cuda and not deepspeed, kwargs_handlers=handlers)
    sharded = recipe.train.sharding == "zero3" or (
        recipe.train.sharding == "auto" and accelerator.distributed_type == accelerate.DistributedType.DEEPSPEED
    )
    if recipe.train.ds_config is not None and not sharded:
        right = "give train.sharding zero3 with it: this launcher has not set DeepSpeed up"
        raise UserError("train.ds_config", recipe.train.ds_config, right)
    if sharded and not dist.is_initialized():
        _alone(backend, timeout)
    elif dist.is_initialized() and accelerator.num_processes != dist.get_world_size():
        raise RuntimeError(f"Accelerate counts {accelerator.num_processes} of {dist.get_world_size()} processes")
    if sharded:
        join_deepspeed()
    comm = join(accelerator.device)
    if store is not None:
        comm.collect("formed")  # all are there
        if comm.index == 0:
            store.add(FORMED, 1)
    config = None
    if sharded:
        raw = _ds_config(recipe, accelerator)
        steps = accumulation(recipe, comm.world)
        micro, hosts = recipe.train.micro_batch_size, comm.collect(socket.gethostname())
        config = resolve_config(raw, recipe.model.dtype, micro, steps, comm.world, per_host(hosts))
        check_by_deepspeed(config)
    return Runtime(accelerator, comm, accelerator.device, config)


def _check_gpus(environment: Mapping[str, str], gpus: int) -> None:
    """Refuse (UserError), on every process of this host, more processes than there are GPUs."""
    here = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")  # the second is DeepSpeed's
    processes = int(here or int(environment["LOCAL_RANK"]) + 1)
    if processes > gpus:
        right = f"start at most {gpus} processes here, one for each GPU that all of them see"
        raise UserError("processes of this host", processes, right)


def quieten() -> None:
    """Progress has one bar, ours; and optional kernels that nothing here uses need no mention."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch is about to rename
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    # and peft asks transformers by an old name, as we do: the new ones are not in all versions that will do
    warnings.filterwarnings("ignore", "`(is_gradient_checkpointing|gradient_checkpointing_enable)`", FutureWarning)


def _join_torchrun(environment: Mapping[str, str], backend: str, timeout: timedelta) -> dist.Store:
    """The process group of processes that torchrun, or Accelerate by it, has started, perhaps anew. Collective.

    With a fixed port torchrun keeps its store after a restart, and with it the addresses of the processes that were
    there before: some would wait for these for ever. So each group that has formed in a store has keys of its own.
    Returns the store, in which `FORMED` is to be counted up once all are there.
    """
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), timeout=timeout)
    own = dist.PrefixStore(f"{FORMED}-{store.add(FORMED, 0)}", store)
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=timeout)
    return store


def _alone(backend: str, timeout: timedelta) -> None:
    """A process group of one, which DeepSpeed wants, without a port."""
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def per_host(hosts: list[str]) -> int | None:
    """How many processes each host has, where they are as many on each and follow one another; otherwise None.

    hosts: names, by process.
    """
    size = hosts.count(hosts[0])
    groups = [hosts[first : first + size] for first in range(0, len(hosts), size)]
    same = all(group == [group[0]] * size for group in groups)
    return size if same and len({group[0] for group in groups}) == len(groups) else None


def _ds_config(recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """The DeepSpeed file of the recipe, else the launcher's, else ours."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    # the launcher's file as it is written: Accelerate fills in "auto" for a number format that is not the recipe's
    path = recipe.train.ds_config or (os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") if plugin else None)
    if path is not None and path != "none":
        return read_config(path)
    if plugin is None:
        return DEFAULT_CONFIG
    return {key: value for key, value in plugin.deepspeed_config.items() if key not in ("bf16", "fp16")}


def check_memory(recipe: Recipe, runtime: Runtime, longest: int) -> None:
    """Refuse (UserError) a recipe whose step needs clearly more memory than is free, before weights load. Collective.

    longest: tokens of the longest row. What cannot be planned is not refused.
    """
    config, comm, device = runtime.ds_config, runtime.comm, runtime.device
    hosts = comm.collect(socket.gethostname())
    if config is not None and (config["zero_optimization"].get("offload_param") or {}).get("device") == "cpu":
        return
    with together(comm):
        try:
            model = read_model(recipe.model.path, recipe.model.revision, recipe.model.trust_remote_code)
        except Exception:  # whatever code comes with a model; loading it says what is wrong
            return
        recipe = replace(recipe, data=replace(recipe.data, max_length=min(recipe.data.max_length, longest)))
        if device.type == "cuda":
            free, margin, place = torch.cuda.mem_get_info(device)[0], 1.05, ("GPU", "GPUs")
        else:  # where memory may be swapped, and kernels differ from those that are planned
            free, margin, place = available() // hosts.count(socket.gethostname()), 1.25, ("process", "processes")
        forecast.check_memory(recipe, model, comm.world, config is not None, free, margin=margin, place=place)


def available() -> int:
    """Bytes of main memory that this host, and the job's control groups, would still give."""
    free: int = psutil.virtual_memory().available
    with suppress(OSError, StopIteration):
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        group = Path(f"/sys/fs/cgroup{own}")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # the topmost has no limit; "max" is none
                limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free = min(free, limit - used + int(stat["inactive_file"]))
    return max(0, free)


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
    model = pretrained(recipe, runtime.comm, runtime.device, config)
    layers = find_layers(model, None if config is None else whole_shape)
    model.config.use_cache = False
    if adapt is not None:
        keep = None if config is None else HfDeepSpeedConfig(config)  # while it lives, peft knows of shards
        model = adapt(model)
        del keep
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers makes the embedding's output require gradients, which would drag every backward pass to the input
        model.disable_input_require_grads()
    if config is None:
        return Replicated(model, runtime.comm), layers
    if deepspeed_trains:
        return Zero3AdamW(model, config, runtime.comm, recipe.optim.max_grad_norm), layers
    return Zero3(model, config, runtime.comm), layers


def pretrained(
    recipe: Recipe, comm: Communicator, device: torch.device, ds_config: dict[str, Any] | None = None
) -> Any:
    """The model of ``model.path``: whole, with entries on process 0 alone, or in shards (ds_config). Collective.

    Each process reads what it holds. Where transformers has to load the checkpoint, process 0 says why.
    Raises UserError (``model.path``) for what cannot be loaded.
    """
    source: Source
    with together(comm), _refusing(recipe, Exception), hushed():
        source = Source(recipe.model, DTYPES[recipe.model.dtype])
    comm.agree("how the model is loaded", source.why_not)
    if source.why_not is None:
        with together(comm), _refusing(recipe, OSError, ValueError, SafetensorError):
            make = whole(device, comm.index == 0) if ds_config is None else in_shards(ds_config)
            model = source.fill(make, device)
    else:
        if comm.index == 0:
            says = f"model.path: {source.why_not}: transformers loads it, which needs memory for all of it on process 0"
            print(one_line(says))
        model, lost = _by_transformers(recipe, device, ds_config)
        with together(comm):
            if lost:  # transformers would go on with random numbers
                missing = f"{len(lost)} of its weights are missing: {lost[0]}"
                right = f"give a checkpoint that fits its config.json ({missing})"
                raise UserError("model.path", recipe.model.path, right)
    with together(comm), _refusing(recipe, ValueError, TypeError, KeyError, AttributeError):
        if comm.index == 0:  # what transformers would refuse to write after training, such as a generation_config.json
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder, state_dict={})
    return model


def _by_transformers(recipe: Recipe, device: torch.device, ds_config: dict[str, Any] | None) -> tuple[Any, list[str]]:
    """The model, and which of its weights are not in its files, as far as this process has seen."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    # while this object lives, transformers builds models in shards; not in float64
    sharded = ds_config is not None and recipe.model.dtype != "float64"
    keep = HfDeepSpeedConfig(ds_config) if sharded else None
    with _refusing(recipe, OSError, ValueError, SafetensorError):
        model, found = AutoModelForCausalLM.from_pretrained(
            recipe.model.path,
            revision=recipe.model.revision,
            dtype=DTYPES[recipe.model.dtype],
            attn_implementation=recipe.model.attention,
            trust_remote_code=recipe.model.trust_remote_code,
            use_safetensors=True,  # other files would be unpickled
            output_loading_info=True,
        )
    del keep
    lost = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    return model if ds_config is not None else model.to(device), lost


def load_tokenizer(recipe: Recipe) -> Any:
    """The model's tokenizer, with the chat template of the recipe where it gives one.

    Raises UserError (``model.path``) where there is none, ``data.chat_template`` for what is no template.
    """
    from transformers import AutoTokenizer

    # tokenizers raises no kind but Exception
    with _refusing(recipe, Exception, right="give a model with a tokenizer"), hushed():
        tokenizer = AutoTokenizer.from_pretrained(
            recipe.model.path, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
        )
    if recipe.data.chat_template is not None:
        tokenizer.chat_template = _chat_template(recipe.data.chat_template, tokenizer)
    return tokenizer


def _chat_template(path: str, tokenizer: Any) -> str:
    """The text of a file, which is a template."""
    import jinja2

    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UserError("data.chat_template", path, f"give a readable Jinja file ({error})") from error
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=text, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise UserError("data.chat_template", f"{path}:{error.lineno}", f"give a Jinja template ({error})") from error
    except Exception:  # it may refuse this chat; those that are trained show it
        pass
    return text


@contextmanager
def _refusing(
    recipe: Recipe, *kinds: type[Exception], right: str = "give a model that transformers can load"
) -> Iterator[None]:
    """What the files of ``model.path`` may raise, as a UserError: all of ``kinds`` but the want of memory."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except kinds as error:
        raise _refuse(recipe, right, error) from error


def _refuse(recipe: Recipe, right: str, error: Exception) -> UserError:
    said, attention = first_line(error), recipe.model.attention
    if "trust_remote_code" in str(error):
        right = "give true to run the Python code that comes with this model, or a model without any"
        return UserError("model.trust_remote_code", recipe.model.trust_remote_code, right)
    if attention is not None and (attention in said or "attn_implementation" in said):
        return UserError("model.attention", attention, f"give a kernel that transformers has here, or null ({said})")
    return UserError("model.path", recipe.model.path, f"{right} ({said})")


@contextmanager
def hushed() -> Iterator[None]:
    """Within it transformers warns of nothing: what it warns of while it reads settings, it refuses, or we do."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def free_memory() -> None:
    """Give back what a model has held that is used no more: models hang in circles of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
