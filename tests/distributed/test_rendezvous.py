"""Who a process is, from what SLURM says; and addresses at which nobody would meet."""

from __future__ import annotations

import socket
import sys

import pytest

from ows_ds.distributed import rendezvous
from ows_ds.errors import UserError

# as SLURM 22.05 sets them in the last task of `srun -N2 --ntasks=3`
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
FOUND = {
    "RANK": "2",
    "WORLD_SIZE": "3",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "gpu007",
    "MASTER_PORT": str(10000 + (4711 * 16 + 2) % 20000),
}


def test_a_task_of_srun() -> None:
    assert rendezvous.discover(STEP) == FOUND
    meeting = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert rendezvous.discover(STEP | meeting) == FOUND | meeting
    many = STEP | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_STEP_NUM_TASKS": "11", "SLURM_NODEID": "2"}
    assert rendezvous.discover(many)["LOCAL_WORLD_SIZE"] == "3"
    assert rendezvous.discover(many | {"SLURM_NODEID": "1"})["LOCAL_WORLD_SIZE"] == "4"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        STEP | {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "8"},  # a launcher within the task
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0"},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"},  # a batch script
    ],
)
def test_nothing_to_find(environment: dict[str, str]) -> None:
    assert rendezvous.discover(environment) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n0", "n0"),
        ("a,b", "a"),
        ("gpu[003-007,011],login1", "gpu003"),
        ("gpu[12,14]-ib,x", "gpu12-ib"),
        ("r[1-2]n[07-08]", "r1n07"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert rendezvous.first_host(nodes) == first


def test_mpi_without_mpi4py_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"mpi4py: .* install ows_ds\[mpi\]"):
        rendezvous.discover({"OMPI_COMM_WORLD_SIZE": "2"})


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The hosts file of this host, called n1."""
    known = {"n0": "10.0.0.1", "n1": "10.0.0.2", "localhost": "127.0.0.1"}

    def look_up(name: str, port: None, type: int) -> list[tuple[object, ...]]:
        address = known.get(name, name)
        if not address[0].isdigit():
            raise socket.gaierror
        return [(2, 1, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "gethostname", lambda: "n1")
    return known


SECOND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "n0"}


def test_hosts_that_can_meet(names: dict[str, str]) -> None:
    for backend in ("gloo", "nccl"):
        rendezvous.check(SECOND, backend)
        rendezvous.check({name: value for name, value in SECOND.items() if name != "LOCAL_WORLD_SIZE"}, backend)


def test_an_own_name_that_leads_home(names: dict[str, str]) -> None:
    names["n1"] = "127.0.1.1"
    message = "GLOO_SOCKET_IFNAME: None is invalid: n1 resolves to 127.0.1.1, where other hosts cannot reach it: set it"
    with pytest.raises(UserError, match=message):
        rendezvous.check(SECOND, "gloo")
    rendezvous.check(SECOND, "nccl")  # which looks at interfaces
    rendezvous.check(SECOND | {"GLOO_SOCKET_IFNAME": "eth0"}, "gloo")
    rendezvous.check(SECOND | {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "gloo")  # all are here
    rendezvous.check(SECOND | {"LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": "", "MASTER_ADDR": "localhost"}, "gloo")
    del names["n1"]
    with pytest.raises(UserError, match="the name n1 does not resolve"):
        rendezvous.check(SECOND, "gloo")


def test_a_meeting_point_that_leads_home(names: dict[str, str]) -> None:
    for backend in ("gloo", "nccl"):
        with pytest.raises(UserError, match=r"MASTER_ADDR: 'localhost' .* reach it .localhost resolves to 127.0.0.1"):
            rendezvous.check(SECOND | {"MASTER_ADDR": "localhost"}, backend)
    first = SECOND | {"RANK": "0", "MASTER_ADDR": "localhost"}  # rank 0 is at home there
    rendezvous.check(first, "gloo")
    with pytest.raises(UserError, match="NCCL_SOCKET_IFNAME: 'lo'"):
        rendezvous.check(SECOND | {"NCCL_SOCKET_IFNAME": "lo"}, "nccl")


def test_own_address(names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert rendezvous.own_address({"GLOO_SOCKET_IFNAME": "lo"}) == "127.0.0.1"
    with pytest.raises(UserError, match=r"NCCL_SOCKET_IFNAME: 'nosuch0' is invalid: expected one of .*lo"):
        rendezvous.own_address({"NCCL_SOCKET_IFNAME": "nosuch0"})
    monkeypatch.setattr(socket, "gethostbyname", names.__getitem__)
    assert rendezvous.own_address({}) == "10.0.0.2"
    names["n1"] = "127.0.1.1"
    with pytest.raises(UserError, match=r"MASTER_ADDR: None .* n1 resolves to 127.0.1.1: set it to rank 0's address"):
        rendezvous.own_address({})
