"""coordinates.py against dense computations, y = x (decay * W + L R^T)^T + b; what is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ows_ds.model.blocks import Matrix
from ows_ds.model.layers import find_layers
from ows_ds.optim.hooks import LowRankHook
from ows_ds.optim.low_rank import Coordinates, FrozenLinear, make_coordinates
from ows_ds.optim.products import EVERY
from ows_ds.optim.projection import is_tall, low_rank_gradient
from tests.support.families import FAMILIES, tiny

RANK = 3
# The same sums in another order: float64 rounding of a few hundred additions of numbers of size one.
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}
SIDES = [(7, 5), (5, 7), (6, 6)]  # C_out, C_in
TOKENS = [(9,), (2, 4)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed + 100 * sum(shape)), dtype=torch.float64
    ).to(dtype)


def module_of(kind: str, outputs: int, inputs: int, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A frozen Linear or Conv1D with random weights; a Conv1D always has a bias."""
    module: nn.Module = nn.Linear(inputs, outputs, bias=bias) if kind == "Linear" else Conv1D(outputs, inputs)
    for index, parameter in enumerate(module.parameters()):
        parameter.data = random(*parameter.shape, seed=index, dtype=dtype)
        parameter.requires_grad_(False)
    return module


def coordinates_of(
    weight: Tensor, decay: float = 1.0, dtype: torch.dtype | None = None, rank: int = RANK
) -> Coordinates:
    """Random coordinates of a weight as stored. dtype: of the values, the weight's unless given."""
    shape = (weight.shape[0], weight.shape[1])
    projector = torch.linalg.qr(random(min(shape), rank, seed=7)).Q.to(weight.dtype)
    values = random(max(shape), rank, seed=8).to(dtype or weight.dtype).requires_grad_()
    return Coordinates(shape, values, projector, decay)


def dense(weight: Tensor, attached: Coordinates) -> Tensor:
    """The weight that a module with ``attached`` computes with."""
    left, right = (factor.detach().to(weight.dtype) for factor in attached.factors)
    return attached.decay * weight + left @ right.T


# ---- FrozenLinear


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("decay", [None, 1.0, 0.9])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sides", SIDES)
def test_frozen_linear(
    sides: tuple[int, int],
    transposed: bool,
    bias: bool,
    decay: float | None,
    inputs_first: bool,
    tokens: tuple[int, ...],
) -> None:
    """decay: None without coordinates."""
    outputs, inputs = sides
    stored = random(inputs, outputs, seed=1) if inputs_first else random(outputs, inputs, seed=1)
    attached = [] if decay is None else [coordinates_of(stored, decay)]
    if attached and transposed:
        attached = [
            Coordinates(stored.shape, attached[0].projector, attached[0].values.detach(), decay, transposed=True)
        ]
    given = {"x": random(*tokens, inputs, seed=2), **({"bias": random(outputs, seed=3)} if bias else {})}
    given |= {"values": attached[0].values.detach()} if attached else {}
    head = random(*tokens, outputs, seed=6)

    def run(compute: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {k: v.clone().requires_grad_() for k, v in given.items()}
        y = compute(**leaves)
        (y * head).sum().backward()
        return y.detach(), {k: leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}

    def plain(x: Tensor, bias: Tensor | None = None, values: Tensor | None = None) -> Tensor:
        whole = stored
        if values is not None:
            q = attached[0].projector
            whole = decay * stored + (values @ q.T if attached[0].left else q @ values.T)
        y = x @ (whole if inputs_first else whole.T)
        return y if bias is None else y + bias

    def ours(x: Tensor, bias: Tensor | None = None, *values: Tensor, **named: Tensor) -> Tensor:
        values = (*values, *named.values())
        some = [replace(one, values=value) for one, value in zip(attached, values, strict=True)]
        y: Tensor = FrozenLinear.apply(x, stored, None, None, bias, some, inputs_first, EVERY, *values)
        return y

    (y, grads), (expected, expected_grads) = run(ours), run(plain)
    assert y.shape == (*tokens, outputs)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert grads.keys() == expected_grads.keys() == given.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], **CLOSE)
    for train in ("x", "values") if attached else ():
        leaves = {name: value.clone().requires_grad_(name == train) for name, value in given.items()}
        assert torch.autograd.gradcheck(ours, (leaves["x"], leaves.get("bias"), leaves["values"]))


@pytest.mark.parametrize("tall", [False, True])
def test_gradients_go_straight_into_their_place(tall: bool) -> None:
    """Added, in the place's dtype, in as many passes as come; the leaf's hook is called once a pass, after all uses."""
    module = module_of("Linear", 7, 5) if tall else module_of("Linear", 5, 7)
    alone, place = coordinates_of(module.weight, 0.9), random(7, RANK, seed=8)
    direct = make_coordinates(alone.shape, alone.values.detach(), alone.projector, place, True)
    direct.decay = alone.decay
    before, calls = place.clone(), []
    direct.values.register_hook(lambda gradient: calls.append((gradient, float((place - before).norm()))))
    attachment = LowRankHook(module, False)
    x, head = random(11, 5 if tall else 7), random(11, 7 if tall else 5, seed=1)
    for times in (1, 2):
        for attached in (alone, direct):
            attachment.coordinates = attached
            # used twice in a pass
            (module(x) * head).sum().backward() if times == 1 else ((module(x) + module(2 * x)) * head).sum().backward()
        torch.testing.assert_close(place - before, alone.values.grad, **CLOSE)
        assert len(calls) == times
        assert calls[-1] == (None, float((place - before).norm()))
    assert direct.values.grad is None


def test_gradients_of_bfloat16_add_up_in_float32() -> None:
    module = module_of("Linear", 7, 5, dtype=torch.bfloat16)
    attached = coordinates_of(module.weight, 1.0, torch.bfloat16)
    place = torch.full((7, RANK), 1000.0)
    LowRankHook(module, False).coordinates = make_coordinates(
        attached.shape, attached.values.detach(), attached.projector, place, True
    )
    for _ in range(4):
        module(random(11, 5, dtype=torch.bfloat16)).sum().backward()
    # bfloat16 would stay at 1000
    assert place.dtype == torch.float32
    assert float((place - 1000).abs().max()) < 40
    assert float((place - 1000).norm()) > 1


# ---- what is kept for the backward pass


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """Collects the tensors that are saved for the backward pass."""
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield tensors


# (kind, C_out, C_in) -> whether the trained coordinates stand on the output side
OUTPUT_SIDE = {
    ("Linear", 7, 5): True,  # stored (7, 5): tall, L = coordinates stands at the rows, the outputs
    ("Linear", 5, 7): False,
    ("Conv1D", 7, 5): True,  # stored (5, 7): wide, R = coordinates stands at the columns, the outputs
    ("Conv1D", 5, 7): False,
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("which", OUTPUT_SIDE, ids=str)
def test_no_more_is_kept_than_needed(which: tuple[str, int, int], sharded: bool) -> None:
    kind, outputs, inputs = which
    tokens = 11
    module = module_of(kind, outputs, inputs)
    attachment = LowRankHook(module, sharded)
    attachment.coordinates = coordinates_of(module.weight, 0.9)
    x = random(tokens, inputs).requires_grad_()
    with kept() as tensors:
        y = module(x)
    factors = sorted([(outputs, RANK), (inputs, RANK)])
    of_tokens = [t for t in tensors if t.shape[0] == tokens]
    assert sorted(tuple(t.shape) for t in tensors if t.shape[0] != tokens) == sorted(
        [*factors, tuple(module.weight.shape)]
    )
    if OUTPUT_SIDE[which]:
        assert [tuple(t.shape) for t in of_tokens] == [(tokens, RANK)]
    else:
        assert [t.data_ptr() for t in of_tokens] == [x.data_ptr()]  # the input itself, not a copy
    # the module's own weight, which ZeRO-3 releases and gathers: a copy or a view would keep it gathered
    assert any(t is module.weight for t in y.grad_fn.saved_tensors)
    assert [t.data_ptr() for t in tensors].count(module.weight.data_ptr()) == 1


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_without_coordinates_only_the_weight_is_kept(kind: str) -> None:
    module = module_of(kind, 7, 5)
    LowRankHook(module, sharded=True)
    x = random(11, 5).requires_grad_()
    with kept() as tensors:
        y = module(x)
    assert [t.data_ptr() for t in tensors] == [module.weight.data_ptr()]
    assert "FrozenLinear" in type(y.grad_fn).__name__
    with kept() as tensors:
        assert not module(x.detach()).requires_grad
    assert tensors == []


# ---- Attachment: linear modules


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("kind", "bias", "sides"),
    [*(("Linear", bias, sides) for bias in (False, True) for sides in SIDES), *(("Conv1D", True, s) for s in SIDES)],
)
def test_linear(
    kind: str, bias: bool, sides: tuple[int, int], sharded: bool, decay: float, tokens: tuple[int, ...]
) -> None:
    module = module_of(kind, *sides, bias)
    attached = coordinates_of(module.weight, decay)
    plain = module_of(kind, *sides, bias)
    plain.weight.data = dense(module.weight, attached)
    plain.weight.requires_grad_(True)
    if bias:
        module.bias.requires_grad_(True)
        plain.bias.requires_grad_(True)
    LowRankHook(module, sharded).coordinates = attached
    xs = [random(*tokens, sides[1]).requires_grad_() for _ in range(2)]
    head = random(*tokens, sides[0], seed=1)
    for x, each in zip(xs, (module, plain), strict=True):
        y = each(x)
        (y * head).sum().backward()
        if each is module:
            got = y.detach()
    torch.testing.assert_close(got, y.detach(), **CLOSE)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, **CLOSE)
    if bias:
        torch.testing.assert_close(module.bias.grad, plain.bias.grad, **CLOSE)
    # what trains receives R of the full gradient, and nothing else receives anything
    expected = low_rank_gradient(plain.weight.grad, attached.projector)
    torch.testing.assert_close(attached.values.grad, expected, **CLOSE)
    assert module.weight.grad is None
    assert attached.projector.grad is None


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_without_coordinates_nothing_changes(kind: str, trained: bool, sharded: bool) -> None:
    def make() -> nn.Module:
        module = nn.Embedding(9, 5, _weight=random(9, 5)) if kind == "Embedding" else module_of(kind, 7, 5)
        module.weight.requires_grad_(trained)
        return module

    def run(module: nn.Module) -> list[Tensor]:
        if kind == "Embedding":
            y = module(torch.tensor([[0, 3], [8, 3]]))
            leaves = [module.weight]
        else:
            x = random(2, 4, 5).requires_grad_()
            y = module(x)
            leaves = [x, module.weight]
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        return [y.detach(), *(torch.autograd.grad(y.square().sum(), leaves) if leaves else ())]

    changed = make()
    attachment = LowRankHook(changed, sharded)
    result, expected = run(changed), run(make())
    assert len(result) == len(expected) == 1 + (kind != "Embedding") + trained
    for ours, theirs in zip(result, expected, strict=True):
        if sharded and not trained and kind != "Embedding":
            torch.testing.assert_close(ours, theirs, **CLOSE)  # goes through FrozenLinear
        else:
            assert torch.equal(ours, theirs)
    attachment.remove()
    assert all(map(torch.equal, run(changed), expected))


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding"])
def test_remove_gives_the_forward_pass_back(kind: str) -> None:
    module = nn.Embedding(9, 5, _weight=random(9, 5)) if kind == "Embedding" else module_of(kind, 7, 5)
    module.weight.requires_grad_(False)
    x = torch.tensor([1, 2]) if kind == "Embedding" else random(4, 5)
    before, names = module(x), set(vars(module))
    attachment = LowRankHook(module, False)
    assert module.forward.__self__ is attachment
    attachment.coordinates = coordinates_of(module.weight)
    assert not torch.equal(module(x), before)
    attachment.coordinates = None
    assert torch.equal(module(x), before)
    attachment.coordinates = coordinates_of(module.weight)
    attachment.remove()
    assert attachment.coordinates is None
    assert set(vars(module)) == names
    assert module.forward.__func__ is type(module).forward
    assert torch.equal(module(x), before)
    assert list(module.state_dict()) == [name for name in ("weight", "bias") if hasattr(module, name)]


def test_a_weight_that_requires_its_gradient_gets_it() -> None:
    """In a refresh the weight requires its gradient, and the module's own forward pass gives it."""
    module = module_of("Linear", 7, 5)
    LowRankHook(module, sharded=True)
    module.weight.requires_grad_(True)
    x = random(4, 5)
    module(x).sum().backward()
    torch.testing.assert_close(module.weight.grad, torch.ones(7, 4, dtype=torch.float64) @ x, **CLOSE)


# ---- Attachment: embeddings


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_lookup_in_models(family: str, decay: float) -> None:
    """Gemma's embedding multiplies by sqrt(hidden size); padding has no gradient."""
    module = tiny(family, dtype=torch.float64).get_input_embeddings()
    module.weight.requires_grad_(False)
    ids = torch.tensor([[1, 5, 5], [63, 0, 2]])
    attached = coordinates_of(module.weight, decay)
    whole = dense(module.weight, attached).requires_grad_()
    expected = functional_call(module, {"weight": whole}, (ids,))
    scale = 32**0.5 if family.startswith("gemma") else 1.0
    torch.testing.assert_close(expected.detach(), scale * whole.detach()[ids], rtol=1e-6, atol=0)
    head = random(*expected.shape)
    (expected * head).sum().backward()

    LowRankHook(module, False).coordinates = attached
    y = module(ids)
    torch.testing.assert_close(y, expected, **CLOSE)
    (y * head).sum().backward()
    torch.testing.assert_close(attached.values.grad, low_rank_gradient(whole.grad, attached.projector), **CLOSE)
    assert int(attached.values.grad.count_nonzero(dim=1).bool().sum()) == len({1, 5, 63, 2})
    assert module.weight.grad is None


def test_lookup_in_a_wide_table() -> None:
    module = nn.Embedding(4, 10, _weight=random(4, 10)).requires_grad_(False)
    attached = coordinates_of(module.weight, 0.9)
    whole = dense(module.weight, attached).requires_grad_()
    ids = torch.tensor([3, 0, 3])
    head = random(3, 10, seed=4)
    (whole[ids] * head).sum().backward()
    LowRankHook(module, False).coordinates = attached
    y = module(ids)
    torch.testing.assert_close(y, whole[ids], **CLOSE)
    (y * head).sum().backward()
    assert attached.values.shape == (10, RANK)
    torch.testing.assert_close(attached.values.grad, low_rank_gradient(whole.grad, attached.projector), **CLOSE)


# ---- sketches


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding"])
def test_a_sketch_is_a_product_of_the_gradient(
    kind: str, sides: tuple[int, int], transposed: bool, beside: bool
) -> None:
    """G Omega or G^T basis arrives at zeros, the coordinates beside it get what they would get, the output stays."""
    if kind == "Embedding":
        module: nn.Module = nn.Embedding(*sides, _weight=random(*sides)).requires_grad_(False)
        x = torch.arange(11) % sides[0]
    else:
        module = module_of(kind, *sides)
        x = random(11, sides[1])
    weight = module.weight
    attached = coordinates_of(weight, 0.9) if beside else None
    whole = (weight if attached is None else dense(weight, attached)).detach().clone().requires_grad_()
    expected = functional_call(module, {"weight": whole}, (x,))
    head = random(*expected.shape)
    (expected * head).sum().backward()
    assert whole.grad is not None

    shape = (weight.shape[0], weight.shape[1])
    tall = whole.grad if is_tall(shape) else whole.grad.T
    basis = random(max(shape) if transposed else min(shape), 4, seed=9)
    zeros = torch.zeros((), dtype=torch.float64).expand(min(shape) if transposed else max(shape), 4)
    sums = random(*zeros.shape)  # added to, as a later micro-batch does
    product = sums + (tall.T if transposed else tall) @ basis
    attachment = LowRankHook(module, False)
    sketch = make_coordinates(shape, zeros, basis, sums, kind != "Embedding", transposed)
    attachment.coordinates, attachment.sketch = attached, sketch
    y = module(x)
    (y * head).sum().backward()
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(sums, product, **CLOSE)
    assert sketch.values.grad is None
    assert not zeros.any()
    assert weight.grad is None
    if attached is not None:
        torch.testing.assert_close(attached.values.grad, low_rank_gradient(whole.grad, attached.projector), **CLOSE)


# ---- whole models


def attach_all(model: nn.Module, decay: float) -> dict[str, Coordinates]:
    """Coordinates on all matrices of the layers and on embedding and head; tied ones share one."""
    parts = find_layers(model)
    matrices: list[Matrix] = [m for block in parts.layers for m in block.matrices]
    result = {}
    for matrix in (*matrices, *parts.embeddings):
        result[matrix.name] = coordinates_of(model.get_parameter(matrix.name), decay)
        for name in matrix.modules:
            LowRankHook(model.get_submodule(name), False).coordinates = result[matrix.name]
    return result


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_equal_dense_ones(family: str, tied: bool) -> None:
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))

    def logits_and_loss(model: Any) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=ids).logits
        return logits, nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    model = tiny(family, tied, torch.float64).requires_grad_(False)
    plain = tiny(family, tied, torch.float64)
    attached = attach_all(model, 0.9)
    assert ("lm_head.weight" in attached or "embed_out.weight" in attached) == (not tied)
    with torch.no_grad():
        for name, each in attached.items():
            each.values.mul_(0.1)
            weight = plain.get_parameter(name)
            weight.copy_(dense(weight, each))
    logits, loss = logits_and_loss(model)
    expected, expected_loss = logits_and_loss(plain)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-11)
    loss.backward()
    expected_loss.backward()
    for name, each in attached.items():
        gradient = plain.get_parameter(name).grad
        assert gradient is not None
        assert each.values.grad is not None, name
        wanted = low_rank_gradient(gradient, each.projector)
        assert float((each.values.grad - wanted).norm()) <= 1e-10 * float(wanted.norm()) + 1e-14, name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tied_embedding_and_head_share_their_gradient() -> None:
    """One leaf receives the sum of both uses."""
    table = nn.Embedding(9, 5, _weight=random(9, 5)).requires_grad_(False)
    head = nn.Linear(5, 9, bias=False).requires_grad_(False)
    head.weight = table.weight
    attached = coordinates_of(table.weight)
    attachments = [LowRankHook(module, False) for module in (table, head)]
    ids = torch.tensor([2, 7])
    gradients = []
    for which in ([0], [1], [0, 1]):
        attached.values.grad = None
        for index, attachment in enumerate(attachments):
            attachment.coordinates = attached if index in which else None
        hidden = table(ids)
        # stop the gradient between the two, so that their parts can be distinguished
        ((hidden * random(2, 5, seed=1)).sum() + (head(random(2, 5, seed=2)) * random(2, 9)).sum()).backward()
        gradients.append(attached.values.grad.clone())
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2], **CLOSE)
    assert float(gradients[0].norm()) > 0.1
    assert float(gradients[1].norm()) > 0.1


# ---- bfloat16 weights under float32 coordinates


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding"])
@pytest.mark.parametrize("sides", [(70, 50), (50, 70)])
def test_bfloat16(kind: str, sides: tuple[int, int]) -> None:
    """Close to float32 with the same (rounded) weights: bfloat16 has 8 bits, and sums run in float32."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        if kind == "Embedding":
            table = random(*sides, dtype=torch.bfloat16).to(dtype)
            module = nn.Embedding(*sides, _weight=table).requires_grad_(False)
            x = torch.arange(40) % sides[0]
        else:
            module = module_of(kind, *sides, dtype=torch.bfloat16).to(dtype)
            x = random(40, sides[1], dtype=torch.bfloat16).to(dtype).requires_grad_()
        attached = coordinates_of(module.weight, 0.9, torch.float32, rank=8)
        attached.projector = attached.projector.to(torch.bfloat16).to(dtype)
        LowRankHook(module, False).coordinates = attached
        y = module(x)
        assert y.dtype == dtype
        (y * random(*y.shape, dtype=torch.bfloat16).to(dtype)).sum().backward()
        assert attached.values.dtype == attached.values.grad.dtype == torch.float32
        assert is_tall(attached.shape) == (module.weight.shape[0] >= module.weight.shape[1])
        results.append([y.detach().float(), attached.values.grad, *([] if kind == "Embedding" else [x.grad.float()])])
    for low, high in zip(*results, strict=True):
        assert float((low - high).norm() / high.norm()) < 1e-2
        assert not torch.equal(low, high)
