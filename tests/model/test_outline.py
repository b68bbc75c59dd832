"""Outlines of the plainest families: what transformers' own models of them are and do, without transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers as tf

from ows_ds.model.outline import FAMILIES, Outline, outline
from ows_ds.model.shapes import SHAPES, configuration, model_of, named, without_weights
from ows_ds.planner.passes import passes
from ows_ds.planner.recording import record

OUTLINED = [name for name in SHAPES if named(name) is not None]


def test_what_is_outlined() -> None:
    assert {SHAPES[name].family for name in OUTLINED} == {*FAMILIES}
    assert {"llama2-7b", "llama3-70b", "qwen3-32b", "gemma3-27b"} <= {*OUTLINED}
    assert outline(SHAPES["mixtral-8x7b"]) is None
    assert outline(replace(SHAPES["llama2-7b"], more={"attention_bias": True})) is None


def shallow(name: str, layers: int = 2) -> Outline:
    found = outline(replace(SHAPES[name], layers=layers))
    assert found is not None
    return found


@pytest.mark.parametrize("name", OUTLINED)
def test_layers_are_those_of_the_model(name: str) -> None:
    found = shallow(name)
    model = model_of(tf.AutoConfig.for_model(**configuration(found.shape)))
    assert found.layers == model.layers
    assert not model.whole_logits


@pytest.mark.parametrize("name", ["llama2-7b", "mistral-7b", "qwen2.5-7b", "qwen3-8b", "gemma3-4b"])
def test_a_pass_is_that_of_the_model(name: str) -> None:
    """With layer 1 alone, with embedding and head, and with nothing in training; with layers that run again."""
    found = shallow(name, 3)
    config = tf.AutoConfig.for_model(**configuration(found.shape))
    for lowest, outside, checkpointing in (
        (1, False, False), (1, False, True), (1, True, True), (0, False, True), (0, True, False), (None, False, False),
    ):  # fmt: skip
        model = without_weights(config)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()
        names = [name for name, _ in model.named_parameters()]
        trained = [one for one in names if f"layers.{lowest}." in one or (outside and "layers." not in one)]
        theirs = record(model, trained)
        ours = passes(found, lowest, outside, checkpointing)
        assert ours.uses == theirs.uses
        assert list(ours.weights.items()) == list(theirs.weights.items())
        assert list(ours.numel.items()) == list(theirs.numel.items())
