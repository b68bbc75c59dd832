"""Where the program stands, for reports."""

from __future__ import annotations

import functools
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PACKAGES, STANDARD = (sysconfig.get_paths()[key] for key in ("purelib", "stdlib"))
DEPTH = 3  # frames of the program that a report names

Frame = tuple[str, int]  # file, line


class Place(NamedTuple):
    """library: the innermost frame, if it is neither the program's nor torch's. own: the program's, innermost first."""

    library: Frame | None
    own: tuple[Frame, ...]

    def __str__(self) -> str:
        library = f"[{_name(self.library)}] " if self.library else ""
        return library + " < ".join(map(_name, self.own))


def here() -> Place:
    """The place that has called these helpers."""
    library, own = None, []
    frame = sys._getframe(1)
    while frame is not None and len(own) < DEPTH:
        file = frame.f_code.co_filename
        kind = _kind(file)
        if kind == "own":
            own.append((file, frame.f_lineno))
        elif kind == "library" and not own and library is None:
            library = (file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return Place(library, tuple(own))


@functools.cache
def _kind(file: str) -> str:
    path = Path(file)
    if path.parent == HERE and not path.name.startswith("test_"):
        return "helper"
    if file.startswith(PACKAGES):
        return "torch" if file.startswith(f"{PACKAGES}/torch/") else "library"
    return "standard" if file.startswith((STANDARD, "<")) else "own"


def _name(frame: Frame) -> str:
    file, line = frame
    for root in (f"{PACKAGES}/", f"{HERE.parent.parent}/"):
        file = file.removeprefix(root)
    return f"{file}:{line}"
