"""Where a saved model's generation stops."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from ows_ds.model.generation import special_tokens, stop_at
from tests.data.test_data import byte_tokenizer
from tests.support.families import tiny


@pytest.mark.parametrize(
    ("before", "tokens", "after", "said"),
    [
        (2, [256], [2, 256], "gets 256 (<|im_end|>)"),
        ([2, 256], [256], [2, 256], None),
        (256, [256], 256, None),
    ],
)
def test_marks_are_added(before: Any, tokens: list[int], after: Any, said: str | None) -> None:
    model: Any = tiny("llama")
    model.generation_config.eos_token_id = before
    line = stop_at(model, byte_tokenizer(), tokens)
    assert model.generation_config.eos_token_id == after
    assert line is None if said is None else line is not None and said in line


def test_a_model_that_generates_nothing() -> None:
    assert stop_at(nn.Linear(2, 2), byte_tokenizer(), [256]) is None


def test_special_tokens() -> None:
    assert special_tokens(byte_tokenizer()) == {256: "<|im_end|>", 257: "<|im_start|>"}
