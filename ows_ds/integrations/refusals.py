"""What in a Trainer does not go with OWS."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, Trainer

from ows_ds.distributed.communicator import join
from ows_ds.errors import UserError
from ows_ds.model.pretrained import DTYPES


def check(trainer: Trainer, always_on: str) -> None:
    """Refuse (UserError) what would go wrong or be without effect."""
    args, accelerator = trainer.args, trainer.accelerator
    sharded = getattr(accelerator.state, "deepspeed_plugin", None) is not None
    world_size, dtype = join(args.device).world_size, next(trainer.model.parameters()).dtype
    checkpointing = args.gradient_checkpointing_kwargs or {}
    # TRL replaces the model's forward pass, and Liger does so in `train`: the loss takes the head's weight itself
    past_head = args.use_liger_kernel or "forward" in vars(trainer.model)
    whose = "use_liger_kernel" if args.use_liger_kernel else type(trainer).__name__
    precision, one_each = accelerator.mixed_precision, "start one process for each GPU, as torchrun does"
    own = "leave it out: OWS is the optimizer, and TrainingArguments has its learning rate and schedule"
    as_loaded = "expected no, or bf16 with a model that was loaded in bfloat16: it runs in the format of its weights"
    folder = "expected False: a checkpoint is one folder that all ranks write to"
    for wrong, key, value, right in (
        (not isinstance(trainer.model, PreTrainedModel), "model", type(trainer.model).__name__,
         "expected a model of transformers, without adapters"),
        (trainer.optimizer is not None or trainer.lr_scheduler is not None, "optimizers", trainer.optimizer, own),
        (trainer.optimizer_cls_and_kwargs, "optimizer_cls_and_kwargs", trainer.optimizer_cls_and_kwargs, own),
        (not str(getattr(args.optim, "value", args.optim)).startswith("adamw_torch"), "optim", str(args.optim), own),
        (trainer.model_init is not None, "model_init", trainer.model_init, "expected the model itself"),
        (args.n_gpu > 1, "GPUs of this process", args.n_gpu, one_each),
        (accelerator.num_processes != world_size, "processes of Accelerate", accelerator.num_processes,
         f"expected {world_size}: with DeepSpeed on CPUs, make accelerate.PartialState(backend='gloo') first, and "
         "give accelerator_config={'use_configured_state': True}"),
        (trainer.is_fsdp_enabled, "fsdp", args.fsdp, "leave it out: weights are replicated or in ZeRO-3 shards"),
        (getattr(accelerator, "parallelism_config", None) is not None, "parallelism_config", args.parallelism_config,
         "leave it out: OWS has data parallelism only"),
        (dtype not in DTYPES.values(), "model", dtype, f"load it in one of {', '.join(DTYPES)}"),
        (precision not in ("no", "bf16") or (precision == "bf16" and dtype != torch.bfloat16),
         "mixed precision", precision, as_loaded),
        (args.torch_compile, "torch_compile", True, "expected False"),
        (args.auto_find_batch_size, "auto_find_batch_size", True, "expected False, and a batch size"),
        (args.save_on_each_node, "save_on_each_node", True, folder),
        (args.load_best_model_at_end and args.save_only_model, "save_only_model", True,
         "expected False: the best model is taken from a complete checkpoint"),
        (checkpointing.get("use_reentrant"), "gradient_checkpointing_kwargs: use_reentrant", True,
         "expected False: with frozen weights, reentrant checkpointing loses gradients"),
        (past_head and always_on == "low_rank", "optim.always_on", always_on,
         f"expected full or none: the loss of {whose} takes the head's weight, without the head's coordinates"),
        (past_head and sharded, "deepspeed", "ZeRO-3",
         f"leave it out: the loss of {whose} takes the head's weight, which would lie in shards"),
    ):  # fmt: skip
        if wrong:
            raise UserError(key, value, right)
