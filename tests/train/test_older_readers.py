"""The exported model as transformers 4, and servers of its time, read it: in a second environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import Replicated
from ows_ds.train.export import let_older_read, save_model
from tests.support.tokenizer import byte_tokenizer

OLD = ("transformers==4.57.6", "tokenizers>=0.22,<0.23", "huggingface-hub>=0.34,<1.0")
READ = """
import sys
import torch
import transformers
assert transformers.__version__.startswith("4."), transformers.__version__
for folder in sys.argv[1:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.save(model(torch.arange(3, 60)[None]).logits, folder + "/logits.pt")
    open(folder + "/tokens", "w").write(repr(tokenizer("hello there").input_ids))
"""
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
BOTH = {
    "full_attention": {"rope_type": "default", "rope_theta": 70000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}),
    "llama3": ("LlamaConfig", {"rope_parameters": SCALED}),
    "qwen3": ("Qwen3Config", {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}),
    "gemma3": ("Gemma3TextConfig", {"rope_parameters": BOTH, "sliding_window": 16}),
}


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the older packages."""
    folder = tmp_path_factory.mktemp("older")
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *OLD]
    found = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    if found.returncode:
        pytest.skip(f"there is no second environment: {found.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.mark.slow
def test_older_transformers_compute_the_same(older: Path, tmp_path: Path) -> None:
    import transformers

    expected, folders = {}, {}
    for name, (kind, given) in CONFIGS.items():
        torch.manual_seed(0)
        described = getattr(transformers, kind)(**SMALL, **given)
        model = transformers.AutoModelForCausalLM.from_config(described).float().eval()
        folders[name] = tmp_path / name
        save_model(Replicated(model, Communicator()), byte_tokenizer(), folders[name])
        again, tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name]), byte_tokenizer()
        assert again.all_special_tokens == tokenizer.all_special_tokens
        with torch.no_grad():
            expected[name] = model(torch.arange(3, 60)[None]).logits
    environment = {**os.environ, "PYTHONPATH": str(older)}
    words = [sys.executable, "-c", READ, *map(str, folders.values())]
    found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    for name, logits in expected.items():
        theirs = torch.load(folders[name] / "logits.pt", weights_only=True)
        torch.testing.assert_close(theirs, logits, rtol=1e-4, atol=1e-5)
        assert (folders[name] / "tokens").read_text() == repr(byte_tokenizer()("hello there").input_ids)


def test_names_of_both_ages(tmp_path: Path) -> None:
    """And a second time nothing changes."""
    import transformers

    described = transformers.Gemma3TextConfig(**SMALL, **CONFIGS["gemma3"][1])
    described.save_pretrained(tmp_path)
    let_older_read(tmp_path)
    once = (tmp_path / "config.json").read_text()
    let_older_read(tmp_path)
    assert (tmp_path / "config.json").read_text() == once
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == described.rope_parameters
    for word in ('"rope_theta": 70000.0', '"rope_local_base_freq": 3000.0', '"rope_scaling": null'):
        assert word in once
