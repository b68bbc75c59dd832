"""The code that README.md and `docs/` show, for tests that run it as it is written."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
PROGRAMS = ("ows-ds", "python", "torchrun", "accelerate", "deepspeed", "mpirun", "srun", "sbatch", "pip", "tensorboard")


@dataclass(frozen=True)
class Code:
    """A block of a page. line: of its first line, from 1. language: as named by its fence, or nothing."""

    page: Path
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a page, in words as a shell takes them."""

    page: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def code_of(page: Path) -> list[Code]:
    """The fenced blocks of a page, and those that are indented by four blanks under an empty line."""
    blocks: list[Code] = []
    fence, start, lines = None, 0, list[str]()
    before = ""
    for number, line in enumerate([*page.read_text(encoding="utf-8").split("\n"), ""], start=1):
        if fence is not None:
            if line.strip() == "```":
                blocks.append(Code(page, start, fence, "\n".join(lines)))
                fence, lines = None, []
            else:
                lines.append(line)
        elif line.startswith("```"):
            fence, start = line[3:].strip(), number + 1
        elif line.startswith("    ") and (lines or not before.strip()):
            start = start if lines else number
            lines.append(line[4:])
        elif lines:
            blocks.append(Code(page, start, "", "\n".join(lines)))
            lines = []
        before = line
    assert fence is None, f"{page}: a fence without an end"
    return blocks


def block(page: str, language: str, holds: str) -> str:
    """The one block of a page in a language that has a text in it."""
    [found] = [one.text for one in code_of(ROOT / page) if one.language == language and holds in one.text]
    return found


def commands_of(page: Path) -> list[Command]:
    """Every command in the blocks of a page, and in the columns of its tables that are headed `command`."""
    found = []
    for one in code_of(page):
        if one.language in ("", "bash"):
            number = one.line
            for statement in one.text.replace("\\\n", "\0").split("\n"):
                found += _command(page, number, statement.replace("\0", " "))
                number += 1 + statement.count("\0")
    column = None
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), start=1):
        cells = [cell.strip() for cell in line.split("|")] if line.startswith("|") else []
        if not cells:
            column = None
        elif "command" in cells:
            column = cells.index("command")
        elif column is not None and (match := re.fullmatch(r"`([^`]+ -[^`]+)`", cells[column])):
            found += _command(page, number, match[1])
    return found


def _command(page: Path, number: int, statement: str) -> list[Command]:
    first = statement.split(" ", 1)[0]
    if first in PROGRAMS or first.startswith("./"):
        statement = statement.replace("$(which python)", sys.executable)  # as a shell does
        return [Command(page, number, tuple(shlex.split(statement, comments=True)))]
    return []


def command(page: str, *begins: str) -> list[str]:
    """The one command of a page that begins with these words."""
    found = {one.words for one in commands_of(ROOT / page) if one.words[: len(begins)] == begins}
    [words] = found
    return list(words)
