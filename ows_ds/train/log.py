"""What a run records and shows: metrics.jsonl, trackers, and the terminal. Rank 0 only.

metrics.jsonl has one object per optimizer step. Numbers that JSON cannot write become null, and the object
then has the extra key `nonfinite`, which names them: `{"loss": null, "nonfinite": {"loss": "nan"}}`; one inside
another object is left out of it, and named as `update_norm/3`. The loss of a skipped step is null without it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ows_ds.config import Recipe
from ows_ds.errors import one_line
from ows_ds.files import write_text
from ows_ds.train.screen import clock, screen
from ows_ds.train.trackers import Trackers, picture

if TYPE_CHECKING:
    from rich.console import Console

Record = dict[str, Any]


def as_json(record: Mapping[str, Any]) -> str:
    """One line of valid JSON; see the module's docstring for numbers that are not finite."""
    bad: dict[str, str] = {}

    def finite(value: Any, name: str) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            bad[name] = str(value)
        return name not in bad

    clean: Record = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            clean[key] = {name: one for name, one in value.items() if finite(one, f"{key}/{name}")}
        else:
            clean[key] = value if finite(value, key) else None
    return json.dumps(clean | ({"nonfinite": bad} if bad else {}), allow_nan=False)


def _cut(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def keep_until(path: Path, step: int) -> list[Record]:
    """Drop the lines after `step`, and an incomplete line, from a metrics file; return the rest.

    The file is replaced atomically. One that is missing has no lines.
    """
    if not path.exists():
        return []
    old = path.read_text(encoding="utf-8")
    kept: list[Record] = []
    for line in old.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and record.get("step", step + 1) <= step:
            kept.append(record)
    new = "".join(json.dumps(record) + "\n" for record in kept)
    if new != old:
        write_text(path, new, durable=True)
    return kept


class RunLog:
    """Records optimizer steps and shows the progress; on ranks other than 0 (`main` false) does nothing.

    Use it as a context manager, or call `close`: the terminal's cursor comes back and the trackers are
    flushed.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        n_layers: int,
        main: bool,
        recipe: Recipe,
        accelerator: Any = None,
        start_step: int = 0,
        console: Console | None = None,
    ) -> None:
        """Open the records of `run_dir`; those of steps after `start_step`, the last one done, are dropped.

        `accelerator` carries the trackers of the recipe (see `trackers.check_trackers`); without one there are none.
        `console` is for tests. Raises UserError where a tracker does not start.
        """
        self.main = main
        if not main:
            return
        self.total_steps, self.n_layers, self.done = total_steps, n_layers, start_step
        self._tokens, self._steps = 0, 0
        self._losses: list[float] = []
        self._changes: list[tuple[int, tuple[int, ...]]] = []
        run_dir.mkdir(parents=True, exist_ok=True)
        metrics = run_dir / "metrics.jsonl"
        for record in keep_until(metrics, start_step or -1):
            self._note_layers(record)
        self._trackers = Trackers(accelerator, recipe.log, run_dir, start_step, self.warn) if accelerator else None
        self._file = open(metrics, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._unwritten = b""
        self._screen = screen(recipe.log.progress, total_steps, n_layers, start_step, console)
        self._closed = False
        if self._trackers is not None:
            self._trackers.describe(recipe, run_dir, start_step)

    def step(self, record: Mapping[str, Any]) -> None:
        """Record one optimizer step; the keys are those of metrics.jsonl, `step` counts from 1.

        `loss` is None for a skipped step. On ranks other than 0 nothing happens.
        """
        if not self.main:
            return
        self._write(as_json(record) + "\n")
        self._tokens += int(record.get("tokens") or 0)
        self._steps += int(record["step"]) > 0
        if (held_out := record.get("eval_loss")) is not None:
            self._losses.append(held_out)
        if record.get("eval_loss") is not None:
            self.event(f"held-out loss {record['eval_loss']:.4f} after step {record['step']}")
        for message, answer in record.get("samples") or ():
            self.event(f"sample: {_cut(message)} -> {_cut(answer)}")
        step = int(record["step"])
        if self._trackers is not None:
            self._trackers.log(record, step)
        if step == 0:  # an evaluation before the first step
            return
        self.done = step
        if self._note_layers(record):
            self._draw()
        self._screen.step(record)

    def summary(self) -> str:
        """Time, tokens and held-out losses of what was logged here."""
        if not self.main:
            return ""
        losses = [f"{one:.4f}" for one in (self._losses[:1] + self._losses[1:][-1:])]
        held_out = f"; held-out loss {' to '.join(losses)}" if losses else ""
        took = clock(time.monotonic() - self._screen.started)
        return f"{self._steps:,} steps in {took}, {self._tokens:,} tokens{held_out}"

    def event(self, text: str) -> None:
        """Show a line above the progress; it is not recorded. On ranks other than 0 nothing happens."""
        if self.main:
            self._screen.event(one_line(text))

    def warn(self, text: str) -> None:
        """As `event`, whatever ``log.progress`` is."""
        self.event(text)
        if self.main and not self._screen.shows:
            print(one_line(text), flush=True)

    def close(self) -> None:
        """Write the final picture, close files and trackers, restore the terminal. Can be called again."""
        if not self.main or self._closed:
            return
        self._closed = True
        self._write("")
        self._screen.close()
        self._file.close()
        self._draw()
        if self._trackers is not None:
            self._trackers.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, line: str) -> None:
        """Append to metrics.jsonl, at once; what a full disk does not take is kept until it does."""
        reported = bool(self._unwritten)
        self._unwritten += line.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not reported:
                self.warn(f"metrics.jsonl is behind until it can be written again ({error})")

    def _note_layers(self, record: Mapping[str, Any]) -> bool:
        """Remember the step's set of layers; say whether it is a new one."""
        layers = tuple(record.get("sampled_layers") or ())
        if self._changes and self._changes[-1][1] == layers:
            return False
        self._changes.append((int(record["step"]), layers))
        return True

    def _draw(self) -> None:
        if self.done and self._trackers is not None:
            self._trackers.show("sampled_layers", picture(self._changes, self.n_layers, self.done), self.done)
