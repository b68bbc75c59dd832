"""`ows-ds bench memory`: the most bytes that a step needs, by component (the paper's Figure 4), and in a refresh."""

from __future__ import annotations

from collections.abc import Sequence

from ows_ds.bench.report import cells
from ows_ds.bench.setting import How, Setting, limits
from ows_ds.bench.tracking import COMPONENTS
from ows_ds.bench.workers import Result, ask_each
from ows_ds.tables import Table, size_in

AXIS, UNIT = "peak memory [GiB]", 2**30


def measure(setting: Setting, methods: Sequence[str], how: How) -> dict[str, Result]:
    """Of each limit and method, {"failed": reason} or, with KIND ``step`` and ``refresh`` (None: there is none):

    KIND: {component: bytes} at the peak (see `ows_ds.bench.tracking`); KIND_planned: the planner's number; KIND_parts:
    that by component, between steps and in each phase; KIND_allocated, KIND_reserved: the most that torch's tensors and
    torch itself took on a GPU.
    """
    answers = ask_each(setting, (*limits(setting), *methods), "memory")
    return {name: one if "failed" in one else one[0] for name, one in answers.items()}


def total(result: Result, kind: str) -> int | None:
    """Bytes at the peak of a step or a refresh; on a GPU as its allocator counts."""
    if result.get(kind) is None:
        return None
    return int(result[f"{kind}_allocated"] or sum(result[kind].values()))


def value(result: Result) -> int | None:
    """The most of any step."""
    return max((size for kind in ("step", "refresh") if (size := total(result, kind)) is not None), default=None)


def parts(result: Result) -> dict[str, int]:
    """Bytes of a step, by component."""
    return dict(result["step"])


def tables(results: dict[str, Result], setting: Setting) -> list[Table]:
    """The methods, one a row."""
    unit, size = size_in([value(one) for one in results.values()])

    def row(one: Result) -> list[str]:
        planned = max((one[f"{kind}_planned"] or 0 for kind in ("step", "refresh")), default=0) or None
        parts = [one["step"][component] for component in COMPONENTS]
        return [*map(size, [*parts, total(one, "step"), total(one, "refresh"), planned])]

    head = ["method", "weights", "grads", "optim", "activ", "buffers", "step", "refresh", "planned"]
    return [Table(f"peak memory [{unit}]", head, cells(results, row))]


def notes(setting: Setting) -> list[str]:
    """How to read the table."""
    counted = "as torch's allocator counts" if setting.device == "cuda" else "of live tensors, counted, not sampled"
    return [
        f"weights to buffers: at the peak of a plain step; step, refresh: the peaks {counted}; planned: what the "
        "planner says of the larger one.",
        "optim: moments, float32 masters, coordinates, projectors. What a kernel allocates and frees within itself is "
        "not in the components.",
    ]
