"""What settings mean, in words, from their dataclasses: for `--help`, and for docs/reference.md.

    python -m ows_ds.config.reference docs/reference.md

writes the page anew; without a file it is printed.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ows_ds import config

_HEAD = """# Reference of the recipe

Every key, as `ows-ds train --help` shows it. A recipe is a YAML file of these sections. Each key is also an option of
the command line, `--section.key value`, and wins over the file there. Unknown keys and wrong types are refused.

A key with a star may change when a run is resumed; a change of any other is refused then ([resume.md](resume.md)). How
to choose values is in [settings.md](settings.md), what data looks like in [data.md](data.md).

This page is made from `ows_ds/config.py` by `python -m ows_ds.config.reference docs/reference.md`.
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """A setting. hint: its type. type: the same in words. default: as YAML; None: it is required. text: its meaning."""

    name: str
    hint: Any
    type: str
    default: str | None
    text: str


def keys(kind: type) -> Iterator[Key]:
    """The fields of a dataclass, with what its docstring says of them."""
    import docstring_parser

    hints = typing.get_type_hints(kind)
    texts = {
        p.arg_name: " ".join((p.description or "").split()) for p in docstring_parser.parse(kind.__doc__ or "").params
    }
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        known = None if default is dataclasses.MISSING else _as_yaml(default)
        yield Key(field.name, hint, config.instruction(hint).removeprefix("expected "), known, texts[field.name])


def summary(kind: type) -> str:
    """The first line of a docstring."""
    return (kind.__doc__ or "").splitlines()[0]


def reference() -> str:
    """The page, in Markdown."""
    from ows_ds.config import MAY_CHANGE

    lines = [_HEAD]
    for section, kind in config.SECTIONS.items():
        lines += [f"## {section}", "", summary(kind), "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key in keys(kind):
            name = f"`{section}.{key.name}`" + (" *" if key.name in MAY_CHANGE.get(section, ()) else "")
            default = "required" if key.default is None else f"`{key.default}`"
            cells = (name, key.type, default, key.text)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _as_yaml(value: object) -> str:
    """A default as the user would write it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
    else:
        print(reference(), end="")
