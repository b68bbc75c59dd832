"""The recipe: defaults, strict reading, ranges."""

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import yaml

from ows_ds import config, files
from ows_ds.config import Recipe
from ows_ds.errors import UserError, one_line, shorten


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """The smallest recipe that passes every check."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    return {"model": {"path": "m"}, "data": {"train": str(rows)}, "train": {"output_dir": str(tmp_path / "run")}}


def changed(tree: dict[str, Any], key: str, value: object) -> Recipe:
    section, name = key.split(".")
    return config.from_dict({**tree, section: {**tree.get(section, {}), name: value}})


def test_a_user_error_is_one_short_line() -> None:
    error = UserError("optim.rank", 0, "expected an integer\nof at least 1")
    assert str(error) == "optim.rank: 0 is invalid: expected an integer of at least 1"
    assert len(shorten("x\n" * 1000)) <= 120
    assert one_line(" a\x1b[31m\n\u202e\ud800é ") == "a\\x1b[31m \\u202e\\ud800é"
    assert shorten([10**5000]) == "<list too long to be shown>"
    assert len(str(UserError("k" * 9999, "v" * 9999, "r" * 9999))) < 3000
    assert "\n" not in str(UserError("a\nb", {"c": "d\ne"}, "f"))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.key, again.value) == (str(error), "optim.rank", 0)


def test_the_defaults_are_those_of_the_design(tree: dict[str, Any]) -> None:
    r = config.from_dict(tree)
    config.check(r)
    assert (r.sampling.gamma, r.sampling.period, r.sampling.tau, r.sampling.scheme) == (5, 50, 13, "bernoulli")
    assert (r.optim.lr, r.optim.schedule, r.optim.warmup_steps) == (3e-4, "linear", 0)
    assert (r.optim.rank, r.optim.update_proj_gap, r.optim.scale) == (128, 200, 1.0)
    assert (r.optim.moments_on_refresh, r.optim.refresh_batch, r.optim.always_on) == ("keep", "full", "full")
    assert r.optim.refresh == "full"
    assert (r.train.global_batch_size, r.data.max_length, r.train.epochs, r.model.dtype) == (16, 512, 1, "bfloat16")


def test_every_setting_is_documented() -> None:
    for kind in config.SECTIONS.values():
        documented = {p.arg_name: p.description for p in docstring_parser.parse(kind.__doc__ or "").params}
        assert list(documented) == [f.name for f in dataclasses.fields(kind)]
        assert all(documented.values())


def test_yaml_gives_the_recipe_back(tree: dict[str, Any]) -> None:
    r = changed(tree, "optim.betas", [0.8, 0.99])
    assert config.from_dict(yaml.safe_load(config.to_yaml(r))) == r
    assert "update_proj_gap: 200" in config.to_yaml(r)


def test_numbers_that_yaml_reads_as_text_are_numbers(tree: dict[str, Any]) -> None:
    assert changed(tree, "optim.lr", yaml.safe_load("3e-4")).optim.lr == 3e-4
    assert changed(tree, "sampling.gamma", 4).sampling.gamma == 4.0


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("optim.rank", "x", "expected an integer"),
        ("optim.rank", 1.5, "expected an integer"),
        ("optim.rank", True, "expected an integer"),
        ("optim.rank", None, "expected an integer"),
        ("optim.lr", "fast", "expected a number"),
        ("optim.lr", True, "expected a number"),
        ("optim.max_grad_norm", "x", "expected a number or null"),
        ("optim.betas", [0.9], "expected a list of 2 numbers"),
        ("optim.betas", 0.9, "expected a list of 2 numbers"),
        ("optim.projector", "qr", "expected one of randomized, svd"),
        ("train.gradient_checkpointing", "yes", "expected true or false"),
        ("log.trackers", "tensorboard", "expected a list of texts"),
        ("model.path", None, "it is required: expected text"),
        ("optim.rnk", 3, "there is no such key; is optim.rank meant?"),
    ],
)
def test_wrong_types_and_unknown_keys_are_refused(tree: dict[str, Any], key: str, value: object, right: str) -> None:
    with pytest.raises(UserError) as error:
        changed(tree, key, value)
    assert error.value.key == key
    assert str(error.value).startswith(f"{key}: {value!r} is invalid: {right}")


def test_sections_are_checked() -> None:
    with pytest.raises(UserError, match=r"optimm: .* is optim meant"):
        config.from_dict({"optimm": {}})
    with pytest.raises(UserError, match="optim: 3 is invalid: expected a section"):
        config.from_dict({"optim": 3})
    with pytest.raises(UserError, match=r"train\.output_dir: None is invalid: it is required"):
        config.from_dict({"model": {"path": "m"}, "train": None})


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("sampling.gamma", 0, "expected a number above 0"),
        ("sampling.gamma", float("nan"), "expected a finite number"),
        ("sampling.tau", -1, "expected a number above 0"),
        ("sampling.period", 0, "expected an integer of at least 1"),
        ("sampling.seed", -1, "expected an integer of at least 0"),
        ("sampling.scores", "no/such.json", "expected a file that exists"),
        ("data.train", None, "it is required"),
        ("data.eval", "no/such.jsonl", "expected a file that exists"),
        ("data.train", "no/such.parquet", "expected a file that exists"),
        ("data.train", "/no/such", "expected a file or folder that exists, or the name of a data set on the hub"),
        ("data.eval", "a/b/c", "expected a file or folder that exists, or the name of a data set on the hub"),
        ("data.train_split", "train[:1%", "expected a split, such as train, or a part of one"),
        ("data.eval_split", "", "expected a split, such as train, or a part of one"),
        ("data.max_length", 1, "expected an integer of at least 2"),
        ("optim.rank", 0, "expected an integer of at least 1"),
        ("optim.lr", -1, "expected a number of at least 0"),
        ("optim.lr", float("inf"), "expected a finite number"),
        ("optim.betas", [0.9, 1.0], "expected two numbers, each at least 0 and below 1"),
        ("optim.betas", [0.9, float("nan")], "expected a finite number"),
        ("optim.max_grad_norm", 0, "expected a number above 0"),
        ("train.epochs", 0, "expected a number above 0"),
        ("train.steps", 0, "expected an integer of at least 1"),
        ("train.global_batch_size", 0, "expected an integer of at least 1"),
        ("train.resume", "no/such/folder", "expected never, auto, or the folder of a checkpoint"),
        ("log.trackers", ["tensorbord"], "expected a list of some of"),
    ],
)
def test_values_out_of_range_are_refused(tree: dict[str, Any], key: str, value: object, right: str) -> None:
    with pytest.raises(UserError) as error:
        config.check(changed(tree, key, value))
    assert error.value.key == key
    assert error.value.right.startswith(right)


@pytest.mark.parametrize("source", ["openai/gsm8k", "gsm8k", "zwhe99/commonsense_170k", "a-b/c.d", "."])
def test_data_sets_are_not_looked_up(tree: dict[str, Any], source: str) -> None:
    config.check(changed(tree, "data.train", source))
    config.check(changed(tree, "data.eval", source))
    for split in ("train", "auxiliary_train", "train[:1%]", "train[-100:]", "train.a[10%:20%]"):
        config.check(changed(tree, "data.eval_split", split))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"sampling": {"scheme": "fixed", "gamma": 2.5}}, "sampling.gamma"),
        ({"train": {"global_batch_size": 2, "micro_batch_size": 4}}, "train.global_batch_size"),
        ({"train": {"global_batch_size": 6, "micro_batch_size": 4}}, "train.global_batch_size"),
        ({"train": {"steps": 5}, "optim": {"warmup_steps": 6}}, "optim.warmup_steps"),
    ],
)
def test_contradictions_are_refused(tree: dict[str, Any], settings: dict[str, Any], key: str) -> None:
    merged = {s: {**tree.get(s, {}), **settings.get(s, {})} for s in {**tree, **settings}}
    with pytest.raises(UserError) as error:
        config.check(config.from_dict(merged))
    assert error.value.key == key


def test_accumulation(tree: dict[str, Any]) -> None:
    r = config.from_dict({**tree, "train": {"output_dir": "o", "global_batch_size": 16, "micro_batch_size": 2}})
    assert [config.accumulation(r, world_size) for world_size in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(UserError, match=r"train\.global_batch_size: 16 is invalid: expected a multiple of 6"):
        config.accumulation(r, 3)


def test_yaml_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("optim:\n  rank: 3\n  betas: {\n")
    with pytest.raises(UserError, match=r"r\.yaml:4' is invalid: expected valid YAML"):
        files.read_yaml(path)
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="expected a YAML file of sections"):
        files.read_yaml(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="expected a readable YAML file"):
        files.read_yaml(path)
    path.write_text("# nothing\n")
    assert files.read_yaml(path) == {}


def test_importing_the_recipe_is_cheap() -> None:
    code = (
        "import sys, ows_ds.config\n"
        "print([m for m in ('torch', 'jsonargparse', 'yaml', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
