"""Checkpoints: complete or absent, sharded, readable at any world size, written while training goes on.

    checkpoints/step-20/
        manifest.json                    numbers of the state, versions, recipe, size and SHA-256 of every file
        state-00000-of-00002.safetensors what rank 0 held: runs of flattened tensors
        state-00001-of-00002.safetensors ...

A checkpoint is written beside its place, synced, read back and renamed. Its tensors are *pieces*: a run of a flattened
tensor with the tensor's shape and the run's start, so that any number of processes can put together what each of them
needs. Safetensors and JSON only: nothing that is loaded can run code.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ows_ds.distributed.communicator import Communicator, fail_together
from ows_ds.distributed.weights import CHUNK, Shard
from ows_ds.errors import Failed, UserError, shorten
from ows_ds.files import parse_json
from ows_ds.model.tensor_files import Writer

FORMAT = 2
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 1 << 30  # bytes: a line of about 100 for each piece of each process
NAME = re.compile(r"step-(\d+)")
PACKAGES = ("ows_ds", "torch", "transformers", "deepspeed")
_SEAL = b'{"sha256": "'  # how a manifest begins; its own digest follows, taken with zeros in its place
_BLANK = b"0" * 64


class SaveError(Failed):
    """A checkpoint could not be written: where and why. All processes raise the same; nothing has changed on disk."""


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after optimizer step ``step`` lies."""
    return run_dir / "checkpoints" / f"step-{step}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Folders of all checkpoints of a run, newest (most steps) first; not verified."""
    found = [p for p in (run_dir / "checkpoints").glob("step-*") if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=_step, reverse=True)


# ---------------------------------------------------------------------- writing


def save(
    folder: Path,
    pieces: list[Shard],
    numbers: dict[str, Any],
    comm: Communicator,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint at ``folder``. Collective.

    pieces: this process's. numbers: what is needed to go on, beside them; facts: what else is to be known of it. Both
    JSON-able; rank 0's are kept. On any process's error nothing appears at ``folder``, and all raise SaveError.
    """
    writing = _Writing(folder, numbers, facts or {}, comm)
    writing.write(pieces)
    writing.complete()


class Saver:
    """The checkpoints of a run: one at a time is written while training goes on, and the newest are kept.

    As a context manager it gives up what is under way where an error comes. failed: how many could not be written.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        comm: Communicator,
        facts: dict[str, Any],
        go_on: bool = True,
        tell: Callable[[str], None] = print,
    ) -> None:
        """keep: how many complete ones stay. facts: see `save`. go_on: whether a failed write is told by ``tell``, on
        every process, in place of SaveError."""
        self.run_dir, self.keep, self.comm, self.facts = run_dir, keep, comm, facts
        self.failed = 0
        self._go_on, self._tell = go_on, tell
        self._writing: _Writing | None = None
        if comm.rank == 0:
            _sweep(run_dir)

    @property
    def done(self) -> bool:
        """This process's part of the checkpoint under way is on the disk, or has failed."""
        return self._writing is not None and self._writing.done

    def start(self, step: int, pieces: list[Shard], numbers: dict[str, Any]) -> None:
        """Begin to write the checkpoint of ``step``, from copies in the host's memory; see `save`. Collective.

        Of another one that is under way the end is waited for.
        """
        self.complete()
        try:
            self._writing = _Writing(folder_of(self.run_dir, step), numbers, self.facts, self.comm, pieces)
        except SaveError as error:
            self._missed(error)

    def complete(self) -> None:
        """Wait until the checkpoint under way is complete, or has failed; then old ones go. Collective."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.complete()
        except SaveError as error:
            self._missed(error)
        else:
            self._prune(writing.folder)

    def save(self, step: int, pieces: list[Shard], numbers: dict[str, Any]) -> None:
        """Write the checkpoint of ``step`` now, after the one under way. Raises SaveError in any case. Collective."""
        self.complete()
        folder = folder_of(self.run_dir, step)
        save(folder, pieces, numbers, self.comm, self.facts)
        self._prune(folder)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing is not None:  # the other processes may be gone: without them it cannot become complete
            self._writing.abandon()

    def _prune(self, newest: Path) -> None:
        if self.comm.rank == 0:
            prune(self.run_dir, self.keep, _step(newest))

    def _missed(self, error: SaveError) -> None:
        if not self._go_on:
            raise error
        self.failed += 1
        there = checkpoints(self.run_dir)
        newest = f"the newest one is {there[0].name}" if there else "there is none yet"
        self._tell(f"{error}; going on, {newest} ({self.failed} not written so far)")


class _Writing:
    """A checkpoint on its way to ``folder``."""

    def __init__(
        self,
        folder: Path,
        numbers: dict[str, Any],
        facts: dict[str, Any],
        comm: Communicator,
        background: list[Shard] | None = None,
    ) -> None:
        """Collective. background: begin with copies of these pieces in a thread; None: `write` is to be called.

        Raises SaveError on all processes where the folder cannot be made.
        """
        self.folder, self.comm = folder, comm
        self.partial = folder.with_name(folder.name + ".partial")
        self._numbers, self._facts = copy.deepcopy(numbers), facts
        self._entry: dict[str, Any] = {}
        self._error: Exception | None = None
        self._abandoned = threading.Event()
        self._thread: threading.Thread | None = None
        error = None
        if comm.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
            try:
                self.partial.mkdir(parents=True)
            except OSError as caught:
                error = caught
        self._agree(None, error)
        if background is not None:
            try:
                copies = _copies(background)
            except (RuntimeError, MemoryError):  # no memory for them: this process waits for the disk
                self.write(background)
                return
            self._thread = threading.Thread(target=self.write, args=(copies,), name=f"write {folder.name}", daemon=True)
            self._thread.start()

    @property
    def done(self) -> bool:
        """This process's file is on the disk, or has failed."""
        return self._thread is None or not self._thread.is_alive()

    def write(self, pieces: list[Shard]) -> None:
        """Write this process's file. Errors are kept for `complete`."""
        path = self.partial / f"state-{self.comm.rank:05}-of-{self.comm.world_size:05}.safetensors"
        try:
            self._entry = _write_shards(path, [p for p in pieces if p.tensor.numel()], self._abandoned)
        except Exception as error:
            self._error = error
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # at once: others want to write, too

    def complete(self) -> None:
        """Wait for all processes' files; then the checkpoint is there. Collective. Raises SaveError on all."""
        if self._thread is not None:
            self._thread.join()
        entries = self._agree(self._entry, self._error)
        error = None
        if self.comm.rank == 0:
            try:
                self._publish(entries)
            except Exception as caught:
                error = caught
        self._agree(None, error)

    def abandon(self) -> None:
        """Stop writing; what was written is no checkpoint. A disk that hangs is not waited for."""
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join(10.0)

    def _agree(self, value: Any, error: Exception | None) -> list[Any]:
        """Every process's value; where one brings an error, SaveError on all."""
        problem = None if error is None else f"{type(error).__name__}: {error}"
        everyones = self.comm.all_gather_object([value, problem], "checkpoint")
        for index, (_, problem) in enumerate(everyones):
            if problem is not None:
                if self.comm.rank == 0:
                    shutil.rmtree(self.partial, ignore_errors=True)
                where = f" on process {index}" if self.comm.world_size > 1 else ""
                raise SaveError(f"checkpoint {self.folder.name} could not be written{where} ({problem})") from error
        return [value for value, _ in everyones]

    def _publish(self, entries: list[dict[str, Any]]) -> None:
        """Manifest, and the folder's name. Rank 0's work."""
        for entry in entries:
            path = self.partial / entry["name"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise OSError(f"{path} is not there: all processes need to write to one folder")
        manifest = {
            "format": FORMAT,
            "versions": {name: version(name) for name in PACKAGES},
            "world_size": self.comm.world_size,
            "facts": self._facts,
            "files": entries,
            "numbers": self._numbers,
        }
        _write(self.partial / MANIFEST, _sealed(manifest))
        _read_manifest(self.partial, "checkpoint")  # what was written can be read
        _sync(self.partial)
        old = self.folder.with_name(self.folder.name + ".old.partial")
        if self.folder.exists():
            self.folder.rename(old)
        self.partial.rename(self.folder)
        _sync(self.folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def prune(run_dir: Path, keep: int, newest: int) -> None:
    """Delete old checkpoints, once that of step ``newest`` is complete. One process's work.

    The ``keep`` newest up to that step stay. Later ones go as well: they were damaged, or are of a course that the run
    has left. What cannot be deleted stays.
    """
    found = checkpoints(run_dir)
    upto = [folder for folder in found if _step(folder) <= newest]
    for old in (*upto[max(keep, 1) :], *(folder for folder in found if folder not in upto)):
        # out of sight first, so that no half-deleted checkpoint can be taken for a whole one
        with contextlib.suppress(OSError):
            old.rename(old.with_name(old.name + ".partial"))
    _sweep(run_dir)


def _sweep(run_dir: Path) -> None:
    """Delete what half-written checkpoints have left behind, while none is being written."""
    for partial in (run_dir / "checkpoints").glob("step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


# ---------------------------------------------------------------------- reading


@dataclass
class Checkpoint:
    """A verified checkpoint, open for reading.

    numbers, facts: as given to `save`. versions: of the packages that wrote it. shapes: of all tensors, by name.
    """

    folder: Path
    numbers: dict[str, Any]
    facts: dict[str, Any]
    versions: dict[str, str | None]
    shapes: dict[str, tuple[int, ...]]
    _files: list[dict[str, Any]]
    _index: dict[str, list[tuple[Path, int, int]]]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Entries [start, stop) of the flattened tensor ``name``, on the CPU, from whichever files hold them."""
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
    """Verify and open a checkpoint. Collective: the processes share the reading of its files.

    Raises UserError for ``key`` on every process, naming the file, where one is missing or damaged.
    """
    with fail_together(comm):
        opened = _read_manifest(folder, key)
        for file in opened._files[comm.rank :: comm.world_size]:
            _verify(folder, file, key)
    return opened


def find(run_dir: Path, resume: str, comm: Communicator) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that ``train.resume`` means, and a line for each damaged one that was passed over. Collective.

    resume: ``never``, ``auto`` (the newest complete one, None where there is none) or a checkpoint's folder.
    """
    if resume == "never":
        return None, []
    if resume != "auto":
        return open_checkpoint(Path(resume), comm), []
    passed: list[str] = []
    for folder in comm.broadcast_object([str(path) for path in checkpoints(run_dir)], "checkpoint"):
        try:
            return open_checkpoint(Path(folder), comm), passed
        except UserError as error:
            passed.append(str(error))
    return None, passed


# ---------------------------------------------------------------------- files


def _copies(pieces: list[Shard]) -> list[Shard]:
    """The pieces as they are now, in the host's memory."""
    return [replace(piece, tensor=piece.tensor.detach().to("cpu", copy=True)) for piece in pieces]


def _write_shards(path: Path, pieces: list[Shard], abandoned: threading.Event) -> dict[str, Any]:
    """Write, sync and read back; the file's entry in the manifest."""
    tensors = {piece.name: piece.tensor for piece in pieces}
    digest = hashlib.sha256()
    writer = Writer(path, tensors, digest)
    try:
        for name in writer.names:
            for start in range(0, tensors[name].numel(), CHUNK):
                if abandoned.is_set():
                    raise InterruptedError("given up")
                writer.write(name, start, tensors[name][start : start + CHUNK])
    finally:
        writer.close()
    if _sha256(path, from_disk=True) != digest.hexdigest():
        raise OSError(f"{path} does not hold what was written to it")
    where = {piece.name: [list(piece.shape), piece.start, piece.tensor.numel()] for piece in pieces}
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest(), "pieces": where}


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest as JSON that begins with the SHA-256 of all its bytes, zeros in that place."""
    content = json.dumps({"sha256": _BLANK.decode(), **manifest}).encode()
    return content.replace(_BLANK, hashlib.sha256(content).hexdigest().encode(), 1)


def _read_manifest(folder: Path, key: str) -> Checkpoint:
    """The checkpoint as its manifest tells, the other files unseen. Raises UserError for ``key``."""

    def refuse(problem: str) -> UserError:
        return UserError(key, str(folder), f"expected a complete checkpoint: {MANIFEST} {problem}")

    try:
        with (folder / MANIFEST).open("rb") as file:
            content = file.read(LARGEST_MANIFEST + 1)
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror})") from None
    if len(content) > LARGEST_MANIFEST:
        raise refuse(f"has more than {LARGEST_MANIFEST} bytes")
    begin, end = len(_SEAL), len(_SEAL) + len(_BLANK)
    digest = hashlib.sha256(content[:begin] + _BLANK + content[end:]).hexdigest().encode()
    if not content.startswith(_SEAL) or content[begin:end] != digest:
        raise refuse(f"is damaged, or not of format {FORMAT}")
    try:
        manifest = parse_json(content.decode())
    except ValueError:
        raise refuse("is damaged") from None
    match manifest:
        case {"format": int() as format, **rest} if format == FORMAT:
            pass
        case _:
            raise refuse(f"is not of format {FORMAT}")
    match rest:
        case {"numbers": dict() as numbers, "facts": dict() as facts, "versions": dict() as versions,
              "files": list() as files} if all(map(_is_entry, files)):  # fmt: skip
            opened = Checkpoint(folder, numbers, facts, versions, {}, files, {})
        case _:
            raise refuse("is damaged")
    for entry in files:
        path = folder / entry["name"]
        # neither by its name nor through a link: what is read is the checkpoint's own
        if Path(entry["name"]).name != entry["name"] or os.path.islink(path):
            raise refuse(f"names the file {shorten(entry['name'])} outside of it")
        for name, (shape, start, count) in entry["pieces"].items():
            opened.shapes[name] = tuple(shape)
            opened._index.setdefault(name, []).append((path, start, start + count))
    return opened


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
    def refuse(problem: str) -> UserError:
        return UserError(key, str(folder), f"expected a complete checkpoint: {file['name']} {problem}")

    path = folder / file["name"]
    if not os.path.isfile(path):
        raise refuse("is missing")
    try:
        good = path.stat().st_size == file["bytes"] and _sha256(path) == file["sha256"]
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror})") from None
    if not good:
        raise refuse("is damaged")


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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


def _sha256(path: Path, from_disk: bool = False) -> str:
    """from_disk: of what lies there, not of the system's copy in memory, as far as it can be told to drop that."""
    with path.open("rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
