"""The checkpoints of a run: when they are written, how a failure counts, which ones stay."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ows_ds.checkpoint.manifest import checkpoints, folder_of, step_of
from ows_ds.checkpoint.writer import SaveError, Writing, save
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Shard

logger = logging.getLogger(__name__)


class Saver:
    """The checkpoints of a run: one at a time is written while training continues, and the newest are kept.

    As a context manager it abandons what is under way on an error. failed: how many could not be written.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        comm: Communicator,
        facts: dict[str, Any],
        skip_failed: bool = True,
        report: Callable[[str], None] = logger.warning,
    ) -> None:
        """keep: how many complete ones stay. facts: see `save`. skip_failed: a failed write is reported by ``report``,
        on every rank, and training continues; otherwise SaveError is raised."""
        self.run_dir, self.keep, self.comm, self.facts = run_dir, keep, comm, facts
        self.failed = 0
        self.best: int | None = None  # the step of one that stays whatever is newer
        self._skip_failed, self._report = skip_failed, report
        self._writing: Writing | None = None
        if comm.rank == 0:
            _sweep(run_dir)

    @property
    def done(self) -> bool:
        """This rank's part of the checkpoint under way is on the disk, or has failed."""
        return self._writing is not None and self._writing.done

    def start(self, step: int, shards: list[Shard], state: dict[str, Any]) -> None:
        """Begin to write the checkpoint of ``step``, from copies in the host's memory; see `save`. Collective.

        Waits for the end of another one that is under way.
        """
        self.complete()
        try:
            self._writing = Writing(folder_of(self.run_dir, step), state, self.facts, self.comm)
        except SaveError as error:
            self._failed(error)
        else:
            self._writing.start(shards)

    def complete(self) -> None:
        """Wait until the checkpoint under way is complete, or has failed; then delete old ones. Collective."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.complete()
        except SaveError as error:
            self._failed(error)
        else:
            self._prune(writing.folder)

    def save(self, step: int, shards: list[Shard], state: dict[str, Any]) -> None:
        """Write the checkpoint of ``step`` now, after the one under way. Raises SaveError in any case. Collective."""
        self.complete()
        folder = folder_of(self.run_dir, step)
        save(folder, shards, state, self.comm, self.facts)
        self._prune(folder)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writing is not None:  # without the other ranks, which may be gone, it cannot become complete
            self._writing.abandon()

    def _prune(self, newest: Path) -> None:
        if self.comm.rank == 0:
            prune(self.run_dir, self.keep, step_of(newest), self.best)

    def _failed(self, error: SaveError) -> None:
        if not self._skip_failed:
            raise error
        self.failed += 1
        newest = next((f"the newest one is {path.name}" for path in checkpoints(self.run_dir)), "there is none yet")
        self._report(f"{error}; training continues, {newest} ({self.failed} not written so far)")


def prune(run_dir: Path, keep: int, newest: int, best: int | None = None) -> None:
    """Delete old checkpoints, once that of step ``newest`` is complete. For one rank.

    The ``keep`` newest up to that step stay, and that of step ``best``. Later ones are deleted as well: they are
    damaged, or the run was resumed from an earlier one. What cannot be deleted stays.
    """
    found = checkpoints(run_dir)
    upto = [folder for folder in found if step_of(folder) <= newest]
    too_old = [folder for folder in upto[max(keep, 1) :] if step_of(folder) != best]
    for old in (*too_old, *(folder for folder in found if folder not in upto)):
        with contextlib.suppress(OSError):  # renamed first: a half-deleted checkpoint must not pass for a complete one
            old.rename(old.with_name(old.name + ".partial"))
    _sweep(run_dir)


def _sweep(run_dir: Path) -> None:
    """Delete what half-written checkpoints have left behind, while none is being written."""
    for partial in (run_dir / "checkpoints").glob("step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
