"""Whether a run fits into the memory that is free, before its weights load."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from ows_ds.config import Recipe, changed
from ows_ds.distributed.communicator import fail_together
from ows_ds.distributed.launch import Runtime
from ows_ds.model.shapes import read_model
from ows_ds.planner.forecast import Planner


def check_memory(recipe: Recipe, runtime: Runtime, longest: int) -> None:
    """Refuse (UserError) a recipe whose step needs clearly more memory than is free, before weights load. Collective.

    longest: tokens of the longest row. Nothing is refused without ``train.check_memory``, nor a model that cannot be
    planned.
    """
    if not recipe.train.check_memory:
        return
    config, comm, device = runtime.ds_config, runtime.comm, runtime.device
    hosts = comm.all_gather_object(socket.gethostname())
    if config is not None and (config["zero_optimization"].get("offload_param") or {}).get("device") == "cpu":
        return
    with fail_together(comm):
        try:
            model = read_model(recipe.model.path, recipe.model.revision, recipe.model.trust_remote_code)
        except Exception:  # of any code that comes with a model; loading it reports the mistake
            return
        recipe = changed(recipe, {"data.max_length": min(recipe.data.max_length, longest)})
        if device.type == "cuda":
            free, margin, place = torch.cuda.mem_get_info(device)[0], 1.05, ("GPU", "GPUs")
        else:  # where memory may be swapped, and kernels differ from the planned ones
            free, margin, place = available() // hosts.count(socket.gethostname()), 1.25, ("process", "processes")
        planner = Planner(recipe, model)
        home = "replicated" if config is None else "zero3"
        planner.require(planner.choice(comm.world_size, home), free, margin, place)


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
