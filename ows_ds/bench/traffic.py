"""`ows-ds bench traffic`: bytes that a rank sends in a step and for a refresh, beside the planner's numbers."""

from __future__ import annotations

from collections.abc import Sequence

from ows_ds.bench.report import cells
from ows_ds.bench.setting import How, Setting
from ows_ds.bench.workers import Result, ask_each
from ows_ds.tables import Table, number, size_in

AXIS, UNIT = "sent in a step [MiB]", 2**20
SMALL = ("agree", "layer_set")  # messages of some bytes, which the planner leaves out


def measure(setting: Setting, methods: Sequence[str], how: How) -> dict[str, Result]:
    """Of each method, on ``how.world_size`` ranks, {"failed": reason} or the bytes of the rank that sends most:

    KIND: {operation: bytes} of a ``step`` or what a ``refresh`` adds (None: there is none); KIND_planned: the planner's
    numbers; full_rank: of an all-reduce of the full gradients of the same layers.
    """
    answers = ask_each(setting, methods, "traffic", how.world_size)
    sent = lambda rank: sum((rank["refresh"] or rank["step"]).values())  # noqa: E731
    return {name: one if "failed" in one else max(one, key=sent) for name, one in answers.items()}


def value(result: Result, kind: str = "step") -> int | None:
    """Bytes of a step, of a refresh, or planned for them."""
    found = result.get(kind)
    return None if found is None else sum(size for name, size in found.items() if name not in SMALL)


def parts(result: Result) -> dict[str, int]:
    """Bytes of a step, by operation."""
    return dict(result["step"])


def tables(results: dict[str, Result], setting: Setting) -> list[Table]:
    """The methods, one a row: sums, and by operation."""
    unit, size = size_in([value(one, kind) for one in results.values() for kind in ("step", "refresh")])

    def row(one: Result) -> list[str]:
        kinds = ("step", "step_planned", "refresh", "refresh_planned")
        step, step_planned, refresh, refresh_planned = (size(value(one, kind)) for kind in kinds)
        share = one["full_rank"] and sum(one["step"].values()) / one["full_rank"]
        return [step, step_planned, number(share, 3, fixed=True), refresh, refresh_planned]

    operations = [
        [name, kind, operation, f"{count:,}"]
        for name, one in results.items()
        for kind in ("step", "refresh")
        for operation, count in (one.get(kind) or {}).items()
    ]
    head = ["method", "step", "planned", "x full-rank", "refresh", "planned"]
    return [
        Table(f"sent by a rank [{unit}]", head, cells(results, row)),
        Table("by operation", ["method", "when", "operation", "bytes"], operations),
    ]


def notes(setting: Setting) -> list[str]:
    """How to read the tables."""
    return [
        "x full-rank: of an all-reduce of the sampled layers' full gradients. refresh: what one adds to its steps.",
        "Bytes are those of ring algorithms, of the rank that sends most. planned: what the planner says, messages "
        "of some bytes left out, and ZeRO-3's gathers where the layers stand inside a model.",
    ]
