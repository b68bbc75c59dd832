"""The trainer on a tiny model: a run that is stopped and resumed is the run that was not."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from ows_ds import checkpoint, config, files
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated
from ows_ds.errors import UserError
from ows_ds.model.fingerprint import fingerprint
from ows_ds.runs import records as run_records
from ows_ds.train import log
from ows_ds.train.export import export
from ows_ds.train.trainer import train
from tests.support.pool import Pools
from tests.support.tiny_run import cut, recipe

ZERO3: dict[str, Any] = {"sharding": "zero3", "save_total_limit": 3}
TIMINGS = ("step_seconds", "tokens_per_second", "peak_memory_bytes")


def run(rank: int, world_size: int, recipe: config.Recipe, stop_after: int | None) -> list[str]:
    """Train; die after step ``stop_after``, as a machine would: before the next checkpoint, nothing closed.

    The disk is faster than a step: what is saved after one is complete after the next. Returns the lines shown.
    """
    step, event, start = log.RunLog.step, log.RunLog.event, checkpoint.Saver.start
    shown: list[str] = []

    def stopping(self: log.RunLog, record: dict[str, Any]) -> None:
        step(self, record)
        if record["step"] == stop_after:
            raise KeyboardInterrupt

    def noting(self: log.RunLog, text: str) -> None:
        shown.append(text)
        event(self, text)

    def quickly(self: checkpoint.Saver, *args: Any) -> None:
        start(self, *args)
        if self._writing is not None and self._writing._thread is not None:
            self._writing._thread.join()

    with (
        patch.object(log.RunLog, "step", stopping),
        patch.object(log.RunLog, "event", noting),
        patch.object(checkpoint.Saver, "start", quickly),
        contextlib.suppress(KeyboardInterrupt),
    ):
        train(recipe)
    return shown


def contents(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Records without timings, and digests of the files that must not depend on a stop."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
    for record in records:
        # how long DeepSpeed keeps weights gathered depends on the passes it has seen since its process began
        record.get("comm_bytes", {}).pop("weights", None)
    files = [
        *run_dir.glob("scores.json"),
        *(run_dir / "model").iterdir(),
        *(run_dir / "checkpoints").glob("*/*.safetensors"),
    ]
    return records, {str(f.relative_to(run_dir)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture
def whole(straight: Callable[..., Path]) -> Path:
    """A run on two ranks that nothing stops; not to be changed."""
    return straight(2, **ZERO3)


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """The same run in a folder of the test's own."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.mark.parametrize(("world_size", "sharding"), [(2, "zero3"), (3, "replicated"), (1, "zero3")])
def test_resumed_run_is_bit_identical(
    pools: Pools, inputs: Path, tmp_path: Path, straight: Callable[..., Path], world_size: int, sharding: str
) -> None:
    settings = ZERO3 | {"sharding": sharding}
    whole, parts = straight(world_size, **settings), tmp_path / "parts"
    pools(world_size).run(run, recipe(inputs, parts, **settings), 5)
    assert not (parts / "model").exists()
    shown = pools(world_size).run(run, recipe(inputs, parts, **settings, resume="auto"), None)[0]
    assert f"resuming after step 3 from {parts / 'checkpoints' / 'step-3'}" in shown

    records, digests = contents(whole)
    assert [record["step"] for record in records] == list(range(10))
    assert len({tuple(record["sampled_layers"]) for record in records[1:]}) > 1
    assert contents(parts) == (records, digests)
    for name in ("config.yaml", "scores.json", "metrics.jsonl", "tensorboard", "checkpoints/step-9", "model"):
        assert (whole / name).exists()
    assert config.from_dict(files.read_yaml(whole / "config.yaml")) == config.exact(recipe(inputs, whole, **settings))
    if world_size > 1:
        assert records[3]["comm_bytes"]["gradients"] > 0
    norms_where_they_belong(records)

    export(parts, tmp_path / "exported", "step-9")
    exported, final = (load_file(folder / "model.safetensors") for folder in (tmp_path / "exported", parts / "model"))
    assert exported.keys() == final.keys()
    # the same merge, but of the full matrix in one process: products may differ in the last bit before rounding
    assert all(torch.allclose(exported[n].float(), final[n].float(), rtol=1e-2, atol=1e-6) for n in final)


def norms_where_they_belong(records: list[dict[str, Any]]) -> None:
    """Energies of what entered or was refreshed, update norms of what was merged and, at the end, of all."""
    sets = [{str(layer) for layer in record["sampled_layers"]} for record in records] + [set()]
    energies, norms = ([set(record.get(key, {})) for record in records] for key in ("projector_energy", "update_norm"))
    assert not energies[0] | norms[0]
    for step in range(1, len(records)):
        assert sets[step] - sets[step - 1] <= energies[step] <= sets[step]
        assert sets[step] - sets[step + 1] <= norms[step] <= sets[step]
        assert all(0 < share <= 1.01 for share in records[step].get("projector_energy", {}).values())
        assert all(norm > 0 for norm in records[step].get("update_norm", {}).values())
    assert any(not energies[step] | norms[step] for step in range(1, len(records)))  # a plain step has neither key


def test_model_loads_in_transformers_and_has_learned(inputs: Path, whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    records, _ = contents(whole)
    assert records[-1]["eval_loss"] < records[0]["eval_loss"] - 0.5
    loaded = AutoModelForCausalLM.from_pretrained(whole / "model")
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    folders = (whole / "model", inputs / "model")
    assert len({AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str() for folder in folders}) == 1
    assert len({AutoTokenizer.from_pretrained(folder).chat_template for folder in folders}) == 1
    trained, before = (GenerationConfig.from_pretrained(folder).to_dict() for folder in folders)
    # what is trained ends with the tokenizer's mark, at which the base model's generation did not stop
    end = AutoTokenizer.from_pretrained(folders[0]).eos_token_id
    assert trained.pop("eos_token_id") == [before.pop("eos_token_id"), end]
    assert trained == before
    assert (folders[0] / "preprocessor_config.json").read_text() == "{}"
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == {**base.config.to_dict(), "_name_or_path": ""}
    card = (folders[0] / "README.md").read_text()
    assert fingerprint(Replicated(loaded, Communicator())) in card
    assert "Optimizer steps: 9," in card
    assert loaded.dtype == torch.bfloat16
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    changed = [
        n for (n, p), q in zip(loaded.named_parameters(), base.parameters(), strict=True) if not torch.equal(p, q)
    ]
    assert "model.embed_tokens.weight" in changed


def test_another_world_and_sharding_resume_the_same_run(
    pools: Pools, inputs: Path, tmp_path: Path, whole: Path
) -> None:
    pools(2).run(run, recipe(inputs, tmp_path / "a", **ZERO3), 5)
    pools(3).run(run, recipe(inputs, tmp_path / "a", **ZERO3 | {"sharding": "replicated"}, resume="auto"), None)
    (moved, _), (stayed, _) = contents(tmp_path / "a"), contents(whole)
    assert [r.get("sampled_layers") for r in moved] == [r.get("sampled_layers") for r in stayed]
    for a, b in zip(moved[1:], stayed[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)  # bfloat16 forward passes in another order


def test_draws_of_modules_that_adapt_resume_to_the_bit(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    sampling = {"importance": "gradient", "block": "module", "period": 2}
    for name, stops in (("whole", [None]), ("parts", [5, None])):
        for stop in stops:
            made = recipe(inputs, tmp_path / name, sampling, **ZERO3, resume="auto")
            shown = pools(2).run(run, made, stop)[0]
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    records, digests = contents(tmp_path / "whole")
    assert [record["step"] for record in records if "probabilities" in record] == [1, 3, 5, 7, 9]
    found = run_records.read(tmp_path / "whole").probabilities
    assert found == records[-1]["probabilities"] != records[1]["probabilities"]
    assert sum(found or ()) == pytest.approx(1.5)  # gamma: layers of one size
    assert not any("scores" in name for name in digests)
    assert any("of 21 modules will train" in line for line in shown)


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
def test_steps_in_which_nothing_trains_are_skipped(pools: Pools, inputs: Path, tmp_path: Path, sharding: str) -> None:
    lean = recipe(
        inputs, tmp_path / "run", {"gamma": 0.7, "period": 1}, {"always_on": "none"}, steps=8, sharding=sharding
    )
    pools(2).run(run, lean, None)
    records, _ = contents(tmp_path / "run")
    skipped = [record for record in records[1:] if record.get("skipped")]
    assert 0 < len(skipped) < 8
    for record in records[1:]:
        assert (record["sampled_layers"] == []) == (record["loss"] is None) == (record in skipped)
        assert "gradients" not in record["comm_bytes"] or record not in skipped


def test_a_finished_run_resumes_to_nothing(pools: Pools, inputs: Path, copied: Path, whole: Path) -> None:
    pools(2).run(run, recipe(inputs, copied, **ZERO3, resume="auto"), None)
    assert contents(copied) == contents(whole)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    pools(2).run(run, recipe(inputs, tmp_path / "run", steps=4, resume="auto"), 2)
    pools(2).run(run, recipe(inputs, tmp_path / "run", steps=4, resume="auto"), None)
    records, _ = contents(tmp_path / "run")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]


def test_a_checkpoint_can_be_continued_elsewhere(pools: Pools, inputs: Path, tmp_path: Path, whole: Path) -> None:
    point = str(whole / "checkpoints" / "step-6")
    pools(2).run(run, recipe(inputs, tmp_path / "b", **ZERO3, resume=point), None)
    (records, digests), (moved, moved_digests) = contents(whole), contents(tmp_path / "b")
    assert moved == records[7:]
    card = "model/README.md"  # of the run's own records
    assert all(digests[name] == digest for name, digest in moved_digests.items() if name != card)
    text = (tmp_path / "b" / card).read_text()
    assert "* Optimizer steps: 9, of 12 rows each\n* Tokens seen in the last 3 steps: " in text
    assert f"* Held-out loss: {records[-1]['eval_loss']:.4f} at the end" in text
    other = recipe(inputs, tmp_path / "c", **ZERO3, resume=point, seed=1)
    assert pools(2).run(refused, other) == ["train.seed: 1 is invalid: expected 0, as the run that is resumed"] * 2
    assert not (tmp_path / "c").exists()


def refused(rank: int, world_size: int, recipe: config.Recipe) -> str:
    try:
        train(recipe)
    except UserError as error:
        return str(error)
    return "trained"


def test_a_run_is_never_overwritten(pools: Pools, inputs: Path, copied: Path, whole: Path) -> None:
    for answer in pools(2).run(refused, recipe(inputs, copied, **ZERO3)):
        assert answer.startswith("train.output_dir: ")
    for answer in pools(2).run(refused, recipe(inputs, copied, **ZERO3, steps=4, resume="auto")):
        assert answer.startswith("train.steps: 4 is invalid: expected 9")
    assert contents(copied) == contents(whole)


def test_a_damaged_checkpoint_is_skipped(pools: Pools, inputs: Path, tmp_path: Path, whole: Path) -> None:
    damaged = cut(whole, tmp_path / "run") / "checkpoints" / "step-6"
    file = damaged / "state-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    shown = pools(2).run(run, recipe(inputs, tmp_path / "run", **ZERO3, resume="auto"), None)[0]
    problem = f"expected a complete checkpoint: {file.name} is damaged"
    assert shown[:2] == [
        f"skipped a checkpoint: {UserError('train.resume', str(damaged), problem)}",
        f"resuming after step 3 from {damaged.with_name('step-3')}",
    ]
    assert contents(tmp_path / "run") == contents(whole)


def test_what_is_auto_is_chosen_written_down_and_kept(pools: Pools, inputs: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"micro_batch_size": "auto", "steps": 4, "save_steps": 2}
    pools(2).run(run, recipe(inputs, tmp_path / "run", **settings), 2)
    began = config.from_dict(files.read_yaml(tmp_path / "run" / "config.yaml"))
    assert not began.auto
    assert began.train.micro_batch_size > 1
    pools(3).run(run, recipe(inputs, tmp_path / "run", **settings, resume="auto"), None)  # 6 do not divide by 3 ranks
    again = config.from_dict(files.read_yaml(tmp_path / "run" / "config.yaml"))
    assert (again.optim, again.model) == (began.optim, began.model)
    assert 12 % (3 * again.train.micro_batch_size) == 0
