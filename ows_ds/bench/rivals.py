"""What a user would take instead, each run as its own users run it, and the limit that all are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ows_ds.bench.setting import Setting
from ows_ds.bench.trial import LR, NEVER, Trial, batch_of, build_model, differentiate_input, ours, sampled
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated
from ows_ds.errors import UserError
from ows_ds.model.layers import find_layers
from ows_ds.train.loss import token_losses


def rival(setting: Setting, name: str, world_size: int) -> Trial:
    """One of `ows_ds.bench.setting.RIVALS` or of its LIMITS. Raises UserError for a package that is missing."""
    if name == "deepspeed":
        return ours(setting, name, world_size)
    model = build_model(setting)
    layers, batch = find_layers(model), batch_of(setting)
    if name in ("limit", "limit-lean"):  # a backward pass through activations alone
        model.requires_grad_(False)
        weights = Replicated(model, Communicator())
        differentiate_input(model, min(sampled(setting)) if name == "limit-lean" else 0)
        return _trial(model, lambda: token_losses(weights, batch) / (setting.tokens - 1))
    optimizer: torch.optim.Optimizer | None = None
    try:
        if name == "peft-lora":
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=setting.lora_rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, lora)
        elif name == "galore_torch":  # exact SVD; embedding, head and vectors at full rank, as in its README
            from galore_torch import GaLoreAdamW

            low = {"rank": setting.rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
            names = {matrix.name for block in layers.layers for matrix in block.matrices}
            groups = [
                {"params": [p for name, p in model.named_parameters() if name not in names]},
                {"params": [p for name, p in model.named_parameters() if name in names], **low},
            ]
            optimizer = GaLoreAdamW(groups, lr=LR, no_deprecation_warning=True)
    except ImportError as error:
        package = {"peft-lora": "peft", "galore_torch": "galore-torch"}[name]
        raise UserError(package, "not installed", f"pip install {package}") from error
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "lmflow-lisa":  # the embedding, the head and what is between them and the layers always train
        for index, block in enumerate(layers.layers):
            for part in (*(m.name for m in block.matrices), *(v.name for v in block.vectors)):
                model.get_parameter(part).requires_grad_(index in sampled(setting))
    # by default as transformers' Trainer takes it
    trial = _trial(model, lambda: model(**batch).loss, optimizer or torch.optim.AdamW(trained, lr=LR, fused=True))
    trial.first_refreshes = name == "galore_torch"
    return trial


def _trial(model: Any, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None = None) -> Trial:
    """The usual loop: a loss, gradients clipped to norm 1, a step."""

    def step() -> None:
        with trial.watch():
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    trial = Trial(model, [p.data for p in model.parameters()], step, optimizer)
    return trial
