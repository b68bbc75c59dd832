from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from ows_ds.compat import transformers as ours
from tests.compat import unchanged
from tests.support.families import tiny


def test_known_rows() -> None:
    from transformers import masking_utils, modeling_flash_attention_utils

    positions = torch.tensor([[0, 1, 2, 0, 1]])
    rows = torch.tensor([[0, 0, 0, 1, 1]])
    with unchanged("transformers", "masking_utils.find_packed_sequence_indices or _is_packed_sequence"):
        with ours.known_rows(None):
            assert masking_utils.find_packed_sequence_indices(positions) is None
            with ours.known_rows(rows):
                assert masking_utils.find_packed_sequence_indices(positions) is rows
                assert not modeling_flash_attention_utils._is_packed_sequence(positions, 1)
            assert masking_utils.find_packed_sequence_indices(positions) is None
        # outside, transformers looks for itself
        assert torch.equal(masking_utils.find_packed_sequence_indices(positions), rows)
        assert modeling_flash_attention_utils._is_packed_sequence(positions, 1)


def test_a_model_asks_for_its_rows() -> None:
    model: Any = tiny("llama")
    ids = torch.arange(3, 8)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with unchanged("transformers", "the look at packed sequences in create_causal_mask"), torch.no_grad():
        alone = model(input_ids=ids[:, 3:]).logits
        with ours.known_rows(torch.tensor([[0, 0, 0, 1, 1]])):
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 3:]
        with ours.known_rows(None):
            mixed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 3:]
        assert torch.allclose(packed, alone, atol=1e-5)
        assert not torch.allclose(mixed, alone, atol=1e-3)


def test_configurations(tmp_path: Path) -> None:
    with unchanged("transformers", "_attn_implementation, _commit_hash or _name_or_path of configurations"):
        model: Any = tiny("llama")
        assert ours.attn_implementation(model.config) == "eager"
        assert hasattr(model.config, "_commit_hash") or ours.commit_hash(model.config) is None
        model.save_pretrained(tmp_path)
        config = tf.AutoConfig.from_pretrained(tmp_path)
        assert config.name_or_path == str(tmp_path)
        ours.forget_origin(config)
        assert not config.name_or_path


def test_keys_of_models() -> None:
    with unchanged("transformers", "_keys_to_ignore_on_load_unexpected, _on_save or _keep_in_fp32_modules_strict"):
        model: Any = tiny("llama")
        names = ("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_save", "_keep_in_fp32_modules_strict")
        assert all(hasattr(model, name) for name in names)
        assert ours.ignored_on_load(model) == []
        assert ours.ignored_on_save(model) == set()
        assert not ours.keeps_float32(model)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with unchanged("transformers", "_raise_exceptions_for_missing_entries of cached_file"):
        (tmp_path / "there").write_text("")
        assert ours.cached_file(str(tmp_path), "there", "main") == str(tmp_path / "there")
        assert ours.cached_file(str(tmp_path), "not there", "main") is None


def test_without_sharding() -> None:
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    with unchanged("transformers", "integrations.deepspeed._hf_deepspeed_config_weak_ref"):
        keep = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
        assert is_deepspeed_zero3_enabled()
        with ours.without_sharding():
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
        del keep
    assert not is_deepspeed_zero3_enabled()


@pytest.mark.parametrize("name", [name for name, _ in inspect.getmembers(ours.CheckpointHooks, inspect.isfunction)])
def test_the_trainer_has_what_is_overridden(name: str) -> None:
    mine = inspect.signature(getattr(ours.CheckpointHooks, name)).parameters
    if name.startswith("_") or name == "save_model":
        with unchanged("transformers", f"Trainer.{name}"):
            assert list(inspect.signature(getattr(tf.Trainer, name)).parameters) == list(mine)
    else:
        assert not hasattr(tf.Trainer, name)


def test_the_trainer_writes_by_save() -> None:
    with unchanged("transformers", "Trainer._save"):
        assert list(inspect.signature(tf.Trainer._save).parameters) == ["self", "output_dir", "state_dict"]


def test_chat_templates() -> None:
    """The marked template writes what `apply_chat_template` does, and the messages are those that it hands over."""
    from ows_ds.data.template import render
    from tests.data.test_data import byte_tokenizer

    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.thinking or '' }}"
        "{% generation %}!{% endgeneration %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "a", "x": None}, {"role": "assistant", "content": "b", "reasoning": "c"}]
    with unchanged(
        "transformers", "_compile_jinja_template, _plain_template_data, _alias_reasoning_fields or {% generation %}"
    ):
        found = render(byte_tokenizer(template), messages, None, False, {})
        assert found.text == "user:a!assistant:bc!"
        assert [found.text[slice(*found.spans[number])] for number in (0, 1)] == ["user:a!", "assistant:bc!"]
        assert [found.text[slice(*span)] for span in found.generated] == ["!", "!"]
