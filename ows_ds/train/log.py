"""What a run records and shows: metrics.jsonl, trackers (TensorBoard), and the terminal. Rank 0 only.

metrics.jsonl has one object per optimizer step. Numbers that JSON cannot write become null, and the object
then has the extra key `nonfinite`, which names them: `{"loss": null, "nonfinite": {"loss": "nan"}}`; one inside
another object is left out of it, and named as `update_norm/3`. The loss of a skipped step is null without it.
"""

import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy

from ows_ds.config import Log, Recipe, to_dict
from ows_ds.errors import UserError, first_line, one_line
from ows_ds.files import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console

Record = dict[str, Any]
STRIP = 64  # most cells of the strip of layers on the terminal
PLAIN_SECONDS = 10.0  # longest silence between two plain lines, if steps are faster
_ONE_IMAGE = ("aim", "clearml")  # trackers that take an image, where others take several
PICTURE = (900, 8)  # pixels: width of the picture of sampled layers, height of a layer


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


def check_trackers(log: Log) -> None:
    """Raises UserError naming log.trackers where one of them is not installed."""
    from accelerate.tracking import get_available_trackers

    installed = [tracker.value for tracker in get_available_trackers()]
    for name in log.trackers:
        if name not in installed:
            raise UserError("log.trackers", name, f"install {name}, or give a list without it")


def keep_until(path: Path, step: int) -> list[Record]:
    """Drop the lines after `step`, and a line that was cut short, from a metrics file; return the rest.

    The file is replaced as a whole or not at all. One that is missing has no lines.
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


def strip(layers: Sequence[int], n_layers: int, filled: str = "█", empty: str = "·") -> str:
    """The sampled layers as at most 64 cells of as many layers each; a cell is filled when one of its layers is on."""
    wide = math.ceil(n_layers / STRIP)
    on = {layer // wide for layer in layers}
    return "".join(filled if cell in on else empty for cell in range(math.ceil(n_layers / wide)))


def numbered(layers: Sequence[int]) -> str:
    """Layers in ascending order as text, three or more in a row by their ends: "0,4-7"."""
    runs = itertools.groupby(enumerate(layers), lambda pair: pair[1] - pair[0])
    found = [[layer for _, layer in run] for _, run in runs]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in found) or "none"


def picture(changes: Sequence[tuple[int, Sequence[int]]], n_layers: int, last_step: int) -> numpy.ndarray:
    """The sampled layers over time: uint8, shape (height, width, 3); steps go right, layer 0 is on top.

    `changes` holds (first step with this set, its layers) in the order of steps, which count from 1.
    """
    width, cell = PICTURE
    grid = numpy.zeros((n_layers, width), dtype=bool)
    for i, (first, layers) in enumerate(changes):
        until = changes[i + 1][0] if i + 1 < len(changes) else last_step + 1
        left, right = ((s - 1) * width // max(last_step, 1) for s in (first, until))
        grid[list(layers), left : max(right, left + 1)] = True
    colours = numpy.array([[238, 240, 244], [31, 83, 160]], dtype=numpy.uint8)  # resting, sampled
    image: numpy.ndarray = colours[grid.astype(numpy.intp)].repeat(cell, axis=0)
    image[::cell] = 255  # a line between layers
    return image


class RunLog:
    """Records optimizer steps and shows how the run goes; on ranks other than 0 (`main` false) does nothing.

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
        accelerator: "Accelerator | None" = None,
        start_step: int = 0,
        console: "Console | None" = None,
    ) -> None:
        """Open the records of `run_dir`; those of steps after `start_step`, the last one done, are dropped.

        `accelerator` carries the trackers of the recipe (see `check_trackers`); without one there are none. They are
        told the recipe, and shown the picture of the scores that lies in `run_dir`. `console` is for tests.
        Raises UserError where a tracker does not start.
        """
        self.main = main
        if not main:
            return
        self.total_steps, self.n_layers, self.done = total_steps, n_layers, start_step
        self._changes: list[tuple[int, tuple[int, ...]]] = []
        run_dir.mkdir(parents=True, exist_ok=True)
        metrics = run_dir / "metrics.jsonl"
        for record in keep_until(metrics, start_step or -1):
            self._note_layers(record)
        self._trackers = _trackers(accelerator, recipe.log, run_dir, start_step) if accelerator else []
        self._file = open(metrics, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._unwritten = b""
        self._blind: set[str] = set()  # trackers that have failed at images
        self._screen = _screen(recipe.log.progress, total_steps, n_layers, start_step, console)
        self._closed = False
        settings = {f"{name}.{key}": one for name, some in to_dict(recipe).items() for key, one in some.items()}
        self._track(lambda tracker: _describe(tracker, settings, start_step))
        with contextlib.suppress(OSError):  # there are scores of some methods alone
            self._show("scores", _pixels(run_dir / "scores.png"), start_step)

    def step(self, record: Mapping[str, Any]) -> None:
        """Record one optimizer step; the keys are those of metrics.jsonl, `step` counts from 1.

        `loss` is None for a skipped step. On ranks other than 0 nothing happens.
        """
        if not self.main:
            return
        self._write(as_json(record) + "\n")
        if record.get("eval_loss") is not None:
            self.event(f"held-out loss {record['eval_loss']:.4f} after step {record['step']}")
        if record["step"] == 0:  # an evaluation before the first step
            self._track(lambda tracker: tracker.log(_scalars(record), step=0))
            return
        self.done = int(record["step"])
        changed = self._note_layers(record)
        self._track(lambda tracker: tracker.log(_scalars(record), step=self.done))
        if changed:
            self._draw()
        self._screen.step(record)

    def event(self, text: str) -> None:
        """Show a line above the progress; it goes nowhere else. On ranks other than 0 nothing happens."""
        if self.main:
            self._screen.event(one_line(text))

    def close(self) -> None:
        """Write the final picture, close files and trackers, give the terminal back. Can be called again."""
        if not self.main or self._closed:
            return
        self._closed = True
        self._write("")
        self._screen.close()
        self._file.close()
        self._draw()
        self._track(lambda tracker: tracker.finish())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, line: str) -> None:
        """Append to metrics.jsonl, at once; what a full disk does not take is kept until it does."""
        told = bool(self._unwritten)
        self._unwritten += line.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not told:
                self.event(f"metrics.jsonl is behind until it can be written again ({error})")

    def _track(self, what: Callable[[Any], None]) -> None:
        """Do it with every tracker; one that cannot write any more is told so, and left alone from then on."""
        for tracker in list(self._trackers):
            try:
                what(tracker)
            except Exception as error:  # of a disk, a network, a service: no reason to stop training
                self._trackers.remove(tracker)
                self.event(f"{tracker.name} gets no more records ({error})")

    def _note_layers(self, record: Mapping[str, Any]) -> bool:
        """Remember the step's set of layers; say whether it is a new one."""
        layers = tuple(record.get("sampled_layers") or ())
        if self._changes and self._changes[-1][1] == layers:
            return False
        self._changes.append((int(record["step"]), layers))
        return True

    def _draw(self) -> None:
        if self.done and self._trackers:
            self._show("sampled_layers", picture(self._changes, self.n_layers, self.done), self.done)

    def _show(self, name: str, image: numpy.ndarray, step: int) -> None:
        """Give an image, uint8 (height, width, 3), to the trackers that take images."""

        for tracker in self._trackers:
            if tracker.name in self._blind or not hasattr(tracker, "log_images"):
                continue
            shape = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            try:
                tracker.log_images({name: image if tracker.name in _ONE_IMAGE else image[None]}, step=step, **shape)
            except Exception as error:  # of a picture: the numbers go on
                self._blind.add(tracker.name)
                self.event(f"{tracker.name} gets no more images ({error})")


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by tag: `comm_bytes/<op>` for each operation, `update_norm/<layer>` for each layer."""
    scalars: dict[str, float] = {}
    for key, value in record.items():
        if key == "sampled_layers":
            scalars["sampled_layers/count"] = len(value)
        elif isinstance(value, Mapping):
            scalars |= {f"{key}/{name}": number for name, number in value.items()}
        elif isinstance(value, int | float) and key != "step":
            scalars[key] = float(value)
    return scalars


def _trackers(accelerator: "Accelerator", log: Log, run_dir: Path, start_step: int) -> list[Any]:
    """Start the trackers of the recipe in `accelerator`."""
    from accelerate.tracking import TensorBoardTracker

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    trackers: list[Any] = []
    for name in log.trackers:
        if name == "tensorboard":
            # Made here: accelerate would put the files into a folder named after the project.
            trackers.append(TensorBoardTracker("", str(run_dir / "tensorboard"), purge_step=start_step + 1))
        else:
            trackers.append(name)
    accelerator.log_with = trackers
    accelerator.project_configuration.set_directories(str(run_dir))
    try:
        accelerator.init_trackers("ows_ds")
    except Exception as error:  # a service that wants a key, or is out of reach
        right = f"make it start ({first_line(error)}), or give a list without it"
        raise UserError("log.trackers", log.trackers, right) from error
    return list(accelerator.trackers)


def _describe(tracker: Any, settings: Mapping[str, Any], step: int) -> None:
    """Tell a tracker the recipe's keys and values."""
    flat = {
        key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in settings.items()
    }
    if tracker.name == "tensorboard":  # its hyperparameters would be another run in the list of runs
        rows = "".join(f"| {key} | {value} |\n" for key, value in flat.items())
        tracker.log({"recipe": f"| key | value |\n|---|---|\n{rows}"}, step=step)
    else:
        tracker.store_init_configuration(flat)


def _pixels(path: Path) -> numpy.ndarray:
    """A PNG file as uint8 (height, width, 3). Raises OSError where there is none."""
    from matplotlib.image import imread

    image: numpy.ndarray = (imread(path)[..., :3] * 255).round().astype(numpy.uint8)
    return image


class _Screen:
    """Shows nothing; the base of what does."""

    def __init__(self, total_steps: int, n_layers: int, start_step: int) -> None:
        self.total_steps, self.n_layers, self.start_step = total_steps, n_layers, start_step
        self.started = time.monotonic()

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a step's record, if its time has come."""

    def event(self, text: str) -> None:
        """Show a line."""

    def close(self) -> None:
        """Give the terminal back."""

    def left(self, step: int) -> str:
        """Time left after `step` at this run's mean speed, as h:mm:ss."""
        speed = (time.monotonic() - self.started) / max(step - self.start_step, 1)
        seconds = round(speed * max(self.total_steps - step, 0))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    @staticmethod
    def numbers(record: Mapping[str, Any]) -> str:
        """Loss, learning rate, speed and peak memory of a step."""
        loss, lr, speed, peak = (record.get(k) for k in ("loss", "lr", "tokens_per_second", "peak_memory_bytes"))
        return "  ".join(
            (
                "loss skipped" if loss is None else f"loss {loss:.4f}",
                f"lr {0.0 if lr is None else lr:.2e}",
                f"{0 if speed is None or not math.isfinite(speed) else round(speed):,} tokens/s",
                f"peak {(peak or 0) / 2**30:.1f} GiB",
            )
        )


class _Plain(_Screen):
    """A line every 50th of the run or 10 seconds, for files and for terminals that cannot move the cursor."""

    def __init__(self, total_steps: int, n_layers: int, start_step: int, console: "Console") -> None:
        super().__init__(total_steps, n_layers, start_step)
        self.console, self.shown_step, self.shown_at = console, start_step, self.started

    def step(self, record: Mapping[str, Any]) -> None:
        step, now = int(record["step"]), time.monotonic()
        due = step - self.shown_step >= max(1, self.total_steps // 50) or now - self.shown_at >= PLAIN_SECONDS
        if not due and step not in (self.start_step + 1, self.total_steps):
            return
        self.shown_step, self.shown_at = step, now
        layers = numbered(record.get("sampled_layers") or ())
        self._line(
            f"step {step}/{self.total_steps}  {self.numbers(record)}  "
            f"layers {layers} of {self.n_layers}  {self.left(step)} left"
        )

    def event(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        self.console.file.write(text + "\n")  # as it is: no wrapping at a width that a file does not have
        self.console.file.flush()


class _Rich(_Screen):
    """Three lines that stay at the bottom: bar and time left; numbers; strip of layers."""

    def __init__(self, total_steps: int, n_layers: int, start_step: int, console: "Console") -> None:
        super().__init__(total_steps, n_layers, start_step)
        from rich.live import Live

        self.console = console
        ascii_only = not (console.encoding or "").lower().startswith("utf")
        self.filled, self.empty = ("#", ".") if ascii_only else ("█", "·")
        self.live = Live(self._render({"step": start_step}), console=console, refresh_per_second=4)
        self.live.start()

    def _render(self, record: Mapping[str, Any]) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step = int(record["step"])
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        started = step > self.start_step
        left = f"{self.left(step)} left" if started else "first step"
        bar.add_row(f"step {step}/{self.total_steps}", ProgressBar(max(self.total_steps, 1), step), left)
        if not started:
            return Group(bar)
        cells = strip(record.get("sampled_layers") or (), self.n_layers, self.filled, self.empty)
        layers = Text("layers ", no_wrap=True, overflow="crop").append(cells, style="cyan")
        return Group(bar, Text(self.numbers(record), no_wrap=True, overflow="crop"), layers)

    def step(self, record: Mapping[str, Any]) -> None:
        self.live.update(self._render(record))

    def event(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.live.stop()


def _screen(progress: str, total_steps: int, n_layers: int, start_step: int, console: "Console | None") -> _Screen:
    """What `log.progress` asks for; auto is a bar on a terminal and lines elsewhere."""
    if progress == "none":
        return _Screen(total_steps, n_layers, start_step)
    from rich.console import Console

    console = console or Console(file=sys.stdout, force_terminal=True if progress == "rich" else None)
    rich = progress == "rich" or (progress == "auto" and console.is_terminal and not console.is_dumb_terminal)
    return (_Rich if rich else _Plain)(total_steps, n_layers, start_step, console)
