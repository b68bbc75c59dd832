"""`ows-ds bench traffic`: bytes that a process sends in a step and for a refresh, beside the planner's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ows_ds.bench.crew import Failed, Worker
from ows_ds.bench.setting import Setting
from ows_ds.tables import Table, number, size_in

Result = dict[str, Any]
SMALL = ("agree", "layer_set")  # messages of some bytes, which the planner leaves out


def measure(setting: Setting, methods: Sequence[str], world_size: int, say: Callable[[str], None]) -> dict[str, Result]:
    """Of each method, in ``world_size`` processes on the loopback device, {"failed": reason} or the busiest one's bytes:

    KIND: {operation: bytes} of a ``step`` or what a ``refresh`` adds; KIND_planned: what `ows_ds.planner.memory` says;
    full_rank: of an all-reduce of the whole gradients of the same layers. refresh is None where there is none.
    """
    results: dict[str, Result] = {}
    for name in methods:
        say(name)
        worker = Worker(setting, name, world_size)
        try:
            worker.hear()
            answers = worker.ask(do="traffic")
            results[name] = max(answers, key=lambda answer: sum((answer["refresh"] or answer["step"]).values()))
        except Failed as error:
            results[name] = {"failed": str(error)}
        worker.close()
    return results


def total(result: Result, kind: str) -> int | None:
    """Bytes of a step, of a refresh, or planned for them."""
    found = result.get(kind)
    return None if found is None else sum(size for name, size in found.items() if name not in SMALL)


def tables(results: dict[str, Result]) -> list[Table]:
    """The methods, one a row: sums, and by operation."""
    kinds = ("step", "step_planned", "refresh", "refresh_planned")
    unit, size = size_in([total(one, kind) for one in results.values() for kind in ("step", "refresh")])
    sums, parts = [], []
    for name, one in results.items():
        if "failed" in one:
            sums.append([name, f"failed: {one['failed']}"])
            continue
        share = one["full_rank"] and sum(one["step"].values()) / one["full_rank"]
        step, planned, refresh, refresh_planned = (size(total(one, kind)) for kind in kinds)
        sums.append([name, step, planned, number(share, 3, fixed=True), refresh, refresh_planned])
        for kind in ("step", "refresh"):
            parts += [[name, kind, op, f"{count:,}"] for op, count in (one[kind] or {}).items()]
    head = ["method", "step", "planned", "x full-rank", "refresh", "planned"]
    return [
        Table(f"sent by a process [{unit}]", head, sums),
        Table("by operation", ["method", "when", "operation", "bytes"], parts),
    ]


def notes(setting: Setting) -> list[str]:
    """What a reader must know."""
    return [
        "x full-rank: of an all-reduce of the sampled layers' whole gradients. refresh: what one adds to its steps.",
        "Bytes are those of ring algorithms, of the process that sends most. planned: what the planner says, messages "
        "of some bytes left out, and ZeRO-3's gathers where the layers stand inside a model.",
    ]
