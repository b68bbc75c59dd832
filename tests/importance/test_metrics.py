"""metrics.py in one process: by hand, and against plain float64 evaluations of the definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated
from ows_ds.errors import UserError
from ows_ds.importance import metrics
from ows_ds.importance.metrics import hill, magnitude_and_influence, measure, tail_exponents
from ows_ds.importance.scores import Scores
from ows_ds.model.blocks import Block, Matrix, ModelLayers
from ows_ds.model.layers import find_layers
from ows_ds.optim.ows import OWS
from tests.importance.test_scores import LENGTHS, padded, sequences
from tests.support.families import FAMILIES, tiny


def blocks(model: nn.Module, layers: ModelLayers, rows: list[Tensor]) -> tuple[list[float], list[float]]:
    """rm and bi from the inputs and outputs of whole sequences, one at a time without padding."""
    states: dict[str, list[tuple[Tensor, Tensor]]] = {unit.name: [] for unit in layers.layers}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            states[name].append((x[0], (output if isinstance(output, Tensor) else output[0])[0]))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in states]
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    rm, bi = [], []
    for pairs in states.values():
        x, y = (torch.cat(one).double() for one in zip(*pairs, strict=True))
        rm.append(float((torch.linalg.norm(y - x, dim=1) / torch.linalg.norm(y, dim=1)).mean()))
        bi.append(float(1 - nn.functional.cosine_similarity(x, y, dim=1).mean()))
    return rm, bi


def alpha_of(singular: Tensor) -> float:
    """PL_Alpha_Hill, term by term."""
    eigenvalues = sorted(float(s) ** 2 for s in singular)
    n = len(eigenvalues)
    k = max(1, n // 2)
    total = sum(math.log(eigenvalues[n - i] / eigenvalues[n - k - 1]) for i in range(1, k + 1))
    return 1 + k / total


def alphas(model: nn.Module, layers: ModelLayers) -> list[float]:
    """alpha from singular values in float64."""
    every = [
        [alpha_of(torch.linalg.svdvals(model.get_parameter(m.name).detach().double())) for m in unit.matrices]
        for unit in layers.layers
    ]
    return [sum(values) / len(values) for values in every]


@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_in_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", 5 * 32)  # five tokens at once
    softmax = nn.functional.softmax  # transformers' is float32, whose rounding depends on padding on some CPUs
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    model = tiny(family, True, torch.float64)
    layers = find_layers(model)
    rows = sequences()
    rm, bi = blocks(model, layers, rows)
    model.train()
    model.get_submodule(layers.layers[1].name).eval()
    modes = [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    weights = Replicated(model, Communicator())
    batches = [padded(rows[:2]), None, padded(rows[2:])]
    found = measure(weights, layers, ["alpha", "bi", "rm"], lambda: iter(batches), tau=3.0)

    assert list(found) == ["alpha", "bi", "rm"]
    assert found["rm"].layers == pytest.approx(rm, rel=1e-12)
    assert found["bi"].layers == pytest.approx(bi, rel=1e-12)
    assert found["alpha"].layers == pytest.approx(alphas(model, layers), rel=1e-12)
    assert {metric: (one.metric, one.tau, one.tokens) for metric, one in found.items()} == {
        "alpha": ("alpha", 0.0, 0),
        "bi": ("bi", 0.0, sum(LENGTHS)),
        "rm": ("rm", 0.0, sum(LENGTHS)),
    }
    assert len({one.model for one in found.values()}) == 1
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_formats(dtype: torch.dtype) -> None:
    """Where x and y are given in their format, the rest is float64."""
    model = tiny("llama", True, dtype)
    layers = find_layers(model)
    row = sequences()[0]
    rm, bi = blocks(model, layers, [row])
    weights = Replicated(model, Communicator())
    found = measure(weights, layers, ["rm", "bi", "alpha"], lambda: [{"input_ids": row[None]}], 3.0)
    assert found["rm"].layers == pytest.approx(rm, rel=1e-6)  # the reference subtracts in the same format
    assert found["bi"].layers == pytest.approx(bi, rel=1e-12)
    assert found["alpha"].layers == pytest.approx(alphas(model, layers), rel=1e-9)


class Layer(nn.Module):
    """x -> matrix times x, as a tensor or first of a tuple."""

    def __init__(self, matrix: list[list[float]], wrapped: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        self.linear.weight = nn.Parameter(torch.tensor(matrix))
        self.wrapped = wrapped

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, None]:
        y = self.linear(hidden_states)
        return (y, None) if self.wrapped else y


class Toy(nn.Module):
    """Token t is (t, 0); the first layer is called by position, the second by keyword."""

    def __init__(self, *matrices: list[list[float]]) -> None:
        super().__init__()
        self.stack = nn.ModuleList(Layer(matrix, index == 1) for index, matrix in enumerate(matrices))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        x = torch.stack([input_ids, 0 * input_ids], dim=-1).float()
        x = torch.where(attention_mask[..., None] != 0, x, math.nan) if attention_mask is not None else x
        self.stack[1](hidden_states=self.stack[0](x))

    def layers(self) -> ModelLayers:
        names = (f"stack.{index}" for index in range(len(self.stack)))
        units = (Block(n, (Matrix(f"{n}.linear.weight", (2, 2), (f"{n}.linear",)),), ()) for n in names)
        return ModelLayers(tuple(units), (), ())


DIAGONAL = [[3.0, 0.0], [0.0, 1.0]]


def test_by_hand() -> None:
    # Layer 0 turns (t, 0) into (0, 2t): f = (-t, 2t), so rm is sqrt(5) / 2 and the cosine 0.
    # Layer 1 turns (0, s) into (s, s): f = (s, 0), so rm is 1 / sqrt(2) and the cosine 1 / sqrt(2).
    # Token 0 is zero all the way: its ratios and cosines count as 0. The last is padding (and NaN).
    toy = Toy([[0.0, 1.0], [2.0, 0.0]], [[1.0, 1.0], [0.0, 1.0]])
    batch = {"input_ids": torch.tensor([[3, 4, 0, 7]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    rm, bi = magnitude_and_influence(Replicated(toy, Communicator()), toy.layers(), [batch, None])
    assert rm.layers == pytest.approx((2 / 3 * math.sqrt(5) / 2, 2 / 3 / math.sqrt(2)), rel=1e-15)
    assert bi.layers == pytest.approx((1.0, 1 - 2 / 3 / math.sqrt(2)), rel=1e-15)
    assert rm.tokens == bi.tokens == 3


def test_a_layer_that_does_nothing() -> None:
    toy = Toy([[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, 1.0]])
    rm, bi = magnitude_and_influence(
        Replicated(toy, Communicator()), toy.layers(), [{"input_ids": torch.tensor([[3]])}]
    )
    assert (rm.layers, bi.layers) == ((0.0, 2.0), (0.0, 2.0))


def test_no_tokens_and_infinite_activations() -> None:
    toy = Toy(DIAGONAL, DIAGONAL)
    weights = Replicated(toy, Communicator())
    with pytest.raises(UserError, match=r"data\.train: '0 calibration tokens'"):
        magnitude_and_influence(weights, toy.layers(), [None])
    toy.stack[1].get_parameter("linear.weight").data[0, 0] = math.inf
    with pytest.raises(RuntimeError, match=r"activations of stack\.1 are not finite"):
        magnitude_and_influence(weights, toy.layers(), [{"input_ids": torch.tensor([[3]])}])
    with pytest.raises(RuntimeError, match=r"stack\.1\.linear\.weight is not finite"):
        tail_exponents(weights, toy.layers())


def test_ows_samples_by_the_metric_of_the_scores() -> None:
    for metric, values, expected in (
        ("alpha", (2.0, 4.0, 4.0), [0.5, 0.25, 0.25]),
        ("rm", (2.0, 1.0, 1.0), [0.5, 0.25, 0.25]),
    ):
        ows = OWS(tiny("llama"), scores=Scores(metric, 0.0, "", values, 0), gamma=1, rank=4)
        assert ows.probabilities == pytest.approx(expected, abs=1e-15)


# ---- spectra


@pytest.mark.parametrize(
    ("singular", "shape", "expected"),
    [
        # n = 4, k = 2, lambda_{n-k} = 4: 1 + 2 / (ln(16 / 4) + ln(64 / 4)) = 1 + 2 / ln 64
        ([1.0, 2.0, 4.0, 8.0], (4, 4), 1 + 2 / math.log(64)),
        ([1.0, 2.0, 4.0, 8.0], (6, 4), 1 + 2 / math.log(64)),
        ([1.0, 2.0, 4.0, 8.0], (4, 9), 1 + 2 / math.log(64)),
        # n = 3, k = 1, lambda_{n-k} = 9
        ([1.0, 3.0, 9.0], (3, 3), 1 + 1 / math.log(9)),
        ([1.0, 2.0], (2, 5), 1 + 1 / math.log(4)),
        # lambda_{n-k} is 4 although two eigenvalues are 0: n = 5, k = 2
        ([0.0, 0.0, 2.0, 4.0, 8.0], (5, 5), 1 + 2 / math.log(64)),
        # where it would be 0, eigenvalues of 0 do not count
        ([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 4.0, 8.0], (8, 8), 1 + 2 / math.log(64)),
        ([0.0, 0.0, 0.0], (3, 5), 0.0),
        ([0.0, 0.0, 2.0], (3, 3), 0.0),
        ([1.0, 1.0, 1.0], (3, 3), 0.0),
    ],
)
def test_hill_by_hand(singular: list[float], shape: tuple[int, int], expected: float) -> None:
    matrix = torch.zeros(shape)
    matrix.diagonal().copy_(torch.tensor(singular))
    assert hill(matrix) == pytest.approx(expected, rel=1e-14)
    if singular != [1.0, 1.0, 1.0]:  # of which rounding would make nearly equal ones, with a very large alpha
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0] for n in shape)
        assert hill(left @ matrix.double() @ right) == pytest.approx(expected, rel=1e-12)


def test_hill_of_entries_that_are_not_finite() -> None:
    assert math.isnan(hill(torch.tensor([[1.0, math.nan], [0.0, 1.0]])))
    assert math.isnan(hill(torch.tensor([[1.0, math.inf], [0.0, 1.0]])))


def test_matrices_without_a_tail_are_left_out() -> None:
    toy = Toy(DIAGONAL, DIAGONAL)
    matrices = tuple(unit.matrices[0] for unit in toy.layers().layers)
    both = ModelLayers((Block("both", matrices, ()),), (), ())
    toy.stack[1].get_parameter("linear.weight").data.zero_()  # as in a layer that block expansion has added
    weights = Replicated(toy, Communicator())
    assert tail_exponents(weights, both).layers == pytest.approx((1 + 1 / math.log(9),), rel=1e-14)
    with pytest.raises(UserError, match=r"sampling\.importance: 'alpha' .* no weight of stack\.1 has"):
        tail_exponents(weights, toy.layers())
