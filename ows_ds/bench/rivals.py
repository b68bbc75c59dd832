"""What a user would take instead, each run as its own users run it, and the limit that all are compared with."""

from __future__ import annotations

from typing import Any

import torch

from ows_ds.bench.setting import Setting
from ows_ds.bench.trial import LR, NEVER, Trial, batch_of, build_model, differentiate_input, ours, sampled
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated
from ows_ds.errors import UserError
from ows_ds.model.layers import ModelLayers, find_layers
from ows_ds.train.loss import token_losses


def rival(setting: Setting, name: str, world_size: int) -> Trial:
    """One of `ows_ds.bench.setting.RIVALS` or of its LIMITS. Raises UserError for a package that is missing."""
    if name == "deepspeed":
        return ours(setting, name, world_size)
    model = build_model(setting)
    layers = find_layers(model)
    if name in ("limit", "limit-lean"):
        return _limit(setting, model, min(sampled(setting)) if name == "limit-lean" else 0)
    if name == "peft-lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise _missing("peft") from error
        model = get_peft_model(
            model, LoraConfig(r=setting.lora_rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    elif name == "lmflow-lisa":  # the embedding, the head and what is between them and the layers always train
        chosen = sampled(setting)
        for index, block in enumerate(layers.layers):
            for part in (*(m.name for m in block.matrices), *(v.name for v in block.vectors)):
                model.get_parameter(part).requires_grad_(index in chosen)
    elif name == "galore_torch":
        return _galore(setting, model, layers)
    trained = model.parameters() if name == "lmflow-lisa" else [p for p in model.parameters() if p.requires_grad]
    # what transformers' Trainer takes by default
    return _trial(setting, model, torch.optim.AdamW(trained, lr=LR, fused=True))


def _missing(package: str) -> UserError:
    return UserError(package, "not installed", f"pip install {package}")


def _trial(setting: Setting, model: Any, optimizer: torch.optim.Optimizer) -> Trial:
    """The usual loop: the model's own loss, gradients clipped to norm 1, a step."""
    batch = batch_of(setting)

    def step() -> None:
        with trial.watch():
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    trial = Trial(model, [p.data for p in model.parameters()], step, optimizer)
    return trial


def _galore(setting: Setting, model: Any, layers: ModelLayers) -> Trial:
    """Projectors by exact SVD, found in the first step; embedding, head and vectors at full rank, as in its README."""
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise _missing("galore-torch") from error
    low = [model.get_parameter(matrix.name) for block in layers.layers for matrix in block.matrices]
    chosen = {id(parameter) for parameter in low}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    projected = {"params": low, "rank": setting.rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW([{"params": others}, projected], lr=LR, no_deprecation_warning=True)
    trial = _trial(setting, model, optimizer)
    trial.first_refreshes = True
    return trial


def _limit(setting: Setting, model: Any, lowest: int) -> Trial:
    """A forward pass, and a backward pass through activations alone, down to the input of layer ``lowest``."""
    model.requires_grad_(False)
    weights, batch = Replicated(model, Communicator()), batch_of(setting)
    differentiate_input(model, lowest)

    def step() -> None:
        with trial.watch():
            loss = token_losses(weights, batch) / (setting.tokens - 1)
        loss.backward()

    trial = Trial(model, [p.data for p in model.parameters()], step)
    return trial
