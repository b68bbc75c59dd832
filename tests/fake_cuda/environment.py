"""The environment of programs that see the devices."""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).resolve().parent


def environment(devices: int = 2, waits: Path | None = None, races: Path | None = None) -> dict[str, str]:
    """Under which every Python process has so many GPUs.

    waits, races: files to which each process appends at its end where its host waited, and its races. Without
    ``races`` none are looked for, which is much faster.
    """
    variables = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    path = [str(HERE / "site"), str(HERE.parent.parent), *filter(None, [variables.get("PYTHONPATH")])]
    variables |= {"FAKE_CUDA": str(devices), "PYTHONPATH": os.pathsep.join(path)}
    for name, file in (("FAKE_CUDA_WAITS", waits), ("FAKE_CUDA_RACES", races)):
        variables.pop(name, None)
        if file is not None:
            variables[name] = str(file.resolve())
    return variables
