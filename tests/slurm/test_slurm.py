"""Job scripts: what a description refuses, what bash makes of a rendered head, what is checked before."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ows_ds import config
from ows_ds.cli.main import main
from ows_ds.errors import UserError
from ows_ds.slurm import job
from ows_ds.slurm.job import Allocation
from tests.conftest import ROOT

SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
NASTY = "a b'c\"d$(touch hacked)`touch hacked`;e\\"


def recipe(folder: Path, **train: Any) -> config.Recipe:
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    tree = {"model": {"path": "org/model"}, "data": {"train": str(folder / "rows.jsonl")}}
    return config.from_dict(tree | {"train": {"output_dir": str(folder / "run")} | train})


def words(head: str, what: str) -> list[str]:
    """The words of an array of the script's head, as bash sees them."""
    show = f'{head}\n"{sys.executable}" -c "import json, sys; print(json.dumps(sys.argv[1:]))" "${{{what}[@]}}"'
    done = subprocess.run(["bash", "-euc", show], capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def head_of(script: str) -> str:
    assert script.endswith(job.BODY.read_text())
    return script.removesuffix(job.BODY.read_text())


def test_nothing_that_a_user_writes_is_run_by_the_shell(tmp_path: Path) -> None:
    folder = tmp_path / NASTY.replace("/", "")
    folder.mkdir()
    (folder / "activate").write_text("")
    cluster = Allocation(
        modules=[NASTY], inside=["apptainer", NASTY], environment=[f"A={NASTY}"], activate=str(folder / "activate")
    )
    options = {"data.train": NASTY, "optim.betas": (0.8, 0.9), "optim.max_grad_norm": None, "optim.rank": 8}
    head = head_of(job.render(cluster, ["note\n; touch hacked"], f"{NASTY}.yaml", options, folder))
    given = ["train", "--config", f"{NASTY}.yaml", "--data.train", NASTY, "--optim.betas", "[0.8, 0.9]"]
    given += ["--optim.max_grad_norm", "null", "--optim.rank", "8", "--train.resume", "auto"]
    assert words(head, "command") == given
    assert words(head, "inside") == ["apptainer", NASTY]
    show = head + '\nmodule() { printf "%s|" "$@"; }\nsetup\nprintf "%s|%s" "$A" "$PWD"'
    done = subprocess.run(["bash", "-euc", show], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"load|{NASTY}|{NASTY}|{folder}"
    assert not list(tmp_path.rglob("hacked"))


def test_what_the_job_asks_for(tmp_path: Path) -> None:
    cluster = Allocation(
        nodes=4, partition="gpu", account="me", qos="long", sbatch=["--constraint=a100&ib"], port=20000
    )
    head = head_of(job.render(cluster, [], "r.yaml", {}, tmp_path))
    assert re.findall(r"^#SBATCH (.*)", head, flags=re.M) == [
        "--job-name=ows",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=24:00:00",
        "--signal=B:USR1@300",
        "--open-mode=append",
        "--output=slurm-%j.log",
        "--partition=gpu",
        "--account=me",
        "--qos=long",
        "--requeue",
        "--constraint=a100&ib",
    ]
    assert "\nport=20000\n" in head
    on_cpu = head_of(job.render(Allocation(gpus_per_node=0), [], "r.yaml", {}, tmp_path))
    assert "gpus-per-node" not in on_cpu


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node: 2", "cluster.node: 2 is invalid: there is no such key; is cluster.nodes meant?"),
        ("nodes: two", "cluster.nodes: 'two' is invalid: expected an integer"),
        ("nodes: 0", "cluster.nodes: 0 is invalid: expected an integer of at least 1"),
        ("lead: -1", "cluster.lead: -1 is invalid: expected an integer of at least 0"),
        ("gpus_per_node: 4", "cluster.gpus_per_node: 4 is invalid: expected cluster.processes_per_node, 8, or 0"),
        ("gpu_memory: 0", "cluster.gpu_memory: 0 is invalid: expected a number above 0"),
        ('time: "1 day"', "cluster.time: '1 day' is invalid: expected a time such as 24:00:00"),
        ('partition: "a\\n#SBATCH --uid=0"', "cluster.partition: .* is invalid: expected a name without spaces"),
        ("sbatch: [-p gpu]", "cluster.sbatch: .* is invalid: expected a list of options such as --constraint=a100"),
        ("environment: [NAME]", "cluster.environment: .* is invalid: expected a list of NAME=VALUE"),
        ("activate: no/such/file", "cluster.activate: 'no/such/file' is invalid: expected a file that exists"),
        ("inside: [/no/such/program]", "cluster.inside: .* is invalid: expected a program that exists"),
        ("port: 80", "cluster.port: 80 is invalid: expected a port from 1024 to 65535"),
        ("port: 40000", "cluster.port: 40000 is invalid: expected a port outside of 32768 to 60999"),
    ],
)
def test_what_a_description_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setattr(job, "EPHEMERAL", tmp_path / "absent")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        job.read(tmp_path / "c.yaml")


def test_the_example_and_the_table_of_keys(tmp_path: Path) -> None:
    example = ROOT / "launch" / "slurm" / "cluster.yaml"
    assert job.read(example) == Allocation(nodes=2, gpu_memory=80.0)
    commented = re.sub(r"^# (\w+:)", r"\1", example.read_text(), flags=re.M).replace(".venv/bin/activate", "/dev/null")
    (tmp_path / "c.yaml").write_text(commented.replace("/dev/null", str(example)))
    assert job.read(tmp_path / "c.yaml").inside[0] == "apptainer"
    table = (ROOT / "docs" / "launch.md").read_text()
    assert [name for name in Allocation.model_fields if f"`{name}`" not in table] == []


def test_what_is_checked_before(tmp_path: Path) -> None:
    cluster = Allocation(nodes=2, processes_per_node=4)
    found = job.check(recipe(tmp_path), cluster)
    assert found[:2] == [
        "8 ranks: 2 nodes x 4, on 4 GPUs of each",
        "16 sequences a step: 8 ranks x 1 x 2 micro-batches",
    ]
    with pytest.raises(UserError, match=r"train.global_batch_size: 16 is invalid: expected a multiple of 24"):
        job.check(recipe(tmp_path), cluster.model_copy(update={"nodes": 3, "processes_per_node": 8}))
    assert "memory of a GPU at most not planned" in found
    of_80 = cluster.model_copy(update={"gpu_memory": 80.0})
    assert "memory of a GPU at most 79.9 GiB of 80 GiB" in job.check(recipe(tmp_path), of_80, int(79.9 * 2**30))
    with pytest.raises(UserError, match=r"cluster.gpu_memory: 80.0 is invalid: .* 80.1 GiB are planned"):
        job.check(recipe(tmp_path), of_80, int(80.1 * 2**30))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"train.output_dir: .* expected a folder without checkpoints, or --train.resume auto"
    ):
        job.check(recipe(tmp_path), cluster)
    assert f"output {tmp_path}/run (resumed)" in job.check(recipe(tmp_path, resume="auto"), cluster)
    with pytest.raises(UserError, match=r"train.resume: .* expected auto, or never"):
        job.check(recipe(tmp_path, resume=str(tmp_path)), cluster)


def test_the_verb_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(job.shutil, "which", lambda program: None)  # type: ignore[attr-defined]
    (tmp_path / "r.yaml").write_text(config.to_yaml(recipe(tmp_path)))
    (tmp_path / "c.yaml").write_text("nodes: 2\n")
    given = ["launch", "--slurm", str(tmp_path / "c.yaml"), "--config", str(tmp_path / "r.yaml"), "--optim.rank", "8"]
    assert main([*given, "--dry-run"]) == 0
    head = head_of(capsys.readouterr().out)
    assert words(head, "command") == [
        *("train", "--config", str(tmp_path / "r.yaml"), "--optim.rank", "8", "--train.resume", "auto")
    ]
    assert main(given) == 2
    assert capsys.readouterr().err == (
        "ows-ds: error: sbatch: None is invalid: start this where SLURM's commands are, or look at the script with "
        "--dry-run\n"
    )
    assert not (tmp_path / "run").exists()
    assert main(["launch", "--config", str(tmp_path / "r.yaml")]) == 2
    assert capsys.readouterr().err == "ows-ds: error: --slurm: None is invalid: it is required: expected a file\n"


@pytest.mark.parametrize("script", [*SCRIPTS, job.BODY], ids=lambda path: path.name)
def test_bash_understands_the_scripts(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_end_in_the_same_body_and_resume(script: Path) -> None:
    text = script.read_text()
    assert text.endswith("\nsource ows_ds/slurm/slurm.sh\n")
    for option in ("--requeue", "--open-mode=append", "--signal=B:USR1@", "--ntasks-per-node="):
        assert f"#SBATCH {option}" in text
    assert ("--train.resume auto" in text) or ("command=(bench quality" in text)
