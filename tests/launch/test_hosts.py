"""Every launcher over two hosts: two ranks, ZeRO-3, and the weights of two ranks without any launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ows_ds import config
from tests.launch.conftest import launched, same
from tests.support.hosts import ADDRESSES, ENVIRONMENT, LIMIT, NAMES, PACKAGES, Hosts, install, need, until_step
from tests.support.pages import command
from tests.train.test_trainer import contents

FIRST = ADDRESSES["n0"]
# what a process on another host does not have by itself
FORWARDED = [name for name in ENVIRONMENT if name not in ("HOME", "LANG")]


@pytest.fixture(scope="module")
def sshd(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An ssh daemon on each host, which lets us in without a password; a folder with files for DeepSpeed."""
    need("sshd", "ssh", "pdsh")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nUsePAM no\nStrictModes no\n"
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/user\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    (folder / "deepspeed_env").write_text("".join(f"{name}={ENVIRONMENT[name]}\n" for name in FORWARDED))
    daemon = ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
    with contextlib.ExitStack() as stack:
        for name in NAMES:
            mount = ["mount", "--bind", str(folder / "ssh_config"), "/etc/ssh/ssh_config"]
            subprocess.run([*hosts.at(name), *mount], check=True)
            stack.enter_context(hosts.running(name, daemon, folder / f"{name}.log"))
        yield folder


def train(hosts: Hosts, inputs: Path, folder: Path, launchers: Mapping[str, list[str]], **more: Any) -> Path:
    """Run ``LAUNCHER ows_ds train ...`` on the hosts; the folder of the run."""
    environment = more.pop("environment", {})
    run_dir = folder / "run"
    file = folder / "recipe.yaml"
    file.write_text(config.to_yaml(launched(inputs, run_dir, **more)))
    commands = {name: [*words, "train", "--config", str(file)] for name, words in launchers.items()}
    codes = hosts.run(commands, folder, **environment)
    logs = "\n".join(f"{name}:\n{(folder / f'{name}.log').read_text()[-4000:]}" for name in commands)
    assert set(codes.values()) == {0}, logs
    return run_dir


def shown(*begins: str, **changes: str) -> list[str]:
    """The command of docs/launch.md that begins so, up to `ows_ds`, with a rank on each host in place of eight.

    changes: further words to replace, by what stands before them.
    """
    words = command("docs/launch.md", *begins)
    words = words[: words.index("ows_ds") + 1]
    ours = {"16": "2", "8": "1", "node0": FIRST, "node0:8,node1:8": "n0:1,n1:1"}
    options = {f"--{option}": value for option, value in changes.items()}
    return [options.get(before, ours.get(word, word)) for before, word in zip(["", *words], words, strict=False)]


def accelerate(file: str) -> dict[str, list[str]]:
    file = f"launch/accelerate/{file}"
    return {name: shown("accelerate", "launch", config_file=file, machine_rank=name[1:]) for name in NAMES}


def torchrun(*options: str) -> list[str]:
    return ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", *options, "-m", "ows_ds"]


def static(*options: str) -> dict[str, list[str]]:
    words = {name: shown("torchrun", "--nnodes", **{"node-rank": name[1:]}) for name in NAMES}
    return {name: [*some[:-2], *options, *some[-2:]] for name, some in words.items()}


def c10d(*options: str) -> dict[str, list[str]]:
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{FIRST}:29500", "--rdzv-id", "1"]
    return dict.fromkeys(NAMES, torchrun(*meeting, *options))


@pytest.mark.ci
def test_accelerate(hosts: Hosts, inputs: Path, tmp_path: Path, expected: Any) -> None:
    same(train(hosts, inputs, tmp_path, accelerate("zero3_nodes.yaml"), sharding="auto"), expected)


@pytest.mark.slow
def test_accelerate_replicated(hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    records, _ = contents(train(hosts, inputs, tmp_path, accelerate("replicated_nodes.yaml"), sharding="auto"))
    assert records[2]["comm_bytes"]["gradients"] > 0
    assert "weights" not in records[2]["comm_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("meeting", [static, c10d])
def test_torchrun(hosts: Hosts, inputs: Path, tmp_path: Path, expected: Any, meeting: Any) -> None:
    same(train(hosts, inputs, tmp_path, meeting()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("meeting", [static, c10d])
def test_a_killed_process_comes_back(hosts: Hosts, inputs: Path, tmp_path: Path, expected: Any, meeting: Any) -> None:
    """`torchrun --max-restarts`: all ranks restart, and the run resumes from its newest checkpoint.

    Also where one host is late: in torchrun's store the early one finds addresses of processes that are dead.
    """
    file, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(config.to_yaml(launched(inputs, run_dir, resume="auto")))
    words = ["train", "--config", str(file), "--log.progress", "plain"]
    agents = {
        name: hosts.start(name, [*launcher, *words], tmp_path / f"{name}.log")
        for name, launcher in meeting("--max-restarts", "3").items()
    }

    def logs() -> str:
        return "\n".join((tmp_path / f"{name}.log").read_text()[-4000:] for name in NAMES)

    def check() -> None:
        assert all(agent.poll() is None for agent in agents.values()), logs()

    try:
        until_step(run_dir, 4, check)
        with hosts.frozen() as [_, second]:
            os.kill(second, signal.SIGKILL)
            time.sleep(5)
        codes = [agent.wait(LIMIT) for agent in agents.values()]
    finally:
        for agent in agents.values():
            hosts.stop(agent)
        hosts.clear()
    assert codes == [0, 0], logs()
    assert "resuming after step" in logs()
    same(run_dir, expected)


@pytest.mark.slow
def test_a_host_whose_name_leads_home(inputs: Path, tmp_path: Path, expected: Any) -> None:
    """Debian's habit: gloo would offer 127.0.1.1 to the other host. The message says so, and what it says helps."""
    need("ip")
    (tmp_path / "refused").mkdir()
    with Hosts(tmp_path, {"n1": "127.0.1.1"}) as both:
        file = tmp_path / "refused" / "recipe.yaml"
        file.write_text(config.to_yaml(launched(inputs, tmp_path / "refused" / "run", timeout_seconds=20)))
        commands = {name: [*words, "train", "--config", str(file)] for name, words in static().items()}
        codes = both.run(commands, tmp_path / "refused")
        assert 0 not in codes.values()
        assert (
            "ows-ds: error: GLOO_SOCKET_IFNAME: None is invalid: n1 resolves to 127.0.1.1, where other hosts cannot "
            "reach it: set it to the network interface, such as eth0\n"
        ) in (tmp_path / "refused" / "n1.log").read_text()
        assert not (tmp_path / "refused" / "run").exists()
        environment = {"GLOO_SOCKET_IFNAME": "eth0"}
        same(train(both, inputs, tmp_path, static(), environment=environment), expected)


@pytest.mark.ci
def test_mpirun(hosts: Hosts, inputs: Path, tmp_path: Path, expected: Any, sshd: Path) -> None:
    """Over ssh: `sshd` must be there."""
    need("mpirun")
    words = shown("mpirun")
    exports = [word for name in FORWARDED if name not in words for word in ("-x", name)]
    launcher = {"n0": [words[0], *exports, *words[1:]]}
    same(train(hosts, inputs, tmp_path, launcher), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pdsh", "no_ssh", "openmpi"])
def test_deepspeed(hosts: Hosts, inputs: Path, tmp_path: Path, expected: Any, sshd: Path, name: str) -> None:
    program, *rest = shown("deepspeed", hostfile=str(sshd / "hostfile"))
    if name == "no_ssh":
        words = [program, "--no_ssh", "--master_addr", FIRST]
        launchers = {host: [*words, "--node_rank", host[1:], *rest] for host in NAMES}
    else:
        if name == "openmpi":
            need("mpirun")
        launchers = {"n0": [program, "--launcher", name, *rest]}
    environment = {"DS_ENV_FILE": str(sshd / "deepspeed_env")}  # a user has .deepspeed_env
    same(train(hosts, inputs, tmp_path, launchers, environment=environment), expected)


@pytest.mark.parametrize(
    ("update", "outcome"),
    [
        ("echo 'Err:1 http://deb.debian.org/debian bookworm InRelease'", pytest.skip.Exception),
        ("echo 'Hit:1 http://deb.debian.org/debian bookworm InRelease'", AssertionError),
        ("echo 'E: Could not get lock /var/lib/apt/lists/lock' >&2; exit 100", AssertionError),
    ],
)
def test_a_missing_program_is_a_failure_unless_no_index_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: str, outcome: type[BaseException]
) -> None:
    """What stands in for apt-get prints what that of Debian does."""
    locate = "echo 'E: Unable to locate package slurmctl' >&2; exit 100"
    (tmp_path / "apt-get").write_text(f"#!/bin/sh\ncase $2 in update) {update} ;; *) {locate} ;; esac\n")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setitem(PACKAGES, "slurmctl", ["slurmctl"])
    with pytest.raises(outcome, match="slurmctl"):
        install(["slurmctl"])
