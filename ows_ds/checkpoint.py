"""Checkpoints: complete or absent, sharded, readable at any world size.

    checkpoints/step-20/
        manifest.json                    numbers of the state, versions, size and SHA-256 of every file
        state-00000-of-00002.safetensors what process 0 held: runs of flattened tensors
        state-00001-of-00002.safetensors ...

A checkpoint is written beside its place, synced and renamed. Its tensors are *pieces*: a run of a flattened tensor with
the tensor's shape and the run's start, so that any number of processes can put together what each of them needs.
Safetensors and JSON only: nothing that is loaded can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ows_ds.communicate import Communicator, together
from ows_ds.config import parse_json, read_text
from ows_ds.errors import UserError, shorten
from ows_ds.weights import Piece

FORMAT = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 1 << 30  # bytes: a line of about 100 for each piece of each process
NAME = re.compile(r"step-(\d+)")


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after optimizer step ``step`` lies."""
    return run_dir / "checkpoints" / f"step-{step}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Folders of all checkpoints of a run, newest (most steps) first; not verified."""
    found = [p for p in (run_dir / "checkpoints").glob("step-*") if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=_step, reverse=True)


def save(folder: Path, pieces: list[Piece], numbers: dict[str, Any], comm: Communicator) -> None:
    """Write a checkpoint at ``folder``. Collective.

    pieces: this process's. numbers: JSON-able; process 0's are kept. On any process's error nothing appears at
    ``folder``, and all processes raise.
    """
    partial = folder.with_name(folder.name + ".partial")
    with together(comm):
        if comm.index == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    entry: dict[str, Any] = {}
    with together(comm):
        entry = _write_pieces(partial / f"state-{comm.index:05}-of-{comm.world:05}.safetensors", pieces)
    entries = comm.collect(entry, "checkpoint")
    with together(comm):
        if comm.index == 0:
            manifest = {
                "format": FORMAT,
                "world": comm.world,
                "torch": torch.__version__,
                "files": entries,
                "numbers": numbers,
            }
            _write(partial / MANIFEST, json.dumps(manifest).encode())
            _sync(partial)
            old = folder.with_name(folder.name + ".old.partial")
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            _sync(folder.parent)
            shutil.rmtree(old, ignore_errors=True)


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and what half-written ones left behind. One process's work."""
    for old in checkpoints(run_dir)[max(keep, 1) :]:
        # out of sight first, so that no half-deleted checkpoint can be taken for a whole one
        hidden = old.with_name(old.name + ".partial")
        old.rename(hidden)
    for partial in (run_dir / "checkpoints").glob("step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


@dataclass
class Checkpoint:
    """A verified checkpoint, open for reading. numbers: as given to `save`."""

    folder: Path
    numbers: dict[str, Any]
    _index: dict[str, list[tuple[Path, str, int, int]]]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Entries [start, stop) of the flattened tensor ``name``, on the CPU, from whichever files hold them."""
        from safetensors import safe_open

        parts: list[tuple[int, Tensor]] = []
        for path, key, first, last in self._index[name]:
            a, b = max(start, first), min(stop, last)
            if a < b:
                with safe_open(path, framework="pt") as file:
                    parts.append((a, file.get_slice(key)[a - first : b - first]))
        parts.sort(key=lambda part: part[0])
        if sum(part.numel() for _, part in parts) != stop - start:
            raise ValueError(f"{self.folder}: {name} has no entries {start} to {stop}")
        if not parts:
            return torch.empty(0)
        return parts[0][1] if len(parts) == 1 else torch.cat([part for _, part in parts])


def open_checkpoint(folder: Path, comm: Communicator, key: str = "train.resume") -> Checkpoint:
    """Verify and open a checkpoint. Collective: the processes share the reading of its files.

    Raises UserError for ``key`` on every process, naming the file, where one is missing or damaged.
    """
    with together(comm):
        manifest = _read_manifest(folder, key)
        for position, file in enumerate(manifest["files"]):
            if position % comm.world == comm.index:
                _verify(folder, file, key)
    index: dict[str, list[tuple[Path, str, int, int]]] = {}
    for file in manifest["files"]:
        for name, (_, start, count) in file["pieces"].items():
            index.setdefault(name, []).append((folder / file["name"], name, start, start + count))
    return Checkpoint(folder, manifest["numbers"], index)


def find(run_dir: Path, resume: str, comm: Communicator) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that ``train.resume`` means, and a line for each damaged one that was passed over. Collective.

    resume: ``never``, ``auto`` (the newest complete one, None where there is none) or a checkpoint's folder.
    """
    if resume == "never":
        return None, []
    if resume != "auto":
        return open_checkpoint(Path(resume), comm), []
    passed: list[str] = []
    for folder in comm.share([str(path) for path in checkpoints(run_dir)], "checkpoint"):
        try:
            return open_checkpoint(Path(folder), comm), passed
        except (UserError, RuntimeError) as error:
            passed.append(str(error))
    return None, passed


def _write_pieces(path: Path, pieces: list[Piece]) -> dict[str, Any]:
    from safetensors.torch import save_file

    # copies: pieces are views into buffers, of which safetensors would write the whole
    tensors = {p.name: p.tensor.detach().to("cpu", copy=True).contiguous() for p in pieces if p.tensor.numel()}
    save_file(tensors, path)
    _sync(path)
    where = {p.name: [list(p.shape), p.start, p.tensor.numel()] for p in pieces if p.tensor.numel()}
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path), "pieces": where}


def _read_manifest(folder: Path, key: str) -> dict[str, Any]:
    def refuse(problem: str) -> UserError:
        return UserError(key, str(folder), f"give a complete checkpoint: {problem}")

    try:
        manifest = parse_json(read_text(folder / MANIFEST, LARGEST_MANIFEST))
    except (OSError, ValueError) as error:
        raise refuse(f"{MANIFEST} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise refuse(f"{MANIFEST} is not of format {FORMAT}")
    files = manifest.get("files")
    if not isinstance(manifest.get("numbers"), dict) or not isinstance(files, list) or not all(map(_is_entry, files)):
        raise refuse(f"{MANIFEST} is damaged")
    for file in files:
        name = file["name"]
        # neither by its name nor through a link: what is read is the checkpoint's own
        if Path(name).name != name or os.path.islink(folder / name):
            raise refuse(f"{MANIFEST} names the file {shorten(name)} outside of it")
    return manifest


def _is_entry(file: Any) -> bool:
    """Whether a value from JSON describes a file, as `_write_pieces` does."""
    match file:
        case {"name": str(), "bytes": int(), "sha256": str(), "pieces": dict() as pieces}:
            return all(
                isinstance(piece, list) and len(piece) == 3 and isinstance(piece[0], list)
                and all(type(number) is int and number >= 0 for number in (*piece[0], *piece[1:]))
                for piece in pieces.values()
            )  # fmt: skip
    return False


def _verify(folder: Path, file: dict[str, Any], key: str) -> None:
    path = folder / file["name"]
    if not os.path.isfile(path):
        raise UserError(key, str(folder), f"give a complete checkpoint: {file['name']} is missing")
    if path.stat().st_size != file["bytes"] or _sha256(path) != file["sha256"]:
        raise UserError(key, str(folder), f"give a complete checkpoint: {file['name']} is damaged")


def _step(folder: Path) -> int:
    match = NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
