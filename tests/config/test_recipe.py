"""The recipe: defaults, strict reading, ranges, and every mistake of a file at once."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from ows_ds import config, files
from ows_ds.config import OWSConfig, Recipe
from ows_ds.config.method import LEARNING_RATES
from ows_ds.errors import UserError, UserErrors, joined, one_line, shorten


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The smallest recipe that passes every check; the working directory is where its rows are."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows", "eval"):
        Path(f"{name}.jsonl").write_text('{"text": "a"}\n')
    Path("ds.json").write_text("{}")
    return {"model": {"path": "m"}, "data": {"train": "rows.jsonl"}, "train": {"output_dir": "run"}}


def changed(tree: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """A tree with other values of keys by their full names."""
    new = {section: dict(values) for section, values in tree.items()}
    for key, value in keys.items():
        section, name = key.split(".")
        new.setdefault(section, {})[name] = value
    return new


def lines(tree: dict[str, Any]) -> list[str]:
    """What is said of a recipe and its files."""
    with pytest.raises(UserError) as caught:
        config.from_dict(tree, files=True)
    return str(caught.value).splitlines()


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


def test_several_user_errors_are_a_line_each() -> None:
    one, two = UserError("a", 1, "expected 2"), UserError("b", 3, "expected 4")
    assert joined([one]) is one
    both = joined([one, joined([two, one])])
    assert isinstance(both, UserErrors)
    assert str(both).splitlines() == [str(one), str(two), str(one)]
    assert (both.key, len(both.errors)) == ("a", 3)
    assert str(pickle.loads(pickle.dumps(both))) == str(both)
    assert [error.key for error in both.within("x: ").errors] == ["x: a", "x: b", "x: a"]


def test_the_defaults_are_those_of_the_design(tree: dict[str, Any]) -> None:
    r = config.from_dict(tree)
    config.check(r)
    assert r.auto == set(config.planned_keys())
    assert (r.sampling.gamma, r.sampling.period, r.sampling.tau, r.sampling.scheme) == (12, 50, 13, "bernoulli")
    assert (r.optim.lr, r.optim.schedule, r.optim.warmup_steps) == (3e-4, "linear", 0)
    assert (r.optim.rank, r.optim.update_proj_gap, r.optim.scale) == (128, 200, 1.0)
    assert (r.optim.moments_on_refresh, r.optim.refresh_batch, r.optim.always_on) == ("align", "full", "full")
    assert r.optim.refresh == "full"
    assert (r.train.global_batch_size, r.data.max_length, r.train.epochs, r.model.dtype) == (16, 512, 1, "bfloat16")


def test_every_key_says_what_it_means_and_expects() -> None:
    for key, field in config.recipe_keys().items():
        assert (field.description or "").endswith("."), key
        assert config.words(field)
    assert config.may_change_on_resume("train.save_steps")
    assert not config.may_change_on_resume("optim.rank")


def test_the_optimizer_has_the_recipes_settings() -> None:
    keys = config.recipe_keys()
    for name, field in OWSConfig.model_fields.items():
        key = next((f"{section}.{name}" for section in ("sampling", "optim") if f"{section}.{name}" in keys), None)
        if name not in ("rank", "accumulation", "seed", "period", "lr", "adaptive", "gamma"):
            assert key is not None
            assert (field.default, field.description) == (keys[key].default, keys[key].description)
    assert OWSConfig(rank=None, betas=(0.8, 0.9)).rank is None
    automatic = OWSConfig(**dict.fromkeys(("scale", "refresh", "lr"), "auto"))
    assert (automatic.scale, automatic.refresh, automatic.lr) == ("auto", "full", 3e-4)
    with pytest.raises(UserError) as caught:
        config.parse(OWSConfig, {"rank": None, "always_on": "low_rank", "gamma": 1.5, "scheme": "fixed", "lr": "x"})
    assert [error.key for error in caught.value.errors] == ["lr", "gamma", "always_on"]


def test_each_method_has_its_own_learning_rate(tree: dict[str, Any]) -> None:
    """Where none is given, or auto; one that is given stays."""
    names = set(get_args(config.recipe_keys()["method.name"].annotation))
    assert set(LEARNING_RATES) == names
    for name in names:
        for given in ({}, {"optim.lr": "auto"}):
            assert config.from_dict(changed(tree, {"method.name": name, **given})).optim.lr == LEARNING_RATES[name]
        assert config.from_dict(changed(tree, {"method.name": name, "optim.lr": 0.5})).optim.lr == 0.5
    assert OWSConfig().lr == LEARNING_RATES["ows"]


@pytest.mark.parametrize(
    ("importance", "changes", "gamma"),
    [
        ([1.0] * 80, {}, 12),
        ([1.0] * 28, {}, 11.2),
        ([1.0] * 28, {"sampling.scheme": "fixed"}, 11),
        ([1.0] * 7 + [0.0] * 25, {}, 7),
        ([1.0] * 32, {"method.name": "lisa"}, 5),
        ([1.0], {}, 1),
        ([1.0] * 32, {"sampling.gamma": 4.5}, 4.5),
    ],
)
def test_gamma_of_layers(tree: dict[str, Any], importance: list[float], changes: dict[str, Any], gamma: float) -> None:
    recipe = config.from_dict(changed(tree, changes))
    assert config.gamma(recipe, importance) == pytest.approx(gamma)
    same = {key.partition(".")[2]: value for key, value in changes.items() if key != "method.name"}
    rank = 4 if recipe.method.name == "ows" else None
    assert OWSConfig(rank=rank, **same).gamma_of(importance) == pytest.approx(gamma)


@pytest.mark.parametrize(("steps", "period"), [(None, 50), (5000, 50), (500, 50), (499, 49), (62, 6), (19, 1), (3, 1)])
def test_a_short_run_has_ten_draws(tree: dict[str, Any], steps: int | None, period: int) -> None:
    assert config.period(config.from_dict(changed(tree, {"sampling.period": "auto"})), steps) == period
    assert config.period(config.from_dict(changed(tree, {"sampling.period": 7})), steps) == 7


def test_yaml_gives_the_recipe_back(tree: dict[str, Any]) -> None:
    r = config.from_dict(changed(tree, {"optim.betas": [0.8, 0.99], "data.train": ["rows.jsonl", {"path": "x"}]}))
    assert config.from_dict(yaml.safe_load(config.to_yaml(r))) == r
    assert "update_proj_gap: 200" in config.to_yaml(r)
    assert pickle.loads(pickle.dumps(r)) == r
    assert config.changed(r, {"optim.rank": 3, "optim.lr": 1.0, "train.steps": 7}).optim.rank == 3


def test_a_tilde_is_the_home_folder(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    r = config.from_dict(changed(tree, {"train.output_dir": "~/run", "data.train": [{"path": "~/rows.jsonl"}]}))
    assert r.train.output_dir == "/home/ann/run"
    assert config.sources(r.data, "data.train")[0].path == "/home/ann/rows.jsonl"


def test_numbers_that_yaml_reads_as_text_are_numbers(tree: dict[str, Any]) -> None:
    r = config.from_dict(changed(tree, {"optim.lr": yaml.safe_load("3e-4"), "sampling.gamma": 4}))
    assert (r.optim.lr, r.sampling.gamma, type(r.sampling.gamma)) == (3e-4, 4.0, float)


def test_five_mistakes_are_five_lines(tree: dict[str, Any]) -> None:
    keys = {"optim.rnk": 3, "optim.lr": "fast", "train.steps": 5, "optim.warmup_steps": 6, "optim.refresh_gap": 9}
    assert lines(changed(tree, {**keys, "data.eval": "none.jsonl"})) == [
        "optim.lr: 'fast' is invalid: expected a number of at least 0, or auto",
        "optim.rnk: 3 is invalid: there is no such key; is optim.rank meant?",
        "optim.refresh_gap: 9 is invalid: it is called optim.update_proj_gap",
        "optim.warmup_steps: 6 is invalid: expected at most train.steps, 5",
        "data.eval: 'none.jsonl' is invalid: expected a file that exists",
    ]


def test_what_is_compared_with_a_wrong_key_is_no_mistake(tree: dict[str, Any]) -> None:
    assert len(lines(changed(tree, {"data.eval": 3, "train.eval_steps": 2}))) == 1
    assert len(lines(changed(tree, {"train.micro_batch_size": "x", "train.global_batch_size": 12}))) == 1
    # a contradiction hides no other
    keys = {"train.global_batch_size": 12, "train.micro_batch_size": 5, "train.steps": 1, "optim.warmup_steps": 2}
    assert len(lines(changed(tree, keys))) == 2


@pytest.mark.parametrize(
    ("old", "says"),
    [
        ("train.eval_every", "it is called train.eval_steps"),
        ("train.save_every", "it is called train.save_steps"),
        ("train.keep_last", "it is called train.save_total_limit"),
        ("train.batch_size", "it is called train.global_batch_size"),
        ("model.attention", "it is called model.attn_implementation"),
        ("optim.refresh_gap", "it is called optim.update_proj_gap"),
        ("optim.fold_rounding", "it is called optim.merge_rounding"),
        ("optim.side", "leave it out"),
    ],
)
def test_old_keys_are_refused_with_the_new_name(tree: dict[str, Any], old: str, says: str) -> None:
    [line] = lines(changed(tree, {old: 3}))
    assert line.startswith(f"{old}: 3 is invalid: {says}")


OF_SOURCES = "[{path: rows.jsonl, %s}]"


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("optim.rank", "x", "expected an integer of at least 1"),
        ("optim.rank", 1.5, "expected an integer"),
        ("optim.rank", True, "expected an integer"),
        ("optim.rank", None, "expected an integer"),
        ("optim.rank", 0, "expected an integer of at least 1"),
        ("optim.rank", 2**31, "expected a number of at most 2.14748e+09"),
        ("optim.lr", True, "expected a number"),
        ("optim.lr", [1], "expected a number"),
        ("optim.scale", "fast", "expected a number above 0, or auto"),
        ("optim.proj_gap_range", [4], "expected a list of 2 integers, the first at least 2"),
        ("optim.proj_gap_range", (9, 4), "expected [least, most], the least of them at least 2"),
        ("optim.scale", 0, "expected a number above 0, or auto"),
        ("optim.lr", 10**400, "expected a number"),
        ("optim.lr", -1, "expected a number of at least 0, or auto"),
        ("optim.lr", float("inf"), "expected a finite number"),
        ("optim.lr", "nan", "expected a finite number"),
        ("optim.max_grad_norm", "x", "expected a number above 0, or null"),
        ("optim.max_grad_norm", 0, "expected a number above 0, or null"),
        ("optim.betas", [0.9], "expected a list of 2 numbers"),
        ("optim.betas", 0.9, "expected a list of 2 numbers"),
        ("optim.betas", [0.9, 1.0], "expected a list of 2 numbers, each at least 0 and below 1"),
        ("optim.projector", "qr", "expected one of randomized, svd"),
        ("optim.lrr", 3, "there is no such key; is optim.lr meant?"),
        ("train.gradient_checkpointing", "yes", "expected true or false"),
        ("train.tiled_mlp", "sometimes", "expected true or false, or auto"),
        ("train.kernels", "triton", "expected one of auto, torch, liger, compile"),
        ("train.epochs", 0, "expected a number above 0"),
        ("train.steps", 0, "expected an integer of at least 1, or null"),
        ("train.resume", "no/such/folder", "expected never, auto, or the folder of a checkpoint"),
        ("train.output_dir", "rows.jsonl", "expected a folder that can be written to"),
        ("train.output_dir", "rows.jsonl/a/b", "expected a folder that can be written to"),
        ("train.output_dir", "n" * 300, "expected a folder that can be written to"),
        ("train.output_dir", "run\0", "expected a folder that can be written to"),
        ("train.output_dir", None, "it is required: expected text"),
        ("train.ds_config", "none.json", "expected a file that exists"),
        ("log.trackers", "tensorboard", "expected a list of some of"),
        ("log.trackers", ["tensorbord"], "expected a list of some of"),
        ("model.path", None, "it is required: expected text"),
        ("model.path", "", "expected text, a folder or a name on the hub"),
        ("model.path", "/no/such", "expected a folder that exists, or a name on the hub"),
        ("model.path", "rows.jsonl", "expected a folder that exists, or a name on the hub"),
        ("model.revision", yaml.safe_load("2026-01-01"), "expected text or null"),
        ("model.attn_implementation", "some/kernel", "expected a kernel of transformers, or model.trust_remote_code"),
        ("sampling.gamma", 0, "expected a number above 0"),
        ("sampling.gamma", float("nan"), "expected a finite number"),
        ("sampling.tau", -1, "expected a number above 0"),
        ("sampling.period", 0, "expected an integer of at least 1, or auto"),
        ("sampling.seed", -1, "expected an integer of at least 0, or null"),
        ("sampling.scores", "no/such.json", "expected a file that exists"),
        ("data.train", None, "it is required"),
        ("data.train", [], "expected text, or a list of sources"),
        ("data.train", 3, "expected text, or a list of sources"),
        ("data.eval", "no/such.jsonl", "expected a file that exists"),
        ("data.train", "no/such.parquet", "expected a file that exists"),
        ("data.train", "/no/such", "expected a file or folder that exists, or the name of a data set on the hub"),
        ("data.eval", "a/b/c", "expected a file or folder that exists, or the name of a data set on the hub"),
        ("data.train_split", "train[:1%", "expected a split, such as train, or a part of one"),
        ("data.eval_split", "", "expected a split, such as train, or a part of one"),
        ("data.max_length", 1, "expected an integer of at least 2"),
        ("data.format", "xml", "expected one of auto, messages"),
        ("data.chat_template", "none.jinja", "expected a file that exists"),
        ("data.cache", "rows.jsonl/c", "expected a folder that can be written to"),
        ("method.lora_dropout", 1, "expected a number of at least 0 and below 1"),
    ],
)
def test_values_are_refused(tree: dict[str, Any], key: str, value: object, right: str) -> None:
    [line] = lines(changed(tree, {key: value}))
    assert line.startswith(f"{key}: {shorten(value)} is invalid: {right}")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"weight": 1}, "data.train[1].path: None is invalid: it is required: expected a file"),
        (
            {"path": "m", "wieght": 1},
            "data.train[1].wieght: 1 is invalid: there is no such key; is data.train[1].weight",
        ),
        ({"path": "m", "format": "xml"}, "data.train[1].format: 'xml' is invalid: expected one of auto"),
        ({"path": "m", "split": "x["}, "data.train[1].split: 'x[' is invalid: expected a split"),
        ({"path": "m", "weight": 0}, "data.train[1].weight: 0 is invalid: expected a number above 0, or null"),
        ("none.jsonl", "data.train[1].path: 'none.jsonl' is invalid: expected a file that exists"),
        (3, "data.train[1]: 3 is invalid: expected text, or a list of sources"),
    ],
)
def test_sources_are_checked(tree: dict[str, Any], source: object, said: str) -> None:
    [line] = lines(changed(tree, {"data.train": ["rows.jsonl", source]}))
    assert line.startswith(said)


def test_sections_are_checked(tree: dict[str, Any]) -> None:
    assert lines({**tree, "optimm": {"rank": 3}}) == [
        "optimm: {'rank': 3} is invalid: there is no such key; is optim meant?"
    ]
    assert lines({**tree, "optim": 3}) == ["optim: 3 is invalid: expected a section: lines of `key: value`, indented"]
    assert lines({**tree, "optim": []})[0].startswith("optim: [] is invalid: expected a section")
    assert lines({**tree, "train": None}) == ["train.output_dir: None is invalid: it is required: expected text"]
    assert lines({**tree, "optim": {3: 4}})[0].startswith("optim.3: ")
    said = lines({**tree, "optim": {"\x1b[31mred\nlr": 1, "projector": "\x1b[31mred"}})
    assert said[0].startswith(r"optim.projector: '\x1b[31mred' is invalid")
    assert said[1].startswith(r"optim.\x1b[31mred lr: 1 is invalid")


@pytest.mark.parametrize("source", ["openai/gsm8k", "gsm8k", "zwhe99/commonsense_170k", "a-b/c.d", "."])
def test_data_sets_are_not_looked_up(tree: dict[str, Any], source: str) -> None:
    for split in ("train", "auxiliary_train", "train[:1%]", "train[-100:]", "train.a[10%:20%]"):
        keys = {"data.train": source, "data.eval": source, "data.eval_split": split}
        config.from_dict(changed(tree, keys), files=True)


STREAM = {"data.streaming": True, "train.steps": 9}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sampling.scheme": "fixed", "sampling.gamma": 2.5}, "sampling.gamma: 2.5 is invalid: expected a whole"),
        ({"train.global_batch_size": 2, "train.micro_batch_size": 4}, "train.global_batch_size: 2"),
        ({"train.global_batch_size": 6, "train.micro_batch_size": 4}, "train.global_batch_size: 6"),
        ({"train.steps": 5, "optim.warmup_steps": 6}, "optim.warmup_steps: 6 is invalid: expected at most train.steps"),
        ({"optim.refresh": "sketch", "optim.projector": "svd"}, "optim.projector: 'svd'"),
        ({"optim.refresh": "sketch", "optim.refresh_batch": "first"}, "optim.refresh_batch: 'first'"),
        ({"optim.refresh": "sketch", "optim.update_proj_gap": 1}, "optim.update_proj_gap: 1"),
        ({"optim.rule": "muon", "method.name": "lisa"}, "optim.rule: 'muon'"),
        ({"method.name": "lisa", "optim.always_on": "low_rank"}, "optim.always_on: 'low_rank'"),
        ({"train.eval_steps": 2}, "train.eval_steps: 2 is invalid: leave it out, or give data.eval"),
        ({"train.sharding": "replicated", "train.ds_config": "ds.json"}, "train.ds_config: 'ds.json'"),
        ({"data.eval": [{"path": "eval.jsonl", "weight": 2}]}, "data.eval: [Source(path='eval.jsonl'"),
        ({"data.streaming": True}, "train.steps: None is invalid: expected their number"),
        (STREAM | {"data.train": ["rows.jsonl", "eval.jsonl"]}, "data.train: [Source(path='rows.jsonl'"),
        (STREAM | {"data.train_split": "train[:9]"}, "data.train_split: 'train[:9]' is invalid: expected a whole"),
        (STREAM | {"data.buffer_size": 3}, "data.buffer_size: 3 is invalid: expected at least train.global_batch_size"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(tree: dict[str, Any], keys: dict[str, Any], said: str) -> None:
    [line] = lines(changed(tree, keys))
    assert line.startswith(said)


def test_a_changed_recipe_is_checked_again(tree: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"optim\.rank: 0 is invalid"):
        config.check(config.changed(config.from_dict(tree), {"optim.rank": 0}))


def test_accumulation(tree: dict[str, Any]) -> None:
    r = config.from_dict({**tree, "train": {"output_dir": "o", "global_batch_size": 16, "micro_batch_size": 2}})
    assert [config.accumulation(r, world_size) for world_size in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(UserError, match=r"train\.global_batch_size: 16 is invalid: expected a multiple of 6"):
        config.accumulation(r, 3)


BOMB = "a: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGES = "a: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("optim:\n  rank: 3\n  betas: {\n", "r.yaml:4' is invalid: expected valid YAML"),
        ("[1, 2]", "r.yaml' is invalid: expected a YAML file of sections"),
        (
            "a: {b: 1}\na: {c: 3}",
            "r.yaml:2' is invalid: expected valid YAML (the key a stands here for the second time)",
        ),
        (b"\xff\xfe\x00", "r.yaml' is invalid: expected a readable YAML file"),
        ("model: \x1b[31m", "r.yaml' is invalid: expected valid YAML"),
        (BOMB, "more than 100000 values"),
        (MERGES, "more than 100000 values"),
        ("log: &a {trackers: [*a]}", "r.yaml:1' is invalid: expected valid YAML"),
        ("[" * 5000, "expected valid YAML"),
        ("model: !!python/object/apply:os.mkdir [hacked]", "r.yaml:1' is invalid"),
        ("model: 2026-99-99", "expected valid YAML"),
        ("model: !!bool maybe", "expected valid YAML"),
        (f"optim: {{rank: {'9' * 9999}}}", "expected valid YAML"),
    ],
)
def test_yaml_files_that_cannot_be_read(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        files.read_yaml(path)
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_yaml_files_that_are_none(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory"), ("/dev/zero", "more than")):
        with pytest.raises(UserError, match=said):
            files.read_yaml(path)
    (tmp_path / "r.yaml").write_text("# yaml-language-server: $schema=recipe.schema.json\n")
    assert files.read_yaml(tmp_path / "r.yaml") == {}


def test_importing_the_recipe_is_cheap() -> None:
    code = (
        "import sys, ows_ds\nassert 'pydantic' not in sys.modules\n"
        "import ows_ds.config\nassert ows_ds.OWSConfig is ows_ds.config.OWSConfig\n"
        "print([m for m in ('torch', 'numpy', 'yaml', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert isinstance(Recipe, type)


def test_inputs_on_the_host_are_those_of_checkpointed_layers() -> None:
    train = {"output_dir": "none", "activation_offload": True}
    made = config.from_dict({"model": {"path": "m"}, "train": train})
    assert made.train.gradient_checkpointing
    assert "train.gradient_checkpointing" not in made.auto
    assert config.from_dict(config.to_dict(made)) == made
    with pytest.raises(UserError, match=r"train\.activation_offload: True is invalid: expected false, or train\.grad"):
        config.from_dict({"model": {"path": "m"}, "train": {**train, "gradient_checkpointing": False}})
