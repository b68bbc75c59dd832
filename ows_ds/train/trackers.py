"""Trackers of accelerate (TensorBoard and others): numbers, recipe, pictures, answers. Failures never stop a run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from ows_ds.config import Log, Recipe, to_dict
from ows_ds.errors import UserError, first_line

if TYPE_CHECKING:
    from accelerate import Accelerator

ONE_IMAGE = ("aim", "clearml")  # trackers that take an image, where others take several
PICTURE = (900, 8)  # pixels: width of the picture of sampled layers, height of a layer


def check_trackers(log: Log) -> None:
    """Raises UserError naming log.trackers where one of them is not installed."""
    from accelerate.tracking import get_available_trackers

    installed = [tracker.value for tracker in get_available_trackers()]
    for name in log.trackers:
        if name not in installed:
            raise UserError("log.trackers", name, f"install {name}, or give a list without it")


def picture(changes: Sequence[tuple[int, Sequence[int]]], n_layers: int, last_step: int) -> numpy.ndarray:
    """The sampled layers over time: uint8, shape (height, width, 3); steps go right, layer 0 is on top.

    `changes` has (first step with this set, its layers) in the order of steps, which count from 1.
    """
    width, cell = PICTURE
    grid = numpy.zeros((n_layers, width), dtype=bool)
    for i, (first, layers) in enumerate(changes):
        until = changes[i + 1][0] if i + 1 < len(changes) else last_step + 1
        left, right = ((s - 1) * width // max(last_step, 1) for s in (first, until))
        grid[list(layers), left : max(right, left + 1)] = True
    colours = numpy.array([[238, 240, 244], [31, 83, 160]], dtype=numpy.uint8)  # frozen, sampled
    image: numpy.ndarray = colours[grid.astype(numpy.intp)].repeat(cell, axis=0)
    image[::cell] = 255  # a line between layers
    return image


class Trackers:
    """The trackers of a run. One that fails is reported by ``report`` and gets nothing more."""

    def __init__(
        self, accelerator: Accelerator, log: Log, run_dir: Path, start_step: int, report: Callable[[str], None]
    ) -> None:
        """Raises UserError where one does not start."""
        from accelerate.tracking import TensorBoardTracker

        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        # TensorBoard's is made here: accelerate would put the files into a folder named after the project.
        accelerator.log_with = [
            TensorBoardTracker("", str(run_dir / "tensorboard"), purge_step=start_step + 1)
            if name == "tensorboard"
            else name
            for name in log.trackers
        ]
        accelerator.project_configuration.set_directories(str(run_dir))
        try:
            accelerator.init_trackers("ows_ds")
        except Exception as error:  # a service that wants a key, or is out of reach
            right = f"make it start ({first_line(error)}), or give a list without it"
            raise UserError("log.trackers", log.trackers, right) from error
        self.active: list[Any] = list(accelerator.trackers)
        self._report = report
        self._without: set[tuple[str, str]] = set()  # (tracker, what it failed at beside numbers)

    def describe(self, recipe: Recipe, run_dir: Path, step: int) -> None:
        """The recipe's keys and values, and the picture of the scores in ``run_dir``."""
        flat = {
            f"{section}.{key}": value if isinstance(value, int | float | str) else json.dumps(value)
            for section, values in to_dict(recipe).items()
            for key, value in values.items()
        }

        def one(tracker: Any) -> None:
            if tracker.name == "tensorboard":  # its hyperparameters would be another run in the list of runs
                tracker.log({"recipe": _markdown(["key", "value"], flat.items())}, step=step)
            else:
                tracker.store_init_configuration(flat)

        self._each(one)
        with contextlib.suppress(OSError):  # only some methods have scores
            self.show("scores", _pixels(run_dir / "scores.png"), step)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """The numbers of a record of metrics.jsonl, and its samples for the trackers that take text."""
        self._each(lambda tracker: tracker.log(_scalars(record), step=step))
        columns, rows = ["message", "answer"], record.get("samples") or []
        for tracker in self.active if rows else ():
            if tracker.name == "tensorboard":
                self._try(tracker, "text", tracker.log, {"samples": _markdown(columns, rows)}, step=step)
            elif hasattr(tracker, "log_table"):
                self._try(tracker, "text", tracker.log_table, "samples", columns=columns, data=rows, step=step)

    def show(self, name: str, image: numpy.ndarray, step: int) -> None:
        """An image, uint8 (height, width, 3), for the trackers that take images."""
        for tracker in self.active:
            if hasattr(tracker, "log_images"):
                shape = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                images = {name: image if tracker.name in ONE_IMAGE else image[None]}
                self._try(tracker, "images", tracker.log_images, images, step=step, **shape)

    def _try(self, tracker: Any, what: str, send: Callable[..., None], *given: Any, **more: Any) -> None:
        """Send what is beside numbers, which are still logged where that fails."""
        if (tracker.name, what) in self._without:
            return
        try:
            send(*given, **more)
        except Exception as error:
            self._without.add((tracker.name, what))
            self._report(f"{tracker.name} gets no more {what} ({error})")

    def close(self) -> None:
        """Flush."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, what: Callable[[Any], None]) -> None:
        for tracker in list(self.active):
            try:
                what(tracker)
            except Exception as error:  # of a disk, a network, a service: no reason to stop training
                self.active.remove(tracker)
                self._report(f"{tracker.name} gets no more records ({error})")


def _markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of a line a row: what is in a cell ends neither it nor the line."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells))


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


def _pixels(path: Path) -> numpy.ndarray:
    """A PNG file as uint8 (height, width, 3). Raises OSError where there is none."""
    from matplotlib.image import imread

    image: numpy.ndarray = (imread(path)[..., :3] * 255).round().astype(numpy.uint8)
    return image
