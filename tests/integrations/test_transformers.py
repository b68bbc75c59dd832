"""OWS in transformers' `Trainer` and TRL's `SFTTrainer`: the run is that of our own trainer; it stops and resumes."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from ows_ds import config
from ows_ds.config import Source, changed
from ows_ds.data.batches import Batches, collate
from ows_ds.data.encode import encode_rows
from ows_ds.data.rows import read
from ows_ds.train.trainer import train
from tests.support.pool import Pools
from tests.support.tiny_run import recipe
from tests.support.training import distance

AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
DEEPSPEED = {
    "zero_optimization": {
        "stage": 3,
        # shards of so small a model would all stay gathered
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    **dict.fromkeys(AUTO, "auto"),
}
# what keeps rounding small: Adam blows up what is next to zero, and singular vectors may come with either sign
STEADY = {"projector": "svd", "moments_on_refresh": "rotate"}
EPS = 1e-6
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed (extra: trl)")


@pytest.fixture(scope="module")
def still(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's inputs without dropout, which two loops draw differently."""
    folder = tmp_path_factory.mktemp("still") / "inputs"
    shutil.copytree(inputs, folder)
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.0}))
    return folder


@contextlib.contextmanager
def deepspeed_on_cpus() -> Iterator[None]:
    """As `accelerate launch` would set it up on GPUs; on CPUs Accelerate needs the backend's name."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    with patch.dict(os.environ, ACCELERATE_USE_DEEPSPEED="true"):
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(backend="gloo")
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def rows_of(inputs: Path, tokenizer: Any, name: str) -> list[Any]:
    return list(encode_rows(read(Source(path=str(inputs / f"{name}.jsonl")), f"data.{name}"), tokenizer, 64)[0])


def collated(rows: list[Any]) -> dict[str, Any]:
    return collate([[row] for row in rows], pad_id=0)


def fit(
    rank: int,
    world_size: int,
    inputs: Path,
    output: Path,
    arguments: dict[str, Any],
    settings: dict[str, Any],
    kind: str = "trainer",
    dtype: str = "bfloat16",
    order: list[int] | None = None,
    resume: bool = False,
    stop_after: int | None = None,
) -> list[dict[str, Any]]:
    """Train with a Trainer; ``output/final`` <- the model. Returns its log.

    kind: trainer, zero3 (a Trainer) or trl. order: of the rows; None: the Trainer's. stop_after: a step after which to
    die, nothing closed.
    """
    import transformers as tf

    from ows_ds.integrations.transformers import OWSTrainer, OWSTrainerMixin

    given = {
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 9,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        **arguments,
    }
    arguments_class: Any = tf.TrainingArguments
    trainer_class: Any = OWSTrainer
    around: Any = contextlib.nullcontext()
    if kind == "zero3":
        around = deepspeed_on_cpus()
        given |= {"deepspeed": DEEPSPEED, "accelerator_config": {"use_configured_state": True}}
    else:
        given["use_cpu"] = True
    if order is not None:
        given["train_sampling_strategy"] = "sequential"
    if kind == "trl":
        from trl import SFTConfig, SFTTrainer

        class OWSSFTTrainer(OWSTrainerMixin, SFTTrainer):
            """As a user writes it."""

        arguments_class, trainer_class = SFTConfig, OWSSFTTrainer
        given |= {"bf16": dtype == "bfloat16", "max_length": 64}
    with around:
        args = arguments_class(**given)
        tokenizer = tf.AutoTokenizer.from_pretrained(inputs / "model")
        model = tf.AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=getattr(torch, dtype))
        rows: Any = rows_of(inputs, tokenizer, "train")
        rows = rows if order is None else [rows[i] for i in order]
        held_out: Any = rows_of(inputs, tokenizer, "eval")
        made: dict[str, Any] = {"data_collator": collated}
        if kind == "trl":
            from datasets import Dataset

            rows, held_out = (
                Dataset.from_list([{name: getattr(row, name) for name in ("input_ids", "labels")} for row in some])
                for some in (rows, held_out)
            )
            made = {"processing_class": tokenizer}
        ows = {"gamma": 1.5, "period": 4, "rank": 4, "update_proj_gap": 3} | settings
        made |= {"ows": ows, "scores": ows.pop("scores", None), "tau": 2.0}
        trainer = trainer_class(model=model, args=args, train_dataset=rows, eval_dataset=held_out, **made)

        class Stop(tf.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == stop_after:
                    raise KeyboardInterrupt

        trainer.add_callback(Stop)
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=resume)
            trainer.save_model(str(output / "final"))
        history: list[dict[str, Any]] = trainer.state.log_history
        return history


def ours(rank: int, world_size: int, recipe: config.Recipe) -> list[int]:
    """Train with our trainer. Returns the order of the rows over all steps."""
    from transformers import AutoTokenizer

    train(recipe)
    inputs = Path(recipe.data.train).parent
    rows = rows_of(inputs, AutoTokenizer.from_pretrained(recipe.model.path), "train")
    batches = Batches(rows, recipe.train.global_batch_size, 1, 1, 0, recipe.train.seed)
    return [row for step in range(9) for row in batches.global_step(step)]


@pytest.fixture(scope="module")
def our_run(pools: Pools, still: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A run of our trainer in float32 on two processes, and the order of its rows."""
    folder = tmp_path_factory.mktemp("ours") / "run"
    plain = recipe(still, folder, optim={**STEADY, "eps": EPS})
    return folder, pools(2).run(ours, changed(plain, {"model.dtype": "float32"}))[0]


@pytest.mark.parametrize("kind", ["trainer", "zero3", pytest.param("trl", marks=needs_trl)])
def test_the_run_is_that_of_our_trainer(
    pools: Pools, still: Path, our_run: tuple[Path, list[int]], tmp_path: Path, kind: str
) -> None:
    folder, order = our_run
    settings = {**STEADY, "scores": str(folder / "scores.json")}
    arguments = {"adam_epsilon": EPS}
    history = pools(2).run(fit, still, tmp_path / "run", arguments, settings, kind, "float32", order)[0]
    steps = [entry for entry in history if "grad_norm" in entry]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    for entry, record in zip(steps, records, strict=True):
        assert entry["sampled_layers"] == ",".join(map(str, record["sampled_layers"]))
        assert entry["learning_rate"] == pytest.approx(record["lr"])
        assert entry["loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-5)
    assert len({entry["sampled_layers"] for entry in steps}) > 1
    # the same sums in another order
    assert distance(weights(tmp_path / "run" / "final"), weights(folder / "model")) < 1e-5


# 20 rows, 2 processes, 3 micro-batches of 2: the second of the two steps of an epoch has fewer micro-batches
STOPPED = {
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "max_steps": 7,
    "gradient_checkpointing": True,
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("trainer", "bfloat16"),
        pytest.param("trl", "bfloat16", marks=[needs_trl, pytest.mark.slow]),
        pytest.param("zero3", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_bit_identical(pools: Pools, inputs: Path, tmp_path: Path, kind: str, dtype: str) -> None:
    for name, stop_after in (("whole", None), ("parts", 5)):
        pools(2).run(fit, inputs, tmp_path / name, STOPPED, {}, kind, dtype, None, False, stop_after)
    assert not (tmp_path / "parts" / "final").exists()
    file = next((tmp_path / "parts" / "checkpoint-4" / "ows").glob("state-00001*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)  # checkpoint-2 is the newest that is whole
    history = pools(2).run(fit, inputs, tmp_path / "parts", STOPPED, {}, kind, dtype, None, True, None)[0]

    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert {f"checkpoint-{step}" for step in (2, 4, 6, 7)} == {
        path.name for path in tmp_path.glob("whole/checkpoint-*")
    }
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert list(losses) == [2, 4, 6, 7]  # a Trainer ends with an evaluation
    assert losses[7] < losses[2]

    # what is saved on the way changes nothing
    pools(2).run(fit, inputs, tmp_path / "unsaved", STOPPED | {"save_strategy": "no"}, {}, kind, dtype)
    assert digests(tmp_path / "unsaved").items() <= digests(tmp_path / "whole").items()


@pytest.mark.parametrize("kind", ["trainer", pytest.param("zero3", marks=pytest.mark.slow)])
def test_the_best_model_is_loaded_at_the_end(pools: Pools, still: Path, tmp_path: Path, kind: str) -> None:
    """Here the worst one, which comes first: layers that train later are again what they were."""
    best = {
        **STOPPED,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "save_total_limit": 2,
    }
    settings = {"gamma": 1, "period": 2, "scheme": "fixed"}
    history = pools(2).run(fit, still, tmp_path, best, settings, kind, "float32")[0]
    assert len({entry["sampled_layers"] for entry in history if "grad_norm" in entry}) > 1
    final, last = weights(tmp_path / "final"), weights(tmp_path / "checkpoint-7")
    assert distance(final, weights(tmp_path / "checkpoint-2")) == 0
    assert distance(final, last) > 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def digests(run: Path) -> dict[str, str]:
    """Of the final model and of the models and the folders of OWS in the checkpoints."""
    files = [*run.glob("*/model.safetensors"), *run.glob("checkpoint-*/ows/*.safetensors")]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
