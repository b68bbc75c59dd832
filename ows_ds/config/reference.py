"""docs/reference.md, from the models: `python -m ows_ds.config.reference docs/reference.md`."""

import sys
from pathlib import Path
from typing import Any

from ows_ds.config.recipe import may_change_on_resume, sections
from ows_ds.config.settings import default_of, fields_of, words

_HEAD = """# Reference of the recipe

Every key, as `ows-ds train --help` shows it. A recipe is a YAML file of these sections. Each key is also an option of
the command line, `--section.key value`, and wins over the file there. Unknown keys and wrong types are refused.

A key with a star may change when a run is resumed; a change of any other is refused then ([resume.md](resume.md)). How
to choose values is in [settings.md](settings.md), what data looks like in [data.md](data.md).

This page is made from `ows_ds/config/` by `python -m ows_ds.config.reference docs/reference.md`.
"""


def reference() -> str:
    """The page, in Markdown."""
    lines = [_HEAD]
    for section, kind in sections().items():
        lines += [f"## {section}", "", str(kind.__doc__), "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for name, field in fields_of(kind).items():
            star = " *" if may_change_on_resume(f"{section}.{name}") else ""
            default = "required" if field.is_required() else f"`{as_yaml(default_of(field))}`"
            cells = (f"`{section}.{name}`{star}", words(field), default, " ".join(str(field.description).split()))
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def as_yaml(value: Any) -> str:
    """A default as the user would write it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
