"""Tiny random models of the families that must work, made from configurations: 3 layers, hidden size 32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    "llama": partial(tf.LlamaConfig, **_COMMON),
    "llama with biases": partial(tf.LlamaConfig, **_COMMON, attention_bias=True, mlp_bias=True),
    "mistral": partial(tf.MistralConfig, **_COMMON),
    "qwen2": partial(tf.Qwen2Config, **_COMMON),
    "qwen3": partial(tf.Qwen3Config, **_COMMON),
    "gemma2": partial(tf.Gemma2Config, **_COMMON),
    "gemma3": partial(tf.Gemma3TextConfig, **_COMMON),
    "phi3": partial(tf.Phi3Config, **_COMMON),
    "gpt_neox": partial(tf.GPTNeoXConfig, **_NEOX),
    "gpt2": partial(tf.GPT2Config, **_GPT2),
}
FAMILIES = tuple(_CONFIGS)

# experts, linear attention, convolutions; a matrix in each layer has a shorter side of 4 or more
_NO_HEAD_DIM = {key: value for key, value in _COMMON.items() if key != "head_dim"}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4,
    "layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 24,
}  # fmt: skip
_TWO_OF_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
_CONV = {"num_dense_layers": 1, "conv_L_cache": 3, "layer_types": ["conv", "full_attention", "conv"]}
_MIXED: dict[str, Callable[..., tf.PreTrainedConfig]] = {
    "mixtral": partial(tf.MixtralConfig, **_COMMON, **_TWO_OF_FOUR),
    "qwen3_moe": partial(tf.Qwen3MoeConfig, **_COMMON, **_MOE),
    "gpt_oss": partial(tf.GptOssConfig, **_COMMON, **_TWO_OF_FOUR, rope_parameters=None),
    "deepseek_v3": partial(tf.DeepseekV3Config, **{**_COMMON, **_MLA}),
    "granitemoehybrid": partial(tf.GraniteMoeHybridConfig, **_NO_HEAD_DIM, **_TWO_OF_FOUR, **_MAMBA),
    "qwen3_5": partial(tf.Qwen3_5TextConfig, **_COMMON, **_LINEAR),
    "qwen3_5_moe": partial(tf.Qwen3_5MoeTextConfig, **_COMMON, **_MOE, **_LINEAR, shared_expert_intermediate_size=24),
    "lfm2_moe": partial(tf.Lfm2MoeConfig, **_NO_HEAD_DIM, **_MOE, **_CONV),
}
MIXED = tuple(_MIXED)


def tiny(
    family: str, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, **more: object
) -> nn.Module:
    """A causal language model of ``family`` with random weights, in evaluation mode, on the CPU.

    more: of its configuration.
    """
    config = {**_CONFIGS, **_MIXED}[family](tie_word_embeddings=tied, **more)
    torch.manual_seed(seed)
    model: nn.Module = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: zeros and ones would hide mistakes
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.to(dtype).eval()
