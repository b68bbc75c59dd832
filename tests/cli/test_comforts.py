"""Verbs around training: recipes, completion, chat on a real terminal, push against an endpoint of our own; and a host
of several GPUs."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from ows_ds import config
from ows_ds.cli.main import VERBS, main
from ows_ds.distributed import own_ranks
from ows_ds.errors import UserError
from ows_ds.train.trainer import train
from tests.conftest import ROOT
from tests.support.pool import Pools
from tests.support.tiny_run import recipe


def run(rank: int, world_size: int, made: config.Recipe) -> None:
    train(made)


@pytest.fixture(scope="module")
def finished(pools: Pools, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    pools(1).run(run, recipe(inputs, folder, steps=2, save_steps=None))
    return folder


# ------------------------------------------------------------------ files that come along


def test_recipes_are_listed_printed_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for file in (*ROOT.glob("launch/recipes/*.yaml"), *ROOT.glob("ds_configs/*.json")):
        assert file.name in listed
    assert main(["recipes", "llama2_7b_gsm8k"]) == 0
    assert capsys.readouterr().out == (ROOT / "launch/recipes/llama2_7b_gsm8k.yaml").read_text()
    assert main(["recipes", "zero3_bf16.json", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "zero3_bf16.json").read_text() == (ROOT / "ds_configs/zero3_bf16.json").read_text()
    capsys.readouterr()
    assert main(["recipes", "zero3_bf16.json", "--output", str(tmp_path)]) == 2  # nothing is written over
    assert main(["recipes", "llama2_7b_gsm"]) == 2
    assert "is llama2_7b_gsm8k meant?" in capsys.readouterr().err


def test_a_shell_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "it").write_text(capsys.readouterr().out)
    for words, expected in (
        ("ows-ds pl", "plan"),
        ("ows-ds train --optim.ra", "--optim.rank"),
        ("ows-ds chat --max", "--max-new-tokens"),
    ):
        count = len(words.split()) - 1
        script = f"source {tmp_path / 'it'}; COMP_WORDS=({words}); COMP_CWORD={count}; _ows_ds; echo ${{COMPREPLY[@]}}"
        found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert found.stdout.split() == [expected]
    assert main(["completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out
    assert main(["completion", "fish"]) == 2


# ------------------------------------------------------------------ chat


def test_an_answer_to_one_message(finished: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["chat", str(finished), "--prompt", "1+1", "--max-new-tokens", "4", "--temperature", "0", "--compare"]
    assert main(words) == 0
    base, trained = re.split(r"^--- run$", capsys.readouterr().out, flags=re.MULTILINE)
    assert base.startswith(f"--- {inputs.name} (base)")
    assert main(words[:-1]) == 0
    assert capsys.readouterr().out.strip("\n") == trained.strip("\n")  # the same one again
    for more, expected in (
        (["--system", "be brief", "--temperature", "-1"], "--temperature: -1 is invalid"),
        (["--max-new-tokens", "0"], "--max-new-tokens: 0 is invalid"),
    ):
        assert main(["chat", str(finished), *more]) == 2
        assert expected in capsys.readouterr().err
    assert main(["chat", str(finished / "model"), "--compare"]) == 2
    assert "only a run knows its base" in capsys.readouterr().err


def test_a_talk_on_a_terminal(finished: Path) -> None:
    """Two messages, one that clears, and the end of input, as a user types them."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "ows_ds", "chat", str(finished), "--max-new-tokens", "3", "--temperature", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    seen = b""

    def read_until(mark: bytes, count: int) -> None:
        nonlocal seen
        end = time.monotonic() + 120
        while seen.count(mark) < count:
            assert time.monotonic() < end, seen
            seen += os.read(ours, 4096)

    try:
        read_until(b"> ", 1)
        os.write(ours, b"1+1\n")
        read_until(b"> ", 2)
        os.write(ours, b"/clear\n")
        read_until(b"> ", 3)
        os.write(ours, b"\x04")  # Ctrl-D
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)
    assert b"a line is a message" in seen


# ------------------------------------------------------------------ the bar, and Ctrl-C


def test_a_bar_on_a_terminal_and_ctrl_c(inputs: Path, tmp_path: Path) -> None:
    """As a user sees it: the bar moves, Ctrl-C saves and says so in one line."""
    made = config.to_dict(recipe(inputs, tmp_path / "run", steps=400, save_steps=None))
    made["log"]["progress"] = "auto"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made))
    words = [sys.executable, "-m", "ows_ds", "train", "--config", str(tmp_path / "r.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
                               start_new_session=True, preexec_fn=lambda: _take_terminal(theirs))  # fmt: skip
    os.close(theirs)
    seen, sent = b"", False
    try:
        end = time.monotonic() + 180
        while time.monotonic() < end:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
            if not sent and re.search(rb"step [2-9]\d?/400, epoch", seen):
                os.write(ours, b"\x03")
                sent = True
        assert process.wait(60) == 75
    finally:
        process.kill()
        os.close(ours)
    shown = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", seen).decode(errors="replace")
    assert "gone, " in shown
    assert " (mean " in shown
    assert len(re.findall("stopped by a signal after step", shown)) == 1
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def _take_terminal(terminal: int) -> None:
    """So that Ctrl-C reaches the process as a signal, as in a shell."""
    import fcntl
    import signal
    import termios

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


# ------------------------------------------------------------------ push


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks."""

    files: dict[str, bytes]
    asked: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.asked.append(self.path)
        answer: Any = {}
        if self.path == "/api/repos/create":
            given = json.loads(body)
            if given["name"] == "refused":
                self.reply(403, {"error": "no"})
                return
            answer = {"url": f"http://{self.headers['host']}/me/{given['name']}", "name": f"me/{given['name']}"}
        elif "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            answer = {"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in names]}
        elif "/commit/" in self.path:
            for line in body.splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    self.files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            answer = {
                "commitOid": "a" * 40,
                "commitUrl": f"http://{self.headers['host']}/me/it/commit/aaa",
                "pullRequestUrl": None,
            }
        self.reply(200, answer)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "refused" in self.path:
            self.reply(404, {"error": "no"})
            return
        self.reply(200, {"id": "me/it", "sha": "b" * 40, "siblings": [], "tags": []})

    def reply(self, status: int, answer: Any) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("OneHub", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


def push(endpoint: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_x",
                   "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    command = [sys.executable, "-m", "ows_ds", "push", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_run_is_pushed_with_its_card(finished: Path, hub: tuple[str, type[Hub]]) -> None:
    endpoint, handler = hub
    found = push(endpoint, str(finished), "me/it")
    assert found.returncode == 0, found.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= handler.files.keys()
    assert handler.files["model.safetensors"] == (finished / "model" / "model.safetensors").read_bytes()
    assert b"outlier-weighed layerwise sampling" in handler.files["README.md"]


def test_what_cannot_be_pushed_is_one_line(finished: Path, tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    for words, expected in (
        ((str(tmp_path), "me/it"), "RUN: "),
        ((str(finished), "a/b/c"), "REPO: 'a/b/c' is invalid: expected a repository such as name/model"),
        (
            (str(finished), "me/refused"),
            "REPO: 'me/refused' is invalid: expected a repository that `hf auth login` lets",
        ),
        ((str(finished),), "REPO: None is invalid: it is required"),
    ):
        found = push(hub[0], *words)
        assert found.returncode == 2
        [line] = found.stderr.splitlines()
        assert line.startswith(f"ows-ds: error: {expected}")


# ------------------------------------------------------------------ ranks of one's own


def test_a_rank_on_each_gpu(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, argv = recipe(inputs, tmp_path), ["train", "--config", "r.yaml"]
    monkeypatch.setattr(own_ranks, "gpus_here", lambda: 8)
    found = own_ranks.command(made, argv, {})
    assert found is not None
    assert found[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "6", "-m", "ows_ds", *argv)
    ]  # 12 sequences in micro-batches of 2
    assert own_ranks.command(made, argv, {"RANK": "0"}) is None
    assert own_ranks.command(config.changed(made, {"train.gpus": 1}), argv, {}) is None
    asked = own_ranks.command(config.changed(made, {"train.gpus": 3}), argv, {})
    assert asked is not None
    assert asked[asked.index("--nproc_per_node") + 1] == "3"
    with pytest.raises(UserError, match=r"train\.gpus: 9 is invalid: expected at most 8"):
        own_ranks.command(config.changed(made, {"train.gpus": 9}), argv, {})
    monkeypatch.setattr(own_ranks, "gpus_here", lambda: 0)
    assert own_ranks.command(made, argv, {}) is None


def test_every_verb_has_help_that_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert f"ows-ds {verb}" in capsys.readouterr().out


def test_shipped_recipes_parse() -> None:
    for file in ROOT.glob("launch/recipes/*.yaml"):
        config.from_dict(yaml.safe_load(file.read_text()))
