"""A key that another tool has leads to ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from ows_ds import config
from ows_ds.cli.main import main
from ows_ds.config.elsewhere import MEANINGS
from ows_ds.errors import UserError

TREE = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "train": {"output_dir": "o"}}


def said(tree: dict[str, object]) -> list[str]:
    with pytest.raises(UserError) as caught:
        config.from_dict(tree)
    return [str(one) for one in caught.value.errors]


@pytest.mark.parametrize("theirs", sorted(MEANINGS))
def test_each_name_leads_to_a_key(theirs: str) -> None:
    """At the top of a file, and in a section."""
    ours = MEANINGS[theirs]
    key, _, value = ours.partition(" ")
    assert key in config.recipe_keys()
    assert theirs not in config.recipe_keys()
    if value:
        section, _, name = key.partition(".")
        assert getattr(
            getattr(config.from_dict({**TREE, section: {**TREE.get(section, {}), name: value}}), section), name
        )
    right = f"there is no such key; {ours} is what is meant"
    assert said({**TREE, theirs: 1}) == [f"{theirs}: 1 is invalid: {right}"]
    if theirs not in config.fields_of(type(config.from_dict(TREE).train)):
        assert said({**TREE, "train": {"output_dir": "o", theirs: 1}}) == [f"train.{theirs}: 1 is invalid: {right}"]


def test_our_own_without_its_section() -> None:
    assert said({**TREE, "rank": 3}) == ["rank: 3 is invalid: there is no such key; optim.rank is what is meant"]
    assert said({**TREE, "train": {"output_dir": "o", "lr": 3}}) == [
        "train.lr: 3 is invalid: there is no such key; optim.lr is what is meant"
    ]


def test_a_whole_recipe_of_another_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is recognised, and `convert` named; one key of theirs is a mistake of its own."""
    (tmp_path / "theirs.yaml").write_text("model_name_or_path: m\ndataset: d\nfinetuning_type: lora\n")
    assert main(["train", "--config", str(tmp_path / "theirs.yaml")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("ows-ds: error: --config: ")
    assert f"ows-ds convert {tmp_path / 'theirs.yaml'}" in line


def test_as_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--learning_rate", "1e-4", "--lora-r", "8"]) == 2
    error = capsys.readouterr().err
    assert "--learning_rate: '1e-4' is invalid: there is no such key; --optim.lr is what is meant" in error
    assert "--lora-r: '8' is invalid: there is no such key; --method.lora_rank is what is meant" in error
