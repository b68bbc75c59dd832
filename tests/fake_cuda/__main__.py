"""python -m tests.fake_cuda run [--devices N] [--waits FILE] [--races FILE] PROGRAM ..."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.fake_cuda import build, environment


def main() -> int:
    """The program's exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fake_cuda", description="run a program that sees GPUs")
    run = parser.add_subparsers(required=True).add_parser("run")
    run.add_argument("--devices", type=int, default=2, help="how many GPUs it sees (2)")
    run.add_argument("--waits", type=Path, help="file for the places where the host waits for a GPU")
    run.add_argument("--races", type=Path, help="file for accesses of two streams that nothing orders")
    run.add_argument("program", nargs=argparse.REMAINDER, help="such as python -m ows_ds train ...")
    arguments = parser.parse_args()
    if problem := build.missing():
        parser.error(problem)
    build.library()
    around = environment.environment(arguments.devices, arguments.waits, arguments.races)
    return subprocess.run(arguments.program, env=around).returncode


if __name__ == "__main__":
    sys.exit(main())
