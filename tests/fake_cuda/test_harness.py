"""The devices themselves: what they refuse, what counts as a wait and as a race, when collectives are done."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.fake_cuda import build
from tests.fake_cuda.host_waits import host_waits
from tests.fake_cuda.races import races
from tests.fake_cuda.worlds import FakeCuda


def matrix() -> Tensor:
    return torch.arange(16.0, device="cuda").view(4, 4)


# ---------------------------------------------------------------- tensors


def mix_devices(rank: int, world_size: int) -> None:
    a, there = matrix(), torch.zeros(4, 4)
    works: list[Callable[[], Any]] = [
        lambda: a + there,
        lambda: torch.cat([a, there]),
        lambda: a.index_select(0, torch.zeros(2, dtype=torch.int64)),
        lambda: a @ matrix().to("cuda:1"),
    ]
    for work in works:
        with pytest.raises(RuntimeError, match="same device"):
            work()
    assert (a * torch.tensor(2.0))[torch.tensor([1])].tolist() == [[8.0, 10.0, 12.0, 14.0]]  # torch moves these


def draw(rank: int, world_size: int) -> None:
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    seeded = [torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) for _ in range(2)]
    assert torch.equal(*seeded)
    torch.manual_seed(1)
    assert torch.equal(torch.randn(3, device="cuda"), seeded[0])
    x = torch.ones(100, device="cuda", requires_grad=True)
    state, host = torch.cuda.get_rng_state(), torch.get_rng_state()
    first = torch.nn.functional.dropout(x)
    assert not torch.equal(first, torch.nn.functional.dropout(x))
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.nn.functional.dropout(x))
    assert torch.equal(host, torch.get_rng_state())


def differentiate(rank: int, world_size: int) -> None:
    threads = []
    x = torch.ones(4, 4, device="cuda", requires_grad=True)
    x.register_hook(lambda gradient: threads.append(threading.current_thread()))
    (x @ matrix()).sum().backward()
    assert x.grad is not None
    assert x.grad.is_cuda
    assert x.grad[0].tolist() == [6.0, 22.0, 38.0, 54.0]
    assert threads != [threading.main_thread()]


def change_memory(rank: int, world_size: int) -> None:
    before = torch.cuda.memory_allocated()
    out = torch.empty(0, device="cuda")
    torch.add(matrix(), 1, out=out)  # resizes it
    assert out.sum().item() == 136
    assert torch.cuda.memory_allocated() == before + out.nbytes
    assert torch.cuda.max_memory_allocated() > before + out.nbytes
    view = out[1:3]
    view.zero_()
    assert out.sum().item() == 68
    assert out.set_(torch.ones(3, device="cuda").untyped_storage(), 1, (2,), (1,)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("function", [mix_devices, draw, differentiate, change_memory])
def test_tensors(fake_cuda: FakeCuda, function: Callable[..., None]) -> None:
    fake_cuda(1).run(function)


# ---------------------------------------------------------------- host waits

WAITS: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
    "arithmetic": (0, lambda a: (a @ a + a.sum()).cholesky_inverse()),
    "item": (1, lambda a: a.sum().item()),
    "bool": (1, lambda a: bool(a.isfinite().all())),
    "tolist": (1, lambda a: a.tolist()),
    "equal": (1, lambda a: torch.equal(a, a)),
    "nonzero": (1, lambda a: a.nonzero()),
    "mask": (1, lambda a: a[a > 3]),
    "where": (0, lambda a: torch.where(a > 3, a, 0)),
    "eigh": (1, lambda a: torch.linalg.eigh(a)),
    "to the device": (1, lambda a: torch.zeros(3).to("cuda")),
    "to the device, not pinned": (1, lambda a: torch.zeros(3).to("cuda", non_blocking=True)),
    "to the device, pinned": (1, lambda a: torch.zeros(3).pin_memory().to("cuda")),
    "to the device, pinned, at once": (0, lambda a: torch.zeros(3).pin_memory()[1:].to("cuda", non_blocking=True)),
    "to the host": (1, lambda a: a.cpu()),
    "to the host, pinned, at once": (
        0,
        lambda a: torch.empty(4, 4, pin_memory=True).copy_(a, non_blocking=True),
    ),
    "to another device": (0, lambda a: a.to("cuda:1")),
    "synchronize": (1, lambda a: torch.cuda.synchronize()),
    "event": (1, lambda a: torch.cuda.current_stream().record_event().synchronize()),
    "stream": (0, lambda a: torch.cuda.Stream().wait_stream(torch.cuda.current_stream())),
    "new tensor": (1, lambda a: torch.tensor([1, 2], device="cuda")),
    "filled tensor": (0, lambda a: torch.full((2,), 1.0, device="cuda")),
}


def count_waits(rank: int, world_size: int) -> dict[str, int]:
    a, counts = matrix(), {}
    for name, (_, work) in WAITS.items():
        host_waits.take()
        work(a)
        counts[name] = host_waits.take().total()
    return counts


def test_waits_are_counted(fake_cuda: FakeCuda) -> None:
    assert fake_cuda(1).run(count_waits) == [{name: expected for name, (expected, _) in WAITS.items()}]


# ---------------------------------------------------------------- races


def on_side(work: Callable[[Tensor], Any], before: bool = True, after: bool = True) -> Callable[[Tensor], Any]:
    """``work`` on another stream, which waits ``before`` it for the current one, which waits for it ``after``."""

    def run(a: Tensor) -> None:
        a.add_(1)
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        if before:
            side.wait_stream(current)
        with torch.cuda.stream(side):
            result = work(a)
        if after:
            current.wait_stream(side)
            del result

    return run


def used_elsewhere(recorded: bool) -> Callable[[Tensor], Any]:
    def work(a: Tensor) -> None:
        other = a + 1
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            other.mul_(2)
        if recorded:
            other.record_stream(side)

    return work


def read_by_event(a: Tensor) -> None:
    a.add_(1)
    event, side = torch.cuda.current_stream().record_event(), torch.cuda.Stream()
    side.wait_event(event)
    with torch.cuda.stream(side):
        a.sum()


def read_after_the_host(a: Tensor) -> None:
    a.sum().item()
    on_side(lambda a: a * 2, before=True)(a)


RACES: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "ordered": ("", on_side(lambda a: a * 2)),
    "ordered by an event": ("", read_by_event),
    "ordered by the host": ("", read_after_the_host),
    "read too early": ("write then read", on_side(lambda a: a * 2, before=False)),
    "written too early": ("write then write", on_side(lambda a: a.zero_(), before=False)),
    "freed too early": ("freed", used_elsewhere(recorded=False)),
    "freed when it is done": ("", used_elsewhere(recorded=True)),
    "two readers": ("", on_side(lambda a: a.sum(), after=False)),
}


def find_races(rank: int, world_size: int) -> dict[str, set[str]]:
    found = {}
    for name, (_, work) in RACES.items():
        races.found.clear()
        work(a := matrix())
        torch.zeros(1, device="cuda").add_(1)  # memory that was freed is reported before the next kernel
        found[name] = {re.split(": | on ", race)[0] for race in races.found}
        assert all("tests/fake_cuda/test_harness.py:" in race for race in races.found), races.found
        torch.cuda.synchronize()
        del a
    return found


def test_races_are_found(fake_cuda: FakeCuda) -> None:
    assert fake_cuda(1).run(find_races) == [{name: {kind} - {""} for name, (kind, _) in RACES.items()}]


# ---------------------------------------------------------------- collectives


def communicate(rank: int, world_size: int) -> None:
    part = torch.full((2,), float(rank), device="cuda")
    full = torch.zeros(4, device="cuda")
    gathered = dist.all_gather_into_tensor(full, part, async_op=True)
    assert full.isnan().all()  # not waited for
    total = part + 1
    dist.all_reduce(total)
    assert total.tolist() == [3.0, 3.0]
    assert gathered.wait()
    assert full.tolist() == [0.0, 0.0, 1.0, 1.0]

    in_place = torch.full((4,), float(rank), device="cuda")
    dist.all_gather_into_tensor(in_place, in_place[2 * rank : 2 * rank + 2])
    assert in_place.tolist() == [0.0, 0.0, 1.0, 1.0]
    summed = dist.all_reduce(total, async_op=True)
    assert total.isnan().all()
    summed.wait()
    assert total.tolist() == [6.0, 6.0]
    dist.reduce_scatter_tensor(part, full)
    assert part.tolist() == [2.0 * rank] * 2
    dist.broadcast(part, 1)
    assert part.tolist() == [2.0, 2.0]
    dist.reduce(part, 1)
    assert rank == 0 or part.tolist() == [4.0, 4.0]
    parts = [torch.empty(1, device="cuda") for _ in range(world_size)]
    dist.all_gather(parts, torch.tensor([rank + 0.5], device="cuda"))
    assert [float(one) for one in parts] == [0.5, 1.5]


def misuse(rank: int, world_size: int) -> None:
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.zeros(2))
    with pytest.raises(ValueError, match="contiguous"):
        dist.all_reduce(matrix().t())
    with pytest.raises(NotImplementedError, match="all_gather_object"):
        dist.all_gather_object([None] * world_size, rank)
    a = matrix()
    races.found.clear()
    work = dist.all_reduce(a, async_op=True)
    assert not races.found
    a.add_(1)
    assert {race.partition(":")[0] for race in races.found} == {"write then read", "write then write"}
    work.wait()


@pytest.mark.parametrize("function", [communicate, misuse])
def test_collectives(fake_cuda: FakeCuda, function: Callable[..., None]) -> None:
    fake_cuda(2).run(function)


# ---------------------------------------------------------------- the command

PROGRAM = """
import torch
a = torch.ones(4, device="cuda:2").add_(1)
with torch.cuda.stream(torch.cuda.Stream()):
    a.sum()
print(torch.cuda.device_count(), a.sum().item())
"""


@pytest.mark.skipif(bool(build.missing()), reason=str(build.missing()))
def test_command(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    files = {"--waits": tmp_path / "waits", "--races": tmp_path / "races"}
    command = [sys.executable, "-m", "tests.fake_cuda", "run", "--devices", "3"]
    command += [str(word) for pair in files.items() for word in pair]
    done = subprocess.run([*command, sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "3 8.0\n"), done.stderr
    place = re.escape(f"{tmp_path}/program.py")
    assert re.search(f"^rank 0: +1 aten::_local_scalar_dense at {place}:6$", files["--waits"].read_text(), re.M)
    assert re.search(
        f"^rank 0: +1 write then read: aten::add.out on stream 0 at {place}:3 .* at {place}:5$",
        files["--races"].read_text(), re.M,
    )  # fmt: skip


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert build.missing() == "needs a C++ compiler (g++)"
