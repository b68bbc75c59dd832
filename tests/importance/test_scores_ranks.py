"""Scores and fingerprints of SmolLM2 in worlds of 1, 2 and 3, replicated and sharded, against equation 2 in float64."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ows_ds.config import Recipe
from ows_ds.distributed.communicator import Communicator, join
from ows_ds.distributed.ds_config import resolve_config
from ows_ds.distributed.weights import Replicated, Weights
from ows_ds.distributed.zero3 import Zero3
from ows_ds.importance.outliers import outlier_scores
from ows_ds.importance.scores import Scores
from ows_ds.model.fingerprint import fingerprint
from ows_ds.model.layers import find_layers
from ows_ds.train.trainer import score
from tests.support.pool import Pools
from tests.support.tiny_run import recipe

TAU = 13.0
# Chosen so that no entry of A lies within 1e-5 of a threshold (`reference` makes sure): then D, which counts entries,
# cannot depend on float32's rounding in the forward pass (3e-6 in the norms that matter).
TEXTS = [
    "The quick brown fox jumps over the lazy dog while the sun sets.",
    "Layers differ.",
    "A function f is continuous at a point if its limit there is its value, which is what the definition says.",
    "def add(a, b):\n    return a + b\n",
    "Water boils at 100 degrees.",
    "Ann has 3 apples and buys 4 more. How many apples does she have now? She has 3 + 4 = 7 apples.",
]
BATCHES = [[0, 3], [1, 4, 2], [5]]  # dealt in turn: in a world of 2, rank 1 has none in the second round
TOKENS = 14 + 4 + 23 + 13 + 9 + 31
EMBEDDING = 49152 * 576
PARAMETERS = EMBEDDING + 30 * (576 * (2 * 576 + 2 * 192 + 3 * 1536) + 2 * 576) + 576
WORLDS = pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.ci)]
)
CHANGED = "model.layers.17.mlp.up_proj.weight"


def rows(folder: Path) -> list[Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]


def load(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


def equation_2(folder: Path) -> tuple[list[float], float]:
    """D in float64 from dense A and whole, unpadded sequences; and how near an entry comes to a threshold, relative."""
    model = load(folder, torch.float64)
    layers = find_layers(model)
    inputs: dict[str, list[Tensor]] = {}
    for matrix in (m for unit in layers.layers for m in unit.matrices):
        keep = inputs.setdefault(matrix.name, [])
        module = model.get_submodule(matrix.modules[0])
        module.register_forward_hook(lambda _, args, __, keep=keep: keep.append(args[0][0]))
    with torch.no_grad():
        for row in rows(folder):
            model(input_ids=row[None])
    ratios = []
    margin = 1.0
    for unit in layers.layers:
        norms = {m.name: torch.cat(inputs[m.name]).norm(dim=0) for m in unit.matrices}
        weights = {m.name: model.get_parameter(m.name).detach() for m in unit.matrices}
        a = torch.cat([(norms[name] * weights[name].abs()).flatten() for name in norms])
        relative = a / (TAU * a.mean())
        ratios.append(float((relative > 1).double().mean()))
        margin = min(margin, float((relative - 1).abs().min()))
    return ratios, margin


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> list[float]:
    ratios, margin = equation_2(smollm2)
    assert margin > 1e-5, "an entry too near the threshold: choose other texts"
    return ratios


def batches(rank: int, world_size: int, folder: Path) -> list[dict[str, Tensor] | None]:
    tokens = rows(folder)
    mine = []
    for indices in BATCHES[rank::world_size]:
        chosen = [tokens[i] for i in indices]
        ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=2)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in chosen], batch_first=True)
        mine.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    rounds = -(-len(BATCHES) // world_size)
    return [*mine, *[None] * (rounds - len(mine))]


class Listening:
    """A communicator's all-reduces, as (name, dtype, bytes), and whatever else it sends, by name."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.calls: list[tuple[str, str, int]] = []
        self._all_reduce = comm.all_reduce
        comm.all_reduce = self.all_reduce  # type: ignore[method-assign]

    def all_reduce(self, tensor: Tensor, name: str = "all_reduce") -> Tensor:
        self.calls.append((name, str(tensor.dtype), tensor.nbytes))
        return self._all_reduce(tensor, name)


def measure(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    def one(weights: Weights) -> dict[str, Any]:
        weights.comm.sent.clear()
        listening = Listening(weights.comm)
        scores = outlier_scores(
            weights, find_layers(weights.module, weights.shape), batches(rank, world_size, folder), TAU
        )
        return {"scores": scores, "calls": list(listening.calls), "sent": dict(weights.comm.sent)}

    def zero3(model: nn.Module, dtype: str) -> Zero3:
        return Zero3(model, resolve_config({"zero_optimization": {"stage": 3}}, dtype, 1, 1, world_size), join("cpu"))

    model = load(folder, torch.float32)
    result = {"replicated": one(Replicated(model, join("cpu")))}
    sharded = zero3(model, "float32")
    result["zero3"] = one(sharded)
    prints = {"zero3 float32": fingerprint(sharded)}

    # one entry, the first of the second half, becomes the next number that bfloat16 knows
    parameter = sharded.module.get_parameter(CHANGED)
    start, stop = sharded.interval(parameter)
    middle = parameter.ds_numel // 2
    if start <= middle < stop:
        sharded.local(parameter)[middle - start] *= 1 + 2**-7
    result["changed"] = fingerprint(sharded)

    if world_size < 3:  # each is tried with more than one process, which is enough for the time it takes
        model = load(folder, torch.bfloat16)
        prints["replicated bfloat16"] = fingerprint(Replicated(model, join("cpu")))
        prints["zero3 bfloat16"] = fingerprint(zero3(model, "bfloat16"))
    result["fingerprints"] = prints
    return result


@pytest.fixture(scope="module")
def measured(pools: Pools, smollm2: Path) -> Any:
    """By world size, every rank's measurements; each world runs once."""

    @functools.cache
    def get(world_size: int) -> list[dict[str, Any]]:
        return pools(world_size).run(measure, smollm2, timeout=300)

    return get


@pytest.mark.parametrize("home", ["replicated", "zero3"])
@WORLDS
def test_scores_equal_equation_2(measured: Any, reference: list[float], world_size: int, home: str) -> None:
    for rank in measured(world_size):
        scores = rank[home]["scores"]
        assert scores == measured(world_size)[0][home]["scores"]
        assert scores.layers == pytest.approx(reference, rel=1e-6)
        assert (len(scores.layers), scores.tau, scores.tokens) == (30, TAU, TOKENS)
    assert min(reference) > 0


@pytest.mark.parametrize("home", ["replicated", "zero3"])
@WORLDS
def test_what_a_score_sends(measured: Any, world_size: int, home: str) -> None:
    features = 30 * (6 * 576 + 1536)  # six matrices of a layer read the hidden state, one the inner state
    sizes = {"score": [2 * features * 8, (30 + 1) * 8], "fingerprint": [272 * 8]}
    for rank in measured(world_size):
        assert rank[home]["calls"] == [
            ("score", "torch.float64", sizes["score"][0]),
            ("score", "torch.int64", sizes["score"][1]),
            ("fingerprint", "torch.int64", sizes["fingerprint"][0]),
        ]
        expected = {
            name: sum(2 * -(-n // world_size) * (world_size - 1) for n in all_n) for name, all_n in sizes.items()
        }
        sent = dict(rank[home]["sent"])
        gathered = sent.pop("weights", 0)
        assert sent == (expected if world_size > 1 else {})
        # No weight beyond what the forward passes gather: each once, the tied embedding again for the head, unless
        # DeepSpeed kept it. 1e-4: shards are padded.
        once = 4 * -(-len(BATCHES) // world_size) * (world_size - 1) / world_size if home == "zero3" else 0
        assert once * PARAMETERS <= gathered <= once * (PARAMETERS + EMBEDDING) * (1 + 1e-4)


def test_fingerprint_is_that_of_the_content(measured: Any) -> None:
    ranks = [rank for world_size in (1, 2, 3) for rank in measured(world_size)]
    fingerprints = {value for rank in ranks for value in rank["fingerprints"].values()}
    fingerprints |= {rank[home]["scores"].model for rank in ranks for home in ("replicated", "zero3")}
    assert len(fingerprints) == 1
    changed = {rank["changed"] for rank in ranks}
    assert len(changed) == 1
    assert not changed & fingerprints


def score_without_steps(rank: int, world_size: int, recipe: Recipe) -> int:
    score(recipe, None)
    return Scores.read(Path(recipe.train.output_dir) / "scores.json").tokens


def test_scores_ask_for_no_batch_and_cut_rows(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    """A batch that two ranks cannot share is no mistake where no step is taken. Four rows, five tokens of each."""
    given = {"calibration_length": 5}
    asked = recipe(inputs, tmp_path / "run", given, global_batch_size=3, micro_batch_size=3, sharding="zero3")
    assert pools(2).run(score_without_steps, asked) == [20, 20]
