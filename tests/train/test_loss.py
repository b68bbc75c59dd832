"""loss.py: chunks against whole logits, for heads of every kind; what is alive; models that must not be cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import ows_ds.train.loss
from ows_ds.data.encoded import IGNORE
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated
from ows_ds.optim.hooks import trained
from ows_ds.optim.ows import OWS
from ows_ds.train.loss import token_losses
from tests.support.families import FAMILIES, tiny

VOCABULARY, ROWS, LENGTH = 64, 3, 9
LABELLED = 16  # of the batch, by `batch`
RUNS = [1, 5, 16, 100]  # rows at a time: one, runs that do not divide, all, more than there are
# float64: sums of a few dozen products in another order
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(autouse=True)
def _forget() -> None:
    ows_ds.train.loss._fits.clear()


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Prompts left out, one row padded; what the first token's label says does not matter."""
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, 1:4] = labels[2, 4:] = IGNORE
    mask[2, 4:] = 0
    assert int((labels[:, 1:] != IGNORE).sum()) == LABELLED
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def gradients(model: Any, rows: int | None, given: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """0.3 times the loss and its gradients; rows: at a time, None: whole logits."""
    head = model.get_output_embeddings()
    if rows is None:
        ows_ds.train.loss._fits[head] = False
    leaves = dict(model.named_parameters()) | {
        f"{name}.{index}": leaf
        for name, module in model.named_modules()
        for index, leaf in enumerate(trained(module))
        if not isinstance(leaf, nn.Parameter)
    }
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(0)  # of dropout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ows_ds.train.loss, "CHUNK", ows_ds.train.loss.CHUNK if rows is None else rows * VOCABULARY)
        loss = 0.3 * token_losses(Replicated(model, Communicator()), given or batch())
    loss.backward()
    ows_ds.train.loss._fits[head] = rows is not None and ows_ds.train.loss._fits[head]
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def agree(model: Any, runs: list[int] = RUNS, fits: bool = True) -> dict[str, Tensor]:
    """Loss and all gradients in runs of rows are those of whole logits. Returns the gradients."""
    loss, expected = gradients(model, None)
    for rows in runs:
        ows_ds.train.loss._fits.clear()
        cut, found = gradients(model, rows)
        assert ows_ds.train.loss._fits[model.get_output_embeddings()] is fits
        torch.testing.assert_close(cut, loss, **CLOSE)
        torch.testing.assert_close(found, expected, **CLOSE)
    return expected


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_whole_logits(family: str, tied: bool) -> None:
    """Everything trains, with dropout where the family has it (gpt2)."""
    model = tiny(family, tied, torch.float64).train()
    assert len(agree(model, [5, 100], fits=family != "gemma2")) == len(list(model.parameters()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("always_on", ["full", "low_rank", "none"])
@pytest.mark.parametrize("refresh", [True, False])
def test_heads_of_ows(tied: bool, always_on: str, refresh: bool, checkpointing: bool) -> None:
    """Frozen, at full rank, with coordinates, and in the step that brings its full gradient for a projector."""
    model: Any = tiny("llama", tied, torch.float64)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
        model.train()
    ows = OWS(model, scores=[1.0, 1.0, 1.0], gamma=1, rank=5, scheme="fixed", always_on=always_on, weight_decay=0.1)
    if not refresh:
        ows.train_step([lambda: token_losses(ows.weights, batch(1))])
        for each in (a.coordinates for some in ows.active.hooks.values() for a in some):
            if each is not None:
                each.values.data.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.1)  # one step's are small
                if each.grad is not None:
                    each.values._post_accumulate_grad_hooks.clear()  # which take the gradients away
                each.grad = None  # so that autograd brings the gradient
    head = model.get_output_embeddings()
    kinds = {"full": 1, "low_rank": 1, "none": 0}
    assert len(trained(head)) == kinds[always_on]
    assert isinstance(next(iter(trained(head)), None), nn.Parameter) == (
        always_on == "full" or (always_on == "low_rank" and refresh)
    )
    leaves = [p for p in model.parameters() if p.requires_grad] + [leaf for leaf in trained(head) if not refresh]
    hooks = [leaf._post_accumulate_grad_hooks for leaf in dict.fromkeys(leaves)]
    kept = [dict(hook) for hook in hooks]
    for hook in hooks:  # which take the gradients away
        hook.clear()
    assert len(agree(model)) >= (9 if refresh else 7)
    counts = []
    for hook, old in zip(hooks, kept, strict=True):
        counts.append([0] * len(old))
        for index, key in enumerate(old):
            hook[key] = lambda _, count=counts[-1], i=index: count.__setitem__(i, count[i] + 1)
    gradients(model, 5)
    assert all(count == [1] for count in counts)  # once a backward pass, though the head works in runs


@pytest.mark.parametrize("dora", [False, True])
def test_peft(dora: bool) -> None:
    config = LoraConfig(r=3, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama", False, torch.float64), config).double().train()
    assert all("lora" in name for name in agree(model))


def test_head_alone() -> None:
    """Nothing below the head trains."""
    model = tiny("llama", False, torch.float64).requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)  # type: ignore[operator, union-attr]
    assert list(agree(model)) == ["lm_head.weight"]


def test_without_gradients_and_without_labels() -> None:
    model = tiny("llama", False, torch.float64)
    weights = Replicated(model, Communicator())
    expected, _ = gradients(model, None)
    ows_ds.train.loss._fits.clear()
    with torch.no_grad():
        loss = token_losses(weights, batch())
    assert not loss.requires_grad
    torch.testing.assert_close(0.3 * loss, expected, **CLOSE)
    nothing = batch() | {"labels": torch.full((ROWS, LENGTH), IGNORE)}
    loss, found = gradients(model, 5, nothing)
    assert float(loss) == 0
    assert len(found) == len(list(model.parameters()))  # zeros, so that all ranks' collectives take place
    assert not any(map(torch.count_nonzero, found.values()))


def test_a_second_backward_pass_fails() -> None:
    model = tiny("llama")
    loss = token_losses(Replicated(model, Communicator()), batch())
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError):
        loss.backward()


class Scaled(nn.Module):
    """A model that does something else with its head's output, or does not use it as a module."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = tiny("llama", False, torch.float64), how

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()  # type: ignore[operator]

    def forward(self, **inputs: Any) -> Any:
        if self.how == "function":
            output = self.inner(**inputs, logits_to_keep=1)
            output.logits = self.inner.model(**inputs).last_hidden_state @ self.get_output_embeddings().weight.T
            return output
        output = self.inner(**inputs)
        if self.how == "in place":
            output.logits.mul_(0.5)
        else:
            output.logits = output.logits * 0.5
        return output


@pytest.mark.parametrize("how", ["in place", "new", "function"])
def test_models_that_change_logits(how: str) -> None:
    agree(Scaled(how), [5], fits=False)


def test_trying_costs_no_random_numbers() -> None:
    """A model that is found out in its first pass drops out what it would have dropped."""
    model: Any = tiny("gemma2", False, torch.float64)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append([float(token_losses(Replicated(model, Communicator()), batch())) for _ in range(2)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


@pytest.mark.parametrize("always_on", ["full", "none"])
def test_bfloat16(always_on: str) -> None:
    """Runs add up in float32: as close to float32's gradients as whole logits are."""
    results = {}
    for dtype, rows in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 1)):
        model = tiny("llama", False).to(torch.bfloat16).to(dtype)
        model.requires_grad_(always_on == "full").get_input_embeddings().requires_grad_(True)  # type: ignore[operator]
        ows_ds.train.loss._fits.clear()
        loss, found = gradients(model, rows)
        assert loss.dtype == torch.float32
        results[dtype, rows] = torch.cat([g.float().flatten() for g in found.values()])
    exact = results.pop((torch.float32, None))
    errors = [float((each - exact).norm() / exact.norm()) for each in results.values()]
    assert errors[1] < 1.2 * errors[0] < 0.02


class Logits(TorchDispatchMode):
    """The most entries alive at once in new tensors whose last side is the vocabulary, the head's gradient aside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.most = self.rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(tensor, Tensor) or tensor.shape[-1:] != (VOCABULARY,):
                continue
            if tensor.untyped_storage().data_ptr() not in inputs:
                self.alive[StorageWeakRef(tensor.untyped_storage())] = tensor.numel()
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        self.alive = {storage: size for storage, size in self.alive.items() if not storage.expired()}
        self.most = max(self.most, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_logits_alive(rows: int) -> None:
    """At most twice a run's: the logits, and what becomes of them. Never more than the labelled rows'."""
    model = tiny("llama").requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]
    with Logits() as mode:
        gradients(model, rows)
    assert mode.rows == min(rows, LABELLED)
    assert mode.most <= 2 * mode.rows * VOCABULARY
    ows_ds.train.loss._fits.clear()
    with Logits() as mode:
        gradients(model, None)
    assert mode.most >= 3 * ROWS * (LENGTH - 1) * VOCABULARY
