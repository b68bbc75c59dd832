"""Folders of checkpoints, and the manifest in each: what it holds, sealed with its own digest."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from ows_ds.errors import UserError, shorten
from ows_ds.files import atomic_write, parse_json

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d+)")
PACKAGES = ("ows_ds", "torch", "transformers", "deepspeed")
_LARGEST = 1 << 30  # bytes: a line of about 100 for each shard of each rank
_SEAL = b'{"sha256": "'  # how a manifest begins; its own digest follows, taken with zeros in its place
_BLANK = b"0" * 64
_Count = Annotated[int, Field(strict=True, ge=0)]


@dataclass(frozen=True)
class File:
    """One rank's file. shards: by tensor the full shape, the shard's start and its number of entries."""

    name: str
    bytes: _Count
    sha256: str
    shards: dict[str, tuple[tuple[_Count, ...], _Count, _Count]]


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``. state, facts: see `ows_ds.checkpoint.save`. versions: of the packages."""

    world_size: _Count
    facts: dict[str, Any]
    files: list[File]
    state: dict[str, Any]
    versions: dict[str, Any] = field(default_factory=lambda: {name: version(name) for name in PACKAGES})
    format: Literal[3] = 3


_ADAPTER = TypeAdapter(Manifest)


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after optimizer step ``step`` is written."""
    return run_dir / "checkpoints" / f"step-{step}"


def step_of(folder: Path) -> int:
    """The optimizer step in a checkpoint's name, -1 for any other name."""
    match = NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def checkpoints(run_dir: Path) -> list[Path]:
    """Folders of all checkpoints of a run, newest (most steps) first; not verified."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def seal(content: dict[str, Any]) -> bytes:
    """JSON that begins with the SHA-256 of all its bytes, zeros in that place."""
    text = json.dumps({"sha256": _BLANK.decode(), **content}).encode()
    return text.replace(_BLANK, hashlib.sha256(text).hexdigest().encode(), 1)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it, sync it, and make sure that it can be read."""
    with atomic_write(folder / MANIFEST, durable=True) as temporary:
        temporary.write_bytes(seal(asdict(manifest)))
    read_manifest(folder, "checkpoint")


def read_manifest(folder: Path, key: str = "train.resume") -> Manifest:
    """The manifest of a checkpoint, whose other files are not looked at. Raises UserError for ``key``."""

    def refuse(problem: str) -> UserError:
        return UserError(key, str(folder), f"expected a complete checkpoint: {MANIFEST} {problem}")

    try:
        with (folder / MANIFEST).open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror})") from None
    if len(content) > _LARGEST:
        raise refuse(f"has more than {_LARGEST} bytes")
    begin, end = len(_SEAL), len(_SEAL) + len(_BLANK)
    digest = hashlib.sha256(content[:begin] + _BLANK + content[end:]).hexdigest().encode()
    if not content.startswith(_SEAL) or content[begin:end] != digest:
        raise refuse(f"is damaged, or not of format {Manifest.format}")
    try:
        tree = parse_json(content.decode())
        if not isinstance(tree, dict) or tree.get("format") != Manifest.format:
            raise refuse(f"is not of format {Manifest.format}")
        manifest = _ADAPTER.validate_python(tree)
    except ValueError:
        raise refuse("is damaged") from None
    for one in manifest.files:
        # neither by its name nor through a link: a checkpoint's files are its own
        if Path(one.name).name != one.name or os.path.islink(folder / one.name):
            raise refuse(f"names the file {shorten(one.name)} outside of it")
    return manifest


def sha256(path: Path, from_disk: bool = False) -> str:
    """from_disk: of what is on the disk, not in the system's cache, as far as the system drops that when asked."""
    with path.open("rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
