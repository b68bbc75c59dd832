"""What a cluster can do: GPUs, the links between them, and how long a collective takes on these. Pure.

    nodes x gpus, each GPU with memory and arithmetic; a fast link inside a node, a slower one between nodes

A link moves n bytes in alpha + n / beta seconds (Hockney 1994): alpha its latency, beta its bandwidth. Collectives are
those of rings (Thakur, Rabenseifner, Gropp 2005, section 4): w - 1 rounds, in each of which every rank sends the
w-th part of the whole. Over several nodes that is one ring through all GPUs, or one ring between the nodes and one
within (Cho et al. 2019, BlueConnect). Nothing here imports torch.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ows_ds.config.settings import Count, Expected, Number, Settings, Wrong, as_number, parse
from ows_ds.errors import UserError
from ows_ds.files import read_yaml

LAUNCH = 8.4e-6  # seconds before the first round of any collective: NCCL's tuner, ring, protocol Simple (tuning.cc)
Positive = Annotated[float, Field(gt=0, lt=1e12), BeforeValidator(as_number)]
NotNegative = Annotated[float, Field(ge=0, lt=1e12), BeforeValidator(as_number)]


class Cluster(Settings):
    """GPUs and what lies between them."""

    nodes: Count = 1
    """Machines."""
    gpus: Count = 1
    """GPUs of a node."""
    memory: Positive = 80.0
    """Memory of a GPU, in GiB."""
    reserve: NotNegative = 2.0
    """Part of a GPU's memory that is not ours, in GiB: driver, libraries' buffers, gaps of the allocator."""
    tflops: Positive = 312.0
    """Peak of a GPU in the weights' format without sparsity, in 1e12 flops a second."""
    memory_bandwidth: Positive = 2039.0
    """Bandwidth between a GPU and its memory, in GB a second."""
    nvlink: Positive = 300.0
    """Bandwidth of a GPU to the others of its node, one direction, in GB a second."""
    nvlink_latency: NotNegative = 3.4
    """Latency of a hop inside a node, in microseconds."""
    host: Positive = 32.0
    """Bandwidth of a GPU to its host's memory, one direction, in GB a second."""
    network: Positive = 25.0
    """Bandwidth of a GPU's share of its node's network, one direction, in GB a second."""
    network_latency: NotNegative = 14.0
    """Latency of a hop between nodes, in microseconds."""
    reach: Annotated[Number, Expected("a share above 0, at most 1")] = Field(0.6, gt=0, le=1)
    """Share of tflops and of the bandwidths that is reached."""
    price: NotNegative | None = None
    """Price of a GPU for an hour, in any currency; null: not known."""

    def contradictions(self) -> Iterator[Wrong]:
        if self.reserve >= self.memory:
            yield Wrong("reserve", f"expected less than memory, {self.memory:g} GiB", ("memory",))

    @property
    def world_size(self) -> int:
        """Number of GPUs."""
        return self.nodes * self.gpus

    @property
    def usable(self) -> float:
        """Bytes of a GPU's memory that training may take."""
        return (self.memory - self.reserve) * 2**30

    def of_size(self, world_size: int) -> "Cluster":
        """The same kind of machines with ``world_size`` GPUs: part of one node, or whole nodes."""
        if world_size <= self.gpus:
            return self.model_copy(update={"nodes": 1, "gpus": world_size})
        if world_size % self.gpus:
            raise ValueError(f"{world_size} GPUs are not whole nodes of {self.gpus}")
        return self.model_copy(update={"nodes": world_size // self.gpus})


# Per GPU: memory in GiB, as drivers show it; from the vendors' data sheets bfloat16 without sparsity, one direction of
# NVLink (or of PCIe 4.0 x16), and what the vendor's own servers have of network for a GPU (HDR 200 Gb/s, NDR 400 Gb/s;
# L40S and RTX: 100 Gb/s shared by 4); to the host PCIe x16. Latencies of a hop: NCCL's tuner, ring, protocol Simple
# (tuning.cc: NVLink 3.4, PCI 5.7, network 14).
PCIE = {"nvlink": 32, "nvlink_latency": 5.7, "network": 3.1}
GPUS: dict[str, dict[str, float]] = {
    "A100-40": {"memory": 39.4, "tflops": 312, "memory_bandwidth": 1555, "nvlink": 300, "network": 25},
    "A100-80": {"memory": 79.3, "tflops": 312, "memory_bandwidth": 2039, "nvlink": 300, "network": 25},
    "H100": {"memory": 79.6, "tflops": 989, "memory_bandwidth": 3350, "host": 64, "nvlink": 450, "network": 50},
    "H200": {"memory": 140, "tflops": 989, "memory_bandwidth": 4800, "host": 64, "nvlink": 450, "network": 50},
    "B200": {"memory": 179, "tflops": 2250, "memory_bandwidth": 8000, "host": 64, "nvlink": 900, "network": 50},
    "MI300X": {"memory": 192, "tflops": 1307, "memory_bandwidth": 5300, "host": 64, "nvlink": 448, "network": 50},
    "H20": {"memory": 96, "tflops": 148, "memory_bandwidth": 4000, "host": 64, "nvlink": 450, "network": 50},
    "V100": {"memory": 31.7, "host": 16, "tflops": 125, "memory_bandwidth": 900, "nvlink": 150, "network": 12.5},
    "L40S": {"memory": 45, "tflops": 362, "memory_bandwidth": 864, **PCIE},
    "A10G": {"memory": 22.5, "tflops": 70, "memory_bandwidth": 600, **PCIE},
    "T4": {"memory": 15, "tflops": 65, "memory_bandwidth": 320, **PCIE},  # of float16
    "L4": {"memory": 22.5, "tflops": 121, "memory_bandwidth": 300, **PCIE},
    "A6000": {"memory": 48, "tflops": 155, "memory_bandwidth": 768, **PCIE},
    "RTX5090": {"memory": 31.8, "tflops": 210, "memory_bandwidth": 1792, "host": 64, **PCIE},
    "RTX4090": {"memory": 24, "tflops": 165, "memory_bandwidth": 1008, **PCIE},
    "RTX3090": {"memory": 24, "tflops": 71, "memory_bandwidth": 936, **PCIE},
}  # fmt: skip


def known_gpu(name: str) -> str | None:
    """The name in `GPUS` of the GPU that a driver calls ``name``, such as NVIDIA H100 80GB HBM3."""
    return next((gpu for gpu in GPUS if gpu.split("-")[0] in name.replace(" ", "")), None)


def read_cluster(given: str, changes: Mapping[str, Any] | None = None) -> Cluster:
    """A cluster by its name (``8xA100-80``, ``4x8xH100``: nodes x GPUs of a node), or in a YAML file of its keys.

    A file may name what it starts from: ``like: 8xH100``. changes: what wins over both. Raises UserError.
    """
    start = _by_name(given)
    if start is None and not Path(given).suffix:
        raise UserError(
            "--cluster", given, f"expected a file, or a number of GPUs such as 8xA100-80 ({', '.join(GPUS)})"
        )
    if start is None:
        tree = read_yaml(given, "--cluster")
        like = tree.pop("like", None)
        start = Cluster() if like is None else _by_name(str(like))
        if start is None:
            raise UserError("like", like, "expected nodes x GPUs of a node, such as 4x8xH100")
        start = parse(Cluster, {**start.model_dump(), **tree})
    given_changes = {key: value for key, value in (changes or {}).items() if value is not None}
    return parse(Cluster, {**start.model_dump(), **given_changes}, "--")


def _by_name(given: str) -> Cluster | None:
    """The cluster of such a name, None where it is none. Raises UserError for GPUs that are not known."""
    found = re.fullmatch(r"(?:(\d{1,9})x)?(\d{1,9})x([\w-]+)", given, re.IGNORECASE)
    if found is None:
        return None
    nodes, gpus, name = found.groups()
    kind = name.upper().removesuffix("GB").removesuffix("-SXM").removesuffix("-PCIE")
    kind = {"A100": "A100-80", "H100-80": "H100", "RTXA6000": "A6000"}.get(kind, kind)
    kind = f"RTX{kind}" if f"RTX{kind}" in GPUS else kind
    if kind not in GPUS:
        raise UserError("--cluster", given, f"expected a file, or nodes x GPUs of one of {', '.join(GPUS)}: 4x8xH100")
    return Cluster(nodes=int(nodes or 1), gpus=int(gpus), **GPUS[kind])  # type: ignore[arg-type]


# ------------------------------------------------------------------ collectives

ALGORITHMS = ("ring", "hierarchical")


def collective(
    cluster: Cluster, sent: float, messages: float = 1, rounds: int = 1, algorithm: str | None = None
) -> float:
    """Seconds of ``messages`` equal collectives in which a GPU sends ``sent`` bytes altogether, as rings count them.

    rounds: passes around the ring: 1 of a reduce-scatter, an all-gather or a reduction to one, 2 of an all-reduce.
    algorithm: one of `ALGORITHMS`; None: the faster one.
    """
    if cluster.world_size == 1 or not sent:
        return 0.0
    names = ALGORITHMS if algorithm is None else (algorithm,)
    return messages * LAUNCH + min(_ALGORITHMS[name](cluster, sent, messages * rounds) for name in names)


def exchange(cluster: Cluster, sent: float, ranks: int) -> float:
    """Seconds of an all-to-all of ``ranks`` GPUs that follow one another: each sends ``sent`` bytes, as many to each of
    the others, to one after the other (pairwise exchange, Thakur et al.)."""
    if ranks == 1 or not sent:
        return 0.0
    inside = min(ranks, cluster.gpus) - 1
    outside = ranks - 1 - inside
    each = sent / (ranks - 1)
    found = LAUNCH + inside * (cluster.nvlink_latency * 1e-6 + each / _rate(cluster, cluster.nvlink))
    return found + outside * (cluster.network_latency * 1e-6 + each / _rate(cluster, cluster.network))


def _ring(cluster: Cluster, sent: float, passes: float) -> float:
    """One ring through all GPUs. Between nodes it has as many channels as a node has GPUs, each a part of the bytes."""
    if cluster.nodes == 1:
        return passes * (cluster.gpus - 1) * cluster.nvlink_latency * 1e-6 + sent / _rate(cluster, cluster.nvlink)
    slowest = min(cluster.nvlink, cluster.network * cluster.gpus)
    return passes * (cluster.world_size - 1) * cluster.network_latency * 1e-6 + sent / _rate(cluster, slowest)


def _hierarchical(cluster: Cluster, sent: float, passes: float) -> float:
    """A ring between the nodes for each place in a node, over the g-th part of the bytes, and a ring within each."""
    n, g, w = cluster.nodes, cluster.gpus, cluster.world_size
    whole = sent * w / (w - 1)  # bytes that all GPUs together hold, for each pass
    between = passes * (n - 1) * cluster.network_latency * 1e-6
    between += whole * (n - 1) / w / _rate(cluster, cluster.network)
    within = passes * (g - 1) * cluster.nvlink_latency * 1e-6 + whole * (g - 1) / g / _rate(cluster, cluster.nvlink)
    return between * (n > 1) + within * (g > 1)


def _rate(cluster: Cluster, gigabytes: float) -> float:
    """Bytes a second that are reached."""
    return gigabytes * 1e9 * cluster.reach


_ALGORITHMS = {"ring": _ring, "hierarchical": _hierarchical}
