"""Training over frozen weights in 8 and 4 bits: real weights are never rounded to them."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ows_ds.compat.deepspeed import shard
from ows_ds.distributed.communicator import Communicator, join
from ows_ds.distributed.formats import NAMES, Format
from ows_ds.distributed.frozen import frozen_of, resting
from ows_ds.distributed.weights import Replicated, Weights
from ows_ds.model.layers import find_layers
from ows_ds.model.pretrained import formats
from ows_ds.optim.ows import OWS
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.training import RATIOS, home, mean_loss, one_step, run_ows, whole_weights

SETTINGS: dict[str, Any] = {
    "scheme": "fixed", "gamma": 1, "period": 2, "rank": 4, "update_proj_gap": 3, "lr": 1e-2, "weight_decay": 0.1,
}  # fmt: skip
STEPS = 7


class Rounded(Replicated):
    """Another implementation: frozen matrices are plain weights that hold what the codes stand for."""

    def __init__(self, module: nn.Module, comm: Communicator, formats: Mapping[str, Format]) -> None:
        super().__init__(module, comm)
        self.formats = {module.get_parameter(name): format for name, format in formats.items()}
        self.real: dict[nn.Parameter, Tensor] = {}
        self.freeze(self.formats)

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            if p in self.formats and p not in self.real:
                self.real[p] = p.data.clone()
                p.data.copy_(self.formats[p].dense(*self.formats[p].quantise(p.data)))

    def thaw(self, parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            if p in self.real:
                p.data.copy_(self.real.pop(p))


def rounded(rank: int, world_size: int, family: str, name: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    model = tiny(family, dtype=torch.float64)
    weights = Rounded(model, join("cpu"), formats(find_layers(model), name, torch.float64))
    ows = OWS(weights, RATIOS, **settings)
    for _ in range(STEPS):
        one_step(ows, rank, world_size)
    ows.merge()
    ows.close()
    weights.thaw(list(weights.real))
    return whole_weights(weights)


def in_few_bits(
    rank: int, world_size: int, sharding: str, family: str, name: str, settings: dict[str, Any]
) -> tuple[dict[str, Tensor], list[tuple[int, ...]]]:
    done = run_ows(rank, world_size, sharding, family, False, torch.float64, STEPS, settings, frozen=name)
    return done["weights"], done["sets"]


CASES = [(1, "replicated"), (2, "replicated"), (2, "zero3"), (3, "zero3")]
FAST = [(2, "zero3", "llama", "int8"), (2, "replicated", "llama", "nf4"), (2, "zero3", "gpt_oss", "nf4")]
FAST += [(1, "replicated", "gpt2", "fp8")]


@pytest.mark.parametrize(
    ("world_size", "sharding", "family", "name"),
    [
        pytest.param(*case, family, name, marks=() if (*case, family, name) in FAST else pytest.mark.slow)
        for case in CASES
        for family in ("llama", "gpt2", "mixtral", "gpt_oss")
        for name in NAMES
    ],
)
def test_equals_plain_weights_of_the_same_values(
    pools: Pools, world_size: int, sharding: str, family: str, name: str
) -> None:
    """To the bit; and what never trained is the base model's, to the bit."""
    base = {key: p.detach().clone() for key, p in tiny(family, dtype=torch.float64).named_parameters()}
    expected = pools(world_size).run(rounded, family, name, SETTINGS)
    found = pools(world_size).run(in_few_bits, sharding, family, name, SETTINGS)
    for plain, (weights, sets) in zip(expected, found, strict=True):
        assert weights.keys() == plain.keys()
        assert all(torch.equal(value, plain[key]) for key, value in weights.items())
        frozen = set(range(len(RATIOS))) - {layer for some in sets for layer in some}
        assert frozen
        for layer in frozen:
            own = [key for key in base if f".{layer}." in key]
            assert own
            assert all(torch.equal(weights[key], base[key]) for key in own)


@pytest.mark.parametrize("more", [{"rank": None}, {"refresh": "sketch"}, {"always_on": "none", "period": 1}])
def test_other_ways_to_train(pools: Pools, more: dict[str, Any]) -> None:
    settings = {**SETTINGS, **more}
    [plain] = pools(1).run(rounded, "llama", "int8", settings)
    [(weights, _)] = pools(1).run(in_few_bits, "replicated", "llama", "int8", settings)
    assert all(torch.equal(value, plain[key]) for key, value in weights.items())


def frozen_bytes(weights: Weights) -> tuple[int, int]:
    """Of this rank, of matrices of layers: live now, and what they would take in the weights' own format."""
    live = real = 0
    for parameter in filter(frozen_of, weights.parameters().values()):
        frozen = frozen_of(parameter)
        assert frozen is not None
        parts = (frozen.real, frozen.codes, frozen.scales)
        tensors = [p.ds_tensor.data if weights.sharded else p.data for p in parts]  # type: ignore[attr-defined]
        live += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        first, last = weights.interval(parameter)
        real += (last - first if weights.sharded else parameter.numel()) * parameter.element_size()
    return live, real


def memory(rank: int, world_size: int, sharding: str, name: str) -> tuple[float, float, int]:
    """Shares of bfloat16's bytes: live, and gathered in a forward pass; and matrices of full precision at once."""
    sent = {}
    for one in ("same", name):
        model = tiny("llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512, head_dim=64)
        weights = home(model, sharding, world_size, one)
        with torch.no_grad():
            mean_loss(weights, torch.ones(1, 8, dtype=torch.long))
        weights.after_step()
        sent[one] = weights.comm.sent["weights"]
    live, real = frozen_bytes(weights)
    others = [p for p in weights.parameters().values() if not frozen_of(p)]
    sizes = [weights.interval(p)[1] - weights.interval(p)[0] for p in others]
    apart = sum(sizes) * 2 * (world_size - 1)
    gathered = (sent[name] - apart) / max(1, sent["same"] - apart)

    alive: list[weakref.ref[Tensor]] = []
    most = 0
    dense = Format.dense

    def counted(self: Format, codes: Tensor, scales: Tensor, expert: int | None = None) -> Tensor:
        nonlocal most
        found = dense(self, codes, scales, expert)
        alive.append(weakref.ref(found))
        most = max(most, sum(one() is not None for one in alive))
        return found

    Format.dense = counted  # type: ignore[method-assign]
    try:
        ows = OWS(weights, RATIOS, **SETTINGS)
        for _ in range(3):
            one_step(ows, rank, world_size)
        ows.close()
    finally:
        Format.dense = dense  # type: ignore[method-assign]
    assert alive
    return live / real, gathered, most


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
@pytest.mark.parametrize(("name", "share"), [("int8", 0.53), ("fp8", 0.53), ("nf4", 0.30)])
def test_bytes(pools: Pools, sharding: str, name: str, share: float) -> None:
    for live, gathered, most in pools(2).run(memory, sharding, name):
        assert live <= share
        if sharding == "zero3":
            assert gathered <= share
        assert most == 1


def moved(rank: int, world_size: int, sharding: str) -> None:
    """At a change of the set, this rank's part of what enters and of what leaves, and nothing between."""
    weights = home(tiny("llama", dtype=torch.float64), sharding, world_size, "int8")
    ows = OWS(weights, RATIOS, **SETTINGS)

    def own(layer: int) -> int:
        matrices = [ows.active.parameters[matrix.name] for matrix in find_layers_of(ows, layer)]
        return sum(weights.interval(p)[1] - weights.interval(p)[0] for p in matrices) * 8

    for _ in range(6):
        before, old = weights.moved.copy(), ows.layer_set
        one_step(ows, rank, world_size)
        left, entered = set(old) - set(ows.layer_set), set(ows.layer_set) - set(old)
        found = weights.moved - before
        assert found == Counter({"to_host": sum(map(own, left)), "to_device": sum(map(own, entered))}) - Counter()
    assert weights.moved["to_host"]
    ows.close()


def find_layers_of(ows: OWS, layer: int) -> Any:
    return [m for m in find_layers(ows.module, ows.weights.shape).layers[layer].matrices]


@pytest.mark.parametrize(("world_size", "sharding"), [(1, "replicated"), (2, "replicated"), (2, "zero3")])
def test_bytes_between_host_and_device(pools: Pools, world_size: int, sharding: str) -> None:
    pools(world_size).run(moved, sharding)


def kept(rank: int, world_size: int, sharding: str) -> None:
    """State dicts are of real weights, for any format."""
    states = {}
    for name in ("int8", "nf4"):
        weights = home(tiny("llama", dtype=torch.float64), sharding, world_size, name)
        ows = OWS(weights, RATIOS, **SETTINGS)
        for _ in range(3):
            one_step(ows, rank, world_size)
        states[name] = ows.state_dict()
        ows.merge()
        states[name, "weights"] = whole_weights(weights)
        ows.close()
    for other in ("same", "int8"):
        weights = home(tiny("llama", dtype=torch.float64), sharding, world_size, other)
        ows = OWS(weights, RATIOS, **SETTINGS)
        ows.load_state_dict(states["nf4"])
        assert ows.next_set is not None
        ows.merge()
        expected = states["nf4", "weights"]
        assert all(torch.equal(value, expected[key]) for key, value in whole_weights(weights).items())
        for parameter in weights.parameters().values():
            frozen = resting(parameter)
            if frozen is not None and frozen.host is not None:  # trained before: codes of what was loaded
                full = frozen.format.quantise(weights.full_tensor(parameter))[0].flatten()
                start, stop = weights.interval(frozen.codes)
                own = shard(frozen.codes)[: stop - start] if weights.sharded else frozen.codes.flatten()[start:stop]
                assert torch.equal(own, full[start:stop])
        ows.close()


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
def test_states_of_another_format(pools: Pools, sharding: str) -> None:
    pools(2).run(kept, sharding)


@pytest.mark.parametrize("family", ["llama", "llama with biases", "gpt_oss"])
def test_training_with_products_in_fp8(family: str) -> None:
    """Activations are rounded, too: losses are near to those of the same weights multiplied as they are."""
    losses = []
    for products in (False, True):
        more = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16} if family == "llama" else {}
        weights = home(tiny(family, dtype=torch.float32, **more), "replicated", 1, "fp8", products)
        ows = OWS(weights, RATIOS, **SETTINGS)
        for _ in range(4):
            one_step(ows, 0, 1)
        with torch.no_grad():
            losses.append(float(mean_loss(weights, torch.arange(3, 60)[None])))
        ows.close()
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
