"""`ows-ds bench time`: seconds of a step, methods interleaved, against the limit.

round 1   limit  ows  lisa ...     each in its own process, which waits while another one works
round 2   ... lisa  ows  limit     the other way round, so that what drifts meets all alike
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ows_ds.bench.crew import Failed, Worker
from ows_ds.bench.setting import Setting, estimate, flops_of_limit, limit_of, limits
from ows_ds.tables import Table, number

# flops a second of bfloat16 without sparsity, from the vendor's data sheets
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "L40S": 362e12, "A100": 312e12}
Result = dict[str, Any]


def measure(
    setting: Setting,
    methods: Sequence[str],
    rounds: int,
    steps: int,
    warm_up: int,
    at_once: bool,
    say: Callable[[str], None],
) -> dict[str, Result]:
    """Of each limit and method, {"failed": reason} or what `summarize` gives.

    rounds of ``steps`` timed steps after ``warm_up`` others, and a refresh. at_once: all processes stay alive, else
    each lives for its part of a round.
    """
    names = [*limits(setting), *methods]
    alive: dict[str, Worker] = {}
    found: dict[str, list[Result]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    flops: dict[str, int] = {}
    try:
        for index in range(rounds):
            for name in names if index % 2 == 0 else names[::-1]:
                if name in failed:
                    continue
                say(f"round {index + 1} of {rounds}: {name}")
                try:
                    if name not in alive:
                        alive[name] = Worker(setting, name)
                        [first] = alive[name].hear()
                        if first["first"] is not None:
                            found[name].append({"seconds": [], "refresh": [first["first"], 1]})
                    [answer] = alive[name].ask(do="time", warm_up=warm_up, steps=steps, refresh=True)
                    found[name].append(answer)
                    if name not in flops:
                        [counted] = alive[name].ask(do="flops")
                        flops[name] = counted["flops"]
                except Failed as error:
                    failed[name] = str(error)
                    alive.pop(name)
                if not at_once and name in alive:
                    alive.pop(name).close()
    finally:
        for worker in alive.values():
            worker.close()
    done = {name: summarize(found[name], setting.update_proj_gap) for name in names if name not in failed}
    for name, one in done.items():
        limit = done.get(limit_of(name, setting))
        one["of_limit"] = one["seconds"]["median"] / limit["seconds"]["median"] if limit else None
        one["flops"] = flops[name]
        one["flops_of_limit"] = flops[name] / flops[limit_of(name, setting)] if limit else None
        one["tokens_per_second"] = setting.tokens / one["seconds"]["median"]
    return {name: done.get(name, {"failed": failed.get(name)}) for name in names}


def summarize(answers: Sequence[Result], update_proj_gap: int) -> Result:
    """Medians of a method's answers, in seconds.

    refresh: what one adds to the steps that it takes part in. refresh_share: of all time, one every ``update_proj_gap``
    steps; both None without refreshes.
    """
    rounds = [answer["seconds"] for answer in answers if answer["seconds"]]
    seconds = spread([one for some in rounds for one in some])
    extra = [took - count * seconds["median"] for took, count in (a["refresh"] for a in answers if a["refresh"])]
    refresh = spread(extra) if extra else None
    share = None
    if refresh is not None:
        share = refresh["median"] / (refresh["median"] + update_proj_gap * seconds["median"])
    return {"seconds": seconds, "refresh": refresh, "refresh_share": share, "rounds": rounds}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, median and interquartile range."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"min": min(values), "median": middle, "iqr": high - low}


def fit_at_once(setting: Setting, methods: Sequence[str], free: int) -> bool:
    """Whether processes of all methods fit into 80 % of ``free`` bytes, by a rough estimate."""
    return sum(estimate(setting, name) for name in (*limits(setting), *methods)) < 0.8 * free


def table(results: dict[str, Result], setting: Setting, gpu: str | None) -> Table:
    """The methods, one a row. gpu: its name, None on a CPU."""
    peak = next((flops for name, flops in PEAKS.items() if gpu and name in gpu), None)
    peak = peak if setting.dtype == "bfloat16" else None
    head = [
        "method",
        "step [ms]",
        "x limit",
        "x flops",
        "tokens/s",
        "refresh [ms]",
        "share [%]",
        *(["MFU [%]"] if peak else []),
    ]
    rows = []
    for name, one in results.items():
        if "failed" in one:
            rows.append([name, f"failed: {one['failed']}"])
            continue
        refresh = None if one["refresh"] is None else 1e3 * one["refresh"]["median"]
        row = [
            name,
            number(1e3 * one["seconds"]["median"], 4),
            number(one["of_limit"], 3, fixed=True),
            number(one["flops_of_limit"], 3, fixed=True),
            number(one["tokens_per_second"], 4),
            number(refresh, 3),
            number(None if one["refresh_share"] is None else 100 * one["refresh_share"], 2, fixed=True),
        ]
        if peak:
            used = flops_of_limit(setting.widths, setting.tokens) / one["seconds"]["median"] / peak
            row.append(number(100 * used, 1, fixed=True))
        rows.append(row)
    return Table("time of a step", head, rows)


def notes(setting: Setting) -> list[str]:
    """What a reader must know."""
    said = [
        "x limit: median over that of a forward pass and a backward pass through activations alone, as deep; x flops: "
        "the same of the flops of all matrix products.",
        f"refresh: what new projectors of all sampled layers add; share: of all time at T_p {setting.update_proj_gap}.",
    ]
    if setting.device == "cuda":
        said.append("MFU: the limit's flops over what the GPU could do, the same flops for every method.")
    return said
