"""`ows-ds launch --slurm`: a recipe and a cluster's description -> a job script, checked before it is submitted.

The script is a head (what the job takes, and what the site asks for) and ``slurm.sh``, its body, which starts the
ranks, passes signals on and has the job requeued. The scripts in ``launch/slurm`` have the same body.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ows_ds import config, files
from ows_ds.config import MOST, Recipe, Settings, Wrong, accumulation, parse
from ows_ds.config.settings import Count, Expected, Number
from ows_ds.errors import UserError, one_line, raise_all
from ows_ds.tables import gib

BODY = Path(__file__).with_name("slurm.sh")
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
# What may stand in a line of #SBATCH, which SLURM reads by rules of its own: nothing that would need quotes.
PLAIN = r"[\w.,:@/+=%*&|()\[\]-]+"


Name = Annotated[str, Field(pattern=f"^{PLAIN}$"), Expected("a name without spaces and quotes")]
Words = Annotated[list[Annotated[str, Field(pattern=r"^[^\x00]*$")]], Expected("a list of texts")]
Options = Annotated[
    list[Annotated[str, Field(pattern=rf"^--[a-z][a-z-]*(={PLAIN})?$")]],
    Expected("a list of options such as --constraint=a100, without spaces and quotes"),
]
Variables = Annotated[
    list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*=[^\x00]*$")]], Expected("a list of NAME=VALUE")
]


class Allocation(Settings):
    """What a job takes of a SLURM cluster, and what the site asks for: keys of the cluster's description."""

    nodes: Count = 1
    """Nodes of the job."""
    processes_per_node: Count = 8
    """Ranks of a node: one for each GPU."""
    gpus_per_node: int | None = None
    """GPUs of a node; null: as many as ranks; 0: the CPU is meant."""
    gpu_memory: Number | None = Field(None, gt=0, lt=MOST)
    """Memory of a GPU, GiB; null: not compared with what the job needs."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """srun starts each rank; torchrun starts those of its node, itself started by srun."""
    time: Annotated[str, Expected("a time such as 24:00:00 or 2-00:00:00, in quotes")] = Field(
        "24:00:00", pattern=r"^(\d+-)?\d+(:\d+){0,2}$"
    )
    """Time limit, such as 24:00:00 or 2-00:00:00."""
    lead: int = Field(300, ge=0, le=MOST)
    """Seconds before the time limit at which the job saves, stops and is requeued."""
    retries: int = Field(0, ge=0, le=MOST)
    """How often a job that failed is tried again."""
    name: Name = "ows"
    """Name of the job."""
    partition: Name | None = None
    """Partition; null: the cluster's default."""
    account: Name | None = None
    """Account that pays; null: the user's default."""
    qos: Name | None = None
    """Quality of service; null: the default."""
    sbatch: Options = Field(["--exclusive"])
    """Further options of sbatch, such as [--exclusive, --constraint=a100]."""
    modules: Words = Field([])
    """Modules to load on each node, in order."""
    activate: str | None = None
    """File that each node sources after that, such as .venv/bin/activate."""
    environment: Variables = Field([])
    """Variables of all ranks, such as [NCCL_SOCKET_IFNAME=ib0]."""
    inside: Words = Field([])
    """What stands before the command on each node, such as [apptainer, exec, --nv, image.sif]."""
    port: Annotated[int, Expected("a port from 1024 to 65535")] | None = Field(None, ge=1024, le=65535)
    """Port on the first node at which ranks meet; null: one that follows from the job's number."""

    def contradictions(self) -> Iterator[Wrong]:
        if self.gpus not in (0, self.processes_per_node):
            right = f"expected cluster.processes_per_node, {self.processes_per_node}, or 0 for the CPU"
            yield Wrong("gpus_per_node", right, ("processes_per_node",))

    @property
    def gpus(self) -> int:
        """GPUs of a node that the job asks for."""
        return self.processes_per_node if self.gpus_per_node is None else self.gpus_per_node

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.nodes * self.processes_per_node


def read(path: str | Path) -> Allocation:
    """The cluster that a YAML file describes. Raises UserError for unknown keys, wrong types and impossible values."""
    return parse(Allocation, files.read_yaml(path, "--slurm"), "cluster.", _not_here)


def _not_here(job: Allocation) -> Iterator[Wrong]:
    """What this machine lacks, or gives to others."""
    if job.activate is not None and not os.path.isfile(job.activate):
        yield Wrong("activate", "expected a file that exists")
    if job.inside and not shutil.which(job.inside[0]) and "/" in job.inside[0]:
        yield Wrong("inside", f"expected a program that exists: there is no {job.inside[0]}")
    low, high = map(int, EPHEMERAL.read_text().split()) if EPHEMERAL.exists() else (32768, 60999)
    if job.port is not None and low <= job.port <= high:
        yield Wrong("port", f"expected a port outside of {low} to {high}, which Linux hands out to anybody")


def check(recipe: Recipe, job: Allocation, planned: int | None = None) -> list[str]:
    """Whether the job could run, as far as that shows here; what was found, a line each.

    planned: bytes that a GPU will hold at most; None: not known. ``config.check`` must have passed.
    Raises UserError for all that is wrong.
    """
    steps, run_dir, found = 0, Path(recipe.train.output_dir), []
    try:
        steps = accumulation(recipe, job.world_size)
    except UserError as error:
        found.append(error)
    if recipe.train.resume not in ("never", "auto"):
        right = "expected auto, or never for a new run: a job that is requeued resumes its own run"
        found.append(UserError("train.resume", recipe.train.resume, right))
    used = config.used(run_dir)
    if used and recipe.train.resume == "never":
        right = f"expected a folder without {used[0]}, or --train.resume auto to resume the run that is there"
        found.append(UserError("train.output_dir", str(run_dir), right))
    memory = "not planned" if planned is None else gib(planned)
    if job.gpu_memory is not None and planned is not None and planned > job.gpu_memory * 2**30:
        right = f"expected GPUs with more: {memory} are planned; or less to hold (docs/memory.md)"
        found.append(UserError("cluster.gpu_memory", job.gpu_memory, right))
    raise_all(found)
    local = Path(recipe.model.path).is_dir()
    where = f"{job.gpus} GPUs" if job.gpus else "the CPU"
    return [
        f"{job.world_size} ranks: {job.nodes} nodes x {job.processes_per_node}, on {where} of each",
        f"{recipe.train.global_batch_size} sequences a step: {config.data_ranks(recipe, job.world_size)} "
        f"{'ranks' if recipe.train.sequence_parallel == 1 else 'groups of ranks'} x "
        f"{recipe.train.micro_batch_size} x {steps} micro-batches",
        f"model {recipe.model.path} ({'a folder' if local else 'on the hub'})",
        f"output {run_dir.resolve()} ({'resumed' if used else 'new'})",
        f"memory of a GPU at most {memory}" + (f" of {job.gpu_memory:g} GiB" if job.gpu_memory is not None else ""),
        f"port {job.port or 'from the number of the job'}",
    ]


def render(job: Allocation, notes: Sequence[str], recipe_file: str, options: Mapping[str, Any], folder: Path) -> str:
    """The job script: trains the recipe in ``recipe_file`` with ``options`` (key -> value) on top, from ``folder``.

    notes: lines for its head.
    """
    directives = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.processes_per_node,
        "gpus-per-node": job.gpus or None,
        "time": job.time,
        "signal": f"B:USR1@{job.lead}",
        "open-mode": "append",
        "output": "slurm-%j.log",
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in directives.items() if value is not None]
    lines += [f"#SBATCH {option}" for option in ("--requeue", *job.sbatch)]
    words = [word for key, value in options.items() for word in (f"--{key}", _text(value))]
    variables = [variable.partition("=") for variable in job.environment]
    setup = [f"module load {shlex.quote(name)}" for name in job.modules]
    setup += [f"source {shlex.quote(str(Path(job.activate).resolve()))}"] if job.activate is not None else []
    setup += [f"export {name}={shlex.quote(value)}" for name, _, value in variables]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"# {one_line(note)}" for note in notes),
            *lines,
            "",
            f"cd {shlex.quote(str(folder))} || exit 1",
            f"command=(train --config {shlex.quote(recipe_file)} {shlex.join([*words, '--train.resume', 'auto'])})",
            f"launcher={job.launcher}",
            f"inside=({shlex.join(job.inside)})",
            f"retries={job.retries}",
            *([f"port={job.port}"] if job.port is not None else []),
            "setup() {",
            *(f"    {line}" for line in setup or [":"]),
            "}",
            "",
            BODY.read_text(),
        ]
    )


def _text(value: Any) -> str:
    """A value as an option of the command line has it."""
    return value if isinstance(value, str) else json.dumps(value)


def launch(
    recipe: Recipe,
    job: Allocation,
    recipe_file: str,
    options: Mapping[str, Any],
    dry_run: bool,
    planned: int | None = None,
) -> None:
    """Check, write the script into ``train.output_dir`` and submit it; with ``dry_run`` check and print it, no more.

    Raises UserError for what is wrong, also by SLURM's own judgement (``sbatch --test-only``) where it is at hand.
    """
    script = render(job, check(recipe, job, planned), recipe_file, options, Path.cwd())
    if dry_run:
        print(script, end="", flush=True)
    if shutil.which("sbatch"):
        print(_sbatch(["--test-only"], script), file=sys.stderr)
    elif not dry_run:
        raise UserError("sbatch", None, "start this where SLURM's commands are, or look at the script with --dry-run")
    if dry_run:
        return
    file = Path(recipe.train.output_dir) / "job.sbatch"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(script)
    number = _sbatch(["--parsable"], script).split(";")[0]
    print(f"job {number}: {file}, output in slurm-{number}.log")


def _sbatch(options: list[str], script: str) -> str:
    done = subprocess.run(["sbatch", *options], input=script, capture_output=True, text=True)
    said = " ".join((done.stdout + done.stderr).split())
    if done.returncode:
        raise UserError("sbatch", said, "change the cluster's description: SLURM refuses this job")
    return said
