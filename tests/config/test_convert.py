"""Recipes written after the documentation of LLaMA-Factory, axolotl, TRL and LMFlow, two each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ows_ds import config
from ows_ds.cli.main import main
from ows_ds.config.convert import convert, is_foreign, table
from ows_ds.config.elsewhere import MEANINGS
from ows_ds.config.readers import QUIET, READERS
from tests.conftest import ROOT

# name, their file, keys of ours, words of what is left out or noted, ranks
RECIPES: list[tuple[str, str, dict[str, Any], list[str], int]] = [
    (
        "llama_factory_lora_sft",
        """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
eval_strategy: steps
eval_steps: 500
""",
        {
            "model.path": "meta-llama/Meta-Llama-3-8B-Instruct", "method.name": "lora", "method.lora_rank": 8,
            "data.max_length": 2048, "data.template": "chat", "optim.lr": 1e-4, "optim.schedule": "cosine",
            "train.global_batch_size": 16, "train.micro_batch_size": 1, "train.epochs": 3.0, "train.save_steps": 500,
            "train.output_dir": "saves/llama3-8b/lora/sft", "model.dtype": "bfloat16",
        },
        ["dataset_info.json", "warmup_ratio", "val_size"],
        2,
    ),
    (
        "llama_factory_galore_full",
        """
model_name_or_path: Qwen/Qwen2.5-7B
stage: sft
do_train: true
finetuning_type: full
use_galore: true
galore_target: mlp,self_attn
galore_rank: 128
galore_scale: 2.0
pure_bf16: true
dataset: data/train.jsonl
template: qwen
cutoff_len: 1024
output_dir: saves/galore
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
learning_rate: 1.0e-5
num_train_epochs: 1.0
lr_scheduler_type: constant
warmup_steps: 20
deepspeed: examples/deepspeed/ds_z3_config.json
report_to: wandb
""",
        {
            "method.name": "galore", "optim.rank": 128, "optim.scale": 2.0, "data.train": "data/train.jsonl",
            "optim.warmup_steps": 20, "train.sharding": "zero3", "log.trackers": ["wandb"],
            "train.ds_config": "examples/deepspeed/ds_z3_config.json", "train.global_batch_size": 16,
        },
        ["galore_target"],
        8,
    ),
    (
        "axolotl_qlora",
        """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj]
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
weight_decay: 0.0
""",
        {
            "method.name": "lora", "model.frozen": "nf4", "method.lora_rank": 32, "method.lora_alpha": 16,
            "data.train": "teknium/GPT4-LLM-Cleaned", "data.format": "alpaca", "data.packing": True,
            "data.eval": "teknium/GPT4-LLM-Cleaned", "data.eval_split": "train[:10%]",
            "data.train_split": "train[10%:]",
            "optim.moments": "int8", "train.global_batch_size": 8, "train.gradient_checkpointing": True,
            "model.attn_implementation": "flash_attention_2",
        },
        ["adapters are of all linear layers", "evals_per_epoch"],
        1,
    ),
    (
        "axolotl_dpo",
        """
base_model: meta-llama/Meta-Llama-3-8B-Instruct
rl: dpo
rl_beta: 0.1
datasets:
  - path: fozziethebeat/alpaca_messages_2k_dpo_test
    type: chat_template.default
    split: train
chat_template: llama3
adapter: lora
lora_r: 16
sequence_len: 4096
micro_batch_size: 1
gradient_accumulation_steps: 4
max_steps: 200
optimizer: adamw_torch
learning_rate: 0.00001
warmup_steps: 10
eval_steps: 50
fsdp: [full_shard, auto_wrap]
output_dir: ./outputs/dpo
xformers_attention:
""",
        {
            "loss.name": "dpo", "loss.beta": 0.1, "train.steps": 200, "optim.warmup_steps": 10, "optim.lr": 1e-5,
            "train.sharding": "zero3", "data.train_split": "train", "method.lora_rank": 16,
        },
        ["data.format"],
        1,
    ),
    (
        "trl_sft",
        """
model_name_or_path: Qwen/Qwen2-0.5B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-5
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
eos_token: '<|im_end|>'
eval_strategy: steps
eval_steps: 100
output_dir: Qwen2-0.5B-SFT
assistant_only_loss: true
max_length: 1024
""",
        {
            "model.path": "Qwen/Qwen2-0.5B", "data.train": "trl-lib/Capybara", "data.packing": True,
            "data.max_length": 1024, "train.global_batch_size": 16, "optim.lr": 2e-5,
        },
        ["eos_token", "train.eval_steps"],
        1,
    ),
    (
        "trl_peft",
        """
model_name_or_path: Qwen/Qwen2-0.5B
dataset_name: data/pairs
dataset_config: main
dataset_train_split: train
load_in_4bit: true
use_peft: true
lora_r: 32
lora_alpha: 16
attn_implementation: sdpa
dtype: bfloat16
bf16: true
report_to: none
max_steps: -1
seed: 7
adam_beta2: 0.95
output_dir: out
""",
        {
            "method.name": "lora", "model.frozen": "nf4", "data.train_subset": "main", "log.trackers": [],
            "train.seed": 7, "optim.betas": [0.9, 0.95], "model.attn_implementation": "sdpa",
        },
        [],
        1,
    ),
    (
        "lmflow_lisa",
        """
model_name_or_path: meta-llama/Llama-2-7b-hf
trust_remote_code: 0
dataset_path: data/alpaca/train_conversation
output_dir: output_models/finetuned_lisa
overwrite_output_dir: true
conversation_template: llama2
num_train_epochs: 1
learning_rate: 2.0e-5
block_size: 256
per_device_train_batch_size: 1
bf16: true
torch_dtype: bfloat16
validation_split_percentage: 0
use_lisa: 1
lisa_activated_layers: 2
lisa_interval_steps: 20
gradient_checkpointing: true
disable_group_texts: 1
""",
        {
            "sampling.gamma": 2.0, "sampling.period": 20, "sampling.scheme": "fixed", "method.name": "lisa",
            "data.train": "data/alpaca/train_conversation", "data.max_length": 256,
        },
        ["disable_group_texts", "validation_split_percentage"],
        1,
    ),
    (
        "lmflow_badam",
        """
model_name_or_path: gpt2
dataset_path: data/alpaca/train
use_badam: true
badam_switch_mode: ascending
badam_switch_interval: 50
output_dir: out
learning_rate: 1.0e-6
use_dora: false
""",
        {"method.name": "badam", "sampling.order": "ascending", "sampling.period": 50, "optim.lr": 1e-6},
        [],
        1,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected", "said", "ranks"), [one[1:] for one in RECIPES], ids=[r[0] for r in RECIPES]
)
def test_a_recipe(
    text: str, expected: dict[str, Any], said: list[str], ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written is a recipe, whose keys say what theirs did; what is lost is named."""
    (tmp_path / "theirs.yaml").write_text(text)
    words = ["convert", str(tmp_path / "theirs.yaml"), "--ranks", str(ranks), "--output", str(tmp_path / "ours.yaml")]
    assert main(words) == 0
    error = capsys.readouterr().err
    written = (tmp_path / "ours.yaml").read_text()
    for word in said:
        assert word in error
        assert word in written
    tree = yaml.safe_load(written)
    flat = {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}
    assert expected.items() <= flat.items()
    given = yaml.safe_load(text)
    for key in given:  # nothing is skipped in silence
        assert key in READERS or key in QUIET or given[key] is None or key in error, key
    if "look at" not in error or "data.format" not in "".join(said):
        problems = [line for line in error.splitlines() if "is invalid" in line]
        if not problems:
            config.from_dict(tree)


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = tmp_path / "ours.yaml", tmp_path / "theirs.yaml"
    ours.write_text("model: {path: m}\ntrain: {output_dir: o}\n")
    theirs.write_text("model_name_or_path: m\ndataset: d\n")
    for words, expected in (
        ([], "FILE.yaml: None is invalid: it is required"),
        ([str(ours)], "expected a flat recipe of LLaMA-Factory"),
        ([str(tmp_path / "none.yaml")], "FILE.yaml: "),
        ([str(theirs), "--ranks", "0"], "--ranks: '0' is invalid"),
        ([str(theirs), "--output", str(ours)], f"--output: '{ours}' is invalid: expected a new file"),
    ):
        assert main(["convert", *words]) == 2
        assert expected in capsys.readouterr().err


def test_every_key_of_ours_exists() -> None:
    """What readers give for usual values are keys of the recipe."""
    usual = (True, 1, 8, "8", "lora", "full", "fa2", "linear", "none", "data.jsonl", "dpo", "ds_z3.json", 0.5)
    for name, reader in READERS.items():
        for value in usual:
            try:
                made = reader(value, {name: value}) or {}
            except (TypeError, ValueError):
                continue
            assert all(key == "?" or key in config.recipe_keys() for key in made), name


def test_the_hints_and_the_page_are_the_same_table() -> None:
    assert table() in (ROOT / "docs" / "from_other_tools.md").read_text()
    assert is_foreign({"model_name_or_path": "m", "dataset": "d"})
    assert not is_foreign({"model": {"path": "m"}, "lr": 1})
    assert convert({"model_name_or_path": "m", "foo": 1}).left_out == {"foo": "not here"}
    assert len(READERS) > 100
    assert MEANINGS.keys() & READERS.keys()
