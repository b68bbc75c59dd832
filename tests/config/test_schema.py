"""The JSON schema against the recipes of the repository, and against broken ones."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ows_ds import config
from ows_ds.cli.main import main
from ows_ds.config.schema import schema
from ows_ds.errors import UserError
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
STUDIES = sorted((ROOT / "launch" / "bench").glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LEAST: dict[str, Any] = {"model": {"path": "m"}, "train": {"output_dir": "o"}}
VALIDATOR = jsonschema.Draft202012Validator(schema())


def fragments(page: Path) -> list[dict[str, Any]]:
    """Recipes, or parts of them, in a page's blocks of YAML."""
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    trees = [yaml.safe_load(block) for block in blocks]
    return [tree for tree in trees if isinstance(tree, dict) and tree and set(tree) <= set(config.sections())]


def completed(tree: dict[str, Any]) -> dict[str, Any]:
    """A part of a recipe with what is required."""
    return {**LEAST, **tree, **{name: {**LEAST[name], **(tree.get(name) or {})} for name in LEAST}}


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    VALIDATOR.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_recipes_of_studies_are_valid(path: Path) -> None:
    VALIDATOR.validate(completed(yaml.safe_load(path.read_text())["recipe"]))


def test_recipes_of_the_documents_are_valid() -> None:
    found = [tree for page in PAGES for tree in fragments(page)]
    assert found
    for tree in found:
        VALIDATOR.validate(completed(tree))
        config.from_dict(completed(tree))


def test_what_the_reader_takes_is_valid() -> None:
    sources = [{"path": "b", "weight": 2}, "c"]
    for tree in (LEAST, {**LEAST, "optim": None}, {**LEAST, "data": {"train": sources, "eval": "a"}}):
        VALIDATOR.validate(tree)
        VALIDATOR.validate(config.to_dict(config.from_dict(tree)))


BROKEN = {
    "an unknown section": {"optimm": {}},
    "an unknown key": {"optim": {"rnk": 3}},
    "an old key": {"train": {"batch_size": 3}},
    "text for an integer": {"optim": {"rank": "many"}},
    "truth for an integer": {"optim": {"rank": True}},
    "a rank of zero": {"optim": {"rank": 0}},
    "no such choice": {"method": {"name": "adapters"}},
    "a negative learning rate": {"optim": {"lr": -0.1}},
    "a beta of one": {"optim": {"betas": [0.9, 1.0]}},
    "too short a list": {"optim": {"betas": [0.9]}},
    "no source": {"data": {"train": []}},
    "a source without a path": {"data": {"train": [{"weight": 1}]}},
    "half a split": {"data": {"train_split": "train[:1"}},
    "a section that is a list": {"optim": []},
    "no model": {"model": {"path": ""}},
    "an unknown tracker": {"log": {"trackers": ["tensorbord"]}},
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_recipes_are_not(name: str) -> None:
    tree = {section: {**LEAST.get(section, {}), **values} if values and section in LEAST else values
            for section, values in (copy.deepcopy(LEAST) | BROKEN[name]).items()}  # fmt: skip
    assert not VALIDATOR.is_valid(tree)
    with pytest.raises(UserError):
        config.from_dict(tree)


def test_the_verb_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()
    assert main(["schema", "--output", str(tmp_path / "s" / "recipe.schema.json")]) == 0
    assert json.loads((tmp_path / "s" / "recipe.schema.json").read_text()) == schema()
    assert main(["schema", "--output", str(tmp_path)]) == 2


def test_every_range_is_in_the_schema() -> None:
    found = schema()["$defs"]
    for key, field in config.recipe_keys().items():
        section, name = key.split(".")
        shown = json.dumps(found[section.capitalize()]["properties"][name])
        assert not re.search('"(gt|ge|lt|le)":', shown)  # no words of JSON schema
        assert ("inimum" in shown) == bool(re.search("above|at least", config.words(field))), key
