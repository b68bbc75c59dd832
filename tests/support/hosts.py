"""Two hosts on one machine, for launchers that want several: namespaces with a network, a name, a hosts file and shared
memory of their own, joined by one cable. They vanish with the processes that hold them. Needs root on Linux.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import pytest
from filelock import FileLock

from tests.conftest import ROOT

ADDRESSES = {"n0": "10.77.0.10", "n1": "10.77.0.11"}
NAMES = tuple(ADDRESSES)
LIMIT = 240  # seconds for one job
# the command line of a process that trains
TRAINS = re.compile(rb"[^\0]*python[\d.]*\0(-u\0)?-m\0ows_ds\0train\0")
# Debian's packages of the programs that are needed
PACKAGES = {
    "ip": ["iproute2"],
    "mpirun": ["openmpi-bin", "libopenmpi-dev"],
    "sshd": ["openssh-server"],
    "ssh": ["openssh-client"],
    "pdsh": ["pdsh"],
    "chromium": ["chromium"],
    "slurmctld": ["slurmctld"],
    "slurmd": ["slurmd"],
    "sbatch": ["slurm-client"],
}
PASSED = ("HF_HUB_OFFLINE", "MKL_CBWR", "COVERAGE_PROCESS_CONFIG")
# What a process of a job gets; nothing of a launcher that this one may run under.
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": os.environ.get("HOME", "/root"),
    "LANG": "C.UTF-8",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions"),
    "TOKENIZERS_PARALLELISM": "false",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # transformers writes into a tokenizer's file whether it was there
    **{
        name: os.environ[name]
        for name in ("HF_HUB_OFFLINE", "MKL_CBWR", "COVERAGE_PROCESS_CONFIG")
        if name in os.environ
    },
}


def need(*programs: str) -> None:
    """Install what is missing of ``programs``; skip the test, with the reason, where this machine cannot have hosts.

    Programs are keys of `PACKAGES`. The reasons: no root, no namespaces, no apt-get, no package index that answers.
    Whatever else goes wrong fails the test.
    """
    if os.geteuid() != 0:
        pytest.skip("hosts are network namespaces, which need root")
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    if "unshare failed" in tried.stderr:  # by the kernel
        pytest.skip(f"hosts are network namespaces, which this machine does not give: {tried.stderr.strip()}")
    assert tried.returncode == 0, tried.stderr
    with FileLock(Path(tempfile.gettempdir()) / "ows_ds-tests-apt.lock"):  # of the other test session
        install([program for program in programs if not shutil.which(program, path=ENVIRONMENT["PATH"])])


def install(programs: Sequence[str]) -> None:
    """Install ``programs`` by apt-get; skips where there is no apt-get or no package index can be reached.

    Only slow tests may.
    """
    if not programs:
        return
    packages = [name for program in programs for name in PACKAGES[program]]
    if not shutil.which("apt-get"):
        pytest.skip(f"there is no apt-get to install {' '.join(packages)}")
    updated, installed = (
        subprocess.run(
            ["apt-get", "-q", *words],
            capture_output=True,
            text=True,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
        )
        for words in (["update"], ["install", "--yes", "--no-install-recommends", *packages])
    )
    # an index that does not answer is a warning of `update`; one that does has a line "Hit:1 ..." or "Get:1 ..."
    if installed.returncode and updated.returncode == 0 and not re.search(r"^(Hit|Get):", updated.stdout, re.MULTILINE):
        pytest.skip(f"{' '.join(packages)} cannot be installed, no package index answers: {updated.stderr[:200]}")
    missing = [program for program in programs if not shutil.which(program, path=ENVIRONMENT["PATH"])]
    assert not missing, f"apt-get does not install {missing}: {updated.stderr[-500:]}{installed.stderr[-500:]}"


def until_step(run_dir: Path, step: int, check: Callable[[], object]) -> None:
    """Wait until the run has logged ``step``. ``check`` is called every second, to fail where it never will."""
    metrics = run_dir / "metrics.jsonl"
    for count in range(20 * LIMIT):
        if metrics.exists() and len(metrics.read_text().splitlines()) > step:
            return
        if count % 20 == 0:
            check()
        time.sleep(0.05)
    pytest.fail(f"step {step} does not come")


class Hosts:
    """Hosts n0 and n1, at 10.77.0.10 and .11 on their ``eth0``.

    folder: for the files of the hosts. own_name: what a host's own name means to itself, by host; its address unless
    given.
    """

    def __init__(self, folder: Path, own_name: Mapping[str, str] | None = None) -> None:
        self._stack = contextlib.ExitStack()
        self._holders: dict[str, int] = {}
        try:
            for name in NAMES:
                known = ADDRESSES | {name: (own_name or {}).get(name, ADDRESSES[name])}
                hosts = folder / f"{name}.hosts"
                lines = "".join(f"{address} {host}\n" for host, address in known.items())
                hosts.write_text(f"127.0.0.1 localhost\n{lines}")
                self._hold(name, hosts)
            self._join_networks()
        except BaseException:
            self._stack.close()
            raise

    def _hold(self, name: str, hosts: Path) -> None:
        script = f"""
            hostname {name} && mount --bind {hosts} /etc/hosts && mount -t tmpfs shm /dev/shm &&
            mount -t tmpfs run /run && mkdir /run/sshd && ip link set lo up && echo ready && exec sleep infinity
        """
        words = ["unshare", "--net", "--uts", "--mount", "sh", "-ec", script]
        holder = subprocess.Popen(words, stdout=subprocess.PIPE, env=ENVIRONMENT)
        self._stack.callback(_end, holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        self._holders[name] = holder.pid
        self._stack.callback(_kill_all_of, os.readlink(f"/proc/{holder.pid}/ns/net"))

    def _join_networks(self) -> None:
        a, b = (str(self._holders[name]) for name in NAMES)
        cable = f"link add eth0 netns {a} type veth peer name eth0 netns {b}"
        subprocess.run(["ip", *cable.split()], check=True, env=ENVIRONMENT)
        for name, address in ADDRESSES.items():
            for words in (f"address add {address}/24 dev eth0", "link set eth0 up"):
                subprocess.run([*self.at(name), "ip", *words.split()], check=True, env=ENVIRONMENT)

    def at(self, name: str) -> list[str]:
        """What a command begins with that runs on host ``name``. It keeps its process id."""
        return ["nsenter", f"--target={self._holders[name]}", "--net", "--uts", "--mount", f"--wd={ROOT}", "--"]

    def start(self, name: str, words: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command on host ``name``, in a session of its own; its output goes to ``log``."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [*self.at(name), *words],
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                env=ENVIRONMENT | environment,
                start_new_session=True,
            )

    @contextlib.contextmanager
    def running(self, name: str, words: Sequence[str], log: Path, **environment: str) -> Iterator[None]:
        """A daemon that stays in the foreground, as long as the context lasts."""
        daemon = self.start(name, words, log, **environment)
        try:
            yield
            assert daemon.poll() is None, log.read_text()
        finally:
            _end(daemon)

    def run(self, commands: Mapping[str, Sequence[str]], folder: Path, **environment: str) -> dict[str, int]:
        """Run a command on each host at the same time; exit codes by host, output in ``folder``/HOST.log.

        What does not end within `LIMIT` is killed, with its session, and fails the test.
        """
        jobs = {
            name: self.start(name, words, folder / f"{name}.log", **environment) for name, words in commands.items()
        }
        try:
            return {name: job.wait(LIMIT) for name, job in jobs.items()}
        except subprocess.TimeoutExpired:
            logs = "\n".join(f"{name}: {(folder / f'{name}.log').read_text()[-3000:]}" for name in jobs)
            pytest.fail(f"not done after {LIMIT} s\n{logs}")
        finally:
            for job in jobs.values():
                self.stop(job)
            self.clear()

    def clear(self) -> None:
        """Kill what still trains: torchrun's processes have sessions of their own, and outlive it if it is killed."""
        with self.frozen() as left:
            _signal(left, signal.SIGKILL)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[list[int]]:
        """The processes that train, without their launchers, stand still as long as the context lasts; their ids."""
        ranks = []
        for holder in self._holders.values():
            for pid in _all_of(os.readlink(f"/proc/{holder}/ns/net")):
                with contextlib.suppress(OSError):
                    if TRAINS.match(Path(f"/proc/{pid}/cmdline").read_bytes()):
                        ranks.append(pid)
        _signal(ranks, signal.SIGSTOP)
        try:
            yield ranks
        finally:
            _signal(ranks, signal.SIGCONT)

    @staticmethod
    def stop(job: subprocess.Popen[bytes]) -> None:
        """Kill what `start` started, with all of its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _all_of(network: str) -> Iterator[int]:
    """Ids of the processes on a host."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it is gone
            if os.readlink(process / "ns" / "net") == network:
                yield int(process.name)


def _kill_all_of(network: str) -> None:
    """What is left on a host, such as processes of a launcher that was killed, which have sessions of their own."""
    _signal(_all_of(network), signal.SIGKILL)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
