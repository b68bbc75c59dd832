"""Two whole runs whose recipes name one folder, on one host and on two that do not see each other's locks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ows_ds import config
from tests.conftest import ROOT
from tests.support.hosts import ENVIRONMENT, Hosts, need, until_step
from tests.support.tiny_run import recipe

TRAIN = [sys.executable, "-m", "ows_ds", "train"]
WITHOUT_LOCKS = "import fcntl, sys; fcntl.flock = lambda *a: None; from ows_ds.cli.main import main; sys.exit(main())"


@pytest.fixture(params=[pytest.param("one host", marks=pytest.mark.ci), pytest.param("two", marks=pytest.mark.slow)])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """What starts a training on the first host, and on the other."""
    if request.param == "one host":
        yield TRAIN, TRAIN
        return
    need("ip")
    unseen = [sys.executable, "-c", WITHOUT_LOCKS, "train"]
    with Hosts(tmp_path) as hosts:
        yield [*hosts.at("n0"), *unseen], [*hosts.at("n1"), *unseen]


def test_the_second_is_refused_and_a_killed_one_resumes(
    places: tuple[list[str], list[str]], inputs: Path, tmp_path: Path
) -> None:
    file, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(config.to_yaml(recipe(inputs, run_dir, steps=2000, save_steps=3, resume="auto")))
    one, other = ([*words, "--config", str(file)] for words in places)
    first = subprocess.Popen(one, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until_step(run_dir, 4, lambda: first.poll() is None or pytest.fail("it has ended"))
        second = subprocess.run(other, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        [line] = second.stderr.splitlines()[-1:]
        assert second.returncode == 2
        assert line.startswith(
            f"ows-ds: error: train.output_dir: '{run_dir}' is invalid: expected a folder that no other"
        )
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    steps = len((run_dir / "metrics.jsonl").read_text().splitlines())
    third = subprocess.Popen(other, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until_step(run_dir, steps + 2, lambda: third.poll() is None or pytest.fail(str(third.communicate()[0])))
        third.send_signal(signal.SIGTERM)
        said = third.communicate(timeout=60)[0].decode()
    finally:
        third.kill()
        third.wait()
    assert third.returncode == os.EX_TEMPFAIL, said
    logged = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(len(logged)))  # one run's records, each once
