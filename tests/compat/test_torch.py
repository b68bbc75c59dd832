from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from ows_ds.compat import torch as ours
from tests.compat import unchanged
from tests.support.pool import Pools


def test_foreach() -> None:
    with unchanged("torch", "torch._foreach_copy_, _mul_, _norm or _zero_"):
        one, two = torch.tensor([3.0, 4.0]), torch.zeros(2)
        ours.copy_all([two], [one])
        ours.scale_all([two], torch.tensor(2.0))
        assert two.tolist() == [6, 8]
        assert ours.squared_norms([one, two]) == [25, 100]
        ours.zero_all([two])
        assert two.tolist() == [0, 0]


def test_times_written() -> None:
    with unchanged("torch", "Tensor._version"):
        one = torch.zeros(2)
        before = ours.times_written(one)
        assert ours.times_written(one.view(1, 2)) == before
        one.view(1, 2).add_(1)
        assert ours.times_written(one) > before


def test_a_skipped_step_is_no_missing_step() -> None:
    with unchanged("torch", "Optimizer._opt_called"), warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        ours.mark_stepped(optimizer)
        schedule.step()


def test_a_module_with_another_weight() -> None:
    with unchanged("torch", "Module._parameters"):
        module, weight, inputs = nn.Embedding(3, 2), torch.ones(3, 2), torch.tensor([1, 2])
        own = dict(module.named_parameters())
        assert torch.equal(ours.with_weight(module, weight)(inputs), weight[inputs])
        assert dict(module.named_parameters()) == own


def test_storages_have_addresses() -> None:
    with unchanged("torch", "UntypedStorage._cdata"):
        one, other = torch.zeros(2), torch.zeros(2)
        assert ours.storage_address(one) == ours.storage_address(one[1:]) != ours.storage_address(other)


def met(rank: int, world_size: int) -> str:
    store = ours.default_store().clone()
    store.set(f"compat/{rank}", "here")
    return str(store.get(f"compat/{1 - rank}").decode())


def test_the_store_of_the_default_group(pools: Pools) -> None:
    with unchanged("torch", "distributed_c10d._get_default_store"):
        assert pools(2).run(met) == ["here", "here"]


def test_where_extensions_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with unchanged("torch", "cpp_extension._get_build_directory"):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        assert ours.build_directory("one") == tmp_path / "one"
