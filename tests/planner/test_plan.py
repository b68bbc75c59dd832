"""`ows-ds plan` as a user types it: tables, JSON, files, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ows_ds import config
from ows_ds.cli.main import main
from ows_ds.importance.scores import Scores
from ows_ds.model.shapes import read_model
from ows_ds.planner.memory import memory, state
from ows_ds.planner.plan import FILES
from ows_ds.planner.step import StepSpec
from tests.support.families import tiny

WORDS = ["--data.max_length", "16", "--optim.rank", "4", "--sampling.gamma", "1.5", "--train.global_batch_size", "16"]

PLAIN = [
    *("--train.micro_batch_size", "1", "--train.gradient_checkpointing", "false", "--optim.refresh_batch", "full"),
    *("--optim.refresh", "full"),
    *("--optim.always_on", "full", "--optim.moments", "float32", "--optim.master", "float32", "--model.frozen", "same"),
]  # nothing is chosen


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model's config.json in ``m`` and nothing else."""
    monkeypatch.chdir(tmp_path)
    model: Any = tiny("llama", False)
    model.config.save_pretrained(tmp_path / "m")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["config.json"]
    return tmp_path


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", "--model.path", "m", *WORDS, *words]) == 0
    return capsys.readouterr().out


def test_tables_fit_a_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(capsys, "--cluster", "2x4xH100", "--methods", "lisa,lora").splitlines()
    assert max(map(len, shown)) <= 80
    titles = ["memory of a GPU [GiB]", "sent by a GPU in a step [MiB]", "time of a step at best [s]"]
    assert set(titles) <= {line.strip() for line in shown}
    assert any(line.startswith("lora ") for line in shown)
    assert "methods: the fastest setting that fits" in (line.strip() for line in shown)
    start = shown.index("  torchrun --nnodes 2 --nproc_per_node 4 -m ows_ds train --config RECIPE.yaml")
    assert any(line.startswith("As it is: 8 GPUs, ") for line in shown[:start])
    cheapest = next(index for index, line in enumerate(shown) if line.startswith("Cheapest: 1 GPU, "))
    assert shown[cheapest + 1].startswith("  ows-ds train --config RECIPE.yaml")
    assert {path.name for path in folder.iterdir()} == {"m"}


def test_lengths_of_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer rows need more, until more GPUs share them; 4 heads are shared by 4 GPUs at most."""
    found = json.loads(plan(capsys, "--cluster", "8xT4", "--lengths", "64,4k,1M", "--json"))["lengths"]
    assert list(found) == ["64", "4096", str(2**20)]
    peaks = [one["peak"] for one in found.values()]
    assert peaks[0] < peaks[1] < peaks[2]
    table = plan(capsys, "--cluster", "8xT4", "--lengths", "64,1M").splitlines()
    first = next(i for i, line in enumerate(table) if line.startswith("lengths of rows"))
    shared = {words[0]: int(words[1]) for words in map(str.split, table[first + 2 : first + 4])}
    assert shared["64"] == 1
    assert shared["1,048,576"] in (1, 2, 4)


def test_json_says_what_memory_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(plan(capsys, "--cluster", "8xA100-80", "--nodes", "2", "--memory", "40", "--json", *PLAIN))
    assert (found["model"], found["cluster"]["nodes"], found["cluster"]["memory"]) == ("m", 2, 40)
    [one] = [x for x in found["whole cluster"] if (x["home"], x["checkpointing"]) == ("replicated", False)]
    assert one["layers"] == {"expected": 2, "planned for": 3}
    spec = StepSpec(read_model("m").layers, layer_set=(0, 1, 2), rank=4, length=16, world_size=16)
    assert one["state"] == state(spec)
    assert one["phases"] == memory(spec).phases
    assert one["peak"] == max(memory(spec).peak, memory(spec, True).peak)
    assert {x["home"] for x in found["whole cluster"]} == {"replicated", "zero3", "hpz"}
    assert set(found["scaling"]) == {"replicated", "zero3", "hpz"}
    assert max(map(int, found["scaling"]["replicated"])) == 1024
    assert {x["home"] for x in found["choices"]} == {"replicated", "zero3", "hpz"}


def test_a_file_that_training_refuses_is_refused_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nvme = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}
    (folder / "nvme.json").write_text(json.dumps(nvme))
    assert main(["plan", "--model.path", "m", *WORDS, "--train.ds_config", "nvme.json"]) == 2
    assert "train.ds_config: zero_optimization.offload_param.device: 'nvme' is invalid" in capsys.readouterr().err


def test_output_can_be_trained_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing but shards fits, the DeepSpeed file lies beside the recipe."""
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    limits = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, **dict.fromkeys(limits, 0)}}))
    words = ["--cluster", "4xA100-80", "--train.ds_config", "ds.json", "--data.train", "rows.jsonl"]
    words += ["--optim.always_on", "none"]
    peaks: dict[str, list[int]] = {}
    for one in json.loads(plan(capsys, *words, "--json"))["choices"]:
        peaks.setdefault(one["home"], []).append(one["peak"])
    between = (min(peaks["zero3"]) + min(peaks["replicated"])) / 2
    assert min(peaks["zero3"]) < between
    words += ["--memory", str(between / 1e9), "--reserve", "0"]
    shown = plan(capsys, *words, "--output", "out", "--choose", "fastest")
    assert "too big" in shown
    assert {path.name for path in (folder / "out").iterdir()} == {*FILES, "ds_config.json"}
    text = (folder / "out" / "recipe.yaml").read_text()
    recipe = config.from_dict(yaml.safe_load(text))
    config.check(recipe)
    assert text.startswith("# torchrun --nproc_per_node 4 -m ows_ds train --config out/recipe.yaml\n")
    assert (recipe.train.sharding, recipe.train.ds_config) == ("zero3", "out/ds_config.json")
    summary = json.loads((folder / "out" / "plan.json").read_text())
    assert summary["fastest"]["micro_batch"] == recipe.train.micro_batch_size
    zero = json.loads((folder / "out" / "ds_config.json").read_text())["zero_optimization"]
    assert (zero["stage"], zero["stage3_param_persistence_threshold"]) == (3, 0)
    # nothing is written over
    before = {path: path.read_bytes() for path in (folder / "out").iterdir()}
    assert main(["plan", "--model.path", "m", *WORDS, "--output", "out"]) == 2
    assert "--output: 'out' is invalid: expected a folder without plan.json" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (folder / "out").iterdir()}


def test_nothing_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(capsys, "--cluster", "1xA100-80", "--memory", "0.0001", "--reserve", "0", "--output", "out")
    assert "Nothing fits: the leanest, with " in shown
    assert {path.name for path in (folder / "out").iterdir()} == {"plan.json", "scaling.png"}


def test_what_makes_it_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first keys that do, in the verdict, the numbers, and the recipe that is written."""
    words = ["--cluster", "1xRTX4090", "--memory", "16", "--model.path", "llama2-7b", "--output", "out", *PLAIN]
    words += ["--sampling.gamma", "5"]
    assert main(["plan", *words]) == 0
    shown = capsys.readouterr().out
    keys = "--optim.refresh compressed --sampling.scheme fixed --model.frozen int8"
    assert f"Nothing of this fits as it is. With {keys} it does" in " ".join(shown.split())
    recipe = config.from_dict(yaml.safe_load((folder / "out" / "recipe.yaml").read_text()))
    assert (recipe.model.frozen, recipe.optim.refresh, recipe.optim.always_on) == ("int8", "compressed", "full")
    assert recipe.train.gradient_checkpointing
    proposal = json.loads((folder / "out" / "plan.json").read_text())["proposal"]
    assert proposal["fits"]
    assert proposal["keys"] == {"optim.refresh": "compressed", "sampling.scheme": "fixed", "model.frozen": "int8"}


@pytest.mark.parametrize(("model", "always_on"), [("llama2-7b", "full"), ("llama3-8b", "none")])
def test_a_24_gib_gpu_takes_7b_and_8b_with_nothing_given(
    folder: Path, capsys: pytest.CaptureFixture[str], model: str, always_on: str
) -> None:
    words = ["--cluster", "1xRTX4090", "--model.path", model, "--data.max_length", "2048"]
    assert main(["plan", *words]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "chosen for 22.0 GiB of a GPU: train.micro_batch_size" in shown
    assert "NOTHING THAT IS EXACT FITS: SUMS OF GRADIENTS FOR PROJECTORS ARE COMPRESSED" in shown
    assert ("EMBEDDING AND HEAD DO NOT TRAIN (optim.always_on none)" in shown) == (always_on == "none")
    assert "As it is: 1 GPU, replicated, " in shown
    assert main(["plan", *words, "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)["chosen"]
    assert (chosen["optim.always_on"], chosen["model.frozen"]) == (always_on, "same")


def test_the_papers_setting_takes_18_gb(capsys: pytest.CaptureFixture[str]) -> None:
    """7B on a GPU that has no more, embedding and head training: with frozen layers in 8 bits, which is said. As they
    are it is 19.2 GB for the layers that are expected, 20.6 GB for the most that are planned for."""
    recipe, usable = "launch/recipes/llama2_7b_alpaca_gpt4.yaml", 18e9 / 2**30
    words = ["--config", recipe, "--model.path", "llama2-7b", "--cluster", "1xRTX4090", "--reserve", "0"]
    words += ["--memory", f"{usable}"]
    assert main(["plan", *words]) == 0
    assert "LAYERS THAT DO NOT TRAIN AT THE MOMENT ARE IN 8 BITS" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    asked = found["recipe"]["train"]["gradient_checkpointing"]
    [peak] = [one["peak"] for one in found["whole cluster"] if one["checkpointing"] is asked]
    assert peak <= 18e9
    assert (found["recipe"]["optim"]["always_on"], found["recipe"]["model"]["frozen"]) == ("full", "int8")


def test_scores_decide_how_deep_it_goes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With scores, a layer that is never drawn is not planned for."""
    words = ["--optim.always_on", "none", "--sampling.scheme", "fixed", "--sampling.gamma", "1", "--json"]
    unknown = json.loads(plan(capsys, *words))["whole cluster"][0]
    Scores("outlier", 13.0, "", (0.0, 0.0, 1.0), 1).write(folder / "s.json")
    known = json.loads(plan(capsys, *words, "--sampling.scores", "s.json"))["whole cluster"][0]
    assert known["phases"]["loss"]["activations"] < unknown["phases"]["loss"]["activations"]


def test_a_recipe_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data, folders and scores need not be there yet."""
    Path("r.yaml").write_text("model: {path: m}\ndata: {train: later.jsonl}\ntrain: {output_dir: runs/x}\n")
    assert main(["plan", "--config", "r.yaml", *WORDS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["recipe"]["data"]["train"], found["recipe"]["optim"]["rank"]) == ("later.jsonl", 4)


MISTAKES = [
    (
        ["--model.path", "m", "--cluster", "8xH101"],
        "--cluster: '8xH101' is invalid: expected a file, or nodes x GPUs of",
    ),
    (
        ["--model.path", "none"],
        "model.path: 'none' is invalid: expected a folder with a config.json, or one of llama2-7b",
    ),
    (
        ["--model.path", "m", "--sampling.gamma", "5"],
        "sampling.gamma: 5.0 is invalid: expected at most 3, the number of layers",
    ),
    (["--model.path", "m", *WORDS, "--optim.rank", "99"], "optim.rank: 99 is invalid"),
    (["--model.path", "m", *WORDS, "--methods", "ows,adam"], "--methods: 'ows,adam' is invalid: expected some of ows"),
    (["--model.path", "m", *WORDS, "--choose", "best"], "--choose: 'best' is invalid: expected cheapest or fastest"),
    (["--model.path", "m", *WORDS, "--nvlink", "fast"], "--nvlink: 'fast' is invalid: expected a number"),
    (["--model.path", "m", *WORDS, "--gpus", "0"], "--gpus: 0 is invalid: expected an integer of at least 1"),
    (
        ["--model.path", "m", *WORDS, "--cluster", "3xH100"],
        "train.global_batch_size: 16 is invalid: expected a multiple of 3",
    ),
    (["--model.path", "m", *WORDS, "--lengths", "4q"], "--lengths: '4q' is invalid: expected tokens with commas"),
    ([], "model.path: None is invalid: it is required"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES)
def test_mistakes(words: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ows-ds: error: {expected}")
    assert error.count("\n") == 1
    assert {path.name for path in folder.iterdir()} == {"m"}
