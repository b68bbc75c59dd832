"""score.py in one process: equation 2 by hand and against a plain evaluation; files of scores."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ows_ds import score
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated, interval
from ows_ds.errors import UserError
from ows_ds.importance import outliers
from ows_ds.importance.metrics import measure
from ows_ds.importance.outliers import blocks, outlier_scores
from ows_ds.importance.scores import Scores
from ows_ds.model.blocks import Block, Matrix, ModelLayers
from ows_ds.model.layers import find_layers
from tests.support.families import FAMILIES, tiny

LENGTHS = [9, 4, 12, 1, 7]


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (length,), generator=generator) for length in LENGTHS]


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def equation_2(model: nn.Module, layers: ModelLayers, rows: list[Tensor], tau: float) -> list[float]:
    """D from the inputs of whole sequences, one at a time without padding, and dense matrices A."""
    inputs: dict[str, list[Tensor]] = {}
    handles = []
    for m in (m for unit in layers.layers for m in unit.matrices):
        keep = inputs.setdefault(m.name, [])
        hook = lambda _, args, __, keep=keep: keep.append(args[0].flatten(0, -2))  # noqa: E731
        handles.append(model.get_submodule(m.modules[0]).register_forward_hook(hook))
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    ratios = []
    for unit in layers.layers:
        parts = []
        for m in unit.matrices:
            weight = model.get_parameter(m.name).detach().double()
            weight = weight.T if m.inputs_first else weight
            norm = torch.cat(inputs[m.name]).double().norm(dim=0)
            parts.append((norm * weight.abs()).flatten())
        a = torch.cat(parts)
        ratios.append(float((a > tau * a.mean()).double().mean()))
    return ratios


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equation_2_in_every_family(family: str, tied: bool) -> None:
    model = tiny(family, tied, torch.float64)
    layers = find_layers(model)
    rows = sequences()
    expected = equation_2(model, layers, rows, tau=3.0)
    assert min(expected) > 0.001

    model.train()
    model.get_submodule(layers.layers[1].name).eval()
    modes = [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = outlier_scores(
        Replicated(model, Communicator()), layers, [padded(rows[:2]), None, padded(rows[2:])], tau=3.0
    )

    assert scores.layers == pytest.approx(expected, rel=1e-12)
    assert (scores.metric, scores.tau, scores.tokens, scores.format) == ("outlier", 3.0, sum(LENGTHS), 1)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


class Toy(nn.Module):
    """Two layers of linear modules without biases, the second of a layer flattened to (tokens, features)."""

    def __init__(self, *weights: list[list[float]]) -> None:
        super().__init__()
        self.stack = nn.ModuleList()
        for weight in weights:
            linear = nn.Linear(len(weight[0]), len(weight), bias=False)
            linear.weight = nn.Parameter(torch.tensor(weight))
            self.stack.append(linear)
        self.seen: list[dict[str, Any]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = True) -> None:
        self.seen.append({"use_cache": use_cache, "training": self.training, "grad": torch.is_grad_enabled()})
        x = torch.stack([input_ids, 2 * input_ids], dim=-1).float()
        x = torch.where(attention_mask[..., None] != 0, x, math.nan) if attention_mask is not None else x
        self.stack[0](x)
        self.stack[1](x.flatten(0, 1))

    def layers(self) -> ModelLayers:
        def matrix(index: int) -> Matrix:
            shape = tuple(self.stack[index].weight.shape)
            return Matrix(f"stack.{index}.weight", shape, (f"stack.{index}",))

        return ModelLayers((Block("0", (matrix(0),), ()), Block("1", (matrix(1),), ())), (), ())


def test_by_hand() -> None:
    # Tokens 3 and 4, the third is padding (and NaN): X = (3 6; 4 8), norms 5 and 10.
    # Layer 0: A = (5 10; 10 20; 0 90), mean 22.5; tau 2: above 45 is one of six.
    # Layer 1: A = (5 -> 5 * 8 = 40, 10), mean 25; tau 2: none above 50.
    toy = Toy([[1.0, -1.0], [-2.0, 2.0], [0.0, 9.0]], [[8.0, 1.0]])
    batch = {"input_ids": torch.tensor([[3, 4, 7]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    scores = outlier_scores(Replicated(toy, Communicator()), toy.layers(), [batch], tau=2.0)
    assert scores.layers == (1 / 6, 0.0)
    assert scores.tokens == 2
    assert toy.seen == [{"use_cache": False, "training": False, "grad": False}]
    assert toy.training
    # tau 1: above 22.5 is still the one; above 25 is the 40. An entry equal to the threshold does not count.
    assert outlier_scores(Replicated(toy, Communicator()), toy.layers(), [batch], tau=1.0).layers == (1 / 6, 1 / 2)
    assert outlier_scores(Replicated(toy, Communicator()), toy.layers(), [batch], tau=4.0).layers == (0.0, 0.0)


def test_without_mask_every_token_counts() -> None:
    toy = Toy([[1.0, -1.0]], [[8.0, 1.0]])
    assert (
        outlier_scores(
            Replicated(toy, Communicator()), toy.layers(), [{"input_ids": torch.tensor([[3, 4]])}], 1.0
        ).tokens
        == 2
    )


def test_no_tokens_and_infinite_activations() -> None:
    toy = Toy([[1.0, -1.0]], [[8.0, 1.0]])
    with pytest.raises(UserError, match=r"data\.train: '0 calibration tokens'"):
        outlier_scores(Replicated(toy, Communicator()), toy.layers(), [None], 1.0)
    toy.stack[1].weight.data[0, 0] = math.inf
    with pytest.raises(RuntimeError, match="of 1 are not finite"):
        outlier_scores(Replicated(toy, Communicator()), toy.layers(), [{"input_ids": torch.tensor([[3]])}], 1.0)


def test_hooks_and_mode_are_put_back_after_an_error() -> None:
    toy = Toy([[1.0, -1.0]], [[8.0, 1.0]])
    batch = {"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.tensor([[1]])}
    with pytest.raises(RuntimeError, match=r"the input of stack\.0\.weight has 2 rows where the batch has 1 tokens"):
        outlier_scores(Replicated(toy, Communicator()), toy.layers(), [batch], 1.0)
    assert toy.training
    assert not any(m._forward_pre_hooks for m in toy.modules())


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7, 40])
@pytest.mark.parametrize(("chunk", "experts"), [(1, None), (8, None), (1000, None), (8, 2), (1000, 3)])
def test_blocks_cover_every_entry_once(
    inputs_first: bool, world_size: int, chunk: int, experts: int | None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(outliers, "BLOCK", chunk)
    matrix = Matrix("w", (5, 7), ("w",), inputs_first, experts)
    parameter = nn.Parameter(torch.arange(35.0 * matrix.count).view(matrix.count, 5, 7))
    seen = torch.zeros(parameter.shape)
    sums = torch.zeros(matrix.count, matrix.in_features)
    for index in range(world_size):
        comm = Communicator()
        comm.rank, comm.world_size = index, world_size
        weights = Replicated(nn.Linear(1, 1), Communicator())
        weights.comm = comm
        for expert, features, block in blocks(weights, matrix, parameter):
            assert block.numel() <= max(chunk, 7)
            assert block.shape[1] == features.stop - features.start
            seen.view(-1)[block.flatten().long()] += 1
            sums[expert, features] += block.sum(0)
    assert torch.equal(seen, torch.ones(parameter.shape))
    assert torch.equal(sums, parameter.detach().sum(2 if inputs_first else 1))
    assert interval(35, 39, 40) == (35, 35)


# ---- score, for scripts


def test_score_takes_a_model_weights_or_a_path(tmp_path: Path) -> None:
    tiny("llama", True, torch.bfloat16).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    batches = [padded(sequences()[:2]), padded(sequences()[2:])]
    weights, layers = Replicated(model, Communicator()), find_layers(model)
    expected = outlier_scores(weights, layers, batches, tau=3.0)
    assert score(model, batches, tau=3.0) == score(weights, iter(batches), tau=3.0) == expected
    assert score(tmp_path / "model", batches, tau=3.0) == score(str(tmp_path / "model"), batches, tau=3.0) == expected
    for metric in ("rm", "bi", "alpha"):
        assert score(model, batches, metric) == measure(weights, layers, [metric], lambda: batches, 3.0)[metric]
    with pytest.raises(UserError, match="metric: 'reverse' is invalid: expected one of outlier, rm, bi, alpha"):
        score(model, batches, "reverse")
    with pytest.raises(UserError, match=r"model\.path"):
        score(tmp_path / "none", batches)


# ---- files of scores

SCORES = Scores("outlier", 13.0, "f" * 64, (0.0019, 0.0005, 0.0064), 1234)


def test_write_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.json"
    SCORES.write(path)
    assert json.loads(path.read_text()) == {
        "metric": "outlier",
        "tau": 13.0,
        "model": "f" * 64,
        "layers": [0.0019, 0.0005, 0.0064],
        "tokens": 1234,
        "format": 1,
    }
    assert Scores.read(path) == SCORES
    assert [p.name for p in path.parent.iterdir()] == ["scores.json"]


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.json"
    SCORES.write(path)
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        replace(SCORES, tau=1.0).write(path)
    monkeypatch.undo()
    assert Scores.read(path) == SCORES
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]


def changed(**values: Any) -> str:
    return json.dumps({**asdict(SCORES), **values})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("{", "JSON"),
        ("\udcff", "JSON"),
        ("[1, 2]", "format 1"),
        ("{}", "format 1"),
        (changed(format=2), "format 1"),
        (changed(layers=[]), "layers"),
        (changed(layers="0.1"), "layers"),
        (changed(layers=[0.1, -0.1]), "layers"),
        (changed(layers=[0.1, math.nan]), "layers"),
        (changed(layers=[0.1, math.inf]), "layers"),
        (changed(layers=[0.1, "0.1"]), "layers"),
        (changed(layers=[0.1, None]), "layers"),
        (changed(layers=[True]), "layers"),
        (changed(tau="13"), "tau"),
        (changed(tau=None), "tau"),
        (changed(tokens=1.5), "tokens"),
        (changed(model=7), "model"),
        (changed(metric="reverse"), "expected scores of one of outlier, rm, bi, alpha"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "scores.json"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=says) as caught:
        Scores.read(path)
    assert caught.value.key.startswith("sampling.scores")


def test_check() -> None:
    rm = replace(SCORES, metric="rm", tau=0.0)
    SCORES.check("f" * 64, 3, "outlier", 13.0)
    SCORES.check("f" * 64, 3, "reverse", 13.0)
    rm.check("f" * 64, 3, "rm", 13.0)  # tau is none of its business
    for scores in (SCORES, rm):
        scores.check("f" * 64, 3)
    for scores, model, layers, kind, tau, says in (
        (SCORES, "e" * 64, 3, "outlier", 13.0, "this model's weights are eeeeeeeeeeee"),
        (SCORES, "f" * 64, 4, None, None, "this model has 4"),
        (SCORES, "f" * 64, 3, "reverse", 5.0, "sampling.tau is 5"),
        (SCORES, "f" * 64, 3, "bi", 13.0, "sampling.importance is bi, which needs scores of metric bi"),
        (rm, "f" * 64, 3, "reverse", 0.0, "sampling.importance is reverse, which needs scores of metric outlier"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            scores.check(model, layers, kind, tau)
        assert caught.value.key == "sampling.scores"
    assert caught.value.value == "scores of metric rm"
