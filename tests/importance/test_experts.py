"""Scores of layers with stacks of experts: equation 2 with each expert's own inputs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated
from ows_ds.errors import UserError
from ows_ds.importance.calibrate import split_lengths
from ows_ds.importance.experts import ExpertInputs
from ows_ds.importance.metrics import hill, measure
from ows_ds.importance.outliers import input_squares, outlier_scores
from ows_ds.importance.scores import Scores
from ows_ds.model.blocks import Matrix, ModelLayers
from ows_ds.model.layers import find_layers
from ows_ds.model.pretrained import formats
from tests.importance.test_metrics_ranks import batches
from tests.importance.test_scores import LENGTHS, padded, sequences
from tests.support.pool import Pools
from tests.support.training import home

EXPERTS, TAU = 5, 3.0  # more experts than some rows have tokens
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "mixtral": functools.partial(tf.MixtralConfig, **SMALL),
    "gpt_oss": functools.partial(tf.GptOssConfig, **SMALL),
    "llama4": functools.partial(tf.Llama4TextConfig, **SMALL, intermediate_size_mlp=24),
}


def moe(family: str, implementation: str = "eager", dtype: torch.dtype = torch.float64) -> nn.Module:
    """A tiny random model with experts."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager")
    if family != "llama4":  # which has one implementation
        model.set_experts_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def of_experts(experts: Any, hidden: Tensor, chosen: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Of each expert the inputs of its two matrices. chosen: (tokens, k); None: each has as many tokens, in order."""
    found = []
    for e in range(EXPERTS):
        x = hidden.view(EXPERTS, -1, hidden.shape[-1])[e] if chosen is None else hidden[(chosen == e).any(1)]
        weight = experts.gate_up_proj[e]
        y = x @ (weight if weight.shape[0] == hidden.shape[-1] else weight.T)
        if chosen is None:
            gate, up = y.chunk(2, dim=-1)
            found.append((x, up * experts.act_fn(gate)))
        else:
            bias = experts.gate_up_proj_bias[e] if experts.has_bias else 0
            found.append((x, experts._apply_gate(y + bias)))
    return found


def reference(
    model: nn.Module, layers: ModelLayers, rows: list[Tensor], real: nn.Module | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """D of every layer and the squares of all inputs, from one row at a time. real: has the weights that are scored,
    where ``model`` computes with others."""
    squares: dict[str, Any] = {}

    def linear(name: str, _: nn.Module, args: Any) -> None:
        squares[name] = squares.get(name, 0) + args[0].flatten(0, -2).square().sum(0)[None]

    def stacks(name: str, module: nn.Module, args: Any) -> None:
        inputs = of_experts(module, args[0], args[1] if len(args) > 1 else None)
        for key, some in zip(("gate_up_proj", "down_proj"), zip(*inputs, strict=True), strict=True):
            full = f"{name}.{key}"
            squares[full] = squares.get(full, 0) + torch.stack([x.square().sum(0) for x in some])

    handles = []
    for m in (m for layer in layers.layers for m in layer.matrices):
        module = model.get_submodule(m.modules[0])
        if m.experts is None:
            handles.append(module.register_forward_pre_hook(functools.partial(linear, m.name)))
        elif m.name.endswith("down_proj"):
            handles.append(module.register_forward_pre_hook(functools.partial(stacks, m.modules[0])))
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    ratios, inputs_first = [], not isinstance(model, tf.MixtralForCausalLM)
    for layer in layers.layers:
        parts = []
        for m in layer.matrices:
            weight = (real or model).get_parameter(m.name).detach().view(m.count, *m.shape)
            weight = weight.mT if m.experts and inputs_first else weight
            parts.append((squares[m.name].sqrt()[:, None] * weight.abs()).flatten())
        a = torch.cat(parts)
        ratios.append(float((a > TAU * a.mean()).double().mean()))
    return ratios, squares


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        ("mixtral", "eager"),
        ("mixtral", "batched_mm"),
        ("gpt_oss", "eager"),
        ("gpt_oss", "batched_mm"),
        ("llama4", "eager"),
    ],
)
def test_equation_2_with_each_experts_own_inputs(family: str, implementation: str) -> None:
    model = moe(family, implementation)
    layers = find_layers(model)
    matrices = [m for layer in layers.layers for m in layer.matrices]
    assert sum(m.experts == EXPERTS for m in matrices) == 4
    rows = [row for row in sequences() if len(row) < 10]
    expected, squares = reference(model, layers, rows)
    given = [padded(rows[:3]), None, padded(rows[3:])]
    weights = Replicated(model, Communicator())
    used, found, tokens = input_squares(weights, matrices, given)
    assert tokens == sum(map(len, rows))
    assert all(used[m.name].inputs_first == (family != "mixtral") for m in matrices if m.experts)
    for name, value in squares.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0)
    scores = outlier_scores(weights, layers, given, TAU)
    assert scores.layers == pytest.approx(expected, rel=1e-12)
    assert min(expected) > 0.001
    expected, squares = reference(model, layers, [row := rows[2]])  # one token: most experts have none
    assert all((~value.any(1)).sum() == EXPERTS - 2 for value in squares.values() if len(value) == EXPERTS)
    assert outlier_scores(weights, layers, [padded([row])], TAU).layers == pytest.approx(expected, rel=1e-12)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("family", "implementation", "frozen"),
    [("mixtral", "eager", "int8"), ("gpt_oss", "eager", "fp8"), ("llama4", "eager", "nf4")],
)
def test_real_weights_are_scored_where_codes_compute(family: str, implementation: str, frozen: str) -> None:
    model, rounded = moe(family, implementation), moe(family, implementation)
    layers = find_layers(model)
    for name, format in formats(layers, frozen, torch.float64).items():
        parameter = rounded.get_parameter(name)
        parameter.data.copy_(format.dense(*format.quantise(parameter.data)))
    rows = [row for row in sequences() if len(row) < 10]
    expected, squares = reference(rounded, layers, rows, model)
    weights = home(moe(family, implementation), "replicated", 1, frozen)
    given = [padded(rows[:3]), None, padded(rows[3:])]
    _, found, _ = input_squares(weights, [m for layer in layers.layers for m in layer.matrices], given)
    for name, value in squares.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=0)
    assert outlier_scores(weights, layers, given, TAU).layers == pytest.approx(expected, rel=1e-12)


class Listed(nn.Module):
    """A layer whose experts are a list of linear modules: even tokens go to the first, odd ones to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].experts = nn.ModuleList(nn.Linear(1, 1) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        for number, expert in enumerate(self.layers[0].experts):
            expert(input_ids[input_ids % 2 == number].float()[:, None])


def test_experts_in_a_list_of_modules() -> None:
    names = [f"layers.0.experts.{number}" for number in range(2)]
    matrices = [Matrix(f"{name}.weight", (1, 1), (name,)) for name in names]
    batch = padded([torch.tensor([2, 4, 5]), torch.tensor([3])])
    _, found, tokens = input_squares(Replicated(Listed(), Communicator()), matrices, [batch, None])
    assert ([value.tolist() for value in found.values()], tokens) == ([[[20.0]], [[34.0]]], 4)


def test_sorted_tokens_in_one_product() -> None:  # which torch has for float32 on the CPU
    model = moe("mixtral", "grouped_mm", torch.float32)
    matrices = [m for layer in find_layers(model).layers for m in layer.matrices]
    _, found, _ = input_squares(Replicated(model, Communicator()), matrices, [padded(sequences())])
    model.set_experts_implementation("eager")
    _, squares = reference(model, find_layers(model), sequences())
    for name, value in squares.items():
        torch.testing.assert_close(found[name], value.double(), rtol=1e-4, atol=1e-6)


def measured(rank: int, world_size: int, family: str, sharding: str) -> dict[str, Scores]:
    weights = home(moe(family), sharding, world_size)
    layers = find_layers(weights.module, weights.shape)
    return measure(weights, layers, ["outlier", "rm", "alpha"], lambda: batches(rank, world_size), TAU)


@pytest.mark.parametrize(
    ("family", "world_size", "sharding"),
    [("mixtral", 2, "replicated"), ("mixtral", 2, "zero3"), ("gpt_oss", 2, "zero3"), ("llama4", 2, "zero3")],
)
def test_scores_of_several_ranks(pools: Pools, family: str, world_size: int, sharding: str) -> None:
    model = moe(family)
    layers = find_layers(model)
    expected, _ = reference(model, layers, sequences())
    alone = measure(Replicated(model, Communicator()), layers, ["rm", "alpha"], lambda: batches(0, 1), TAU)
    ranks = pools(world_size).run(measured, family, sharding)
    assert all(found == ranks[0] for found in ranks)
    assert ranks[0]["outlier"].layers == pytest.approx(expected, rel=1e-12)
    assert ranks[0]["outlier"].tokens == sum(LENGTHS)
    assert ranks[0]["rm"].layers == pytest.approx(alone["rm"].layers, rel=1e-9)
    assert ranks[0]["alpha"] == alone["alpha"]
    for layer, alpha in zip(layers.layers, alone["alpha"].layers, strict=True):
        stacks = (model.get_parameter(m.name).detach().view(-1, *m.shape) for m in layer.matrices)
        alphas = [hill(one) for stack in stacks for one in stack]
        assert alpha == sum(alphas) / len(alphas)


# ---- uses of a stack


def inputs_of(stack: Tensor, use: Any) -> dict[int, float]:
    """The first feature's sum of squares by expert."""
    found: dict[int, float] = {}

    def add(expert: int, inputs_first: bool, x: Tensor) -> None:
        assert (inputs_first, x.shape[1]) == (False, 6)
        found[expert] = found.get(expert, 0.0) + float(x[:, 0].square().sum())

    with torch.no_grad(), ExpertInputs("stack", stack, add):
        use()
    return found


def test_ways_to_multiply() -> None:
    stack, x, bias = torch.randn(3, 4, 6), torch.ones(2, 6), torch.ones(4)
    assert inputs_of(stack, lambda: nn.functional.linear(x, stack[1], bias)) == {1: 2}
    assert inputs_of(stack, lambda: nn.functional.linear(x[0], stack[1])) == {1: 1}
    assert inputs_of(stack, lambda: [x @ one.T for one in stack.unbind()]) == {0: 2, 1: 2, 2: 2}
    assert inputs_of(stack, lambda: stack[2] @ x.T) == inputs_of(stack, lambda: x @ stack[2].clone().T) == {2: 2}
    assert inputs_of(stack, lambda: x @ stack.mT[1:]) == {1: 2, 2: 2}
    assert inputs_of(stack, lambda: torch.einsum("eni,eoi->eno", x.expand(3, 2, 6), stack)) == {0: 2, 1: 2, 2: 2}
    assert inputs_of(stack, lambda: stack.double()[[2, 0, 2]] @ x.double()[0].expand(3, 6).unsqueeze(-1)) == {
        2: 2,
        0: 1,
    }
    assert inputs_of(stack, lambda: (stack[0].shape, stack.mT.detach(), x + 1)) == {}


@pytest.mark.parametrize(
    "use",
    [
        lambda stack, x: x @ stack[0, :2].T,  # twice the same x, if the other half follows
        lambda stack, x: torch.einsum("ni,eoi->neo", x, stack),  # all tokens with all experts
        lambda stack, x: stack.sum(0),
        lambda stack, x: stack[0] + 1,
    ],
)
def test_other_uses_are_refused(use: Any) -> None:
    stack = torch.randn(3, 4, 6)
    with pytest.raises(UserError, match=r"sampling.importance: 'outlier' is invalid: expected rm, bi or alpha: stack"):
        inputs_of(stack, lambda: use(stack, torch.ones(2, 6)))


def test_split_lengths() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 0], [0, 0, 0]])
    ids = torch.arange(12).view(4, 3)
    some = list(split_lengths({"input_ids": ids, "attention_mask": mask, "pixels": torch.arange(4)[:, None]}))
    assert [one["input_ids"].tolist() for one in some] == [[[4, 5]], [[0, 1], [6, 7]]]
    assert [one["attention_mask"].tolist() for one in some] == [[[1, 1]], [[1, 1], [1, 1]]]
    assert [one["pixels"].tolist() for one in some] == [[[1]], [[0], [2]]]
    patches = {"input_ids": ids, "attention_mask": mask, "patches": torch.zeros(7, 2)}
    with pytest.raises(UserError, match=r"calibration_batch_size: 4 is invalid: expected 1: .* patches does not"):
        list(split_lengths(patches))
    [one] = split_lengths({name: value[:1] if name != "patches" else value for name, value in patches.items()})
    assert (one["input_ids"].shape, one["patches"].shape) == ((1, 2), (7, 2))
