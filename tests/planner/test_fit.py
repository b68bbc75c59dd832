"""Keys that are ``auto``: what is chosen, in which order, and that it is no more than is needed."""

from __future__ import annotations

from typing import Any

import pytest

from ows_ds import config
from ows_ds.config import Recipe
from ows_ds.model.shapes import read_model
from ows_ds.planner.fit import Fitted, by_speed, fit
from ows_ds.planner.forecast import Planner

GIB = 2**30


def recipe(**sections: dict[str, Any]) -> Recipe:
    return config.from_dict(
        {"model": {"path": "llama3-8b"}, "train": {"output_dir": "o"}, "data": {"max_length": 2048}, **sections}
    )


def chosen(free: float, **sections: dict[str, Any]) -> Fitted:
    planner = Planner(recipe(**sections), read_model("llama3-8b"))
    return fit(planner, by_speed(planner, 1, ["replicated"]), free * GIB, planner.recipe.auto)


def test_less_memory_takes_more_changes_and_never_needless_ones() -> None:
    seen = []
    for free in (200, 80, 40, 22, 16, 13):
        found = chosen(free)
        assert found.fits
        assert found.peak <= free * GIB
        seen.append(len(found.changes))
        for key in list(found.changes)[:-1]:  # without any one of them it does not fit
            less = config.changed(found.planner.recipe, {key: config.value_of(recipe(), key)})
            planner = Planner(less, found.planner.model)
            free_again = by_speed(Planner(recipe(), found.planner.model), 1, ["replicated"])
            assert min(planner.peak(choice, 3.0) for choice in free_again) > free * GIB, (free, key)
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert not chosen(4).fits


def test_what_leaves_the_training_as_it_is_comes_first() -> None:
    roomy, tight = chosen(200), chosen(45)
    assert not roomy.choice.checkpointing
    assert roomy.choice.micro_batch * 2048 == 8192
    assert tight.choice.checkpointing
    assert not {**roomy.changes, **tight.changes}


def test_a_key_that_is_given_stays() -> None:
    given = {"optim": {"always_on": "full", "moments": "float32"}, "train": {"output_dir": "o", "micro_batch_size": 2}}
    found = chosen(22, **given)
    assert found.choice.micro_batch == 2
    assert not {"optim.always_on", "optim.moments", "sampling.scheme", "optim.rank"} & found.changes.keys()
    assert chosen(22, model={"path": "llama3-8b", "frozen": "same"}).recipe.model.frozen == "same"


def test_the_recipe_of_it_is_read_again() -> None:
    found = chosen(22)
    assert found.recipe.auto == {"sampling.period", "sampling.gamma"}
    assert config.from_dict(config.to_dict(found.recipe)) == found.recipe
    first, second = found.lines(recipe().auto, "GPU", 22 * GIB)
    assert first.startswith("chosen for 22.0 GiB of a GPU: train.micro_batch_size ")
    assert "EMBEDDING AND HEAD DO NOT TRAIN (optim.always_on none)" in second
    assert "EMBEDDING AND HEAD DO NOT TRAIN" in "".join(found.lines(frozenset(), "GPU", 22 * GIB))
    [line] = chosen(200).lines(frozenset(), "GPU", 200 * GIB)
    assert line.endswith(" of a GPU planned, of 200.0 GiB")


@pytest.mark.parametrize("method", ["lisa", "badam", "galore", "lora", "full", "mezo", "hift"])
def test_no_method_is_given_what_it_refuses(method: str) -> None:
    for free in (60, 14):
        config.check(chosen(free, method={"name": method}).recipe, files=False)


def test_shapes_are_read_where_a_launcher_has_set_zero3_up() -> None:
    """As `accelerate launch` with DeepSpeed does: transformers would build the model in shards."""
    from transformers.integrations import HfDeepSpeedConfig

    keep = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert read_model("llama2-7b").layers == read_model("llama2-7b").layers
    del keep
