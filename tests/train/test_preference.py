"""Losses that compare answers: against TRL's own trainers, over chunks and ranks, resumed; their rows, and their
memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ows_ds.train.loss
from ows_ds import config
from ows_ds.cli.main import main
from ows_ds.data import prepare
from ows_ds.data.batches import compared
from ows_ds.data.encoded import IGNORE
from ows_ds.data.pack import Sequences
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated
from ows_ds.errors import UserError
from ows_ds.train import preference
from ows_ds.train.trainer import train
from tests.support.alive import Alive
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.tiny_run import cut, recipe
from tests.support.tokenizer import byte_tokenizer

PAIRS = [
    {"prompt": "what is 1+1", "chosen": "it is 2", "rejected": "no idea at all"},
    {"prompt": "name a colour", "chosen": "blue, as the sky", "rejected": "7"},
    {"prompt": "hi", "chosen": "hello", "rejected": "go away, please"},
    {"prompt": "a b c", "chosen": "d", "rejected": "e f"},
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
    for i, row in enumerate(PAIRS)
]
PRECOMPUTED: dict[str, Any] = {"precompute_ref_log_probs": True}  # TRL loads no second model
NAMES = ("dpo", "orpo", "simpo", "kto")  # of log-probabilities
RUN = {"micro_batch_size": 2, "global_batch_size": 4, "steps": 4, "save_steps": 2}


@pytest.fixture(autouse=True)
def _forget() -> None:
    ows_ds.train.loss._fits.clear()


def write_rows(folder: Path, rows: list[dict[str, Any]], times: int = 3) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * times))
    return file


def sequences(tmp_path: Path, name: str, **loss: Any) -> tuple[Any, Sequences]:
    """A recipe with this loss, and its rows."""
    rows = write_rows(tmp_path, LABELLED if name == "kto" else PAIRS, 1)
    tree: dict[str, Any] = {"model": {"path": "m"}, "train": {"output_dir": "o"}, "loss": {"name": name, **loss}}
    made = config.from_dict({**tree, "data": {"train": str(rows), "template": "plain", "cache": str(tmp_path / "c")}})
    given = config.sources(made.data, "data.train")
    return made, prepare.prepare(made.data, byte_tokenizer(), given, "data.train")[0]


def context_of(made: config.Recipe, model: Any) -> Any:
    weights = Replicated(model, Communicator())
    runtime = SimpleNamespace(comm=Communicator(), device=torch.device("cpu"))
    return SimpleNamespace(recipe=made, weights=weights, runtime=runtime, pad_id=0, to_device=lambda batch: batch)


def policy(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose weights are another one's for another seed."""
    model: Any = tiny("llama", False, dtype)
    model.resize_token_embeddings(len(byte_tokenizer()))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def batch_of(tmp_path: Path, name: str, **loss: Any) -> tuple[Any, dict[str, Tensor], float]:
    """A recipe, all its rows as one batch with the reference of another model, and the share for orpo."""
    made, rows = sequences(tmp_path, name, **loss)
    if name in ("dpo", "kto"):
        rows.reference = preference._reference(context_of(made, policy(1)), rows)
    return made, compared(list(rows), 0, made.loss.rows, name == "orpo"), len(rows) / rows.leading.sum()


# ------------------------------------------------------------------ TRL's


def test_dpo_is_trls(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    made, batch, share = batch_of(tmp_path, "dpo", beta=0.3)
    model = policy()
    arguments = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], beta=0.3, bf16=False, **PRECOMPUTED)
    other = DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(PAIRS), processing_class=byte_tokenizer())
    reference = batch["reference"].float()
    theirs = other.compute_loss(
        other.model.eval(),
        {
            "input_ids": batch["input_ids"],
            "attention_mask": torch.ones_like(batch["input_ids"]),
            "completion_mask": (batch["labels"] != IGNORE).long(),
            "ref_chosen_logps": reference[:4],
            "ref_rejected_logps": reference[4:],
        },
    )
    ours = preference.loss(context_of(made, model), batch, share) / 4
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    assert abs(float(ours) - math.log(2)) > 0.01  # the models differ


def test_kto_is_trls(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    made, batch, share = batch_of(tmp_path, "kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    model = policy()
    more = {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.5, "per_device_train_batch_size": 4}
    arguments = KTOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=False, **more, **PRECOMPUTED)
    rows = Dataset.from_list(LABELLED)
    other = KTOTrainer(model, args=arguments, train_dataset=rows, processing_class=byte_tokenizer())
    theirs = other.compute_loss(
        other.model.eval(),
        {
            "input_ids": batch["input_ids"],
            "attention_mask": torch.ones_like(batch["input_ids"]),
            "completion_mask": (batch["labels"] != IGNORE).long(),
            "KL_input_ids": batch["kl_input_ids"],
            "KL_attention_mask": torch.ones_like(batch["kl_input_ids"]),
            "KL_completion_mask": (batch["kl_labels"] != IGNORE).long(),
            "ref_logps": batch["reference"].float(),
            "ref_KL_logps": batch["kl_reference"].float(),
            "label": batch["right"],
        },
    )
    ours = preference.loss(context_of(made, model), batch, share) / 4
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_orpo_and_simpo_are_trls(tmp_path: Path) -> None:
    """Their own formulas, on log-probabilities from whole logits."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    model = policy()
    here = SimpleNamespace(device=torch.device("cpu"))
    made, batch, share = batch_of(tmp_path, "orpo", beta=0.4)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits
    answers = torch.where(batch["answers"], batch["input_ids"], IGNORE)
    means = ORPOTrainer.get_batch_logps(logits, answers, average_log_prob=True)
    losses = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.4, accelerator=here), means[:4], means[4:])[0]
    nll = torch.nn.functional.cross_entropy(logits[:4, :-1].flatten(0, 1), batch["labels"][:4, 1:].flatten())
    ours = preference.loss(context_of(made, model), batch, share) / 4
    assert float(ours) == pytest.approx(float(nll - losses.mean()), rel=1e-5)

    made, batch, share = batch_of(tmp_path, "simpo", simpo_gamma=0.7)
    means = CPOTrainer.get_batch_logps(logits, batch["labels"], average_log_prob=True)
    cpo = SimpleNamespace(
        beta=2.0, simpo_gamma=0.7, loss_type="simpo", label_smoothing=0.0, alpha=0.0, accelerator=here
    )
    theirs = CPOTrainer.cpo_loss(cpo, means[:4], means[4:])[0].mean()
    ours = preference.loss(context_of(made, model), batch, share) / 4
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_reward_is_trls(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    made, batch, share = batch_of(tmp_path, "reward")
    described = policy().config
    described.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(described).float().eval()
    arguments = RewardConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=False)
    rows = Dataset.from_list(PAIRS)
    other = RewardTrainer(model, args=arguments, train_dataset=rows, processing_class=byte_tokenizer())
    context = context_of(made, model)
    context.pad_id = model.config.pad_token_id  # TRL has set it
    batch["input_ids"][batch["input_ids"] == 0] = context.pad_id
    mask = (batch["input_ids"] != context.pad_id).long()
    theirs = other.compute_loss(model.eval(), {"input_ids": batch["input_ids"], "attention_mask": mask})
    ours = preference.loss(context, batch, share) / 4
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_a_reward_model_is_one_of_transformers(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    made = started(inputs, tmp_path / "run", "reward", steps=6)
    pools(1).run(run, config.changed(made, {"optim.lr": 3e-2}))
    losses = [one["eval_loss"] for one in records(tmp_path / "run") if "eval_loss" in one]
    assert losses[-1] < 0.8 * losses[0]
    model, found = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "model", output_loading_info=True
    )
    assert model.config.num_labels == 1
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_logits_change_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither loss nor gradients; whole logits, which some models need, are the reference."""
    made, batch, share = batch_of(tmp_path, name)
    found = []
    for chunk in (None, 1, 7):
        model = policy(dtype=torch.float64)
        context = context_of(made, model)
        if chunk is None:
            ows_ds.train.loss._fits[model.get_output_embeddings()] = False
        else:
            monkeypatch.setattr(ows_ds.train.loss, "CHUNK", chunk * len(byte_tokenizer()))
        statistics: list[Tensor] = []
        loss = preference.loss(context, batch, share, statistics=statistics)
        loss.backward()
        found.append((loss.detach(), statistics[0], [p.grad for p in model.parameters()]))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ runs


def run(rank: int, world_size: int, made: config.Recipe) -> None:
    train(made)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def started(inputs: Path, folder: Path, name: str, **given: Any) -> config.Recipe:
    folder.parent.mkdir(exist_ok=True)
    rows = write_rows(folder.parent, LABELLED if name == "kto" else PAIRS)
    made = config.to_dict(recipe(inputs, folder, **{**RUN, **given}))
    made["data"] |= {"train": str(rows), "eval": str(rows), "format": "auto", "cache": str(folder.parent / "cache")}
    made["model"]["dtype"] = "float64"
    made["loss"] = {"name": name}
    if name == "reward":  # where a pair's gradients cancel, Adam would make steps of what rounding leaves of them
        made["optim"]["eps"] = 1e-4
    return config.from_dict(made)


@pytest.mark.parametrize(
    "name", ["dpo", *(pytest.param(one, marks=pytest.mark.slow) for one in (*NAMES[1:], "reward"))]
)
def test_shards_on_two_ranks_are_one_rank(name: str, pools: Pools, inputs: Path, tmp_path: Path) -> None:
    """The same losses; dpo begins with ln 2; a run that is resumed on another number of ranks ends alike."""
    made = [
        started(inputs, tmp_path / "a" / "run", name),
        started(inputs, tmp_path / "b" / "run", name, sharding="zero3"),
    ]
    made[0] = config.changed(made[0], {"train.micro_batch_size": 4})
    for world_size, one in zip((1, 2), made, strict=True):
        pools(world_size).run(run, one)
    alone, sharded = (records(Path(one.train.output_dir)) for one in made)
    for ours, theirs in zip(alone, sharded, strict=True):
        assert ours["sampled_layers"] == theirs["sampled_layers"]
        for key in ("loss", "eval_loss", "reward_margin"):
            assert ours.get(key) == (
                None if theirs.get(key) is None else pytest.approx(theirs[key], rel=1e-9, abs=1e-12)
            )
    first = next(one for one in alone if one["loss"] is not None)
    assert {"reward_accuracy", "reward_margin"} <= first.keys()
    assert "eval_reward_accuracy" in alone[0]
    if name == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["reward_margin"] == pytest.approx(0, abs=1e-5)
    copied = cut(tmp_path / "b" / "run", tmp_path / "b" / "again", 2)
    for file in (tmp_path / "b" / "cache").glob("*.reference.*"):
        file.unlink()  # it is computed again, of the model before training
    pools(2).run(run, config.changed(made[1], {"train.output_dir": str(copied), "train.resume": "auto"}))
    ends = [(folder / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "b" / "run", copied)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("method", ["lora", "lisa", "mezo"])
def test_other_methods(method: str, inputs: Path, tmp_path: Path, pools: Pools) -> None:
    made = started(inputs, tmp_path / "run", "dpo")
    pools(1).run(run, config.changed(made, {"method.name": method, "train.steps": 1}))
    first = next(one for one in records(tmp_path / "run") if one["loss"] is not None)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3 if method == "mezo" else 1e-6)


def test_no_more_memory_than_examples(tmp_path: Path) -> None:
    """Bytes that operations have made and that are alive at once, over a pass of as many tokens."""
    made, batch, share = batch_of(tmp_path, "dpo")
    peaks = []
    for name in ("sft", "dpo"):
        context = context_of(made, policy())
        with Alive() as alive:
            if name == "sft":
                loss = ows_ds.train.loss.token_losses(context.weights, batch)
            else:
                loss = preference.loss(context, batch, share)
            loss.backward()
        peaks.append(alive.most)
    assert peaks[1] <= 1.05 * peaks[0]


# ------------------------------------------------------------------ rows


def test_rows_as_they_come(tmp_path: Path) -> None:
    """Whole chats, prompts as text beside chats, texts without a prompt: all the same pair."""
    from ows_ds.data.messages import answers

    ask, good, bad = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
    expected = [{"prompt": [ask], "completion": [one]} for one in (good, bad)]
    for row in (
        {"prompt": [ask], "chosen": [good], "rejected": [bad]},
        {"chosen": [ask, good], "rejected": [ask, bad]},
        {"prompt": "q", "chosen": [ask, good], "rejected": [ask, bad]},
        {"prompt": "q", "chosen": [good], "rejected": [bad]},
    ):
        assert answers(row, "preference") == expected
    texts = answers({"chosen": "Q: x A: yes", "rejected": "Q: x A: yep"}, "preference")
    assert texts == [{"prompt": "Q: x A:", "completion": " yes"}, {"prompt": "Q: x A:", "completion": " yep"}]


def test_kto_asks_each_prompt_with_another_answer(tmp_path: Path) -> None:
    _, rows = sequences(tmp_path, "kto")
    words = [[byte_tokenizer().decode(one.input_ids) for one in pair] for pair in rows]
    assert len(words) == 4
    assert {tuple(pair) for pair in words} == {
        (f"{own['prompt']}{own['completion']}</s>", f"{own['prompt']}{other['completion']}</s>")
        for own, other in zip(LABELLED, [LABELLED[-1], *LABELLED[:-1]], strict=True)
    } or all("</s>" not in word for pair in words for word in pair)
    assert sorted(pair[0].right for pair in rows) == [False, False, True, True]


MISTAKES = [
    ({"name": "dpo"}, {"packing": True}, "data.packing: True is invalid: expected false under loss.name dpo"),
    ({"name": "orpo"}, {"loss_on": "all"}, "data.loss_on: 'all' is invalid: expected assistant under loss.name orpo"),
    ({"name": "kto"}, {"format": "messages"}, "data.format: 'messages' is invalid: expected labelled, or auto"),
    ({}, {"format": "preference"}, "data.format: 'preference' is invalid: expected a format of examples, or auto"),
    ({"name": "ppo"}, {}, "loss.name: 'ppo' is invalid: expected one of sft, dpo"),
    ({"name": "dpo", "beta": 0}, {}, "loss.beta: 0 is invalid: expected a number above 0"),
]


@pytest.mark.parametrize(("loss", "data", "expected"), MISTAKES)
def test_mistakes_in_a_recipe(loss: dict[str, Any], data: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        config.from_dict({"model": {"path": "m"}, "train": {"output_dir": "o"}, "loss": loss, "data": data})
    assert any(str(one).startswith(expected) for one in caught.value.errors), str(caught.value)


BAD_ROWS = [
    ("dpo", {"prompt": "a", "completion": "b"}, "expected chosen and rejected as texts"),
    ("dpo", {"prompt": "a", "chosen": "b", "rejected": ["c"]}, "expected chosen and rejected as texts"),
    ("dpo", {"chosen": "b", "rejected": "b"}, "expected chosen and rejected to differ"),
    ("kto", {"prompt": "a", "completion": "b", "label": 1}, "expected label as true or false"),
    ("sft", PAIRS[0], "those of chosen and rejected are for loss.name dpo"),
]


@pytest.mark.parametrize(("name", "row", "expected"), BAD_ROWS)
def test_bad_rows_are_named(
    name: str, row: dict[str, Any], expected: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    words = [
        "--model.path",
        str(inputs / "model"),
        "--data.train",
        str(file),
        "--train.output_dir",
        str(tmp_path / "o"),
    ]
    assert main(["train", *words, "--loss.name", name, "--preview"]) == 2
    error = capsys.readouterr().err
    assert f"data.train: '{file}:1' is invalid: " in error
    assert expected in error
