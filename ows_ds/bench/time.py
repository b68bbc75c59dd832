"""`ows-ds bench time`: seconds of a step, methods interleaved, against the limit.

round 1   limit  ows  lisa ...     each in its own process, which waits while another one works
round 2   ... lisa  ows  limit     the other way round, so that drift of the machine affects all alike
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence

import psutil
import torch

from ows_ds.bench.report import cells
from ows_ds.bench.setting import How, Setting, estimate, flops_of_limit, limit_of, limits
from ows_ds.bench.workers import Result, WorkerError, Workers
from ows_ds.planner.cluster import GPUS, known_gpu
from ows_ds.tables import Table, number

logger = logging.getLogger(__name__)
AXIS, UNIT = "time of a step [ms]", 1e-3


def measure(setting: Setting, methods: Sequence[str], how: How) -> dict[str, Result]:
    """Of each limit and method, {"failed": reason} or what `summarize` gives.

    A round has ``how.steps`` timed steps after ``how.warm_up`` others, and a refresh.
    """
    names = [*limits(setting), *methods]
    at_once = not how.one_at_a_time and fit_at_once(setting, names, _free_memory(setting))
    alive: dict[str, Workers] = {}
    answers: dict[str, list[Result]] = {name: [] for name in names}
    failed: dict[str, Result] = {}
    try:
        for index in range(how.rounds):
            for name in (name for name in names[:: -1 if index % 2 else 1] if name not in failed):
                logger.info("round %d of %d: %s", index + 1, how.rounds, name)
                try:
                    if name not in alive:
                        alive[name] = Workers(setting, name)
                    answers[name] += alive[name].ask("time", how.warm_up, how.steps)
                    if index == 0:
                        answers[name][0] |= alive[name].ask("flops")[0]
                    if (first := alive[name].first[0]["first"]) is not None:  # of a refresh; one a process
                        answers[name].append({"seconds": [], "refresh": [first, 1]})
                        alive[name].first[0]["first"] = None
                    if not at_once:
                        alive.pop(name).close()
                except WorkerError as error:
                    failed[name] = {"failed": str(error)}
                    alive.pop(name, None)
    finally:
        for workers in alive.values():
            workers.close()
    done = {name: summarize(answers[name], setting.update_proj_gap) for name in names if name not in failed}
    for name, one in done.items():
        limit = done.get(limit_of(name, setting))
        one["of_limit"] = one["seconds"]["median"] / limit["seconds"]["median"] if limit else None
        one["flops_of_limit"] = one["flops"] / limit["flops"] if limit else None
        one["tokens_per_second"] = setting.tokens / one["seconds"]["median"]
    return {name: failed.get(name) or done[name] for name in names}


def summarize(answers: Sequence[Result], update_proj_gap: int) -> Result:
    """Medians of a method's answers, in seconds; flops of a step.

    refresh: what one adds to the steps that it takes part in. refresh_share: of all time, one every ``update_proj_gap``
    steps; both None without refreshes.
    """
    rounds = [answer["seconds"] for answer in answers if answer["seconds"]]
    seconds = spread([one for some in rounds for one in some])
    extra = [took - count * seconds["median"] for took, count in (a["refresh"] for a in answers if a["refresh"])]
    refresh, share = spread(extra) if extra else None, None
    if refresh is not None:
        share = refresh["median"] / (refresh["median"] + update_proj_gap * seconds["median"])
    flops = next((answer["flops"] for answer in answers if "flops" in answer), None)
    return {"seconds": seconds, "refresh": refresh, "refresh_share": share, "rounds": rounds, "flops": flops}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, median and interquartile range."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"min": min(values), "median": middle, "iqr": high - low}


def fit_at_once(setting: Setting, names: Sequence[str], free: int) -> bool:
    """Whether processes of all methods fit into 80 % of ``free`` bytes, by a rough estimate."""
    return sum(estimate(setting, name) for name in names) < 0.8 * free


def _free_memory(setting: Setting) -> int:
    """Bytes, where the processes will run."""
    return int(torch.cuda.mem_get_info()[0] if setting.device == "cuda" else psutil.virtual_memory().available)


def value(result: Result) -> float | None:
    """Seconds of a step."""
    return None if "failed" in result else float(result["seconds"]["median"])


def parts(result: Result) -> dict[str, float]:
    """A step has one part."""
    return {"step": result["seconds"]["median"]}


def tables(results: dict[str, Result], setting: Setting, gpu: str | None = None) -> list[Table]:
    """The methods, one a row. gpu: its name where it is not this machine's."""
    if gpu is None and setting.device == "cuda" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    peak = None
    if gpu is not None and setting.dtype == "bfloat16":
        known = known_gpu(gpu)
        peak = None if known is None else GPUS[known]["tflops"]

    def row(one: Result) -> list[str]:
        seconds, refresh, share = one["seconds"]["median"], one["refresh"], one["refresh_share"]
        used = flops_of_limit(setting.widths, setting.tokens) / seconds / (1e12 * peak) if peak else 0.0
        return [
            number(1e3 * seconds, 4),
            number(one["of_limit"], 3, fixed=True),
            number(one["flops_of_limit"], 3, fixed=True),
            number(one["tokens_per_second"], 4),
            number(None if refresh is None else 1e3 * refresh["median"], 3),
            number(None if share is None else 100 * share, 2, fixed=True),
            *([number(100 * used, 1, fixed=True)] if peak else []),
        ]

    head = ["method", "step [ms]", "x limit", "x flops", "tokens/s", "refresh [ms]", "share [%]"]
    return [Table("time of a step", [*head, *(["MFU [%]"] if peak else [])], cells(results, row))]


def notes(setting: Setting) -> list[str]:
    """How to read the table."""
    found = [
        "x limit: median over that of a forward pass and a backward pass through activations alone, as deep; x flops: "
        "the same of the flops of all matrix products.",
        f"refresh: what new projectors of all sampled layers add; share: of all time at T_p {setting.update_proj_gap}.",
    ]
    if setting.device == "cuda":
        found.append("MFU: the limit's flops over what the GPU could do, the same flops for every method.")
    return found
