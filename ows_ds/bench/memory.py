"""`ows-ds bench memory`: the most bytes that a step needs, by component (the paper's Figure 4), and in a refresh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ows_ds.bench.crew import Failed, Worker
from ows_ds.bench.setting import Setting, limits
from ows_ds.bench.tracking import COMPONENTS
from ows_ds.tables import Table, size_in

Result = dict[str, Any]


def measure(setting: Setting, methods: Sequence[str], say: Callable[[str], None]) -> dict[str, Result]:
    """Of each limit and method, one after the other, {"failed": reason} or, for ``step`` and ``refresh``:

    KIND: {component: bytes} at the peak of a step (see `ows_ds.bench.tracking`); KIND_planned: what `ows_ds.planner.memory`
    says; KIND_parts: that by component, between steps and in each phase; KIND_allocated: the most that torch took on a
    GPU. None: there is none.
    """
    results: dict[str, Result] = {}
    for name in (*limits(setting), *methods):
        say(name)
        worker = Worker(setting, name)
        try:
            worker.hear()
            [results[name]] = worker.ask(do="memory")
        except Failed as error:
            results[name] = {"failed": str(error)}
        worker.close()
    return results


def total(result: Result, kind: str = "step") -> int | None:
    """Bytes at the peak of a step, or of a refresh; on a GPU as its allocator counts."""
    if result.get(kind) is None:
        return None
    return int(result[f"{kind}_allocated"] or sum(result[kind].values()))


def peak(result: Result) -> int | None:
    """The most of any step."""
    return max((size for kind in ("step", "refresh") if (size := total(result, kind)) is not None), default=None)


def table(results: dict[str, Result]) -> Table:
    """The methods, one a row."""
    unit, size = size_in([peak(one) for one in results.values()])
    rows = []
    for name, one in results.items():
        if "failed" in one:
            rows.append([name, f"failed: {one['failed']}"])
            continue
        planned = max((one[f"{kind}_planned"] for kind in ("step", "refresh") if one[f"{kind}_planned"]), default=None)
        parts = [one["step"][component] for component in COMPONENTS]
        rows.append([name, *map(size, [*parts, total(one), total(one, "refresh"), planned])])
    head = ["method", "weights", "grads", "optim", "activ", "buffers", "step", "refresh", "planned"]
    return Table(f"peak memory [{unit}]", head, rows)


def notes(setting: Setting) -> list[str]:
    """What a reader must know."""
    how = "as torch's allocator counts" if setting.device == "cuda" else "of live tensors, counted, not sampled"
    return [
        f"weights to buffers: at the peak of a plain step; step, refresh: the peaks {how}; planned: what the planner "
        "says of the larger one.",
        "optim: moments, float32 masters, coordinates, projectors. Of kernels, what they take and give back is not "
        "in the components.",
    ]
