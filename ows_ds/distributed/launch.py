"""From a recipe and a launcher's environment to ranks that know each other."""

from __future__ import annotations

import io
import logging
import os
import socket
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ows_ds.config import Recipe, accumulation, data_ranks
from ows_ds.distributed import rendezvous
from ows_ds.distributed.communicator import Communicator, join
from ows_ds.distributed.ds_config import DEFAULT_CONFIG, check_by_deepspeed, read_config, resolve_config
from ows_ds.distributed.logs import show_log
from ows_ds.distributed.sequence import SequenceParallel
from ows_ds.distributed.zero3 import free_operator, join_deepspeed
from ows_ds.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

DRIVER = Path("/proc/driver/nvidia/version")  # where there is a driver of GPUs
FORMED = "ows_ds/formed"  # in torchrun's store: how many process groups have met there

logger = logging.getLogger(__name__)


@dataclass
class Runtime:
    """The ranks of this run. ds_config: the DeepSpeed configuration, None where weights are replicated. sequence: those
    that share rows."""

    accelerator: Accelerator
    comm: Communicator
    device: torch.device
    ds_config: dict[str, Any] | None
    sequence: SequenceParallel

    def sized(self, micro_batch_size: int, accumulation: int) -> Runtime:
        """The same where a step has other micro-batches."""
        if self.ds_config is None:
            return self
        sizes = {"train_micro_batch_size_per_gpu": micro_batch_size, "gradient_accumulation_steps": accumulation}
        return replace(self, ds_config={**self.ds_config, **sizes})


def start(recipe: Recipe, training: bool = True) -> Runtime:
    """Join the ranks that the launcher started; without a launcher the world size is 1. Collective.

    training: steps are taken, for which the batch must be divisible by the ranks.
    It changes this process: variables of the environment that the launcher left out, the log (`show_log`), warnings
    (`suppress_warnings`). Raises UserError for a sharding or a DeepSpeed file that cannot be had, and for hosts that
    cannot meet.
    """
    import accelerate
    from accelerate.utils import InitProcessGroupKwargs

    environment = os.environ
    environment.update(rendezvous.discover(environment))
    show_log(int(environment.get("RANK", 0)))
    launched = "LOCAL_RANK" in environment
    cuda = _uses_gpus(environment)
    deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    # NCCL ends the process without a word when its time is over: before that the watchdog says who is to blame
    timeout = timedelta(seconds=recipe.train.timeout_seconds * (2 if cuda else 1))
    backend = "nccl" if cuda else "gloo"
    if launched:
        rendezvous.check(environment, backend)
    if launched and cuda:
        _check_gpus(environment, torch.cuda.device_count())
    if cuda and environment.get("DS_ACCELERATOR") == "cpu":  # of a shell that was used without GPUs
        del environment["DS_ACCELERATOR"]
    # without the backend, Accelerate with DeepSpeed on CPUs takes the world size for 1 on every rank; with cpu=True it
    # ignores DeepSpeed
    handlers = [InitProcessGroupKwargs(backend=backend, timeout=timeout)] if launched else []
    if not cuda:
        environment.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it has to find out
        # two versions of ninja, the activated environment's and the system's, would compile DeepSpeed's CPU operator
        # again in turns
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
        free_operator()
    store = None
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not dist.is_initialized():
        store = _join_torchrun(environment, backend, timeout)
    suppress_warnings()
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints that its CPU operator is there
        try:
            accelerator = accelerate.Accelerator(cpu=not cuda and not deepspeed, kwargs_handlers=handlers)
        except NotImplementedError as error:  # GPUs of RTX 40 with an old driver, which do not reach each other
            raise UserError("NCCL_P2P_DISABLE", environment.get("NCCL_P2P_DISABLE"), str(error)) from error
    sharded = recipe.train.sharding == "zero3" or (
        recipe.train.sharding == "auto" and accelerator.distributed_type == accelerate.DistributedType.DEEPSPEED
    )
    if recipe.train.ds_config is not None and not sharded:
        right = "expected train.sharding zero3 with it: this launcher has not set DeepSpeed up"
        raise UserError("train.ds_config", recipe.train.ds_config, right)
    if sharded and not dist.is_initialized():
        _alone(backend, timeout)
    elif dist.is_initialized() and accelerator.num_processes != dist.get_world_size():
        raise RuntimeError(f"Accelerate counts {accelerator.num_processes} of {dist.get_world_size()} ranks")
    if sharded:
        join_deepspeed()
    device = accelerator.device
    if cuda and device.index is None:  # without a launcher
        device = torch.device("cuda", torch.cuda.current_device())
    comm = join(device)
    if store is not None:
        comm.all_gather_object("formed")  # all are there
        if comm.rank == 0:
            store.add(FORMED, 1)
    data_ranks(recipe, comm.world_size)  # refuses what does not divide
    sequence = SequenceParallel(comm, recipe.train.sequence_parallel)
    config = None
    if sharded:
        raw = _ds_config(recipe, accelerator)
        steps = accumulation(recipe, comm.world_size) if training else 1
        micro, hosts = recipe.train.micro_batch_size, comm.all_gather_object(socket.gethostname())
        config = resolve_config(raw, recipe.model.dtype, micro, steps, comm.world_size, per_host(hosts))
        check_by_deepspeed(config)
    if training:
        names = comm.all_gather_object(torch.cuda.get_device_name(device) if cuda else "CPU")
        devices = ", ".join(f"{count} x {name}" for name, count in Counter(names).items())
        if comm.rank == 0:
            logger.info("%s, %s, %s", devices, recipe.model.dtype, "ZeRO-3" if sharded else "replicated")
    return Runtime(accelerator, comm, device, config, sequence)


def _uses_gpus(environment: Mapping[str, str]) -> bool:
    """Whether this run computes on GPUs. Refuses (UserError) a torch that cannot use those that are there: a run on the
    CPU would take weeks where hours are expected."""
    if environment.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        return False
    if torch.cuda.is_available():
        return True
    hidden = environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if DRIVER.exists() and not hidden:
        version = DRIVER.read_text().partition("\n")[0]
        right = (
            f"expected a build that the driver of this host's GPUs runs ({version}), such as one for an older CUDA; "
        )
        raise UserError("torch", torch.__version__, f"{right}ACCELERATE_USE_CPU=true trains on the CPU")
    return False


def _check_gpus(environment: Mapping[str, str], gpus: int) -> None:
    """Refuse (UserError), on every rank of this host, more ranks than there are GPUs."""
    here = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")  # the second is DeepSpeed's
    processes = int(here or int(environment["LOCAL_RANK"]) + 1)
    if processes > gpus:
        right = f"start at most {gpus} processes here, one for each GPU that all of them see"
        raise UserError("processes of this host", processes, right)


def suppress_warnings() -> None:
    """No second progress bar, and no warnings of what the user cannot change. Process-wide."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that nothing here uses
    # DeepSpeed calls collectives by names that torch is about to rename
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    # peft uses old names of transformers, and so do we: the new ones are not in all supported versions
    warnings.filterwarnings("ignore", "`(is_gradient_checkpointing|gradient_checkpointing_enable)`", FutureWarning)


def _join_torchrun(environment: Mapping[str, str], backend: str, timeout: timedelta) -> dist.Store:
    """The process group of ranks that torchrun, or Accelerate through it, has started or restarted. Collective.

    With a fixed port torchrun keeps its store after a restart, and with it the addresses of the ranks before: some
    would wait for these forever. So each group that has formed in a store has its own keys. Returns the store, in which
    `FORMED` is to be increased once all ranks are there.
    """
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), timeout=timeout)
    own = dist.PrefixStore(f"{FORMED}-{store.add(FORMED, 0)}", store)
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    device = torch.device("cuda", int(environment["LOCAL_RANK"])) if backend == "nccl" else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=timeout, device_id=device)
    return store


def _alone(backend: str, timeout: timedelta) -> None:
    """A process group of one rank, which DeepSpeed needs, without a port."""
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def per_host(hosts: list[str]) -> int | None:
    """How many ranks each host has, where all have as many and those of a host follow one another; otherwise None.

    hosts: names, by rank.
    """
    size = hosts.count(hosts[0])
    groups = [hosts[first : first + size] for first in range(0, len(hosts), size)]
    same = all(group == [group[0]] * size for group in groups)
    return size if same and len({group[0] for group in groups}) == len(groups) else None


def _ds_config(recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """The DeepSpeed file of the recipe, else the launcher's, else ours."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    # the launcher's file itself: Accelerate has filled in "auto" for another number format than the recipe's
    path = recipe.train.ds_config or (os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") if plugin else None)
    if path is not None and path != "none":
        return read_config(path)
    if plugin is None:
        return DEFAULT_CONFIG
    return {key: value for key, value in plugin.deepspeed_config.items() if key not in ("bf16", "fp16")}
