"""LoRA and DoRA: adapters beside all linear layers of a frozen model (Hu et al. 2021; Liu et al. 2024), by peft; LoRA's
also beside stacks of experts.

Under ZeRO-3 with DeepSpeed's own optimizer. The adapters are merged into the weights at the end, so that the model that
is saved is a plain one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ows_ds.compat.deepspeed import full_shape
from ows_ds.config import Recipe
from ows_ds.distributed.frozen import named_weights
from ows_ds.distributed.weights import Weights
from ows_ds.errors import UserError
from ows_ds.model.layers import find_layers


def adapt(recipe: Recipe, model: Any) -> Any:
    """``model`` inside a peft model with new adapters, the same on every rank and the only weights that train.

    Raises UserError (``method.name``, ``model.frozen``) for what peft does not have, or where it is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("method.name", recipe.method.name, f"install ows_ds[peft] ({error})") from error
    method = recipe.method
    found = find_layers(model, full_shape)
    stacks = {m.name.removeprefix(f"{b.name}.") for b in found.layers for m in b.matrices if m.experts}
    # in some models of experts peft takes routers for linear layers, too
    frozen = found.router_names and recipe.optim.router == "freeze"
    linear = {m.modules[0].removeprefix(f"{b.name}.") for b in found.layers for m in b.matrices if not m.experts}
    if stacks and recipe.model.frozen != "same":
        right = "expected same: peft's adapters of experts in stacks need their real weights, and this model has them"
        raise UserError("model.frozen", recipe.model.frozen, right)
    if stacks and method.name == "dora":
        right = "expected lora: peft has no DoRA of experts in stacks, and this model has them"
        raise UserError("method.name", method.name, right)
    config = LoraConfig(
        r=method.lora_rank,
        lora_alpha=method.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=method.lora_dropout,
        target_modules=sorted(linear) if frozen else "all-linear",
        target_parameters=sorted(stacks) or None,
        use_dora=method.name == "dora",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(recipe.train.seed)
    return get_peft_model(model, config)


def base(weights: Weights) -> dict[str, nn.Parameter]:
    """The parameters that the model had before `adapt`, by their names there."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
        for name, parameter in weights.parameters().items()
        if "lora_" not in name
    }


def merge(weights: Weights) -> None:
    """Add the adapters to the weights; ``weights.module`` is the plain model again. Collective."""
    adapted: Any = weights.module
    for module in adapted.modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            own = [parameter for _, parameter in named_weights(module)]
            weights.thaw(own)
            with weights.gathered(own):
                module.merge()
            weights.freeze(own)
    weights.module = adapted.unload()
