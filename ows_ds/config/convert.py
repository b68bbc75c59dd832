"""Recipes of LLaMA-Factory, axolotl, TRL and LMFlow -> ours; what has no counterpart is listed.

`readers.TABLE` says what becomes of a key; docs/from_other_tools.md shows the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ows_ds.config.elsewhere import MEANINGS
from ows_ds.config.readers import MICRO, NOTE, QUIET, READERS, TABLE, Keys
from ows_ds.config.recipe import sections


class Converted(NamedTuple):
    """recipe: its sections, without defaults. left_out: keys without a counterpart, and why. notes: what to look at."""

    recipe: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    notes: list[str]


def is_foreign(tree: Mapping[str, Any]) -> bool:
    """Whether a file is a recipe of another tool: flat, with at least two of their keys and no section of ours."""
    flat = [key for key in tree if key in MEANINGS or key in READERS]
    return len(flat) >= 2 and not any(isinstance(tree.get(name), Mapping) for name in sections())


def convert(tree: Mapping[str, Any], ranks: int = 1) -> Converted:
    """ranks: over which the run will be split: their batches are of a rank."""
    found: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    notes: list[str] = []
    tree = {str(key): value for key, value in tree.items()}
    for key, value in {**tree, **_batch(tree, ranks)}.items():
        if value is None or key in QUIET:
            continue
        if key not in READERS:
            left_out[key] = f"{MEANINGS[key]} is near" if key in MEANINGS else "not here"
            continue
        made = READERS[key](value, tree)
        if made is None:
            left_out[key] = f"{value!r} is not here"
        for name, ours in (made or {}).items():
            if name.startswith(NOTE):
                notes.append(f"{key}: {ours}")
                continue
            section, _, last = name.partition(".")
            found.setdefault(section, {})[last] = ours
    if found.get("method", {}).get("name") in (None, "ows") and "method" in found:
        found["method"] = {name: one for name, one in found["method"].items() if not name.startswith("lora_")}
    ordered = {name: found[name] for name in sections() if found.get(name)}
    return Converted(ordered, left_out, notes)


def _batch(tree: Mapping[str, Any], ranks: int) -> Keys:
    """Their batches: sequences of a rank and pass, and passes a step; as keys of our own making."""
    micro = next((tree[key] for key in MICRO if isinstance(tree.get(key), int)), None)
    steps = tree.get("gradient_accumulation_steps")
    if micro is None and not isinstance(steps, int):
        return {}
    return {"_batch": (micro or 1) * (steps if isinstance(steps, int) else 1) * ranks}


def table() -> str:
    """The Markdown table of docs/from_other_tools.md."""
    rows = [f"| {', '.join(f'`{name}`' for name in names.split())} | {ours} |" for names, ours, _ in TABLE]
    return "\n".join(["| theirs | here |", "|---|---|", *rows]) + "\n"
