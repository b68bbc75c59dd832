"""The progress of a run on the terminal: a bar, plain lines, or nothing."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

STRIP = 64  # most cells of the strip of layers
SMOOTH = 0.9  # share of the mean of earlier losses in that of a step
PLAIN_SECONDS = 10.0  # longest silence between two plain lines, if steps are faster


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


class Screen:
    """Shows nothing; the base class of the others."""

    shows = False

    def __init__(self, total_steps: int, n_layers: int, start_step: int) -> None:
        self.total_steps, self.n_layers, self.start_step = total_steps, n_layers, start_step
        self.started = time.monotonic()
        self.mean: float | None = None  # of the last losses, those longer ago count less

    def note(self, record: Mapping[str, Any]) -> None:
        """Let a step's loss count."""
        loss = record.get("loss")
        if loss is not None and math.isfinite(loss):
            self.mean = loss if self.mean is None else SMOOTH * self.mean + (1 - SMOOTH) * loss

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a step's record, if it is due."""

    def event(self, text: str) -> None:
        """Show a line."""

    def close(self) -> None:
        """Give the terminal back."""

    def left(self, step: int) -> str:
        """Time left after `step` at this run's mean speed, as h:mm:ss."""
        speed = (time.monotonic() - self.started) / max(step - self.start_step, 1)
        return clock(speed * max(self.total_steps - step, 0))

    def place(self, record: Mapping[str, Any]) -> str:
        """Step and epoch."""
        epoch = record.get("epoch")
        return f"step {record['step']}/{self.total_steps}" + (f", epoch {epoch:.2f}" if epoch is not None else "")

    def numbers(self, record: Mapping[str, Any]) -> str:
        """Loss, alone and smoothed, learning rate, speed and peak memory of a step."""
        mean = "" if self.mean is None else f" (mean {self.mean:.4f})"
        loss, lr, speed, peak = (record.get(k) for k in ("loss", "lr", "tokens_per_second", "peak_memory_bytes"))
        return "  ".join(
            (
                "loss skipped" if loss is None else f"loss {loss:.4f}{mean}",
                f"lr {0.0 if lr is None else lr:.2e}",
                f"{0 if speed is None or not math.isfinite(speed) else round(speed):,} tokens/s",
                f"peak {(peak or 0) / 2**30:.1f} GiB",
            )
        )


def clock(seconds: float) -> str:
    """A time as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class _Plain(Screen):
    """A line every 50th of the run or 10 seconds, for files and for terminals that cannot move the cursor."""

    shows = True

    def __init__(self, total_steps: int, n_layers: int, start_step: int, console: Console) -> None:
        super().__init__(total_steps, n_layers, start_step)
        self.console, self.shown_step, self.shown_at = console, start_step, self.started

    def step(self, record: Mapping[str, Any]) -> None:
        self.note(record)
        step, now = int(record["step"]), time.monotonic()
        due = step - self.shown_step >= max(1, self.total_steps // 50) or now - self.shown_at >= PLAIN_SECONDS
        if not due and step not in (self.start_step + 1, self.total_steps):
            return
        self.shown_step, self.shown_at = step, now
        layers = numbered(record.get("sampled_layers") or ())
        self._line(
            f"{self.place(record)}  {self.numbers(record)}  "
            f"layers {layers} of {self.n_layers}  {clock(now - self.started)} gone, {self.left(step)} left"
        )

    def event(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        self.console.file.write(text + "\n")  # as it is: no wrapping at a width that a file does not have
        self.console.file.flush()


class _Rich(Screen):
    """Three lines that stay at the bottom: bar and time left; numbers; strip of layers."""

    shows = True

    def __init__(self, total_steps: int, n_layers: int, start_step: int, console: Console) -> None:
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
        gone = clock(time.monotonic() - self.started)
        left = f"{gone} gone, {self.left(step)} left" if started else "first step"
        bar.add_row(self.place(record), ProgressBar(max(self.total_steps, 1), step), left)
        if not started:
            return Group(bar)
        cells = strip(record.get("sampled_layers") or (), self.n_layers, self.filled, self.empty)
        layers = Text("layers ", no_wrap=True, overflow="crop").append(cells, style="cyan")
        return Group(bar, Text(self.numbers(record), no_wrap=True, overflow="crop"), layers)

    def step(self, record: Mapping[str, Any]) -> None:
        self.note(record)
        self.live.update(self._render(record))

    def event(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.live.stop()


def screen(progress: str, total_steps: int, n_layers: int, start_step: int, console: Console | None) -> Screen:
    """The screen that `log.progress` names; auto is a bar on a terminal and lines elsewhere. console: for tests."""
    if progress == "none":
        return Screen(total_steps, n_layers, start_step)
    from rich.console import Console

    console = console or Console(file=sys.stdout, force_terminal=True if progress == "rich" else None)
    rich = progress == "rich" or (progress == "auto" and console.is_terminal and not console.is_dumb_terminal)
    return (_Rich if rich else _Plain)(total_steps, n_layers, start_step, console)
