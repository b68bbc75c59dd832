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
    "llama": lambda **more: tf.LlamaConfig(**{**_COMMON, **more}),
    "llama with biases": lambda **more: tf.LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True, **more),
    "mistral": lambda **more: tf.MistralConfig(**{**_COMMON, **more}),
    "qwen2": lambda **more: tf.Qwen2Config(**_COMMON, **more),
    "qwen3": lambda **more: tf.Qwen3Config(**_COMMON, **more),
    "gemma2": lambda **more: tf.Gemma2Config(**_COMMON, **more),
    "gemma3": lambda **more: tf.Gemma3TextConfig(**_COMMON, **more),
    "phi3": lambda **more: tf.Phi3Config(**_COMMON, **more),
    "gpt_neox": lambda **more: tf.GPTNeoXConfig(**_NEOX, **more),
    "gpt2": lambda **more: tf.GPT2Config(**_GPT2, **more),
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
    "mixtral": lambda **more: tf.MixtralConfig(**{**_COMMON, **_TWO_OF_FOUR, **more}),
    "qwen3_moe": lambda **more: tf.Qwen3MoeConfig(**{**_COMMON, **_MOE, **more}),
    "gpt_oss": lambda **more: tf.GptOssConfig(**_COMMON, **_TWO_OF_FOUR, rope_parameters=None, **more),
    "deepseek_v3": lambda **more: tf.DeepseekV3Config(**{**_COMMON, **_MLA}, **more),
    "granitemoehybrid": lambda **more: tf.GraniteMoeHybridConfig(**_NO_HEAD_DIM, **_TWO_OF_FOUR, **_MAMBA, **more),
    "qwen3_5": lambda **more: tf.Qwen3_5TextConfig(**_COMMON, **_LINEAR, **more),
    "qwen3_5_moe": lambda **more: tf.Qwen3_5MoeTextConfig(
        **_COMMON, **_MOE, **_LINEAR, shared_expert_intermediate_size=24, **more
    ),
    "lfm2_moe": lambda **more: tf.Lfm2MoeConfig(**_NO_HEAD_DIM, **_MOE, **_CONV, **more),
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
