"""Writing one checkpoint: every rank its file, rank 0 the manifest and the folder's name."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from ows_ds.checkpoint.manifest import File, Manifest, sha256, write_manifest
from ows_ds.compat.torch import copy_to_host
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.merging import CHUNK
from ows_ds.distributed.weights import Shard
from ows_ds.errors import Failed
from ows_ds.files import sync
from ows_ds.model.tensor_files import Writer


class SaveError(Failed):
    """A checkpoint could not be written: where and why. All ranks raise the same; nothing has changed on disk."""


def save(
    folder: Path, shards: list[Shard], state: dict[str, Any], comm: Communicator, facts: dict[str, Any] | None = None
) -> None:
    """Write a checkpoint at ``folder``. Collective.

    shards: this rank's. state: what else is needed to resume; facts: what else is to be known of it. Both JSON-able;
    rank 0's are kept. On any rank's error nothing appears at ``folder``, and all raise SaveError.
    """
    writing = Writing(folder, state, facts or {}, comm)
    writing.write(shards)
    writing.complete()


class Writing:
    """A checkpoint on its way to ``folder``: `write` or `start`, then `complete` or `abandon`."""

    def __init__(self, folder: Path, state: dict[str, Any], facts: dict[str, Any], comm: Communicator) -> None:
        """Collective. Raises SaveError on all ranks where the folder cannot be made."""
        self.folder, self.comm = folder, comm
        self.partial = folder.with_name(folder.name + ".partial")
        self._state, self._facts = copy.deepcopy(state), facts
        self._file: File | None = None
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
        self._gather(None, error)

    @property
    def done(self) -> bool:
        """This rank's file is on the disk, or has failed."""
        return self._thread is None or not self._thread.is_alive()

    def start(self, shards: list[Shard]) -> None:
        """Write copies of ``shards`` in a thread; where there is no memory for them, write before returning."""
        try:
            shards = copies(shards)
        except (RuntimeError, MemoryError):
            self.write(shards)
            return
        self._thread = threading.Thread(
            target=self.write, args=(shards,), name=f"write {self.folder.name}", daemon=True
        )
        self._thread.start()

    def write(self, shards: list[Shard]) -> None:
        """Write this rank's file. An error is kept for `complete`."""
        path = self.partial / f"state-{self.comm.rank:05}-of-{self.comm.world_size:05}.safetensors"
        try:
            self._file = write_shards(path, [shard for shard in shards if shard.tensor.numel()], self._abandoned)
        except Exception as error:
            self._error = error
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # at once: it frees space for others

    def complete(self) -> None:
        """Wait for all ranks' files; then the checkpoint is there. Collective. Raises SaveError on all."""
        if self._thread is not None:
            self._thread.join()
        file = self._file and [self._file.name, self._file.bytes, self._file.sha256, self._file.shards]
        files = self._gather(file, self._error)
        error = None
        if self.comm.rank == 0:
            try:
                self._publish([File(*values) for values in files])
            except Exception as caught:
                error = caught
        self._gather(None, error)

    def abandon(self) -> None:
        """Stop writing; what was written is no checkpoint. A disk that hangs is waited for for ten seconds."""
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join(10.0)

    def _gather(self, value: Any, error: Exception | None) -> list[Any]:
        """Every rank's value; where one has an error, SaveError on all."""
        problem = None if error is None else f"{type(error).__name__}: {error}"
        gathered = self.comm.all_gather_object([value, problem], "checkpoint")
        for rank, (_, problem) in enumerate(gathered):
            if problem is not None:
                if self.comm.rank == 0:
                    shutil.rmtree(self.partial, ignore_errors=True)
                where = f" on rank {rank}" if self.comm.world_size > 1 else ""
                raise SaveError(f"checkpoint {self.folder.name} could not be written{where} ({problem})") from error
        return [value for value, _ in gathered]

    def _publish(self, files: list[File]) -> None:
        """Manifest, and the folder's name. For rank 0."""
        for file in files:
            path = self.partial / file.name
            if not path.is_file() or path.stat().st_size != file.bytes:
                raise OSError(f"{path} is not there: all ranks must write to one folder")
        write_manifest(self.partial, Manifest(self.comm.world_size, self._facts, files, self._state))
        sync(self.partial)
        old = self.folder.with_name(self.folder.name + ".old.partial")
        if self.folder.exists():
            self.folder.rename(old)
        self.partial.rename(self.folder)
        sync(self.folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def copies(shards: list[Shard]) -> list[Shard]:
    """The shards as they are now, in the host's memory."""
    return [replace(shard, tensor=copy_to_host(shard.tensor.detach())) for shard in shards]


def write_shards(path: Path, shards: list[Shard], abandoned: threading.Event) -> File:
    """Write, sync and read back one file. Raises OSError where it does not hold what was written."""
    tensors = {shard.name: shard.tensor for shard in shards}
    digest = hashlib.sha256()
    writer = Writer(path, tensors, digest)
    try:
        for name in writer.names:
            for start in range(0, tensors[name].numel(), CHUNK):
                if abandoned.is_set():
                    raise InterruptedError("abandoned")
                writer.write(name, start, tensors[name][start : start + CHUNK])
    finally:
        writer.close()
    if sha256(path, from_disk=True) != digest.hexdigest():
        raise OSError(f"{path} does not hold what was written to it")
    places = {shard.name: (tuple(shard.shape), shard.start, shard.tensor.numel()) for shard in shards}
    return File(path.name, path.stat().st_size, digest.hexdigest(), places)
