"""On a host of several GPUs without a launcher: the command that starts a rank on each."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence

from ows_ds.config import Recipe
from ows_ds.errors import UserError

# by which launchers say that they have started this process, or that it is one of a job
LAUNCHED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "SLURM_PROCID",
    "ACCELERATE_MIXED_PRECISION",
)

logger = logging.getLogger(__name__)


def command(recipe: Recipe, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str] | None:
    """What to run in place of this process; None: this process trains. argv: the verb and its options.

    Raises UserError (``train.gpus``) for more GPUs than there are.
    """
    environment = os.environ if environment is None else environment
    if any(name in environment for name in LAUNCHED) or environment.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return None
    count = gpus_here()
    wanted = recipe.train.gpus
    if wanted != "auto" and wanted > max(1, count):
        raise UserError("train.gpus", wanted, f"expected at most {max(1, count)}: this host has {count} GPUs")
    batch = recipe.train.global_batch_size // recipe.train.micro_batch_size
    shared = recipe.train.sequence_parallel
    sizes = (n for n in range(count, 0, -1) if n % shared == 0 and batch % (n // shared) == 0)
    fitting = next(sizes, 1) if wanted == "auto" else wanted
    if fitting < count:
        logger.info("%d of %d GPUs of this host are used (train.gpus)", fitting, count)
    if fitting <= 1:
        return None
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(fitting)]
    return [*launcher, "-m", "ows_ds", *argv]


def gpus_here() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()
