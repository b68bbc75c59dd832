"""Finding, verifying and reading checkpoints, at any world size."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ows_ds.checkpoint.manifest import File, checkpoints, read_manifest, sha256
from ows_ds.distributed.communicator import Communicator, fail_together
from ows_ds.errors import UserError


@dataclass
class Checkpoint:
    """A verified checkpoint, open for reading.

    state, facts: as given to `save`. versions: of the packages that wrote it. shapes: of all tensors, by name.
    """

    folder: Path
    state: dict[str, Any]
    facts: dict[str, Any]
    versions: dict[str, str | None]
    shapes: dict[str, tuple[int, ...]]
    _index: dict[str, list[tuple[Path, int, int]]]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Entries [start, stop) of the flattened tensor ``name``, on the CPU, from whichever files have them."""
        from safetensors import safe_open

        parts: list[tuple[int, Tensor]] = []
        for path, first, last in self._index[name]:
            a, b = max(start, first), min(stop, last)
            if a < b:
                with safe_open(path, framework="pt") as file:
                    parts.append((a, file.get_slice(name)[a - first : b - first]))
        parts.sort(key=lambda part: part[0])
        if sum(part.numel() for _, part in parts) != stop - start:
            raise ValueError(f"{self.folder}: {name} has no entries {start} to {stop}")
        if not parts:
            return torch.empty(0)
        return parts[0][1] if len(parts) == 1 else torch.cat([part for _, part in parts])


def open_checkpoint(folder: Path, comm: Communicator, key: str = "train.resume") -> Checkpoint:
    """Verify and open a checkpoint. Collective: the ranks share the reading of its files.

    Raises UserError for ``key`` on every rank, naming the file, where one is missing or damaged.
    """
    with fail_together(comm):
        manifest = read_manifest(folder, key)
        for file in manifest.files[comm.rank :: comm.world_size]:
            _verify(folder, file, key)
    opened = Checkpoint(folder, manifest.state, manifest.facts, manifest.versions, {}, {})
    for file in manifest.files:
        for name, (shape, start, count) in file.shards.items():
            opened.shapes[name] = shape
            opened._index.setdefault(name, []).append((folder / file.name, start, start + count))
    return opened


def find(run_dir: Path, resume: str, comm: Communicator) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that ``train.resume`` means, and a line for each damaged one that was skipped. Collective.

    resume: ``never``, ``auto`` (the newest complete one, None where there is none) or a checkpoint's folder.
    """
    if resume == "never":
        return None, []
    if resume != "auto":
        return open_checkpoint(Path(resume), comm), []
    skipped: list[str] = []
    for folder in comm.broadcast_object([str(path) for path in checkpoints(run_dir)], "checkpoint"):
        try:
            return open_checkpoint(Path(folder), comm), skipped
        except UserError as error:
            skipped.append(str(error))
    return None, skipped


def _verify(folder: Path, file: File, key: str) -> None:
    path = folder / file.name
    if not os.path.isfile(path):
        problem = "is missing"
    else:
        try:
            if path.stat().st_size == file.bytes and sha256(path) == file.sha256:
                return
            problem = "is damaged"
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
    raise UserError(key, str(folder), f"expected a complete checkpoint: {file.name} {problem}")
