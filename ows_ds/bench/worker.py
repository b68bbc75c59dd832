"""A process of one rank with one method, which takes steps when it is asked to (see `ows_ds.bench.workers`)."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ows_ds.bench.rivals import rival
from ows_ds.bench.setting import OURS, Setting, ways_of
from ows_ds.bench.tracking import Tracker
from ows_ds.bench.trial import Trial, full_rank_bytes, ours
from ows_ds.errors import UserError, first_line
from ows_ds.planner.memory import memory
from ows_ds.planner.traffic import traffic

Answer = dict[str, Any]


def serve(pipe: Connection, setting: Setting, method: str, rank: int, world_size: int, port: int) -> None:
    """Answer questions, (name in `WORK`, arguments), until the pipe ends; first of all, after the first step.

    Whatever fails is answered with {"failed": reason}, and the process ends.
    """
    if world_size > 1:  # as a launcher sets them
        names: Answer = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        os.environ.update({name: str(value) for name, value in names.items()})
    with open(os.devnull, "w") as nothing:  # for what libraries print
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    try:
        torch.set_num_threads(setting.threads)
        torch.set_flush_denormal(True)  # random weights under a decaying Adam reach denormals, trained ones hardly
        trial = (ours if ways_of(method)[0] in OURS else rival)(setting, method, world_size)
        first = timed(trial.step)  # finds the first projectors, and makes all that is made once
        pipe.send({"first": first if trial.first_refreshes else None})
        while True:
            name, arguments = pipe.recv()
            pipe.send(WORK[name](trial, setting, *arguments))
    except EOFError:
        pass
    except Exception as error:
        pipe.send({"failed": reason(error)})


def reason(error: BaseException) -> str:
    """One line for the row of a method that failed."""
    if isinstance(error, UserError):
        missing = error.value == "not installed"
        return f"{error.key} is not installed" if missing else f"{error.key} {error.value}: {error.right}"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "out of memory"
    return f"{type(error).__name__}: {first_line(error)}"


def timed(work: Callable[[], Any]) -> float:
    """Seconds that ``work`` takes, on a GPU until it is done there."""
    sync = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    sync()
    start = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - start


def answer_time(trial: Trial, setting: Setting, warm_up: int, steps: int) -> Answer:
    """Seconds of each of ``steps`` steps, and [seconds, steps] of a refresh or None."""
    for _ in range(warm_up):
        trial.step()
    seconds = [timed(trial.step) for _ in range(steps)]
    if (take := trial.refresh) is None:
        return {"seconds": seconds, "refresh": None}
    count: list[int] = []
    return {"seconds": seconds, "refresh": [timed(lambda: count.append(take())), *count]}


def answer_flops(trial: Trial, setting: Setting) -> Answer:
    """Of the matrix products of a step, a multiply-add being two: the same in every run."""

    def product(into: Any, a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    # torch does not count addmm in place, and takes its dtype (`ows_ds.compat.torch.add_product`) for something else
    products = {torch.ops.aten.addmm_: product, torch.ops.aten.addmm: product}
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        trial.step()
    return {"flops": counter.get_total_flops()}


def answer_memory(trial: Trial, setting: Setting) -> Answer:
    """See `ows_ds.bench.memory.measure`."""
    answer: Answer = {}
    for kind, work in {"step": trial.step, "refresh": trial.refresh}.items():
        answer |= dict.fromkeys([kind, *(f"{kind}_{what}" for what in ("planned", "parts", "allocated", "reserved"))])
        if work is None:
            continue
        if setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            work()
            answer[f"{kind}_allocated"] = torch.cuda.max_memory_allocated()
            answer[f"{kind}_reserved"] = torch.cuda.max_memory_reserved()
        tracker = Tracker(trial.model, trial.weights, trial.state)
        trial.watch = tracker.forward
        with tracker:
            work()
        tracker.close()
        answer[kind] = tracker.peak()
        if trial.spec is not None:
            planned = memory(trial.spec, kind == "refresh")
            answer[f"{kind}_planned"] = planned.peak
            answer[f"{kind}_parts"] = {"state": planned.state, **planned.phases}
    return answer


def answer_waits(trial: Trial, setting: Setting) -> Answer:
    """How often the host waits for the GPU, as torch counts: {"step": in a plain one, "refresh": in one that finds new
    projectors, 0 where there is none}; None without a GPU.
    """
    answer: Answer = {}
    for kind, work in {"step": trial.step, "refresh": trial.refresh}.items():
        answer[kind] = 0 if setting.device == "cuda" else None
        if work is None or setting.device != "cuda":
            continue
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            steps = work() or 1
        torch.cuda.set_sync_debug_mode("default")
        plain = (steps - 1) * answer["step"]
        answer[kind] = sum("synchroniz" in str(one.message) for one in found) - plain
    return answer


def answer_traffic(trial: Trial, setting: Setting) -> Answer:
    """See `ows_ds.bench.traffic.measure`."""
    comm, spec = trial.comm, trial.spec
    if comm is None or spec is None:
        raise RuntimeError("it does not run on several ranks")
    trial.step()
    step, _ = _sent(trial.step, comm.sent)
    planned = traffic(spec, index=comm.rank)
    answer: Answer = {"step": dict(step), "step_planned": planned, "refresh": None, "refresh_planned": None}
    answer["full_rank"] = full_rank_bytes(setting, comm.world_size, spec.layers)
    if trial.refresh is not None:
        sent, steps = _sent(trial.refresh, comm.sent)
        # what the refresh sends beyond as many plain steps
        more = {op: size - step[op] * steps for op, size in sent.items()}
        more_planned = {op: n - planned.get(op, 0) for op, n in traffic(spec, True, comm.rank).items()}
        answer["refresh"], answer["refresh_planned"] = (
            {op: size for op, size in one.items() if size} for one in (more, more_planned)
        )
    return answer


def _sent(work: Callable[[], Any], sent: Counter[str]) -> tuple[Counter[str], Any]:
    """Bytes that ``work`` sends, by operation, and what it returns."""
    before = Counter(sent)
    result = work()
    return Counter(dict(sorted((sent - before).items()))), result


WORK: dict[str, Callable[..., Answer]] = {
    "time": answer_time,
    "flops": answer_flops,
    "memory": answer_memory,
    "waits": answer_waits,
    "traffic": answer_traffic,
}
