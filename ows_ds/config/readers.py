"""What becomes of the keys of LLaMA-Factory, axolotl, TRL and LMFlow: a function a key.

A reader is given the value and the whole file, and returns keys of the recipe by their full names, None for a value
without a counterpart; what stands under a question mark is a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from ows_ds.config.loss import ROWS
from ows_ds.config.recipe import Log
from ows_ds.config.settings import as_number

Keys = dict[str, Any]
Reader = Callable[[Any, Mapping[str, Any]], Keys | None]
NOTE = "?"


def to(key: str, *choices: Any) -> Reader:
    """The same value under another name; choices: the only ones that are known here."""
    return lambda value, tree: {key: value} if not choices or value in choices else None


def fixed(**when: Keys) -> Reader:
    """Words, in lower case, to keys; ``true`` and ``false`` for switches."""
    return lambda value, tree: when.get(str(value).lower())


def number(key: str, least: float = 0) -> Reader:
    """A number; one below ``least``, such as -1, is none."""

    def read(value: Any, tree: Mapping[str, Any]) -> Keys | None:
        given: Any = as_number(value)
        if not isinstance(given, int | float):
            return None
        return {} if given < least else {key: given}

    return read


def _steps(key: str) -> Reader:
    def read(value: Any, tree: Mapping[str, Any]) -> Keys | None:
        if isinstance(value, int) and value >= 1:
            return {key: value}
        return {NOTE: f"a share of the run; give {key} in steps"} if isinstance(value, float) else None

    return read


def _warmup(value: Any, tree: Mapping[str, Any]) -> Keys | None:
    steps = tree.get("max_steps")
    if isinstance(value, int | float) and isinstance(steps, int) and steps > 0:
        return {"optim.warmup_steps": math.ceil(value * steps)}
    return {} if not value else {NOTE: "a share of the run; give optim.warmup_steps in steps"}


def _optimizer(value: Any, tree: Mapping[str, Any]) -> Keys | None:
    name = str(value).lower()
    if "8bit" in name or "bnb" in name:
        return {"optim.moments": "int8"}
    if "adamw" in name:
        return {}
    return {"method.name": "galore"} if "galore" in name else None


def _source(value: Any, tree: Mapping[str, Any]) -> Keys | None:
    """A name, several with commas (LLaMA-Factory), or a list of mappings (axolotl)."""
    if isinstance(value, str):
        names = [name.strip() for name in value.split(",") if name.strip()]
        keys: Keys = {"data.train": names[0] if len(names) == 1 else [{"path": name} for name in names]}
        if any(not Path(name).suffix and "/" not in name for name in names):
            keys[NOTE] = "a name of dataset_info.json: give the file, or the data set's name on the hub"
        return keys
    return _list(value, "data.train")


def _held_out(value: Any, tree: Mapping[str, Any]) -> Keys | None:
    return {"data.eval": value} if isinstance(value, str) else _list(value, "data.eval")


def _list(value: Any, key: str) -> Keys | None:
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) and "path" in one for one in value):
        return None
    formats = {FORMATS[word] for one in value if (word := str(one.get("type", "")).partition(".")[0]) in FORMATS}
    found = []
    for one in value:
        files = one.get("data_files")
        path = files[0] if isinstance(files, list) and files else files if isinstance(files, str) else one["path"]
        given = {"path": path, "subset": one.get("name"), "split": one.get("split")}
        found.append({name: word for name, word in given.items() if word})
    if len(found) == 1:
        given, names = found[0], key.partition(".")[2]
        keys: Keys = {key: given["path"]}
        keys |= {f"data.{names}_{more}": given[more] for more in ("subset", "split") if more in given}
    else:
        keys = {key: found}
    return keys | ({"data.format": formats.pop()} if len(formats) == 1 else {})


def _held_out_share(value: Any, tree: Mapping[str, Any]) -> Keys | None:
    """A part of the training rows: the first ones."""
    source = next((tree[key] for key in ("dataset", "dataset_name", "dataset_path", "datasets") if tree.get(key)), None)
    made = None if source is None else _source(source, tree)
    if not value:
        return {}
    if made is None or not isinstance(made.get("data.train"), str) or not isinstance(value, int | float):
        return {NOTE: "a part of several sources; give data.eval"}
    split = str(made.get("data.train_split", "train"))
    part = f"{value:g}" if value >= 1 else f"{value * 100:.0f}%"
    keys = {"data.eval": made["data.train"], "data.eval_split": f"{split}[:{part}]"}
    subset = {"data.eval_subset": made["data.train_subset"]} if "data.train_subset" in made else {}
    return {**keys, **subset, "data.train_split": f"{split}[{part}:]"}


def _rows(value: Any, tree: Mapping[str, Any]) -> Keys | None:
    return {"data.train_split": f"train[:{value}]"} if isinstance(value, int) and value > 0 else {}


def _template(value: Any, tree: Mapping[str, Any]) -> Keys:
    name = str(value)
    if name in ("alpaca", "empty", "none", "default"):
        return {"data.template": "alpaca" if name == "alpaca" else "plain"}
    return {"data.template": "chat", NOTE: f"the tokenizer's own chat template is used for {name}"}


def _chat_template(value: Any, tree: Mapping[str, Any]) -> Keys:
    if str(value).endswith((".jinja", ".j2", ".txt")):
        return {"data.chat_template": value}
    return {"data.template": "chat"} if str(value) == "tokenizer_default" else _template(value, tree)


def _adapter(value: Any, tree: Mapping[str, Any]) -> Keys | None:
    name = str(value).lower()
    dora = tree.get("use_dora") or tree.get("peft_use_dora")
    if name == "qlora":
        return {"method.name": "lora", "model.frozen": "nf4"}
    return {"method.name": "dora" if dora else "lora"} if name == "lora" else None


def _finetuning(value: Any, tree: Mapping[str, Any]) -> Keys | None:
    special = next((name for name in ("galore", "badam") if tree.get(f"use_{name}")), None)
    if value == "full":
        return {"method.name": special or "full"}
    return _adapter(value, tree)


def _deepspeed(value: Any, tree: Mapping[str, Any]) -> Keys:
    name = str(value.get("zero_optimization", {}).get("stage", "")) if isinstance(value, Mapping) else str(value)
    if "3" not in name:
        return {
            NOTE: f"{name}: weights stay on every rank (train.sharding replicated); ZeRO-3 alone is taken from files"
        }
    keys = {"train.sharding": "zero3", NOTE: "train.ds_config takes a DeepSpeed file; without one ours is used"}
    return keys if isinstance(value, Mapping) else {**keys, "train.ds_config": value}


def _trackers(value: Any, tree: Mapping[str, Any]) -> Keys | None:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list):
        return None
    known = get_args(get_args(Log.model_fields["trackers"].annotation)[0])
    return {"log.trackers": [name for name in names if name in known]}


def _resume(value: Any, tree: Mapping[str, Any]) -> Keys:
    return {"train.resume": value if isinstance(value, str) else "auto"} if value else {}


def _loss(value: Any, tree: Mapping[str, Any]) -> Keys | None:
    name = {"sigmoid": "dpo", "rm": "reward", "pt": "sft"}.get(str(value), str(value))
    if name == "dpo" and tree.get("pref_loss") in ("orpo", "simpo"):
        name = str(tree["pref_loss"])
    if name not in ("sft", *ROWS):
        return None
    return {"loss.name": name, **({"data.loss_on": "all"} if value == "pt" else {})}


def _targets(value: Any, tree: Mapping[str, Any]) -> Keys:
    return {} if value in ("all", True, "all-linear") else {NOTE: "adapters are of all linear layers"}


def _lisa(value: Any, tree: Mapping[str, Any]) -> Keys:
    return {"method.name": "lisa", "sampling.gamma": float(value), "sampling.scheme": "fixed"}


def _schedule(value: Any, tree: Mapping[str, Any]) -> Keys | None:
    name = str(value).removesuffix("_with_warmup")
    return {"optim.schedule": name} if name in ("linear", "cosine", "constant") else None


def _warmup_steps(value: Any, tree: Mapping[str, Any]) -> Keys | None:
    return {"optim.warmup_steps": value} if isinstance(value, int) else _warmup(value, tree)


def _betas(value: Any, tree: Mapping[str, Any]) -> Keys:
    return {"optim.betas": [float(tree.get("adam_beta1") or 0.9), float(tree.get("adam_beta2") or 0.999)]}


def _per_epoch(value: Any, tree: Mapping[str, Any]) -> Keys:
    return {NOTE: "give train.eval_steps or train.save_steps in steps"}


def _strategy(value: Any, tree: Mapping[str, Any]) -> Keys:
    return {} if value in ("steps", "no") else {NOTE: f"{value}: evaluations and checkpoints count steps here"}


FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "chat_template": "messages", "completion": "text"}
MICRO = ("per_device_train_batch_size", "micro_batch_size")
FA2 = {"model.attn_implementation": "flash_attention_2"}


def switch(**keys: Any) -> Reader:
    """Keys (with two underscores for the point) where a switch is on."""
    return fixed(true={name.replace("__", "."): value for name, value in keys.items()}, false={})


TABLE: tuple[tuple[str, str, Reader], ...] = (  # their names; ours, for people; what reads them
    ("model_name_or_path base_model model_name", "model.path", to("model.path")),
    ("model_revision revision_of_model", "model.revision", to("model.revision")),
    (
        "bf16 pure_bf16",
        "model.dtype",
        fixed(true={"model.dtype": "bfloat16"}, auto={"model.dtype": "bfloat16"}, false={}),
    ),
    ("torch_dtype dtype", "model.dtype", to("model.dtype", "bfloat16", "float32", "float64")),
    ("load_in_8bit", "model.frozen: int8", switch(model__frozen="int8")),
    ("load_in_4bit", "model.frozen: nf4", switch(model__frozen="nf4")),
    ("use_qlora", "method.name: lora over model.frozen: nf4", switch(model__frozen="nf4", method__name="lora")),
    (
        "quantization_bit",
        "model.frozen: int8 or nf4",
        fixed(**{"8": {"model.frozen": "int8"}, "4": {"model.frozen": "nf4"}}),
    ),
    (
        "flash_attn",
        "model.attn_implementation",
        fixed(fa2=FA2, sdpa={"model.attn_implementation": "sdpa"}, auto={}, disabled={}),
    ),
    (
        "flash_attention use_flash_attention use_flash_attention_2",
        "model.attn_implementation: flash_attention_2",
        fixed(true=FA2, false={}),
    ),
    ("attn_implementation", "model.attn_implementation", to("model.attn_implementation")),
    ("trust_remote_code", "model.trust_remote_code", to("model.trust_remote_code", True, False)),
    (
        "dataset dataset_name dataset_path datasets train_file",
        "data.train: a file, a name, or a list of path, subset, split",
        _source,
    ),
    ("dataset_config", "data.train_subset", to("data.train_subset")),
    ("dataset_train_split", "data.train_split", to("data.train_split")),
    ("dataset_test_split", "data.eval_split", to("data.eval_split")),
    ("eval_dataset test_datasets validation_file eval_file", "data.eval", _held_out),
    (
        "val_size val_set_size",
        "data.eval_split: train[:1%] and data.train_split: train[1%:] of one source",
        _held_out_share,
    ),
    ("max_samples max_train_samples", "data.train_split: train[:N]", _rows),
    ("cutoff_len sequence_len block_size max_length max_seq_length", "data.max_length", number("data.max_length", 2)),
    ("template conversation_template", "data.template: chat, plain or alpaca", _template),
    ("chat_template chat_template_path chat_template_jinja", "data.chat_template: a file", _chat_template),
    ("train_on_prompt train_on_inputs", "data.loss_on: all", switch(data__loss_on="all")),
    (
        "assistant_only_loss",
        "false, TRL's default, is data.loss_on: all",
        fixed(true={}, false={"data.loss_on": "all"}),
    ),
    ("packing neat_packing sample_packing", "data.packing: true, rows kept apart", switch(data__packing=True)),
    ("streaming", "data.streaming", switch(data__streaming=True)),
    ("buffer_size", "data.buffer_size", number("data.buffer_size", 1)),
    ("tokenized_path dataset_prepared_path", "data.cache", to("data.cache")),
    ("stage rl", "loss.name; pt is data.loss_on: all", _loss),
    ("pref_beta rl_beta", "loss.beta", number("loss.beta")),
    ("pref_loss", "loss.name", fixed(sigmoid={}, orpo={"loss.name": "orpo"}, simpo={"loss.name": "simpo"})),
    ("simpo_gamma", "loss.simpo_gamma", number("loss.simpo_gamma")),
    ("finetuning_type", "method.name", _finetuning),
    ("adapter", "method.name; qlora over model.frozen: nf4", _adapter),
    ("use_lora use_peft", "method.name: lora", switch(method__name="lora")),
    ("use_dora peft_use_dora", "method.name: dora", switch(method__name="dora")),
    ("use_lisa", "method.name: lisa", switch(method__name="lisa")),
    ("use_galore", "method.name: galore", switch(method__name="galore")),
    ("use_badam", "method.name: badam", switch(method__name="badam")),
    ("lora_r lora_rank", "method.lora_rank", number("method.lora_rank", 1)),
    ("lora_alpha", "method.lora_alpha; 16 here, not twice the rank", number("method.lora_alpha")),
    ("lora_dropout", "method.lora_dropout", number("method.lora_dropout")),
    ("lora_target lora_target_modules lora_target_linear", "adapters are of all linear layers", _targets),
    ("lisa_activated_layers lisa_n_layers", "sampling.gamma, sampling.scheme: fixed", _lisa),
    (
        "lisa_interval_steps lisa_step_interval badam_switch_interval",
        "sampling.period",
        number("sampling.period", 1),
    ),
    ("badam_switch_mode", "sampling.order", to("sampling.order", "ascending", "descending", "random")),
    ("galore_rank", "optim.rank", number("optim.rank", 1)),
    ("galore_update_interval", "optim.update_proj_gap", number("optim.update_proj_gap", 1)),
    ("galore_scale", "optim.scale", number("optim.scale")),
    ("learning_rate", "optim.lr", number("optim.lr")),
    ("lr_scheduler_type lr_scheduler", "optim.schedule: linear, cosine or constant", _schedule),
    ("warmup_steps", "optim.warmup_steps", _warmup_steps),
    ("warmup_ratio", "optim.warmup_steps, in steps", _warmup),
    ("weight_decay", "optim.weight_decay", number("optim.weight_decay")),
    ("max_grad_norm gradient_clipping", "optim.max_grad_norm", number("optim.max_grad_norm")),
    ("adam_beta1 adam_beta2", "optim.betas", _betas),
    ("adam_epsilon", "optim.eps", number("optim.eps")),
    ("optim optimizer", "AdamW alone; in 8 bits optim.moments: int8", _optimizer),
    ("per_device_train_batch_size micro_batch_size", "train.micro_batch_size", number("train.micro_batch_size", 1)),
    (
        "gradient_accumulation_steps",
        "times micro-batch and ranks: train.global_batch_size",
        lambda value, tree: {},
    ),
    ("per_device_eval_batch_size eval_batch_size", "train.eval_batch_size", number("train.eval_batch_size", 1)),
    ("num_train_epochs num_epochs", "train.epochs", number("train.epochs")),
    ("max_steps", "train.steps", number("train.steps", 1)),
    ("eval_steps", "train.eval_steps", _steps("train.eval_steps")),
    ("save_steps", "train.save_steps", _steps("train.save_steps")),
    ("evals_per_epoch saves_per_epoch", "train.eval_steps, train.save_steps", _per_epoch),
    ("eval_strategy evaluation_strategy save_strategy", "train.eval_steps, train.save_steps", _strategy),
    ("save_total_limit", "train.save_total_limit", number("train.save_total_limit", 1)),
    (
        "gradient_checkpointing",
        "train.gradient_checkpointing",
        fixed(true={"train.gradient_checkpointing": True}, unsloth={"train.gradient_checkpointing": True}, false={}),
    ),
    ("seed", "train.seed", number("train.seed")),
    ("output_dir", "train.output_dir", to("train.output_dir")),
    ("resume_from_checkpoint auto_resume_from_checkpoints", "train.resume: auto, or a folder", _resume),
    ("deepspeed deepspeed_config", "train.sharding: zero3, train.ds_config", _deepspeed),
    ("fsdp fsdp_config", "train.sharding: zero3", lambda value, tree: {"train.sharding": "zero3"} if value else {}),
    ("ddp_timeout", "train.timeout_seconds", number("train.timeout_seconds", 1)),
    ("early_stopping_patience", "train.early_stopping", number("train.early_stopping", 1)),
    ("load_best_model_at_end", "train.load_best", switch(train__load_best=True)),
    ("report_to", "log.trackers", _trackers),
    (
        "use_wandb wandb_project",
        "log.trackers",
        lambda value, tree: {"log.trackers": ["wandb"]} if value else {},
    ),
)
READERS: dict[str, Reader] = {name: reader for names, _, reader in TABLE for name in names.split()}
READERS["_batch"] = number("train.global_batch_size", 1)
# nothing is lost without them: how much is printed, how many processes read, what is on here anyway
_QUIET = """
logging_steps logging_strategy logging_dir plot_loss overwrite_cache overwrite_output_dir
preprocessing_num_workers dataloader_num_workers dataset_num_proc dataset_processes do_train do_eval
do_predict disable_tqdm log_level save_safetensors strict remove_unused_columns run_name wandb_name
wandb_watch wandb_log_model wandb_entity wandb_run_id gradient_checkpointing_kwargs tf32 fp16 group_by_length
dataloader_pin_memory include_tokens_per_second save_only_model push_to_hub special_tokens weight_sharing
ddp_find_unused_parameters model_type tokenizer_type is_llama_derived_model local_rank debug dataset_dir
media_dir use_fast_tokenizer dataset_text_field
"""
QUIET = frozenset(_QUIET.split())
