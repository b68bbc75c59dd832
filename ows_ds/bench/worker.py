"""A process with one method that takes steps when it is told to: `python -m ows_ds.bench.worker`.

In and out are lines of JSON. First the job, {"setting": {...}, "method": name, "world_size": processes}, answered once the
first step is taken; then questions until the input ends:

    {"do": "time", "warm_up": n, "steps": n, "refresh": true}   {"seconds": [...], "refresh": [seconds, steps] or null}
    {"do": "flops"}                                             {"flops": n}
    {"do": "memory"}                                            {"step": {...}, "refresh": {...} or null, ...}
    {"do": "traffic"}                                           {"step": {...}, "refresh": {...} or null, ...}

Whatever fails is answered with {"failed": reason}, and the process ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ows_ds.bench.rivals import rival
from ows_ds.bench.setting import OURS, Setting
from ows_ds.bench.tracking import Tracker
from ows_ds.bench.trial import Trial, full_rank_bytes, ours
from ows_ds.errors import UserError
from ows_ds.planner.memory import memory
from ows_ds.planner.traffic import traffic


def main() -> None:
    """Serve one job on standard input and output."""
    # what libraries print must not stand between the answers
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.filterwarnings("ignore")
    try:
        for answer in _serve():
            print(json.dumps(answer), file=out, flush=True)
    except Exception as error:
        print(json.dumps({"failed": reason(error)}), file=out, flush=True)
        raise SystemExit(1) from error


def reason(error: BaseException) -> str:
    """One line for the row of a method that failed."""
    if isinstance(error, UserError):
        return (
            f"{error.key} {error.value}: {error.right}"
            if error.value != "not installed"
            else f"{error.key} is not installed"
        )
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _serve() -> Iterator[dict[str, Any]]:
    job = json.loads(sys.stdin.readline())
    setting = Setting(**job["setting"])
    torch.set_num_threads(setting.threads)
    torch.set_flush_denormal(True)  # random weights under a decaying Adam meet them, trained ones hardly
    build = ours if job["method"] in OURS else rival
    trial = build(setting, job["method"], job["world_size"])
    sync: Callable[[], None] = torch.cuda.synchronize if setting.device == "cuda" else lambda: None
    first = timed(trial.step, sync)  # finds the first projectors, and makes all that is made once
    yield {"first": first if trial.first_refreshes else None}
    for line in sys.stdin:
        question = json.loads(line)
        yield WORK[question.pop("do")](trial, setting, sync, **question)


def timed(work: Callable[[], Any], sync: Callable[[], None]) -> float:
    """Seconds that ``work`` takes, on a GPU until it is done there."""
    sync()
    start = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - start


def _time(
    trial: Trial, setting: Setting, sync: Callable[[], None], warm_up: int, steps: int, refresh: bool
) -> dict[str, Any]:
    for _ in range(warm_up):
        trial.step()
    seconds = [timed(trial.step, sync) for _ in range(steps)]
    more = None
    if refresh and trial.refresh is not None:
        count: list[int] = []
        took = timed(lambda: count.append(trial.refresh()), sync)  # type: ignore[misc]
        more = [took, count[0]]
    return {"seconds": seconds, "refresh": more}


def _flops(trial: Trial, setting: Setting, sync: Callable[[], None]) -> dict[str, Any]:
    """Of the matrix products of a step, a multiply-add being two: a count, which no other work on the machine moves."""

    def product(into: Any, a: torch.Size, b: torch.Size, **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    # torch counts those that are not in place
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as counter:
        trial.step()
    return {"flops": counter.get_total_flops()}


def _memory(trial: Trial, setting: Setting, sync: Callable[[], None]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    kinds: dict[str, Callable[[], Any] | None] = {"step": trial.step, "refresh": trial.refresh}
    for kind, work in kinds.items():
        answer[kind] = answer[f"{kind}_planned"] = answer[f"{kind}_parts"] = answer[f"{kind}_allocated"] = None
        if work is None:
            continue
        if setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            work()
            answer[f"{kind}_allocated"] = torch.cuda.max_memory_allocated()
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


def _traffic(trial: Trial, setting: Setting, sync: Callable[[], None]) -> dict[str, Any]:
    comm, spec = trial.comm, trial.spec
    if comm is None or spec is None:
        raise RuntimeError("it does not run on several processes")
    trial.step()
    step, _ = _sent(trial.step, comm.sent)
    answer: dict[str, Any] = {
        "step": step,
        "step_planned": traffic(spec, index=comm.rank),
        "refresh": None,
        "refresh_planned": None,
        "full_rank": full_rank_bytes(setting, comm.world_size, spec.layers),
    }
    if trial.refresh is not None:
        sent, steps = _sent(trial.refresh, comm.sent)
        # what the refresh sent beyond as many plain steps
        answer["refresh"] = {op: size - step.get(op, 0) * int(steps) for op, size in sent.items()}
        whole = traffic(spec, True, comm.rank)
        answer["refresh_planned"] = {op: size - answer["step_planned"].get(op, 0) for op, size in whole.items()}
    for key in ("refresh", "refresh_planned"):
        if answer[key] is not None:
            answer[key] = {op: size for op, size in answer[key].items() if size}
    return answer


def _sent(work: Callable[[], Any], sent: Counter[str]) -> tuple[dict[str, int], Any]:
    """Bytes that ``work`` sent, by operation, and what it returned."""
    before = Counter(sent)
    result = work()
    return dict(sorted((sent - before).items())), result


WORK: dict[str, Callable[..., dict[str, Any]]] = {
    "time": _time,
    "flops": _flops,
    "memory": _memory,
    "traffic": _traffic,
}

if __name__ == "__main__":
    main()
