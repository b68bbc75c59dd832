"""What may be chosen for a run on a cluster: without changing what is trained (`Choice`), and with small changes of it
(`LEVERS`). Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ows_ds.planner.cluster import Cluster

HOMES = {"replicated": "replicated", "zero3": "ZeRO-3", "hpz": "ZeRO-3, hpZ"}  # of frozen weights; their names
# what makes a step smaller where nothing that leaves the training as it is does, one after the other: those that change
# least of it first
LEVERS: tuple[tuple[str, Callable[[Any], bool], Any], ...] = (  # a key, which values change, and into what
    ("optim.refresh_batch", ("full",).__contains__, "first"),  # projectors of a part of the batch
    ("sampling.scheme", ("bernoulli",).__contains__, "fixed"),  # never more than gamma layers at a time
    ("model.frozen", ("same",).__contains__, "int8"),
    ("optim.moments", ("float32",).__contains__, "int8"),
    ("optim.master", ("float32",).__contains__, "none"),
    ("optim.always_on", ("full", "low_rank").__contains__, "none"),  # embedding and head do not train
    ("model.frozen", ("same", "int8", "fp8").__contains__, "nf4"),
    ("sampling.gamma", lambda gamma: gamma > 2, 2.0),
    ("optim.rank", lambda rank: rank > 64, 64),
)


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


def choices(batch: int, cluster: Cluster) -> Iterator[Choice]:
    """All that can be chosen for a global batch of ``batch`` sequences on the cluster or a part of it."""
    for world_size in [*_powers(cluster.gpus), *(n * cluster.gpus for n in _powers(cluster.nodes) if n > 1)]:
        for home in HOMES:
            if (world_size == 1 and home != "replicated") or (home == "hpz" and world_size <= cluster.gpus):
                continue
            for micro in _powers(batch):
                if batch % (micro * world_size) == 0:
                    yield from (Choice(world_size, home, micro, checkpointing) for checkpointing in (False, True))


def _powers(largest: int) -> list[int]:
    """1, 2, 4, ... and ``largest`` itself."""
    return sorted({2**i for i in range(largest.bit_length())} | {largest})


def scaling_sizes(cluster: Cluster, largest: int = 1024) -> list[int]:
    """Numbers of GPUs up to ``largest``, each twice the one before: parts of a node, then whole nodes."""
    sizes = _powers(cluster.gpus)
    while sizes[-1] * 2 <= largest:
        sizes.append(sizes[-1] * 2)
    return sizes
