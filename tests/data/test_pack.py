"""Packing: which rows share a sequence, and that sharing one changes nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils

import ows_ds.train.loss
from ows_ds.data import attention
from ows_ds.data.batches import collate
from ows_ds.data.encoded import Builder, Encoded
from ows_ds.data.pack import Sequences, pack
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated
from ows_ds.train.loss import token_losses
from tests.data.test_data import lists, row_of
from tests.optim.test_period import Waits
from tests.support.families import FAMILIES, tiny

# sums of a few dozen float64 products in another order; transformers' eager attention and Gemma's norms are float32
CLOSE, ROUGH = {"rtol": 1e-10, "atol": 1e-12}, {"rtol": 1e-5, "atol": 1e-6}
LENGTHS = [5, 9, 3, 12, 2, 4]
PACKS = [[0, 1, 4], [2], [3, 5]]  # in 16 tokens


def test_packs_by_hand() -> None:
    # 9 and 8 begin sequences; 4 does not fit with 9, 2 leaves less room there than beside 8 would
    assert pack([4, 9, 2, 8, 1], 12) == [[0, 3], [1, 2, 4]]
    assert pack([5, 5, 5], 5) == [[0], [1], [2]]
    assert pack(LENGTHS, 16) == PACKS
    assert pack([], 5) == []


@given(lengths=st.lists(st.integers(1, 20), max_size=80))
@settings(max_examples=80, deadline=None)
def test_every_row_is_packed_once_and_little_room_is_left(lengths: list[int]) -> None:
    packs = pack(lengths, 20)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    fill = [sum(lengths[row] for row in rows) for rows in packs]
    assert max(fill, default=0) <= 20
    assert sum(2 * tokens <= 20 for tokens in fill) <= 1  # two half empty ones would have been one


def rows_of(lengths: list[int], seed: int = 0) -> list[Encoded]:
    random = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(3, 64, (length,), generator=random)
        trained = torch.rand(length, generator=random) < 0.7
        trained[-1] = True
        found.append(row_of(ids.tolist(), torch.where(trained, ids, -100).tolist()))
    return found


def test_sequences_of_parts() -> None:
    """Rows of different parts do not meet."""
    rows = [rows_of([3, 2]), rows_of([4, 1])]
    parts = []
    for some in rows:
        builder = Builder()
        for row in some:
            builder.add(row.input_ids.tolist(), row.trained.tolist())
        parts.append(builder.build())
    packed, plain = Sequences(parts, 8), Sequences(parts)
    assert (len(plain), plain.sizes, plain.lengths.tolist(), plain.packed) == (4, [2, 2], [3, 2, 4, 1], False)
    assert (len(packed), packed.sizes, packed.lengths.tolist()) == (2, [1, 1], [5, 5])
    assert plain.targets.tolist() == [row.targets for some in rows for row in some]
    assert packed.targets.tolist() == [sum(row.targets for row in some) for some in rows]
    for found in (plain[2], plain[-2]):
        assert list(map(lists, found)) == [lists(rows[1][0])]
    assert [list(map(lists, found)) for found in packed] == [list(map(lists, some)) for some in rows]
    assert len(Sequences([])) == len(Sequences([]).lengths) == 0
    with pytest.raises(IndexError):
        packed[2]


def gradients(model: nn.Module, sequences: list[list[Encoded]], packed: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the losses of batches of two sequences, and its gradients."""
    model.zero_grad()
    weights, total = Replicated(model, Communicator()), torch.zeros((), dtype=torch.float64)
    for i in range(0, len(sequences), 2):
        loss = token_losses(weights, collate(sequences[i : i + 2], 0, packed))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_losses_and_gradients_of_rows_alone(family: str, kernel: str) -> None:
    """In sequences of several rows, two a batch, one with more padding; for learned positions, rotary ones, sliding
    windows and soft-capped heads."""
    if family == "gemma2" and kernel == "sdpa":
        kernel = "eager"  # sdpa has no soft caps
    model: Any = tiny(family, dtype=torch.float64)
    model.set_attn_implementation(kernel)
    close = CLOSE if kernel == "sdpa" and "gemma" not in family else ROUGH
    rows = rows_of(LENGTHS)
    expected, plain = gradients(model, [[row] for row in rows], False)
    loss, found = gradients(model, [[rows[i] for i in some] for some in PACKS], True)
    torch.testing.assert_close(loss, expected, **close)
    torch.testing.assert_close(found, plain, **close)
    assert attention.keeps_apart(Replicated(model, Communicator()), 64)


def test_windows_are_within_a_row() -> None:
    """A sliding window shorter than a sequence, and than a row."""
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    rows = rows_of([9, 7])
    expected, plain = gradients(model, [[row] for row in rows], False)
    loss, found = gradients(model, [rows], True)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(found, plain, **CLOSE)


def test_models_that_see_a_neighbour_are_detected() -> None:
    """Alibi gives transformers no positions to tell rows by; a recurrence runs through all of them."""
    common = {"vocab_size": 64, "hidden_size": 32}
    bloom = transformers.BloomConfig(**common, n_layer=2, n_head=4)
    mamba = transformers.MambaConfig(**common, num_hidden_layers=2, state_size=4)
    for config in (bloom, mamba):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        assert not attention.keeps_apart(Replicated(model, Communicator()), 64)
    honest: Any = tiny("llama")
    assert attention.keeps_apart(Replicated(honest, Communicator()), 64)
    assert not honest.training
    # one that ignores its arguments
    forward = honest.model.forward
    honest.model.forward = lambda *args, position_ids, **more: forward(*args, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "known_rows", lambda rows: nullcontext())
        assert not attention.keeps_apart(Replicated(honest, Communicator()), 64)


def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **more: Any) -> Tensor:
    """What flash_attn_varlen_func computes: q (tokens, heads, size), rows of tokens that do not see each other."""
    assert more["causal"]
    assert int(more["max_seqlen_q"]) == int(cu_seqlens_q.diff().max())
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    groups = q.shape[1] // k.shape[1]
    parts = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        whole = (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
        one = [t[start:end].transpose(0, 1) for t in whole]
        parts.append(scaled_dot_product_attention(*one, is_causal=True).transpose(0, 1))
    return torch.cat(parts)


def test_flash_attention_gets_the_ends_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its kernel, which needs a GPU."""
    model: Any = tiny("llama", dtype=torch.float64)
    model.set_attn_implementation("sdpa")
    rows = rows_of(LENGTHS)
    expected, plain = gradients(model, [[row] for row in rows], False)
    calls = []

    def kernel(*args: Any, **more: Any) -> Tensor:
        calls.append(1)
        return varlen(*args, **more)

    def functions(*_: Any, **__: Any) -> Any:
        def options(**more: Any) -> dict[str, Any]:
            return {name: more[name] for name in ("max_seqlen_q", "max_seqlen_k") if name in more} | {"causal": True}

        return (None, kernel, None, None, None), (options, options)

    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", functions)
    model.config._attn_implementation = "flash_attention_2"
    loss, found = gradients(model, [[rows[i] for i in some] for some in PACKS], True)
    assert calls
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(found, plain, **CLOSE)


@pytest.mark.parametrize("packed", [False, True])
def test_nobody_looks_whether_rows_are_packed(packed: bool) -> None:
    """Of a batch's numbers, only labels on the CPU are looked at."""
    model: Any = tiny("llama")
    model.set_attn_implementation("sdpa")
    rows = rows_of([5, 6])
    weights = Replicated(model, Communicator())
    batch = collate([rows] if packed else [[row] for row in rows], 0, packed)
    ows_ds.train.loss._fits.clear()
    token_losses(weights, batch)  # once to learn the head
    with Waits(set()) as mode:
        token_losses(weights, batch)
    assert [one for one in mode.found if one[0] != "nonzero" or one[2] != torch.bool] == []
