"""What a run has memory for, before its weights load: what is ``auto`` is chosen, what cannot fit is refused."""

from __future__ import annotations

import importlib.util
import logging
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from ows_ds import config
from ows_ds.config import Recipe, changed
from ows_ds.distributed.communicator import fail_together
from ows_ds.distributed.launch import Runtime
from ows_ds.model.shapes import check_shared, read_model
from ows_ds.planner.fit import IN_BITS, by_speed, fit, require
from ows_ds.planner.forecast import Planner

logger = logging.getLogger(__name__)


def fit_memory(recipe: Recipe, runtime: Runtime, longest: int) -> Recipe:
    """The recipe with what is ``auto`` chosen for the memory that is free; refuses (UserError) one whose step needs
    clearly more, before weights load. Collective.

    longest: tokens of the longest row. Nothing is refused without ``train.check_memory``. A model that cannot be
    planned is neither refused, nor is anything chosen for it.
    """
    ds_config, comm, device = runtime.ds_config, runtime.comm, runtime.device
    hosts = comm.all_gather_object(socket.gethostname())
    offloaded = ds_config is not None and _device(ds_config) == "cpu"
    with fail_together(comm):
        try:
            model = read_model(recipe.model.path, recipe.model.revision, recipe.model.trust_remote_code)
        except Exception:  # of any code that comes with a model; loading it reports the mistake
            return config.exact(recipe)
        check_shared(model.config, recipe.train.sequence_parallel)
        if device.type == "cuda":
            free, part, margin, place = torch.cuda.mem_get_info(device)[0], 0.92, 1.05, ("GPU", "GPUs")
        else:  # where memory may be swapped, and kernels differ from the planned ones
            free, part, margin, place = (
                available() // hosts.count(hosts[comm.rank]),
                0.8,
                1.25,
                ("process", "processes"),
            )
    least = min(comm.all_gather_object(free))  # all ranks choose the same
    with fail_together(comm):
        cut = changed(recipe, {"data.max_length": min(recipe.data.max_length, longest)})
        planner, home = Planner(cut, model), "replicated" if ds_config is None else "zero3"
        fitted = fit(planner, by_speed(planner, comm.world_size, [home]), part * least, recipe.auto, possible)
        if not fitted.fits and recipe.train.check_memory and not offloaded:
            require(fitted.planner, fitted.choice, least, margin, place)
        if comm.rank == 0:
            for line in fitted.lines(recipe.auto, place[0], least):
                logger.info(line)
    chosen = {key: config.value_of(fitted.recipe, key) for key in recipe.auto - fitted.recipe.auto}
    return changed(recipe, chosen)


def possible(key: str, value: Any) -> bool:
    """Whether what a value needs is installed."""
    return (key, value) not in IN_BITS or importlib.util.find_spec("bitsandbytes") is not None


def _device(ds_config: dict[str, Any]) -> str:
    """On which DeepSpeed keeps weights that no layer needs."""
    return str((ds_config["zero_optimization"].get("offload_param") or {}).get("device", "none"))


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
