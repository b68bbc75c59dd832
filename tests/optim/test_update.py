"""update.py in a world of one against torch.optim.AdamW on separate tensors; how moments follow their rows.

Zero tolerance: AdamW works entry by entry, so that it does not matter which tensor an entry belongs to.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ows_ds.distributed.communicator import Communicator, Pending
from ows_ds.distributed.weights import Replicated
from ows_ds.model.blocks import Block, Matrix, Vector
from ows_ds.optim.full_rank import FullRank, adam_steps
from ows_ds.optim.layout import Plan, Scale, make_plan, scale_of
from ows_ds.optim.muon import Rule
from ows_ds.optim.update import AdamWSettings, CoordinateBuffer

RANK = 3
SCALE = 0.25
SETTINGS = AdamWSettings(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)


def block(name: str, *shapes: tuple[int, int], vectors: tuple[int, ...] = ()) -> Block:
    return Block(
        name,
        tuple(Matrix(f"{name}.m{i}", shape, (f"{name}.m{i}",)) for i, shape in enumerate(shapes)),
        tuple(Vector(f"{name}.v{i}", numel) for i, numel in enumerate(vectors)),
    )


UNITS = {
    "a": block("a", (5, 4), (3, 6), vectors=(4, 3)),
    "b": block("b", (4, 4), vectors=(7,)),
    "c": block("c", (6, 5)),
    "always": block("always", vectors=(5,)),
}


def buffer_of(
    *names: str, dtype: torch.dtype = torch.float64, weight_dtype: torch.dtype | None = None, scale: Scale = SCALE
) -> CoordinateBuffer:
    return CoordinateBuffer(
        plan_of(*names), Communicator(), dtype, weight_dtype or dtype, torch.device("cpu"), Rule(scale=scale)
    )


def plan_of(*names: str) -> Plan:
    return make_plan([UNITS[n] for n in names], RANK, 1)


def random(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def fill_gradients(buffer: CoordinateBuffer, seed: int) -> None:
    for index, block in enumerate(buffer.blocks.values()):
        block.grads.copy_(random(block.grads, 100 * seed + index))


class Separate:
    """What `CoordinateBuffer` must come out as: one AdamW for each slot, thrown away when its unit leaves."""

    def __init__(self, scale: Scale = SCALE) -> None:
        self.scale = scale
        self.values: dict[str, nn.Parameter] = {}
        self.optimizers: dict[str, torch.optim.AdamW] = {}

    def change(self, buffer: CoordinateBuffer) -> None:
        slots = [name for block in buffer.blocks.values() for name in block.layout.slots]
        for name in set(self.values) - set(slots):
            del self.values[name], self.optimizers[name]
        for name in set(slots) - set(self.values):
            self.values[name] = nn.Parameter(buffer.value(name).clone())
            self.optimizers[name] = torch.optim.AdamW([self.values[name]], lr=0.0)

    def update(self, buffer: CoordinateBuffer, settings: AdamWSettings) -> None:
        for name, value in self.values.items():
            matrix = buffer.plan.matrices.get(name)
            scale = 1.0 if matrix is None else scale_of(matrix, RANK, self.scale)
            value.grad = buffer.grad(name).clone()
            self.optimizers[name].param_groups[0].update(
                lr=settings.lr * scale,
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=settings.weight_decay / scale if matrix else 0.0,
            )
            self.optimizers[name].step()

    def assert_equals(self, buffer: CoordinateBuffer) -> None:
        assert set(self.values) == {name for block in buffer.blocks.values() for name in block.layout.slots}
        for name, value in self.values.items():
            assert torch.equal(buffer.value(name), value.data), name
            state, block = self.optimizers[name].state[value], buffer.block(name)
            rows = block.local_rows(name)
            if state:
                for kind in ("exp_avg", "exp_avg_sq"):
                    own = getattr(block, kind)[rows].flatten()[: value.numel()]
                    assert torch.equal(own, state[kind].flatten()), name


def step(buffer: CoordinateBuffer, separate: Separate, settings: AdamWSettings, seed: int) -> None:
    fill_gradients(buffer, seed)
    separate.update(buffer, settings)
    buffer.reduce()
    buffer.update(settings)
    separate.assert_equals(buffer)


# ---- one plan


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_separate_adamws(dtype: torch.dtype, weight_decay: float) -> None:
    buffer, separate = buffer_of("a", "b", "always", dtype=dtype), Separate()
    for block in buffer.blocks.values():
        assert {getattr(block, kind).dtype for kind in ("values", "grads", "master", "exp_avg", "exp_avg_sq")} == {
            dtype
        }
        block.values.copy_(random(block.values, 99))
    start = [block.values.clone() for block in buffer.blocks.values()]
    separate.change(buffer)
    for index in range(6):
        step(buffer, separate, replace(SETTINGS, weight_decay=weight_decay, lr=SETTINGS.lr / (1 + index)), index)
    assert set(buffer.steps.values()) == {6.0}
    moved = [block.values - old for block, old in zip(buffer.blocks.values(), start, strict=True)]
    assert all(float(one.abs().min()) > 0 for one in moved)


def test_bfloat16_weights_under_float32_masters() -> None:
    """Values are the masters rounded; the masters continue as if there were no rounding."""
    buffer, exact = (
        buffer_of("a", dtype=torch.float32, weight_dtype=torch.bfloat16),
        buffer_of("a", dtype=torch.float32),
    )
    start = random(torch.empty(11, RANK), 1).bfloat16()
    for one in (buffer, exact):
        one.block("a.m0").fill("a.m0", start[:5])
        one.block("a.m1").fill("a.m1", start[5:])
        for index in range(3):
            fill_gradients(one, index)
            one.reduce()
            one.update(SETTINGS)
    rounded, whole = buffer.blocks["a"], exact.blocks["a"]
    assert (rounded.values.dtype, rounded.master.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(rounded.master, whole.values)
    assert torch.equal(rounded.full_tensor(), whole.values)
    assert torch.equal(rounded.values, whole.values.bfloat16())
    assert not torch.equal(rounded.values.float(), whole.values)


def test_first_step_by_hand() -> None:
    """Adam's first step is -lr * sign(gradient) where eps is nothing; matrices times scale, and decayed."""
    buffer = buffer_of("b", "always", scale=0.5)
    for block in buffer.blocks.values():
        block.values.fill_(1.0)
        block.grads.fill_(2.0)
    buffer.blocks["b"].grads[1] = -0.5
    buffer.reduce()
    buffer.update(AdamWSettings(lr=0.1, betas=(0.9, 0.99), eps=0.0, weight_decay=0.2))
    decayed = 1 - 0.1 * 0.2
    expected = torch.full_like(buffer.blocks["b"].values, 1 - 0.1)
    expected[:4] = decayed - 0.1 * 0.5
    expected[1] = decayed + 0.1 * 0.5
    torch.testing.assert_close(buffer.blocks["b"].values, expected, rtol=1e-15, atol=1e-15)
    always = buffer.blocks["always"].values
    torch.testing.assert_close(always, torch.full_like(always, 1 - 0.1), rtol=1e-15, atol=1e-15)


def test_an_automatic_scale_makes_steps_as_long_as_at_full_rank() -> None:
    """Adam's first step of a whole matrix has lr in every entry, and so lr * sqrt(long * short) as its norm."""
    buffer = buffer_of("a", "c", scale="auto")
    fill_gradients(buffer, 3)
    buffer.reduce()
    buffer.update(replace(SETTINGS, eps=0.0))
    for name, matrix in buffer.plan.matrices.items():
        expected = SETTINGS.lr * math.sqrt(matrix.long * matrix.short)
        assert float(buffer.value(name).norm()) == pytest.approx(expected, rel=1e-12)


def test_hyper_by_hand() -> None:
    settings = AdamWSettings(lr=0.4, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    common = {"betas": (0.9, 0.99), "eps": 1e-8}
    assert settings.matrices(0.25) == {"lr": 0.1, "weight_decay": 0.4, **common}  # lr * decay is 0.04 for both
    assert settings.full_rank() == {"lr": 0.4, "weight_decay": 0.1, **common}
    assert settings.vectors() == {"lr": 0.4, "weight_decay": 0.0, **common}


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0, "auto"])
def test_decay_does_not_depend_on_the_scale(scale: Scale) -> None:
    """Without a gradient only the decay acts: lr * weight_decay on coordinates, nothing on vectors."""
    buffer = buffer_of("a", scale=scale)
    block = buffer.blocks["a"]
    block.values.fill_(1.0)
    for _ in range(3):
        buffer.reduce()
        buffer.update(SETTINGS)
    rows = block.layout.segments["matrices"][1]
    expected = torch.tensor((1 - 0.01 * 0.1) ** 3, dtype=torch.float64)
    torch.testing.assert_close(block.values[:rows], expected.expand(rows, RANK), rtol=1e-15, atol=0)
    assert torch.equal(block.values[rows:], torch.ones(3, RANK, dtype=torch.float64))


def test_nothing_to_train() -> None:
    buffer = buffer_of()
    assert buffer.reduce() == []
    buffer.update(SETTINGS)
    buffer.zero_grad()
    buffer.change(plan_of("c"))
    assert not buffer.value("c.m0").any()


def test_set_steps() -> None:
    """Adam's bias correction follows the counts that are set."""
    buffer, separate = buffer_of("b"), Separate()
    separate.change(buffer)
    buffer.set_steps({("b", "matrices"): 7.0})
    assert buffer.steps == {("b", "matrices"): 7, ("b", "vectors"): 0}
    fill_gradients(buffer, 0)
    grads = buffer.grad("b.m0").clone()
    separate.update(buffer, SETTINGS)
    buffer.reduce()
    buffer.update(SETTINGS)
    assert buffer.steps == {("b", "matrices"): 8, ("b", "vectors"): 1}
    assert torch.equal(buffer.value("b.v0"), separate.values["b.v0"].data)
    # step 8 of moments that begin now: N = (1 - b1) / (1 - b1^8) / sqrt((1 - b2) / (1 - b2^8)) * sign, eps aside
    size = (1 - 0.8) / (1 - 0.8**8) / math.sqrt((1 - 0.95) / (1 - 0.95**8))
    expected = -SETTINGS.lr * SCALE * size * grads.sign()
    torch.testing.assert_close(buffer.value("b.m0"), expected, rtol=1e-3, atol=0)


# ---- from one plan to the next


@pytest.mark.parametrize("scale", [SCALE, "auto"])
def test_blocks_that_stay_continue_and_others_start_again(scale: Scale) -> None:
    """Units leave, return and stay; all as if each slot had an AdamW of its own. What stays does not move."""
    separate = Separate(scale)
    buffer = buffer_of(scale=scale)
    seed = 0
    for names in (("a", "b", "always"), ("b", "c", "always"), ("a", "b", "c", "always"), ("always",), ("a", "always")):
        old, steps = dict(buffer.blocks), buffer.steps
        buffer.change(plan_of(*names))
        assert list(buffer.blocks) == list(names)
        for name, block in buffer.blocks.items():
            assert (block is old.get(name)) == (name in old)
            assert all(bool(t.any()) == (name in old) for t in (block.values, block.exp_avg, block.exp_avg_sq))
        assert all(count == steps.get(key, 0.0) for key, count in buffer.steps.items())
        separate.change(buffer)
        separate.assert_equals(buffer)
        for _ in range(3):
            seed += 1
            step(buffer, separate, SETTINGS, seed)
    assert buffer.steps["always", "vectors"] == 15
    assert buffer.steps["a", "matrices"] == 3


# ---- reductions that start during the backward pass


class Recorder(Communicator):
    """Rank 0 of two, of which the other one never has a gradient; writes down what is begun and waited for."""

    world_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def start_reduce_scatter(self, tensor: Tensor, part: Tensor, name: str = "") -> Pending:
        rows = str(tensor.shape[0])
        self.events.append(f"begin {rows}")
        recorder = self

        class Work:
            def wait(self) -> None:
                recorder.events.append(f"wait {rows}")
                part.copy_(tensor[: part.shape[0]])

        return Work()

    def start_all_gather(self, part: Tensor, whole: Tensor, name: str = "") -> Pending:
        return Communicator().start_all_gather(part, part)


def arriving(*names: str) -> tuple[CoordinateBuffer, list[str]]:
    comm = Recorder()
    plan = make_plan([UNITS[n] for n in names], RANK, 2)
    return CoordinateBuffer(plan, comm, torch.float64, torch.float64, torch.device("cpu")), comm.events


A, B, C = ("a.m0", "a.m1", "a.v0", "a.v1"), ("b.m0", "b.v0"), ("c.m0",)  # 14, 7 (padded to 8) and 6 rows


def test_reductions_start_in_order_as_soon_as_a_unit_is_complete() -> None:
    buffer, events = arriving("a", "b", "c")
    buffer.await_gradients(["c", "b"])
    buffer.last_pass(False)
    for name in (*C, *B, *A):
        buffer.arrived(name)
    assert events == []  # another micro-batch adds to them
    buffer.last_pass(True)
    buffer.arrived("b.v0")
    buffer.arrived("b.m0")
    assert events == []  # complete, but not its turn: all processes begin in one order
    buffer.arrived("c.m0")
    assert events == ["begin 6", "begin 8"]
    for name in A:
        buffer.arrived(name)
    assert events == ["begin 6", "begin 8"]  # not awaited
    fill_gradients(buffer, 1)
    grads = buffer.reduce()
    assert events == ["begin 6", "begin 8", "begin 14", "wait 14", "wait 8", "wait 6"]
    assert [g.shape[0] for g in grads] == [7, 4, 3]
    assert all(torch.equal(g, block.grads[: len(g)]) for g, block in zip(grads, buffer.blocks.values(), strict=True))


def test_what_never_arrives_is_reduced_in_its_place() -> None:
    """As on a process whose batch used no expert of a layer: the order is that of the others."""
    buffer, events = arriving("a", "b", "c")
    buffer.await_gradients(["c", "b"])
    buffer.last_pass(True)
    for name in B:
        buffer.arrived(name)
    buffer.reduce()
    assert events[:3] == ["begin 6", "begin 8", "begin 14"]


def test_a_gradient_that_comes_too_late() -> None:
    buffer, _ = arriving("c")
    buffer.await_gradients(["c"])
    buffer.last_pass(True)
    buffer.arrived("c.m0")
    with pytest.raises(RuntimeError, match=r"c\.m0 came after its block's gradients were on their way"):
        buffer.arrived("c.m0")


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
    optimizer = torch.optim.AdamW([plain.weight.requires_grad_(True)], **SETTINGS.full_rank())
    x = random(torch.empty(6, 5, dtype=torch.float64), 1)
    clip = torch.tensor(0.5, dtype=torch.float64)
    for _ in range(3):
        for part in (x[:3], x[3:]):  # two micro-batches
            module(part).square().sum().backward()
            assert module.weight.grad is None
            plain(part).square().sum().backward()
        plain.weight.grad.mul_(clip)
        assert torch.equal(full.grads["weight"] * clip, plain.weight.grad.flatten())
        full.update(SETTINGS, clip)
        full.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(module.weight, plain.weight)
    assert adam_steps(full.states()) == {"weight": 3.0}
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
        full.update(SETTINGS, torch.ones((), dtype=torch.float64))
        full.zero_grad()

    step()
    before = {kind: tensor.clone() for kind, tensor in full.states()["weight"].items()}
    full.enter({"bias": module.bias})
    assert full.states()["weight"].keys() == before.keys() == {"master", "exp_avg", "exp_avg_sq", "step"}
    assert all(torch.equal(tensor, before[kind]) for kind, tensor in full.states()["weight"].items())
    step()
    assert adam_steps(full.states()) == {"weight": 2.0, "bias": 1.0}
    full.leave(["weight"])
    assert adam_steps(full.states()) == {"bias": 1.0}
    assert (module.weight.requires_grad, module.bias.requires_grad) == (False, True)
    full.enter({"weight": module.weight})
    assert adam_steps(full.states()) == {"bias": 1.0, "weight": 0.0}
    assert not full.states()["weight"]["exp_avg"].any()


def test_full_rank_keeps_the_state_of_weights_that_come_back() -> None:
    module, plain = linear(), linear()
    full = FullRank(Replicated(module, Communicator()), torch.float64)
    # biases do not decay
    optimizers = {"weight": torch.optim.AdamW([plain.weight], **SETTINGS.full_rank())}
    optimizers["bias"] = torch.optim.AdamW([plain.bias], **SETTINGS.vectors())
    x = random(torch.empty(6, 5, dtype=torch.float64), 1)
    for name in ("weight", "bias", "weight", "bias"):
        full.enter({name: getattr(module, name)})
        module(x).square().sum().backward()
        full.update(SETTINGS, torch.ones((), dtype=torch.float64))
        full.leave([name], keep=True)
        plain.requires_grad_(False)
        getattr(plain, name).requires_grad_(True)
        plain(x).square().sum().backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        assert torch.equal(getattr(module, name), getattr(plain, name))
        assert not full.grads
    assert adam_steps(full.states()) == {"weight": 2.0, "bias": 2.0}


def test_full_rank_adds_up_in_float32() -> None:
    """Steps far below bfloat16's resolution are not lost."""
    module = nn.Linear(2, 2, bias=False).to(torch.bfloat16).requires_grad_(False)
    module.weight.fill_(1.0)
    full = FullRank(Replicated(module, Communicator()), torch.float32)
    full.enter({"weight": module.weight})
    settings = AdamWSettings(lr=1e-3, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    for _ in range(8):
        module(x).sum().backward()
        full.update(settings, torch.ones(()))
        full.zero_grad()
    assert module.weight.dtype == torch.bfloat16
    torch.testing.assert_close(full.states()["weight"]["master"], torch.full((4,), 1 - 8e-3), rtol=1e-6, atol=0)
    assert torch.equal(module.weight, torch.full((2, 2), 1 - 8e-3).bfloat16())


def test_full_rank_without_a_gradient() -> None:
    """As of experts that no token went to: the norm is zero, and the weight only decays."""
    module = linear()
    full = FullRank(Replicated(module, Communicator()), torch.float64)
    full.enter({"weight": module.weight})
    before = module.weight.clone()
    assert [float(square) for square in full.squares()] == [0.0]
    full.update(SETTINGS, torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(module.weight, before * (1 - 0.01 * 0.1), rtol=1e-15, atol=0)
