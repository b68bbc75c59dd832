"""Rank, world size and master address where the launcher is SLURM's ``srun`` or ``mpirun``, and whether other hosts can
reach that address. Other launchers set the variables themselves. Nothing is written to the environment here.
"""

from __future__ import annotations

import fcntl
import ipaddress
import re
import socket
import struct
from collections.abc import Mapping

from ows_ds.errors import UserError

MPI_MARKS = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")  # Open MPI, MVAPICH, MPICH and Intel MPI
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
FIRST_PORT, PORTS = 10000, 20000  # below those that Linux hands out


def discover(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this rank.

    Empty where a launcher has set them already, and at world size 1. What is set of MASTER_ADDR and MASTER_PORT is
    kept. Under MPI it is collective, and MPI is finalized. Raises UserError where mpi4py is missing.
    """
    if "LOCAL_RANK" in environment:
        return {}
    if any(mark in environment for mark in MPI_MARKS):  # first: mpirun itself starts its daemons with srun
        found = _from_mpi(environment)
    elif "SLURM_STEP_NUM_TASKS" in environment:  # not in a batch script, which is no step
        found = _from_slurm(environment)
    else:
        return {}
    return found if found["WORLD_SIZE"] != "1" else {}


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """srun numbers the tasks node by node: task 0 is on the first node."""
    # tasks of each node, such as 4(x2),3
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"])
    tasks = [int(count) for count, times in runs for _ in range(int(times or 1))]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT")
        or str(FIRST_PORT + (int(environment["SLURM_JOB_ID"]) * 16 + int(environment["SLURM_STEP_ID"])) % PORTS),
    }


def first_host(nodes: str) -> str:
    """``gpu003`` of SLURM's ``gpu[003-007,011],login1``."""
    [first] = re.findall(r"^(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _from_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
        raise UserError("mpi4py", f"{error}", "install ows_ds[mpi] and an MPI library on every host") from error
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    meeting = bytearray(300)
    if world.rank == 0:
        address = "127.0.0.1" if node.size == world.size else own_address(environment)
        port = environment.get("MASTER_PORT") or free_port("")
        text = f"{environment.get('MASTER_ADDR') or address} {port}".encode()
        meeting[: len(text)] = text
    world.Bcast(meeting)
    address, port = meeting.rstrip(b"\0").decode().split()
    found = {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(node.rank),
        "LOCAL_WORLD_SIZE": str(node.size),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    node.Free()
    MPI.Finalize()  # a rank that fails later must not wait for the others in MPI
    return found


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of ``host`` ("": of all of this machine's addresses) on which nothing listens at the moment."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def own_address(environment: Mapping[str, str]) -> str:
    """This host's IPv4 address for others: of the network interface in `INTERFACES`, else of the host's own name.

    Raises UserError for an interface without one, and where the name resolves to a loopback address.
    """
    for variable in INTERFACES:
        if name := environment.get(variable):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                request = struct.pack("256s", name.encode()[:15])
                try:
                    reply = fcntl.ioctl(any_socket, 0x8915, request)  # SIOCGIFADDR
                except OSError as error:
                    names = ", ".join(name for _, name in socket.if_nameindex())
                    raise UserError(variable, name, f"expected one of {names} that has an address ({error})") from error
            return socket.inet_ntoa(reply[20:24])
    if trouble := _loops(socket.gethostname()):
        raise UserError("MASTER_ADDR", None, f"{trouble}: set it to rank 0's address, or {INTERFACES[0]}")
    return socket.gethostbyname(socket.gethostname())


def check(environment: Mapping[str, str], backend: str) -> None:
    """Refuse addresses at which ranks on several hosts would wait for each other forever.

    environment: with the variables of `discover`. backend: gloo or nccl.
    Raises UserError on the hosts concerned.
    """
    world = int(environment.get("WORLD_SIZE", 1))
    local = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or "0"  # the second is DeepSpeed's
    address = environment.get("MASTER_ADDR", "localhost")
    on_first_host = int(environment.get("RANK", 0)) == int(environment.get("LOCAL_RANK", 0))
    if world == int(local) or (local == "0" and _loops(address)):  # all ranks seem to be on one host
        return
    if not on_first_host and (trouble := _loops(address)):
        raise UserError("MASTER_ADDR", address, f"expected the host of rank 0 as other hosts reach it ({trouble})")
    name = socket.gethostname()
    if backend == "gloo" and not environment.get("GLOO_SOCKET_IFNAME") and (trouble := _loops(name)):
        right = f"{trouble}, where other hosts cannot reach it: set it to the network interface, such as eth0"
        raise UserError("GLOO_SOCKET_IFNAME", None, right)
    if backend == "nccl" and environment.get("NCCL_SOCKET_IFNAME") == "lo":
        raise UserError("NCCL_SOCKET_IFNAME", "lo", "expected the network interface to the other hosts")


def _loops(name: str) -> str:
    """What is wrong with a host's name or address where it leads back to the host that asks; else empty."""
    try:
        # gloo takes the first one, too
        first = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return f"the name {name} does not resolve"
    return f"{name} resolves to {first}" if ipaddress.ip_address(first.partition("%")[0]).is_loopback else ""
