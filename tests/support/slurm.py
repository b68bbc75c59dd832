"""A real SLURM on the two hosts: one controller, two daemons, each in the foreground, ended by its process id."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.hosts import ADDRESSES, ENVIRONMENT, LIMIT, NAMES, Hosts

# Jobs of the partition `high` push those of `low` out, which get a signal before (preempt_send_user_signal). A requeued
# job may start again as soon as its credentials have expired: cred_expire, in seconds.
CONFIGURATION = """
ClusterName=ows
SlurmctldHost=n0
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
TmpFS=/tmp
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmctldParameters={parameters}
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """The clients' side. Both nodes say that they have a GPU, so that job scripts run as they are."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.environment = ENVIRONMENT | {"SLURM_CONF": str(folder / "slurm.conf")}

    def client(self, *words: str) -> str:
        """What a client (squeue, scontrol, ...) prints on host n0."""
        done = subprocess.run(
            [*self.hosts.at("n0"), *words], env=self.environment, capture_output=True, text=True, timeout=LIMIT
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str) -> int:
        """``sbatch`` with these words, in this checkout; the job's number."""
        return int(self.client("sbatch", "--parsable", *words).split(";")[0])

    def state(self, job: int) -> dict[str, str]:
        """What ``scontrol show job`` says, key by key."""
        return dict(re.findall(r"(\w+)=(\S*)", self.client("scontrol", "show", "job", str(job))))

    def runs(self, job: int) -> None:
        """Fail the test unless the job is running."""
        state = self.state(job)
        assert state["JobState"] == "RUNNING", Path(state["StdOut"]).read_text()[-5000:]

    def wait(self, job: int, *states: str) -> dict[str, str]:
        """Wait until the job is in one of ``states``; what `state` says then. Fails the test after `LIMIT` seconds."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            found = self.state(job)
            if found["JobState"] in states:
                return found
            if found["JobState"] in ("FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED", "COMPLETED"):
                break
            time.sleep(0.5)
        log = Path(found["StdOut"])
        pytest.fail(f"job {job} is not {states} but {found}\n{log.read_text()[-5000:] if log.exists() else ''}")


@contextlib.contextmanager
def slurm(hosts: Hosts, folder: Path, parameters: str = "preempt_send_user_signal") -> Iterator[Slurm]:
    """A cluster with two idle nodes. parameters: slurmctld's."""
    nodes = "\n".join(f"NodeName={n} NodeAddr={a} CPUs=2 Gres=gpu:1" for n, a in ADDRESSES.items())
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, nodes=nodes, parameters=parameters))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (folder / "state").mkdir()
    one = Slurm(hosts, folder)
    with contextlib.ExitStack() as stack:
        conf = str(folder / "slurm.conf")
        stack.enter_context(hosts.running("n0", ["slurmctld", "-D", "-f", conf], folder / "slurmctld.log"))
        for name in NAMES:
            daemon = ["slurmd", "-D", "-N", name, "-f", conf]
            stack.enter_context(hosts.running(name, daemon, folder / f"slurmd-{name}.log"))
        end = time.monotonic() + 30
        idle = ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%t"]
        while True:
            with contextlib.suppress(AssertionError):
                if one.client(*idle).split() == ["idle"] * 2:
                    break
            logs = "\n".join(log.read_text()[-2000:] for log in folder.glob("slurm*.log"))
            assert time.monotonic() < end, f"the nodes do not come up\n{logs}"
            time.sleep(0.3)
        yield one


def script(name: str) -> str:
    """A job script of ours."""
    return str(ROOT / "launch" / "slurm" / name)
