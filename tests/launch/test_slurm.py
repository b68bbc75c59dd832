"""Jobs of a real SLURM controller on two hosts: told to stop, they save, are requeued, and end as if nothing was."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from ows_ds import config
from ows_ds.slurm import Allocation, render
from tests.launch.hosts import LIMIT, Hosts, need
from tests.launch.slurm import Slurm, script, slurm
from tests.ranks.pool import Pools
from tests.ranks.test_trainer import contents, run
from tests.tiny_run import recipe

# long enough to be pushed out in the middle of the first period; one checkpoint is kept, the last
LONG: Mapping[str, Any] = {"sharding": "zero3", "steps": 40, "batch_size": 2, "micro_batch_size": 1, "keep_last": 1}
PERIOD = 36


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    need("ip", "slurmctld", "slurmd", "sbatch")
    folder = tmp_path_factory.mktemp("slurm")
    with Hosts(folder) as hosts, slurm(hosts, folder) as one:
        yield one


@pytest.fixture(scope="module")
def expected(pools: Pools, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run on one host, that nothing stops, leaves behind."""
    folder = tmp_path_factory.mktemp("expected") / "run"
    pools(2).run(run, long_recipe(inputs, folder), None)
    return contents(folder)


def long_recipe(inputs: Path, run_dir: Path) -> config.Recipe:
    return recipe(inputs, run_dir, {"period": PERIOD}, **LONG)


def write(inputs: Path, folder: Path) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(config.to_yaml(long_recipe(inputs, folder / "run")))
    return file


def until_step(cluster: Slurm, job: int, run_dir: Path, step: int) -> None:
    """Wait until the run has logged ``step``."""
    cluster.wait(job, "RUNNING")
    end, metrics = time.monotonic() + LIMIT, run_dir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) <= step:
        state = cluster.state(job)
        assert state["JobState"] == "RUNNING", Path(state["StdOut"]).read_text()[-5000:]
        assert time.monotonic() < end, f"step {step} does not come"
        time.sleep(0.2)


def stopped_after(log: str) -> list[int]:
    """The steps after which the job was stopped."""
    return [int(step) for step in re.findall(r"stopped by a signal after step (\d+) of", log)]


def ends_as_if_nothing_was(cluster: Slurm, job: int, folder: Path, expected: Any) -> str:
    """Wait for the job's end; its output. It was stopped once, in the middle of a period, and went on."""
    state = cluster.wait(job, "COMPLETED")
    log = Path(state["StdOut"]).read_text()
    [step] = stopped_after(log)
    assert 0 < step < PERIOD
    assert f"going on after step {step} from" in log
    assert state["Restarts"] == "1"
    records, files = contents(folder / "run")
    assert files == expected[1]
    assert records == expected[0]
    return log


def test_a_preempted_job_ends_as_if_nothing_was(cluster: Slurm, inputs: Path, tmp_path: Path, expected: Any) -> None:
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
    words = [sys.executable, "-m", "ows_ds", "launch", "--slurm", str(tmp_path / "cluster.yaml")]
    words += ["--config", str(write(inputs, tmp_path)), "--log.progress", "plain"]
    dry = cluster.client(*words, "--dry-run")
    assert not (tmp_path / "run").exists()
    said = cluster.client(*words)
    assert (tmp_path / "run" / "job.sbatch").read_text() == dry
    job = int(re.findall(r"job (\d+):", said)[0])
    until_step(cluster, job, tmp_path / "run", 2)
    higher = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=true", "--output=/dev/null")
    cluster.wait(higher, "COMPLETED")
    log = ends_as_if_nothing_was(cluster, job, tmp_path, expected)
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
    cluster: Slurm, inputs: Path, tmp_path: Path, expected: Any, name: str, launcher: str, nodes: int
) -> None:
    """Each way to start two processes, told to stop and requeued by the script."""
    text, count = re.subn(
        r"^launcher=\w+", f"launcher={launcher}", Path(script(f"{name}.sbatch")).read_text(), flags=re.M
    )
    assert count == 1
    (tmp_path / "job.sbatch").write_text(text)
    options = [f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}", "--gpus-per-node=1"]
    words = [str(write(inputs, tmp_path)), "--log.progress", "plain"]
    job = cluster.submit(*options, f"--output={tmp_path}/job.log", str(tmp_path / "job.sbatch"), *words)
    until_step(cluster, job, tmp_path / "run", 2)
    cluster.client("scancel", "--batch", "--signal=USR1", str(job))  # as SLURM itself before a time limit
    if name == "70b":  # computes activations again: other arithmetic
        log = Path(cluster.wait(job, "COMPLETED")["StdOut"]).read_text()
        assert len(stopped_after(log)) == 1
    else:
        ends_as_if_nothing_was(cluster, job, tmp_path, expected)


@pytest.mark.slow
def test_preemption_that_tells_the_processes_alone(
    inputs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, expected: Any
) -> None:
    """SLURM's default: SIGTERM to the steps and none to the batch shell."""
    need("ip", "slurmctld", "slurmd", "sbatch")
    folder = tmp_path_factory.mktemp("slurm")
    with Hosts(folder) as hosts, slurm(hosts, folder, told="idle_on_node_suspend") as cluster:
        options = ["--ntasks-per-node=1", "--gpus-per-node=1", "--partition=low", f"--output={tmp_path}/job.log"]
        words = [str(write(inputs, tmp_path)), "--log.progress", "plain"]
        job = cluster.submit(*options, script("several_nodes.sbatch"), *words)
        until_step(cluster, job, tmp_path / "run", 2)
        cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=true", "--output=/dev/null")
        ends_as_if_nothing_was(cluster, job, tmp_path, expected)


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
    jobs = {submit("75 75 0"): ("COMPLETED", 2), submit("2", 9): ("FAILED", 0), submit("1"): ("FAILED", 0)}
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


@pytest.mark.slow
def test_deepspeed_launches_with_slurm(cluster: Slurm, inputs: Path, tmp_path: Path) -> None:
    """`deepspeed --launcher slurm` within an allocation."""
    folder = tmp_path / "run"
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe(inputs, folder, sharding="zero3", steps=2)))
    (tmp_path / "hostfile").write_text("n0 slots=1\nn1 slots=1\n")
    bin = Path(sys.executable).parent
    job = cluster.submit(
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--output={tmp_path}/job.log",
        f"--wrap={bin}/deepspeed --hostfile {tmp_path}/hostfile --launcher slurm --no_ssh_check --master_addr n0 "
        f"--launcher_args '--nodes=2 --ntasks-per-node=1' {bin}/ows-ds train --config {file}",
    )
    cluster.wait(job, "COMPLETED")
    records, _ = contents(folder)
    assert records[2]["comm_bytes"]["gradients"] > 0
