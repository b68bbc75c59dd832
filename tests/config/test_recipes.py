"""The recipes of the paper's experiments: they parse, pass the checks offline, and say what the paper says."""

from __future__ import annotations

import json

import pytest
import yaml

from ows_ds import config
from ows_ds.cli.main import main
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
PAPER = [path for path in RECIPES if path.stem.startswith(("llama2_7b", "mistral_7b", "qwen2.5_7b"))]
# models of today: shape in the planner, cluster, family of a tiny model
CURRENT = {
    "qwen3_8b_chat": ("qwen3-8b", "1xRTX4090", "qwen3"),
    "llama3.1_8b_chat": ("llama3.1-8b", "8xA100-80", "llama"),
    "llama3.3_70b_chat": ("llama3.3-70b", "8xH100", "llama"),
    "qwen3_30b_a3b_chat": ("qwen3-30b-a3b", "8xA100-80", "qwen3_moe"),
    "llama3.3_70b_nf4": ("llama3.3-70b", "1xH100", "llama"),
}
MODELS = {"llama2_7b": "meta-llama/Llama-2-7b-hf", "mistral_7b": "mistralai/Mistral-7B-v0.1"}
MODELS["qwen2.5_7b"] = "Qwen/Qwen2.5-7B"
# train, its subset and split; eval, its subset and split; format, template
DATA = {
    "commonsense": ("zwhe99/commonsense_170k", None, "train", None, None, "test", "alpaca", "alpaca"),
    "alpaca_gpt4": ("vicgalle/alpaca-gpt4", None, "train", None, None, "test", "alpaca", "alpaca"),
    "mmlu": ("cais/mmlu", "all", "auxiliary_train", "cais/mmlu", "all", "validation", "multiple_choice", "plain"),
    "gsm8k": ("openai/gsm8k", "main", "train", "openai/gsm8k", "main", "test", "question_answer", "plain"),
}


def test_every_experiment_has_its_recipe() -> None:
    pairs = {f"{model}_{data}" for model in ("llama2_7b", "mistral_7b") for data in DATA} | {"qwen2.5_7b_gsm8k"}
    assert {path.stem for path in PAPER} == pairs
    assert {path.stem for path in RECIPES} == pairs | {"demo"} | CURRENT.keys()


@pytest.mark.parametrize("name", CURRENT)
def test_recipes_of_today_fit_what_they_say(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shape, cluster, _ = CURRENT[name]
    file = ROOT / "launch" / "recipes" / f"{name}.yaml"
    assert f"--model.path {shape} --cluster {cluster}" in file.read_text()
    assert main(["plan", "--config", str(file), "--model.path", shape, "--cluster", cluster, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cheapest"] is not None
    assert found["proposal"] is None  # as it is
    config.check(config.from_dict(yaml.safe_load(file.read_text())), files=False)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_recipes_have_the_papers_settings(path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(path), "--print_config"]) == 0
    r = config.from_dict(yaml.safe_load(capsys.readouterr().out))
    config.check(r)  # offline: names on the hub are not looked up
    [(model, data)] = [(m, d) for m in MODELS for d in DATA if str(path).endswith(f"/{m}_{d}.yaml")]
    d, o, s, t = r.data, r.optim, r.sampling, r.train
    assert (r.model.path, r.model.dtype, r.method.name) == (MODELS[model], "bfloat16", "ows")
    assert (d.train, d.train_subset, d.train_split, d.eval, d.eval_subset, d.eval_split, d.format, d.template) == DATA[
        data
    ]
    assert (d.max_length, d.loss_on) == (512, "assistant")
    assert (s.gamma, s.tau, s.scheme, s.period, s.importance) == (5, 13, "bernoulli", 50, "outlier")
    assert (o.lr, o.schedule, o.warmup_steps) == (3e-5 if model == "mistral_7b" else 3e-4, "linear", 0)
    assert (o.rank, o.update_proj_gap, o.always_on) == (128, 200, "full")
    assert (t.global_batch_size, t.epochs, t.steps, t.output_dir) == (16, 1, None, f"runs/{model}_{data}")
