"""`ows-ds bench time | memory | traffic`: measure every point of a sweep, print tables, write them.

OUTPUT/
    time.json, time.md, time.png    or memory, traffic: numbers, tables, picture; date, hardware, versions, command
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from ows_ds import tables
from ows_ds.bench import memory, report, time, traffic
from ows_ds.bench.setting import (
    DISTRIBUTED,
    OURS,
    RIVALS,
    SMALL_VOCAB,
    How,
    Setting,
    parse_methods,
    parse_sweep,
    points,
)  # fmt: skip
from ows_ds.bench.workers import Result
from ows_ds.tables import Table

logger = logging.getLogger(__name__)
QUANTITIES: dict[str, Any] = {"time": time, "memory": memory, "traffic": traffic}


def bench(what: str, setting: Setting, how: How, command: str) -> None:
    """Measure ``what``: time, memory or traffic. command: as typed, for the report.

    Raises UserError for whatever the user can put right.
    """
    cuda = torch.cuda.is_available() and what != "traffic"
    names = parse_methods(how.methods, DISTRIBUTED if what == "traffic" else (*OURS, *RIVALS))
    swept = parse_sweep(how.sweep)
    settings = points(setting, swept, cuda)
    sweep, found = None if swept is None else swept[0], []
    for one in settings:
        value = None if sweep is None else getattr(one, sweep)
        if sweep is not None:
            logger.info("%s %s", sweep, value)
        found.append({"value": value, "results": QUANTITIES[what].measure(one, names, how)})
    summary = {
        "format": 1,
        **report.facts(command, how.world_size if what == "traffic" else 1),
        "what": what,
        "setting": settings[0].model_dump(),
        "sweep": sweep,
        "points": found,
    }
    shown, notes = make_tables(summary), make_notes(summary)
    if how.output is not None:
        write(summary, shown, notes, Path(how.output))
    print(json.dumps(summary, indent=2, allow_nan=False) if how.as_json else tables.terminal(shown, notes))


def make_tables(summary: Result) -> list[Table]:
    """The summary's tables: of a single point, or one over the values of a sweep."""
    quantity, setting, found = QUANTITIES[summary["what"]], Setting(**summary["setting"]), summary["points"]
    if summary["sweep"] is None:
        return list(quantity.tables(found[0]["results"], setting))
    head = ["method", *(f"{summary['sweep']} {point['value']}" for point in found)]
    names = [name for name in found[0]["results"] if all(name in point["results"] for point in found)]
    rows = [[name, *(tables.number(_value(summary, point, name), 3) for point in found)] for name in names]
    return [Table(quantity.AXIS, head, rows)]


def _value(summary: Result, point: Result, name: str) -> float | None:
    """What a sweep shows of a method, in the unit of the axis."""
    quantity = QUANTITIES[summary["what"]]
    value = quantity.value(point["results"].get(name, {"failed": ""}))
    return None if value is None else value / quantity.UNIT


def make_notes(summary: Result) -> list[str]:
    """How to read the tables."""
    setting, sweep = Setting(**summary["setting"]), summary["sweep"]
    shape = setting.widths
    random = f"Random LLaMA of width {shape.hidden} (MLP {shape.intermediate}, {shape.heads}/{shape.kv_heads} heads)"
    facts = {
        "model": random if setting.model is None else Path(setting.model).name,
        "layers": f"{setting.layers} layers",
        "gamma": f"{setting.gamma} of them sampled",
        "tokens": f"{setting.tokens} tokens",
        "rank": f"rank {setting.rank}",
        "lora_rank": f"LoRA's rank {setting.lora_rank}",
        "dtype": setting.dtype,
        "device": f"{setting.threads} threads a process" if setting.device == "cpu" else "a GPU",
    }
    notes = QUANTITIES[summary["what"]].notes(setting)
    notes.append(", ".join(words for name, words in facts.items() if name != sweep) + ".")
    if setting.model is None and setting.vocab == SMALL_VOCAB:
        notes.append(f"The vocabulary has {SMALL_VOCAB} entries: a large head would hide a few layers' differences.")
    if sweep is not None:
        notes += [
            f"{name} at {sweep} {point['value']} failed: {one['failed']}"
            for point in summary["points"]
            for name, one in point["results"].items()
            if "failed" in one
        ]
    return notes


def write(summary: Result, shown: list[Table], notes: list[str], output: Path) -> None:
    """WHAT.json, WHAT.md and WHAT.png in ``output``, each complete or as it was before."""
    what, sweep = summary["what"], summary["sweep"]
    lines = [*report.heading(what.capitalize(), summary), *(f"* {note}" for note in notes), *report.sections(shown)]
    report.write(output, what, summary, lines)
    quantity, results, picture = QUANTITIES[what], summary["points"][0]["results"], output / f"{what}.png"
    if sweep is not None:
        series = {
            name: {p["value"]: v for p in summary["points"] if (v := _value(summary, p, name)) is not None}
            for name in results
        }
        tables.lines({name: some for name, some in series.items() if some}, sweep, quantity.AXIS, picture)
        return
    parts = {
        name: {part: size / quantity.UNIT for part, size in quantity.parts(one).items()}
        for name, one in results.items()
        if "failed" not in one
    }
    tables.bars(parts, quantity.AXIS, picture)
