"""Every model type of transformers trains, tiny (benchmarks/families.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.families import model_types, outcome, page, try_type

SOME = (
    "llama", "gpt2", "falcon", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "granitemoehybrid", "qwen3_5_moe",
    "lfm2_moe", "mamba2", "rwkv", "gemma3", "qwen2_vl",
)  # fmt: skip


@pytest.mark.parametrize("model_type", SOME)
def test_trains(model_type: str) -> None:
    try_type(model_type)


@pytest.mark.slow
def test_nearly_all_train() -> None:
    """Of those that can be made and run on text at all, at least 95 %; the page says which."""
    found = {name: outcome(name) for name in model_types()}
    fails = {name: said for name, (what, said) in found.items() if what == "fails"}
    trains = [name for name, (what, _) in found.items() if what == "trains"]
    assert len(fails) <= 0.05 * (len(fails) + len(trains)), json.dumps(fails, indent=1)
    assert len(trains) > 200
    assert (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8") == page(found)
