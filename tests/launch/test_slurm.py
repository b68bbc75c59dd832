"""Jobs of a real SLURM controller on two hosts: asked to stop, they save, are requeued, and end as if never stopped."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ows_ds import config
from ows_ds.slurm.job import Allocation, render
from tests.launch.conftest import PERIOD, launched, same
from tests.support.hosts import LIMIT, Hosts, need, until_step
from tests.support.pages import command
from tests.support.pool import Pools
from tests.support.slurm import Slurm, script, slurm
from tests.support.tiny_run import recipe
from tests.train.test_trainer import contents, run

# a job of a higher partition, that needs all nodes
PUSH_OUT = ("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--wrap=true", "--output=/dev/null")
SIGNALS = 1 << signal.SIGUSR1 - 1 | 1 << signal.SIGTERM - 1  # in a mask of signals


@pytest.fixture(scope="module")
def cluster(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    need("slurmctld", "slurmd", "sbatch")
    with slurm(hosts, tmp_path_factory.mktemp("slurm")) as one:
        yield one


def write(inputs: Path, folder: Path, **train: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(config.to_yaml(launched(inputs, folder / "run", **train)))
    return file


def signalled(cluster: Slurm, job: int, run_dir: Path, *words: str) -> None:
    """Have a client's command ask the job to stop, after some steps.

    Its processes stand still until the signal has come to them, so that no run is too fast for SLURM.
    """
    cluster.wait(job, "RUNNING")
    until_step(run_dir, 2, lambda: cluster.runs(job))
    with cluster.hosts.frozen() as ranks:
        assert len(ranks) == 2
        cluster.client(*words)
        end = time.monotonic() + LIMIT
        while not all(reached(pid) for pid in ranks):
            assert time.monotonic() < end, "the signal does not come"
            time.sleep(0.1)


def reached(pid: int) -> bool:
    """Whether the process has a signal before it, or was let go by SLURM to see it."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask, state = (re.search(rf"^{key}:\s+(\w+)", status, re.MULTILINE) for key in ("ShdPnd", "State"))
    assert mask is not None
    assert state is not None
    return bool(int(mask[1], 16) & SIGNALS) or state[1] != "T"


def stopped_after(log: str) -> list[int]:
    """The steps after which the job was stopped."""
    return [int(step) for step in re.findall(r"stopped by a signal after step (\d+) of", log)]


def ends_as_if_never_stopped(cluster: Slurm, job: int, folder: Path, expected: Any) -> str:
    """Wait for the job's end; its output. It was stopped once, in the middle of a period, and resumed."""
    state = cluster.wait(job, "COMPLETED")
    log = Path(state["StdOut"]).read_text()
    [step] = stopped_after(log)
    assert 0 < step < PERIOD
    assert f"resuming after step {step} from" in log
    assert state["Restarts"] == "1"
    same(folder / "run", expected)
    return log


@pytest.mark.ci
def test_a_preempted_job_ends_as_if_never_stopped(cluster: Slurm, inputs: Path, tmp_path: Path, expected: Any) -> None:
    """`ows-ds launch --slurm` submits it; a job of a higher partition pushes it out."""
    (tmp_path / "cluster.yaml").write_text(
        yaml.safe_dump(
            {
                "nodes": 2,
                "processes_per_node": 1,
                "partition": "low",
                "time": "01:00:00",
                "lead": 20,
                "sbatch": [f"--output={tmp_path}/job.log"],
                "environment": ["NOTE=it's $HOME; `exit`"],
            }
        )
    )
    files = {"cluster.yaml": str(tmp_path / "cluster.yaml"), "my.yaml": str(write(inputs, tmp_path)), "64": "4"}
    *words, dry_run = [files.get(word, word) for word in command("docs/launch.md", "ows-ds", "launch")]
    words += ["--log.progress", "plain", "--train.resume", "auto"]
    said = cluster.client(*words)
    job = int(re.findall(r"job (\d+):", said)[0])
    signalled(cluster, job, tmp_path / "run", *PUSH_OUT)
    dry = cluster.client(*words, dry_run)  # while the job waits
    assert dry.replace("(resumed)", "(new)") == (tmp_path / "run" / "job.sbatch").read_text()
    log = ends_as_if_never_stopped(cluster, job, tmp_path, expected)
    assert "exit code 75 after start 1: the job is requeued" in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launcher", "nodes"),
    [
        ("several_nodes", "torchrun", 2),
        ("several_nodes", "accelerate", 2),
        ("several_nodes", "srun", 2),
        ("one_node", "srun", 1),
        ("70b", "srun", 2),
    ],
)
def test_job_scripts(
    cluster: Slurm, pools: Pools, inputs: Path, tmp_path: Path, expected: Any, name: str, launcher: str, nodes: int
) -> None:
    """Each way to start two ranks, asked to stop and requeued by the script."""
    text, count = re.subn(
        r"^launcher=\w+", f"launcher={launcher}", Path(script(f"{name}.sbatch")).read_text(), flags=re.M
    )
    assert count == 1
    (tmp_path / "job.sbatch").write_text(text)
    given = {"--nodes=4": f"--nodes={nodes}", "my.yaml": str(write(inputs, tmp_path)), "64": "4"}
    sbatch = [given.get(word, word) for word in command("docs/launch.md", "sbatch")]
    options = [sbatch[1], f"--ntasks-per-node={2 // nodes}", "--gpus-per-node=1"]
    words = [*sbatch[3:], "--log.progress", "plain"]
    job = cluster.submit(*options, f"--output={tmp_path}/job.log", str(tmp_path / "job.sbatch"), *words)
    # as SLURM itself before a time limit
    signalled(cluster, job, tmp_path / "run", "scancel", "--batch", "--signal=USR1", str(job))
    if name == "70b":  # computes activations again
        pools(2).run(run, launched(inputs, tmp_path / "whole", gradient_checkpointing=True), None)
        expected = contents(tmp_path / "whole")
    ends_as_if_never_stopped(cluster, job, tmp_path, expected)


@pytest.mark.slow
def test_preemption_that_signals_the_ranks_alone(
    inputs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, expected: Any
) -> None:
    """SLURM's default: SIGTERM to the steps and none to the batch shell."""
    need("ip", "slurmctld", "slurmd", "sbatch")
    folder = tmp_path_factory.mktemp("slurm")
    with Hosts(folder) as hosts, slurm(hosts, folder, parameters="idle_on_node_suspend") as cluster:
        options = ["--ntasks-per-node=1", "--gpus-per-node=1", "--partition=low", f"--output={tmp_path}/job.log"]
        words = [str(write(inputs, tmp_path)), "--log.progress", "plain"]
        job = cluster.submit(*options, script("several_nodes.sbatch"), *words)
        signalled(cluster, job, tmp_path / "run", *PUSH_OUT)
        ends_as_if_never_stopped(cluster, job, tmp_path, expected)


@pytest.mark.slow
def test_a_lost_node(inputs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, expected: Any) -> None:
    """Cut off for longer than SlurmdTimeout: SLURM itself requeues the job, which starts when the node is back."""
    need("ip", "slurmctld", "slurmd", "sbatch")
    folder = tmp_path_factory.mktemp("slurm")
    with Hosts(folder) as hosts, slurm(hosts, folder) as cluster:
        cable = [*hosts.at("n1"), "ip", "link", "set", "eth0"]
        options = ["--ntasks-per-node=1", "--gpus-per-node=1", f"--output={tmp_path}/job.log"]
        words = [str(write(inputs, tmp_path)), "--log.progress", "plain"]
        job = cluster.submit(*options, script("several_nodes.sbatch"), *words)
        cluster.wait(job, "RUNNING")
        until_step(tmp_path / "run", 4, lambda: cluster.runs(job))
        with hosts.frozen() as [first, _]:
            subprocess.run([*cable, "down"], check=True)
        end = time.monotonic() + LIMIT
        # if the cable came back while both live, they would continue, and save
        while (found := cluster.state(job))["Restarts"] != "1" or Path(f"/proc/{first}").exists():
            assert time.monotonic() < end, found
            time.sleep(0.5)
        subprocess.run([*cable, "up"], check=True)
        log = Path(cluster.wait(job, "COMPLETED")["StdOut"]).read_text()
        assert stopped_after(log) == []
        assert re.search(r"resuming after step [3-9] from", log)
        same(tmp_path / "run", expected)


@pytest.mark.slow
def test_the_exit_code_decides(cluster: Slurm, tmp_path: Path) -> None:
    """What stands in for `python -m ows_ds` exits with a code for each start; a signal makes it 75."""
    stub = tmp_path / "stub"
    stub.write_text(
        "#!/bin/bash\n"
        'codes=($1); shift; echo started "$@"\n'
        "trap 'exit 75' TERM USR1\n"
        "if [[ $codes == wait ]]; then sleep 600 & wait; fi\n"
        "exit ${codes[${SLURM_RESTART_COUNT:-0}]}\n"
    )
    stub.chmod(0o755)

    def submit(codes: str, retries: int = 0) -> int:
        file = tmp_path / f"{codes}-{retries}.sbatch"
        description = Allocation(
            processes_per_node=1,
            gpus_per_node=0,
            retries=retries,
            inside=[str(stub), codes],
            sbatch=[f"--output={tmp_path}/%j.log"],
        )
        file.write_text(render(description, [], "r.yaml", {}, tmp_path))
        return cluster.submit(str(file))

    cancelled = submit("wait")
    jobs = {submit("75 0"): ("COMPLETED", 1), submit("2", 9): ("FAILED", 0), submit("1"): ("FAILED", 0)}
    jobs |= {submit("1 0", 1): ("COMPLETED", 1), submit("1 1 0", 1): ("FAILED", 1)}
    cluster.wait(cancelled, "RUNNING")
    log = tmp_path / f"{cancelled}.log"
    while not log.exists() or "started python -m ows_ds train --config r.yaml" not in log.read_text():
        time.sleep(0.2)
    cluster.client("scancel", str(cancelled))
    for job, (state, restarts) in jobs.items():
        end = time.monotonic() + LIMIT
        while (found := cluster.state(job))["JobState"] != state or int(found["Restarts"]) != restarts:
            assert time.monotonic() < end, found
            time.sleep(0.5)
    assert cluster.state(cancelled)["JobState"] == "CANCELLED"
    assert "requeued" not in log.read_text()


@pytest.mark.slow
def test_an_array_of_variants(cluster: Slurm, inputs: Path, tmp_path: Path) -> None:
    study = {
        "recipe": config.to_dict(recipe(inputs, tmp_path / "unused", steps=2)),
        "test": str(tmp_path / "test.jsonl"),
        "variants": {"ows": None, "lisa": {"method.name": "lisa"}},
    }
    study["recipe"]["train"].pop("output_dir")
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    options = ["--array=0-1", "--ntasks-per-node=1", "--gpus-per-node=1", f"--output={tmp_path}/job-%a.log"]
    job = cluster.submit(*options, script("bench_array.sbatch"), str(tmp_path / "study.yaml"), str(tmp_path / "out"))
    end = time.monotonic() + LIMIT
    while cluster.client("squeue", "--noheader", f"--jobs={job}", "--states=PENDING,RUNNING,COMPLETING"):
        assert time.monotonic() < end
        time.sleep(0.5)
    logs = "\n".join(log.read_text()[-2000:] for log in tmp_path.glob("job-*.log"))
    assert sorted(f.parent.parent.name for f in tmp_path.glob("out/runs/*/*/result.json")) == ["lisa", "ows"], logs
    words = ["--config", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "out"), "--json"]
    report = json.loads(cluster.client(sys.executable, "-m", "ows_ds", "bench", "quality", *words))
    assert (report["runs"], report["runs_complete"], sorted(report["variants"])) == (2, 2, ["lisa", "ows"])


@pytest.mark.slow
def test_srun_alone(cluster: Slurm, inputs: Path, tmp_path: Path, expected: Any) -> None:
    """Without a job script nobody sets MASTER_ADDR."""
    words = [sys.executable, "-m", "ows_ds", "train", "--config", str(write(inputs, tmp_path))]
    cluster.client("srun", "--nodes=2", "--ntasks-per-node=1", *words)
    same(tmp_path / "run", expected)


@pytest.mark.slow
def test_deepspeed_launches_with_slurm(cluster: Slurm, inputs: Path, tmp_path: Path, expected: Any) -> None:
    """`deepspeed --launcher slurm` within an allocation; no ssh is there to ask for the first host's address."""
    (tmp_path / "hostfile").write_text("n0 slots=1\nn1 slots=1\n")
    bin = Path(sys.executable).parent
    job = cluster.submit(
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--output={tmp_path}/job.log",
        f"--wrap={bin}/deepspeed --hostfile {tmp_path}/hostfile --launcher slurm --no_ssh_check --master_addr n0 "
        f"--launcher_args '--nodes=2 --ntasks-per-node=1' {bin}/ows-ds train --config {write(inputs, tmp_path)}",
    )
    cluster.wait(job, "COMPLETED")
    same(tmp_path / "run", expected)
