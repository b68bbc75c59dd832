"""cluster.py and roofline.py by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ows_ds.errors import UserError
from ows_ds.planner.cluster import LAUNCH, Cluster, collective, known_gpu, read_cluster
from ows_ds.planner.roofline import Times, Work, times, work
from ows_ds.planner.step import StepSpec
from ows_ds.planner.traffic import Messages, messages, traffic
from tests.planner.test_memory import FIVE, SEVEN

# 100 GB/s and 1 us inside a node, 10 GB/s and 5 us between nodes
NODE = Cluster(nodes=1, gpus=4, nvlink=100, nvlink_latency=1, network=10, network_latency=5, reach=1)
TWO = NODE.model_copy(update={"nodes": 2})


def test_a_ring_inside_a_node() -> None:
    # 4 GPUs hold 4e9 bytes: each sends 3e9 in 3 rounds
    assert collective(NODE, 3e9) == pytest.approx(LAUNCH + 3e-6 + 0.03)
    assert collective(NODE, 3e9, messages=10) == pytest.approx(10 * LAUNCH + 30e-6 + 0.03)
    assert collective(NODE, 6e9, rounds=2) == pytest.approx(LAUNCH + 6e-6 + 0.06)  # an all-reduce
    assert collective(NODE.model_copy(update={"gpus": 1}), 3e9) == collective(NODE, 0) == 0


def test_rings_between_nodes() -> None:
    # 8 GPUs hold 8e9 bytes: each sends 7e9. One ring leaves a node by the four GPUs' networks, 40 GB/s
    assert collective(TWO, 7e9, algorithm="ring") == pytest.approx(LAUNCH + 7 * 5e-6 + 7e9 / 40e9)
    # rings of rings: 1e9 to the other node, then 3 times 2e9 inside
    expected = LAUNCH + 5e-6 + 0.1 + 3e-6 + 6e9 / 100e9
    assert collective(TWO, 7e9, algorithm="hierarchical") == pytest.approx(expected)
    assert collective(TWO, 7e9) == pytest.approx(expected)  # 0.160 s against 0.175 s
    slow = TWO.model_copy(update={"network": 1})
    assert collective(slow, 7e9) == min(collective(slow, 7e9, algorithm=name) for name in ("ring", "hierarchical"))


def test_few_bytes_pay_latency_alone() -> None:
    """On 1,024 GPUs a flat ring has 1,023 hops, rings of rings 127 + 7."""
    many = read_cluster("128x8xA100-80")
    flat, nested = (collective(many, 1, algorithm=name) for name in ("ring", "hierarchical"))
    assert flat == pytest.approx(LAUNCH + 1023 * 14e-6, rel=1e-6)
    assert nested == pytest.approx(LAUNCH + 127 * 14e-6 + 7 * 3.4e-6, rel=1e-6)


def test_clusters_by_name_and_file(tmp_path: Path) -> None:
    assert read_cluster("8xA100-80") == Cluster(nodes=1, gpus=8, memory=79.3)
    four = read_cluster("4x8xH100", {"network": 25.0, "price": None})
    assert (four.nodes, four.gpus, four.world_size, four.tflops, four.network) == (4, 8, 32, 989, 25)
    file = tmp_path / "mine.yaml"
    file.write_text("like: 2x8xH100\nmemory: 94\n")
    assert read_cluster(str(file)) == read_cluster("2x8xH100").model_copy(update={"memory": 94})
    assert (four.of_size(4).gpus, four.of_size(16).nodes) == (4, 2)
    with pytest.raises(ValueError, match="12 GPUs"):
        four.of_size(12)


@pytest.mark.parametrize(
    ("given", "changes", "expected"),
    [
        ("8xA200", {}, "--cluster: '8xA200' is invalid: expected a file, or nodes x GPUs of one of A100-40"),
        ("mine", {}, "--cluster: 'mine' is invalid"),
        ("no.yaml", {}, "--cluster: 'no.yaml' is invalid: expected a readable YAML file"),
        ("8xH100", {"nodes": 0}, "--nodes: 0 is invalid: expected an integer of at least 1"),
        ("8xH100", {"nvlink": 0.0}, "--nvlink: 0.0 is invalid: expected a number above 0"),
        (
            "8xH100",
            {"network_latency": float("nan")},
            "--network-latency: nan is invalid: expected a finite number",
        ),
        ("8xH100", {"reach": 1.5}, "--reach: 1.5 is invalid: expected a share above 0, at most 1"),
        ("8xH100", {"reserve": 80.0}, "--reserve: 80.0 is invalid: expected less than memory, 79.6 GiB"),
    ],
)
def test_mistakes(given: str, changes: dict[str, float], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        read_cluster(given, changes)
    assert str(caught.value).startswith(expected)


def test_keys_of_a_file(tmp_path: Path) -> None:
    for text, expected in (("nvlnk: 3", "is nvlink meant?"), ("gpus: many", "expected an integer")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UserError, match=expected):
            read_cluster(str(tmp_path / "c.yaml"))


# ------------------------------------------------------------------ roofline


def test_names_of_gpus_in_any_case() -> None:
    assert read_cluster("8xh100") == read_cluster("8xH100")
    assert read_cluster("8XA100") == read_cluster("8xA100-80")
    memory = {"RTX3090": 24, "A6000": 48, "L4": 22.5, "V100": 31.7, "MI300X": 192}
    assert {name: read_cluster(f"2x{name}").memory for name in memory} == memory


def test_flops_of_llama2_7b() -> None:
    """2 T per entry forward and as much backward; attention 2 T s q, and twice that."""
    spec = StepSpec(SEVEN, "mezo", rows=1, length=512)
    entries, attention, head = 32 * 202_375_168, 32 * 2 * 512 * 512 * 4096, 32000 * 4096
    frozen = work(spec)
    assert frozen["forward"].flops == 2 * (2 * 512 * entries + attention)  # two passes
    assert frozen["loss"].flops == 2 * 2 * 511 * head
    assert "backward" not in frozen
    full = work(StepSpec(SEVEN, "full", rows=1, length=512))
    assert full["backward"].flops == 2 * 2 * 512 * entries + 2 * attention
    assert full["loss"].flops == 3 * 2 * 511 * head
    # value, two moments and gradient in float32, both ways or twice, and the weight: 34 bytes an entry
    assert full["update"].bytes == 6_738_415_616 * 34


def test_flops_of_coordinates() -> None:
    """A low-rank layer: 2 T r (m + n) more each way, and 2 T r times the longer side."""
    lean = StepSpec(SEVEN, layer_set=FIVE, always_on="none", rank=128)
    plain, done = work(replace(lean, layer_set=(0,))), work(replace(lean, layer_set=(0, 1)))
    sides = 4 * 2 * 4096 + 3 * (4096 + 11008)
    longer = 4 * 4096 + 3 * 11008
    assert done["forward"].flops - plain["forward"].flops == 2 * 512 * 128 * sides
    assert done["backward"].flops - plain["backward"].flops == 2 * 512 * 128 * (sides + longer)
    again = work(replace(lean, checkpointing=True))
    assert again["recompute"] == again["forward"]
    assert "refresh" not in done
    assert work(lean, 0.01)["refresh"].flops == pytest.approx(
        0.01 * 5 * sum(2 * 512 * m * n + 12 * m * n * 136 for m, n in 4 * [(4096, 4096)] + 3 * [(11008, 4096)])
    )


def test_messages_and_times() -> None:
    spec = StepSpec(SEVEN, layer_set=FIVE, world_size=4, accumulation=2)
    sent = messages(spec, 0.01)
    assert sent["full_rank_gradients"].count == 4  # embedding and head, twice
    assert (sent["grad_norm"].rounds, sent["gradients"].count) == (2, 6)  # a layer each, and what is always on
    assert sent["projectors"].sent == pytest.approx(0.01 * traffic(spec, True, 3)["projectors"])
    assert sent["refresh_gradients"].count == pytest.approx(0.01 * 35 * 2)
    gpu = NODE.model_copy(update={"tflops": 1, "memory_bandwidth": 1000})
    found = times(gpu, {"forward": Work(2e12, 1e9), "update": Work(0, 1e12)}, {"gradients": Messages(3e9)})
    assert found.work == {"forward": 2, "update": 1}
    assert found.links["gradients"] == collective(gpu, 3e9)


def test_overlap() -> None:
    """Gathers hide behind passes and passes behind gathers; what follows the update hides behind nothing."""
    hidden = Times({"forward": 2, "backward": 3, "update": 1}, {"weights": 4, "coordinates": 1})
    assert (hidden.serial, hidden.overlapped) == (11, 7)
    assert replace(hidden, links={"weights": 9, "gradients": 1}).overlapped == 11


def test_hpz_gathers_inside_a_node() -> None:
    sent = {"weights": Messages(7e9), "gradients": Messages(7e9)}
    found = times(TWO, {}, sent, inside=True)
    assert found.links["weights"] == collective(NODE, 7e9)
    assert found.links["gradients"] == collective(TWO, 7e9)


@pytest.mark.parametrize(
    ("given", "memory"),
    [("1x4090", 24), ("8xA100-80GB", 79.3), ("2x8xh100-80gb", 79.6), ("1xt4", 15), ("1x5090", 31.8)],
)
def test_names_as_people_write_them(given: str, memory: float) -> None:
    assert read_cluster(given).memory == memory


@pytest.mark.parametrize(
    ("driver", "gpu"),
    [
        ("NVIDIA H200", "H200"), ("NVIDIA H20", "H20"), ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10G"), ("NVIDIA A100-SXM4-80GB", "A100-40"), ("NVIDIA GeForce RTX 5090", "RTX5090"),
        ("Tesla T4", "T4"),
    ],
)  # fmt: skip
def test_gpus_by_their_drivers_names(driver: str, gpu: str) -> None:
    assert known_gpu(driver) == gpu
