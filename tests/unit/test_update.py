"""update.py in a world of one against torch.optim.AdamW on separate tensors; how moments follow their rows.

Zero tolerance: AdamW works entry by entry, so that it does not matter which tensor an entry belongs to.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ows_ds.communicate import Communicator
from ows_ds.layers import Matrix, Unit, Vector
from ows_ds.plan import make_plan
from ows_ds.update import CoordinateBuffer, FullRank, Hyper, steps_of
from ows_ds.weights import Replicated

RANK = 3
HYPER = Hyper(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, scale=0.25)


def unit(name: str, *shapes: tuple[int, int], vectors: tuple[int, ...] = ()) -> Unit:
    return Unit(
        name,
        tuple(Matrix(f"{name}.m{i}", shape, (f"{name}.m{i}",)) for i, shape in enumerate(shapes)),
        tuple(Vector(f"{name}.v{i}", numel) for i, numel in enumerate(vectors)),
    )


UNITS = {
    "a": unit("a", (5, 4), (3, 6), vectors=(4, 3)),
    "b": unit("b", (4, 4), vectors=(7,)),
    "c": unit("c", (6, 5)),
    "always": unit("always", vectors=(5,)),
}


def buffer_of(*names: str, dtype: torch.dtype = torch.float64, comm: Communicator | None = None) -> CoordinateBuffer:
    comm = comm or Communicator()
    return CoordinateBuffer(make_plan([UNITS[n] for n in names], RANK, comm.world), comm, dtype, torch.device("cpu"))


def random(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


class Separate:
    """What `CoordinateBuffer` must come out as: one AdamW for each slot, thrown away when its unit leaves."""

    def __init__(self) -> None:
        self.values: dict[str, nn.Parameter] = {}
        self.optimizers: dict[str, torch.optim.AdamW] = {}

    def change(self, buffer: CoordinateBuffer) -> None:
        slots = buffer.plan.slots
        for name in set(self.values) - set(slots):
            del self.values[name], self.optimizers[name]
        for name in set(slots) - set(self.values):
            self.values[name] = nn.Parameter(buffer.value(name).clone())
            self.optimizers[name] = torch.optim.AdamW([self.values[name]], lr=0.0)

    def update(self, buffer: CoordinateBuffer, grads: Tensor, hyper: Hyper) -> None:
        for name, (first, last) in buffer.plan.slots.items():
            matrix = name in buffer.plan.matrices
            self.values[name].grad = grads[first:last].clone()
            self.optimizers[name].param_groups[0].update(
                lr=hyper.lr * hyper.scale if matrix else hyper.lr,
                betas=hyper.betas,
                eps=hyper.eps,
                weight_decay=hyper.weight_decay / hyper.scale if matrix else 0.0,
            )
            self.optimizers[name].step()

    def assert_equals(self, buffer: CoordinateBuffer) -> None:
        assert set(self.values) == set(buffer.plan.slots)
        for name, value in self.values.items():
            assert torch.equal(buffer.value(name), value.data), name
            state, rows = self.optimizers[name].state[value], buffer.local_rows(name)
            if state:
                assert rows is not None
                assert torch.equal(buffer.exp_avg[rows], state["exp_avg"]), name
                assert torch.equal(buffer.exp_avg_sq[rows], state["exp_avg_sq"]), name


# ---- one plan


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_separate_adamws(dtype: torch.dtype, weight_decay: float) -> None:
    buffer, separate = buffer_of("a", "b", "always", dtype=dtype), Separate()
    assert buffer.values.dtype == buffer.exp_avg.dtype == buffer.exp_avg_sq.dtype == dtype
    buffer.values.copy_(random(buffer.values, 99))
    start = buffer.values.clone()
    separate.change(buffer)
    for step in range(6):
        hyper = replace(HYPER, weight_decay=weight_decay, lr=HYPER.lr / (1 + step))
        buffer.grads.copy_(random(buffer.grads, step))
        grads = buffer.reduce()
        separate.update(buffer, grads, hyper)
        buffer.update(grads, hyper)
        separate.assert_equals(buffer)
    assert {float(count) for count in buffer.steps.values()} == {6.0}
    assert float((buffer.values - start).abs().min()) > 0


def test_first_step_by_hand() -> None:
    """Adam's first step is -lr * sign(gradient) where eps is nothing; matrices times scale, and decayed."""
    buffer = buffer_of("b", "always")
    buffer.values.fill_(1.0)
    grads = torch.full_like(buffer.grads, 2.0)
    grads[1] = -0.5
    hyper = Hyper(lr=0.1, betas=(0.9, 0.99), eps=0.0, weight_decay=0.2, scale=0.5)
    buffer.update(grads, hyper)
    decayed = 1 - 0.1 * 0.2
    expected = torch.full_like(buffer.values, 1 - 0.1)
    expected[:4] = decayed - 0.1 * 0.5
    expected[1] = decayed + 0.1 * 0.5
    torch.testing.assert_close(buffer.values, expected, rtol=1e-15, atol=1e-15)


def test_hyper_by_hand() -> None:
    hyper = Hyper(lr=0.4, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, scale=0.25)
    common = {"betas": (0.9, 0.99), "eps": 1e-8}
    assert hyper.matrices() == {"lr": 0.1, "weight_decay": 0.4, **common}  # lr * decay is 0.04 for both
    assert hyper.full() == {"lr": 0.4, "weight_decay": 0.1, **common}
    assert hyper.vectors() == {"lr": 0.4, "weight_decay": 0.0, **common}
    assert replace(hyper, scale=0.0).matrices() == {"lr": 0.0, "weight_decay": 0.0, **common}


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_decay_does_not_depend_on_the_scale(scale: float) -> None:
    """Without a gradient only the decay acts: lr * weight_decay on coordinates, nothing on vectors."""
    buffer = buffer_of("a")
    buffer.values.fill_(1.0)
    for _ in range(3):
        buffer.update(torch.zeros_like(buffer.grads), replace(HYPER, scale=scale))
    rows = buffer.plan.segments[0].rows[1]
    expected = torch.tensor((1 - 0.01 * 0.1) ** 3, dtype=torch.float64)
    torch.testing.assert_close(buffer.values[:rows], expected.expand(rows, RANK), rtol=1e-15, atol=0)
    assert torch.equal(buffer.values[rows:], torch.ones(3, RANK, dtype=torch.float64))


def test_leaf_accumulates_in_the_buffer() -> None:
    buffer = buffer_of("a", "b")
    buffer.values.copy_(random(buffer.values, 1))
    leaf = buffer.leaf("a.m1")
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert leaf.shape == (6, RANK)
    assert leaf.data_ptr() == buffer.value("a.m1").data_ptr()
    factors = [random(leaf, seed).detach() for seed in (2, 3)]
    for factor in factors:
        (leaf * factor).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.data_ptr() == buffer.grad("a.m1").data_ptr()
    assert torch.equal(buffer.grad("a.m1"), factors[0] + factors[1])
    first, last = buffer.plan.slots["a.m1"]
    assert (first, last) == (5, 11)
    assert not buffer.grads[:first].any()
    assert not buffer.grads[last:].any()
    # an update reaches the leaf, and zeroing the buffer empties its gradient
    before = leaf.detach().clone()
    buffer.update(buffer.reduce(), HYPER)
    assert torch.equal(leaf, buffer.value("a.m1"))
    assert not torch.equal(leaf, before)
    buffer.grads.zero_()
    assert not leaf.grad.any()


def test_nothing_to_train() -> None:
    buffer = buffer_of()
    buffer.update(buffer.reduce(), HYPER)
    assert buffer.values.shape == (0, RANK)
    later = buffer_of("c")
    later.adopt(buffer)
    assert not later.values.any()


def test_set_steps() -> None:
    """Adam's bias correction follows the counts that are set."""
    buffer, separate = buffer_of("b"), Separate()
    separate.change(buffer)
    buffer.set_steps({("b", "matrices"): 7.0})
    assert {key: float(count) for key, count in buffer.steps.items()} == {("b", "matrices"): 7, ("b", "vectors"): 0}
    grads = random(buffer.grads, 0)
    separate.update(buffer, grads, HYPER)
    buffer.update(grads, HYPER)
    assert {key: float(count) for key, count in buffer.steps.items()} == {("b", "matrices"): 8, ("b", "vectors"): 1}
    assert torch.equal(buffer.value("b.v0"), separate.values["b.v0"].data)
    # step 8 of moments that begin now: N = (1 - b1) / (1 - b1^8) / sqrt((1 - b2) / (1 - b2^8)) * sign, eps aside
    size = (1 - 0.8) / (1 - 0.8**8) / math.sqrt((1 - 0.95) / (1 - 0.95**8))
    expected = -HYPER.lr * HYPER.scale * size * grads[:4].sign()
    torch.testing.assert_close(buffer.value("b.m0"), expected, rtol=1e-3, atol=0)


# ---- from one plan to the next


def test_units_that_stay_go_on_and_others_begin_anew() -> None:
    """Four periods: units move, leave, return and stay; all as if each slot had an AdamW of its own."""
    separate = Separate()
    buffer = buffer_of()
    seed = 0
    for names in (("a", "b", "always"), ("b", "c", "always"), ("a", "b", "c", "always"), ("always",), ("a", "always")):
        old, buffer = buffer, buffer_of(*names)
        buffer.adopt(old)
        stay = {key for key in buffer.steps if key in old.steps}
        for key, count in buffer.steps.items():
            assert float(count) == (float(old.steps[key]) if key in stay else 0.0)
        for segment in buffer.plan.segments:
            entered = (segment.unit, segment.kind) not in stay
            for tensor in (buffer.values, buffer.exp_avg, buffer.exp_avg_sq):
                assert bool(tensor[slice(*segment.rows)].any()) != entered
        assert not buffer.grads.any()
        separate.change(buffer)
        separate.assert_equals(buffer)
        for _ in range(3):
            seed += 1
            grads = random(buffer.grads, seed)
            separate.update(buffer, grads, HYPER)
            buffer.update(grads, HYPER)
            separate.assert_equals(buffer)
    assert float(buffer.steps["always", "vectors"]) == 15
    assert float(buffer.steps["a", "matrices"]) == 3


@pytest.mark.parametrize("world", [1, 2, 3, 5, 40])
def test_rows_move_to_their_new_owners(world: int) -> None:
    """Each process takes its rows out of the gathered old ones; together they are the new layout."""
    old = make_plan([UNITS[n] for n in ("a", "b")], RANK, 2)
    whole = torch.arange(float(old.rows * RANK), dtype=torch.float64).view(old.rows, RANK) + 1
    parts = []
    for index in range(world):
        comm = Communicator()
        comm.index, comm.world = index, world
        buffer = buffer_of("b", "c", "a", comm=comm)
        new_rows = {(s.unit, s.kind): s.rows for s in buffer.plan.segments}
        buffer.scatter(buffer.exp_avg, whole, [(s.rows, new_rows[s.unit, s.kind]) for s in old.segments])
        parts.append(buffer.exp_avg)
        first, last = buffer.plan.part(index)
        for name, (start, stop) in buffer.plan.slots.items():
            rows = buffer.local_rows(name)
            mine = range(max(start, first) - first, min(stop, last) - first)
            assert (range(0) if rows is None else range(rows.start, rows.stop)) == (mine if len(mine) else range(0))
    # b: 4 + 3 rows (14 to 21 of the old), c: 6 rows, a: 5 + 6 + 2 + 1 (0 to 14)
    moved = torch.cat(parts)
    assert torch.equal(moved[:7], whole[14:21])
    assert not moved[7:13].any()
    assert torch.equal(moved[13:27], whole[:14])
    assert not moved[27:].any()


# ---- full rank


def linear() -> nn.Linear:
    module = nn.Linear(5, 4).double().requires_grad_(False)
    for index, parameter in enumerate(module.parameters()):
        parameter.copy_(random(parameter, index))
    return module


def test_full_rank_is_adamw_on_the_weight() -> None:
    module, plain = linear(), linear()
    full = FullRank(Replicated(module, Communicator()), torch.float64)
    full.enter({"weight": module.weight})
    assert (module.weight.requires_grad, module.bias.requires_grad) == (True, False)
    optimizer = torch.optim.AdamW([plain.weight.requires_grad_(True)], **HYPER.full())
    x = random(torch.empty(6, 5, dtype=torch.float64), 1)
    clip = torch.tensor(0.5, dtype=torch.float64)
    for _ in range(3):
        for part in (x[:3], x[3:]):  # two micro-batches
            module(part).square().sum().backward()
            assert module.weight.grad is None
            plain(part).square().sum().backward()
        plain.weight.grad.mul_(clip)
        assert torch.equal(full.grads["weight"] * clip, plain.weight.grad.flatten())
        full.update(HYPER, clip)
        full.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(module.weight, plain.weight)
    assert steps_of(full.states()) == {"weight": 3.0}
    full.leave(["weight"])
    assert not module.weight.requires_grad
    assert not full.states()
    module(x.requires_grad_()).sum().backward()
    assert module.weight.grad is None


def test_full_rank_weights_that_stay_keep_their_state_and_others_start_anew() -> None:
    module = linear()
    full = FullRank(Replicated(module, Communicator()), torch.float64)
    full.enter({"weight": module.weight})
    x = random(torch.empty(6, 5, dtype=torch.float64), 1)

    def step() -> None:
        module(x).square().sum().backward()
        full.update(HYPER, torch.ones((), dtype=torch.float64))
        full.zero_grad()

    step()
    before = {kind: tensor.clone() for kind, tensor in full.states()["weight"].items()}
    full.enter({"bias": module.bias})
    assert full.states()["weight"].keys() == before.keys() == {"master", "exp_avg", "exp_avg_sq", "step"}
    assert all(torch.equal(tensor, before[kind]) for kind, tensor in full.states()["weight"].items())
    step()
    assert steps_of(full.states()) == {"weight": 2.0, "bias": 1.0}
    full.leave(["weight"])
    assert steps_of(full.states()) == {"bias": 1.0}
    assert (module.weight.requires_grad, module.bias.requires_grad) == (False, True)
    full.enter({"weight": module.weight})
    assert steps_of(full.states()) == {"bias": 1.0, "weight": 0.0}
    assert not full.states()["weight"]["exp_avg"].any()


def test_full_rank_keeps_the_state_of_weights_that_come_back() -> None:
    module, plain = linear(), linear()
    full = FullRank(Replicated(module, Communicator()), torch.float64)
    # biases do not decay
    optimizers = {"weight": torch.optim.AdamW([plain.weight], **HYPER.full())}
    optimizers["bias"] = torch.optim.AdamW([plain.bias], **HYPER.vectors())
    x = random(torch.empty(6, 5, dtype=torch.float64), 1)
    for name in ("weight", "bias", "weight", "bias"):
        full.enter({name: getattr(module, name)})
        module(x).square().sum().backward()
        full.update(HYPER, torch.ones((), dtype=torch.float64))
        full.leave([name], keep=True)
        plain.requires_grad_(False)
        getattr(plain, name).requires_grad_(True)
        plain(x).square().sum().backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        assert torch.equal(getattr(module, name), getattr(plain, name))
        assert not full.grads
    assert steps_of(full.states()) == {"weight": 2.0, "bias": 2.0}


def test_full_rank_adds_up_in_float32() -> None:
    """Steps far below bfloat16's resolution are not lost."""
    module = nn.Linear(2, 2, bias=False).to(torch.bfloat16).requires_grad_(False)
    module.weight.fill_(1.0)
    full = FullRank(Replicated(module, Communicator()), torch.float32)
    full.enter({"weight": module.weight})
    hyper = Hyper(lr=1e-3, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, scale=1.0)
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    for _ in range(8):
        module(x).sum().backward()
        full.update(hyper, torch.ones(()))
        full.zero_grad()
    assert module.weight.dtype == torch.bfloat16
    torch.testing.assert_close(full.states()["weight"]["master"], torch.full((4,), 1 - 8e-3), rtol=1e-6, atol=0)
    assert torch.equal(module.weight, torch.full((2, 2), 1 - 8e-3).bfloat16())
