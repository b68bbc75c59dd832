"""Tiny random models of the families that must work, made from configurations: 3 layers, hidden size 32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
from torch import nn

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NEOX = {key: value for key, value in _COMMON.items() if key not in ("num_key_value_heads", "head_dim")}
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48}
_GPT2 |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_CONFIGS: dict[str, Callable[..., tf.PreTrainedConfig]] = {
    "llama": lambda **more: tf.LlamaConfig(**_COMMON, **more),
    "llama with biases": lambda **more: tf.LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True, **more),
    "mistral": lambda **more: tf.MistralConfig(**_COMMON, **more),
    "qwen2": lambda **more: tf.Qwen2Config(**_COMMON, **more),
    "qwen3": lambda **more: tf.Qwen3Config(**_COMMON, **more),
    "gemma2": lambda **more: tf.Gemma2Config(**_COMMON, **more),
    "gemma3": lambda **more: tf.Gemma3TextConfig(**_COMMON, **more),
    "phi3": lambda **more: tf.Phi3Config(**_COMMON, **more),
    "gpt_neox": lambda **more: tf.GPTNeoXConfig(**_NEOX, **more),
    "gpt2": lambda **more: tf.GPT2Config(**_GPT2, **more),
}
FAMILIES = tuple(_CONFIGS)


def tiny(family: str, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A causal language model of ``family`` with random weights, in evaluation mode, on the CPU."""
    config = _CONFIGS[family](tie_word_embeddings=tied)
    torch.manual_seed(seed)
    model: nn.Module = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: zeros and ones would hide mistakes
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.to(dtype).eval()
