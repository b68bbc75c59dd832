"""`ows-ds bench time | memory | traffic`: measure every point of a sweep, print tables, write them.

OUTPUT/
    time.json, time.md, time.png    or memory, traffic: numbers, tables, picture; date, hardware, versions, command
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
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
    check,
    parse_methods,
    parse_sweep,
    points,
)
from ows_ds.files import atomic_write
from ows_ds.tables import Table

Summary = dict[str, Any]
AXES = {"time": "time of a step [ms]", "memory": "peak memory [GiB]", "traffic": "sent in a step [MiB]"}


def bench(what: str, setting: Setting, how: How, command: str) -> None:
    """Measure ``what``: time, memory or traffic. command: what was typed.

    Raises UserError for whatever the user can put right.
    """
    cuda = torch.cuda.is_available() and what != "traffic"
    names = parse_methods(how.methods, DISTRIBUTED if what == "traffic" else (*OURS, *RIVALS))
    swept = parse_sweep(how.sweep)
    settings = points(setting, swept, cuda)
    check(how)
    output = None if how.output is None else Path(how.output)
    found = []
    for index, one in enumerate(settings):
        label = "" if swept is None else f"{swept[0]} {swept[1][index]}: "

        def say(text: str, label: str = label) -> None:
            print(f"{label}{text}", file=sys.stderr, flush=True)

        if what == "time":
            at_once = not how.one_at_a_time and time.fit_at_once(one, names, _free(one))
            results = time.measure(one, names, how.rounds, how.steps, how.warm_up, at_once, say)
        elif what == "memory":
            results = memory.measure(one, names, say)
        else:
            results = traffic.measure(one, names, how.world_size, say)
        found.append({"value": None if swept is None else swept[1][index], "results": results})
    summary = {
        "format": 1,
        **report.facts(command, how.world_size if what == "traffic" else 1),
        "what": what,
        "setting": settings[0].model_dump(),
        "sweep": None if swept is None else swept[0],
        "points": found,
    }
    shown, notes = make_tables(summary), _notes(summary)
    if output is not None:
        write(summary, shown, notes, output)
    print(json.dumps(summary, indent=2, allow_nan=False) if how.as_json else tables.terminal(shown, notes))


def _free(setting: Setting) -> int:
    """Bytes that can still be had where the processes will run."""
    if setting.device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def make_tables(summary: Summary) -> list[Table]:
    """The summary's tables: one of a single point, or one over the values of a sweep."""
    what, setting = summary["what"], Setting(**summary["setting"])
    first = summary["points"][0]["results"]
    if summary["sweep"] is None:
        gpu = torch.cuda.get_device_name() if setting.device == "cuda" and torch.cuda.is_available() else None
        return {
            "time": lambda: [time.table(first, setting, gpu)],
            "memory": lambda: [memory.table(first)],
            "traffic": lambda: traffic.tables(first),
        }[what]()
    head = ["method", *(f"{summary['sweep']} {point['value']}" for point in summary["points"])]
    rows = [
        [name, *(tables.number(_value(what, point["results"][name]), 3) for point in summary["points"])]
        for name in first
        if all(name in point["results"] for point in summary["points"])
    ]
    return [Table(AXES[what], head, rows)]


def _value(what: str, result: dict[str, Any]) -> float | None:
    """What a sweep shows of a method's result, in the unit of `AXES`."""
    if "failed" in result:
        return None
    if what == "time":
        return float(1e3 * result["seconds"]["median"])
    size = memory.peak(result) if what == "memory" else traffic.total(result, "step")
    return None if size is None else size / (2**30 if what == "memory" else 2**20)


def _notes(summary: Summary) -> list[str]:
    """What a reader must know to read the tables rightly."""
    what, setting = summary["what"], Setting(**summary["setting"])
    notes = {"time": time.notes, "memory": memory.notes, "traffic": traffic.notes}[what](setting)
    facts = {
        "model": _model(setting),
        "layers": f"{setting.layers} layers",
        "gamma": f"{setting.gamma} of them sampled",
        "tokens": f"{setting.tokens} tokens",
        "rank": f"rank {setting.rank}",
        "lora_rank": f"LoRA's rank {setting.lora_rank}",
        "dtype": setting.dtype,
        "device": f"{setting.threads} threads a process" if setting.device == "cpu" else "a GPU",
    }
    notes.append(", ".join(words for name, words in facts.items() if name != summary["sweep"]) + ".")
    if setting.model is None and setting.vocab == SMALL_VOCAB:
        notes.append(
            f"The vocabulary has {SMALL_VOCAB} entries: beside a few layers a whole head would hide what is compared."
        )
    if summary["sweep"] is not None:
        notes += [
            f"{name} at {summary['sweep']} {point['value']} failed: {one['failed']}"
            for point in summary["points"]
            for name, one in point["results"].items()
            if "failed" in one
        ]
    return notes


def _model(setting: Setting) -> str:
    if setting.model is not None:
        return Path(setting.model).name
    shape = setting.widths
    return f"Random LLaMA of width {shape.hidden} (MLP {shape.intermediate}, {shape.heads}/{shape.kv_heads} heads)"


def markdown(summary: Summary, shown: Sequence[Table], notes: Sequence[str]) -> str:
    """WHAT.md."""
    lines = [*report.heading(summary["what"].capitalize(), summary), *(f"* {note}" for note in notes)]
    for one in shown:
        lines += ["", f"## {one.title[0].upper()}{one.title[1:]}", "", *tables.markdown(one)]
    return "\n".join(lines) + "\n"


def write(summary: Summary, shown: Sequence[Table], notes: Sequence[str], output: Path) -> None:
    """WHAT.json, WHAT.md and WHAT.png in ``output``, each complete or as it was before."""
    what = summary["what"]
    for name, text in {
        f"{what}.json": json.dumps(summary, indent=2, allow_nan=False) + "\n",
        f"{what}.md": markdown(summary, shown, notes),
    }.items():
        with atomic_write(output / name) as partial:
            partial.write_text(text, encoding="utf-8")
    results, picture = summary["points"][0]["results"], output / f"{what}.png"
    good = {name: one for name, one in results.items() if "failed" not in one}
    if summary["sweep"] is not None:
        series = {
            name: {
                point["value"]: value
                for point in summary["points"]
                if (value := _value(what, point["results"].get(name, {"failed": ""}))) is not None
            }
            for name in results
        }
        tables.lines({name: some for name, some in series.items() if some}, summary["sweep"], AXES[what], picture)
    elif what == "memory":
        parts = {n: {part: size / 2**30 for part, size in one["step"].items()} for n, one in good.items()}
        tables.bars(parts, AXES[what], picture)
    elif what == "traffic":
        parts = {n: {part: size / 2**20 for part, size in one["step"].items()} for n, one in good.items()}
        tables.bars(parts, AXES[what], picture)
    else:
        tables.bars({name: {"step": float(_value(what, one) or 0)} for name, one in good.items()}, AXES[what], picture)
