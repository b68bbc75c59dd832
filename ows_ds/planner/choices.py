"""What may be chosen for a run on a cluster without changing what is trained. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ows_ds.planner.cluster import Cluster

HOMES = {"replicated": "replicated", "zero3": "ZeRO-3", "hpz": "ZeRO-3, hpZ"}  # of frozen weights; their names


@dataclass(frozen=True)
class Choice:
    """What may be chosen without changing what is trained.

    home: of the frozen weights: on each GPU, in shards over all (zero3), or in these and in a second copy in shards
    over the GPUs of each node (hpz).
    """

    world_size: int  # GPUs
    home: str
    micro_batch: int  # sequences of a GPU's forward pass
    checkpointing: bool

    @property
    def sharding(self) -> str:
        """As ``train.sharding``."""
        return "replicated" if self.home == "replicated" else "zero3"

    def settings(self) -> dict[str, Any]:
        """Those of ``train`` in a recipe."""
        return {
            "sharding": self.sharding,
            "micro_batch_size": self.micro_batch,
            "gradient_checkpointing": self.checkpointing,
        }

    def options(self, other: Choice | None = None) -> list[tuple[str, str]]:
        """The command line's options for it, or for what it changes of another choice."""
        old = {} if other is None else other.settings()
        changed = {name: value for name, value in self.settings().items() if old.get(name) != value}
        return [(f"--train.{name}", str(value).lower()) for name, value in changed.items()]


def choices(batch: int, cluster: Cluster, shared_by: int = 1) -> Iterator[Choice]:
    """All that can be chosen for a global batch of ``batch`` sequences on the cluster or a part of it. shared_by: GPUs
    that share the tokens of rows."""
    for world_size in [*powers(cluster.gpus), *(n * cluster.gpus for n in powers(cluster.nodes) if n > 1)]:
        for home in HOMES:
            if (
                world_size % shared_by
                or (world_size == 1 and home != "replicated")
                or (home == "hpz" and world_size <= cluster.gpus)
            ):
                continue
            for micro in powers(batch):
                if batch % (micro * world_size // shared_by) == 0:
                    yield from (Choice(world_size, home, micro, checkpointing) for checkpointing in (False, True))


def powers(largest: int) -> list[int]:
    """1, 2, 4, ... and ``largest`` itself."""
    return sorted({2**i for i in range(largest.bit_length())} | {largest})


def scaling_sizes(cluster: Cluster, largest: int = 1024) -> list[int]:
    """Numbers of GPUs up to ``largest``, each twice the one before: parts of a node, then whole nodes."""
    sizes = powers(cluster.gpus)
    while sizes[-1] * 2 <= largest:
        sizes.append(sizes[-1] * 2)
    return sizes
