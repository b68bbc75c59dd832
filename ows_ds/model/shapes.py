"""Widths of known models by name, and any model's layers from its configuration alone: no weight is made or read.

The numbers are those of the models' own configurations (Touvron et al. 2023, Grattafiori et al. 2024, Jiang et al.
2023 and 2024, Qwen 2024 and 2025, OpenAI 2025, Zhipu 2025, DeepSeek 2024). Importing this module is cheap: no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ows_ds.errors import UserError, first_line, one_line

if TYPE_CHECKING:
    from ows_ds.model.blocks import ModelLayers
    from ows_ds.model.outline import Outline


@dataclass(frozen=True)
class Shape:
    """A decoder of the LLaMA kind.

    hidden, intermediate: features of hidden states and of the MLP. heads, kv_heads: of queries; of keys and values.
    vocab: entries of the vocabulary. layers: of the whole model. family: transformers' ``model_type``. more: other keys
    of its configuration.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int = 32000
    layers: int = 32
    family: str = "llama"
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)


def _tokens_to(experts: int) -> dict[str, int]:
    return {"num_experts_per_tok": experts}


TIED = {"tie_word_embeddings": True}
SHAPES = {
    "llama2-7b": Shape(4096, 11008, 32, 32),
    "llama2-13b": Shape(5120, 13824, 40, 40, layers=40),
    "llama2-70b": Shape(8192, 28672, 64, 8, layers=80),
    "llama3-8b": Shape(4096, 14336, 32, 8, 128256),
    "llama3-70b": Shape(8192, 28672, 64, 8, 128256, 80),
    "llama3.1-8b": Shape(4096, 14336, 32, 8, 128256),
    "llama3.1-70b": Shape(8192, 28672, 64, 8, 128256, 80),
    "llama3.2-1b": Shape(2048, 8192, 32, 8, 128256, 16, more={"head_dim": 64, **TIED}),
    "llama3.2-3b": Shape(3072, 8192, 24, 8, 128256, 28, more={"head_dim": 128, **TIED}),
    "llama3.3-70b": Shape(8192, 28672, 64, 8, 128256, 80),
    "mistral-7b": Shape(4096, 14336, 32, 8, family="mistral"),
    "mistral-nemo": Shape(5120, 14336, 32, 8, 131072, 40, "mistral", {"head_dim": 128}),
    "phi-4": Shape(5120, 17920, 40, 10, 100352, 40, "phi3", {"pad_token_id": 0}),
    "gemma3-4b": Shape(2560, 10240, 8, 4, 262208, 34, "gemma3_text", {"head_dim": 256, **TIED}),
    "gemma3-12b": Shape(3840, 15360, 16, 8, 262208, 48, "gemma3_text", {"head_dim": 256, **TIED}),
    "gemma3-27b": Shape(5376, 21504, 32, 16, 262208, 62, "gemma3_text", {"head_dim": 128, **TIED}),
    "qwen3-0.6b": Shape(1024, 3072, 16, 8, 151936, 28, "qwen3", {"head_dim": 128, **TIED}),
    "qwen3-1.7b": Shape(2048, 6144, 16, 8, 151936, 28, "qwen3", {"head_dim": 128, **TIED}),
    "qwen3-4b": Shape(2560, 9728, 32, 8, 151936, 36, "qwen3", {"head_dim": 128, **TIED}),
    "qwen3-8b": Shape(4096, 12288, 32, 8, 151936, 36, "qwen3", {"head_dim": 128}),
    "qwen3-14b": Shape(5120, 17408, 40, 8, 151936, 40, "qwen3", {"head_dim": 128}),
    "qwen3-32b": Shape(5120, 25600, 64, 8, 151936, 64, "qwen3", {"head_dim": 128}),
    "qwen2.5-7b": Shape(3584, 18944, 28, 4, 152064, 28, "qwen2"),
    "qwen2.5-14b": Shape(5120, 13824, 40, 8, 152064, 48, "qwen2"),
    "qwen2.5-32b": Shape(5120, 27648, 40, 8, 152064, 64, "qwen2"),
    "qwen2.5-72b": Shape(8192, 29568, 64, 8, 152064, 80, "qwen2"),
    "mixtral-8x7b": Shape(4096, 14336, 32, 8, family="mixtral", more={"num_local_experts": 8, **_tokens_to(2)}),
    "qwen3-30b-a3b": Shape(
        2048, 6144, 32, 4, 151936, 48, "qwen3_moe",
        {"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, **_tokens_to(8)},
    ),
    "gpt-oss-20b": Shape(
        2880, 2880, 64, 8, 201088, 24, "gpt_oss", {"head_dim": 64, "num_local_experts": 32, **_tokens_to(4)}
    ),
    "gpt-oss-120b": Shape(
        2880, 2880, 64, 8, 201088, 36, "gpt_oss", {"head_dim": 64, "num_local_experts": 128, **_tokens_to(4)}
    ),
    "glm-4.5-air": Shape(
        4096, 10944, 96, 8, 151552, 46, "glm4_moe",
        {"head_dim": 128, "moe_intermediate_size": 1408, "n_routed_experts": 128, "n_shared_experts": 1,
         "first_k_dense_replace": 1, "attention_bias": True, **_tokens_to(8)},
    ),
    "deepseek-v3": Shape(
        7168, 18432, 128, 128, 129280, 61, "deepseek_v3",
        {"moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "first_k_dense_replace": 3,
         "n_group": 8, "topk_group": 4, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
         "qk_nope_head_dim": 128, "v_head_dim": 128, **_tokens_to(8)},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """What is known of a model without its weights.

    name: for people. layers: its parts. whole_logits: it changes its head's output, so that the loss takes all logits
    at once (`ows_ds.train.loss`). outline: of a plain one that is known by name.
    """

    name: str
    layers: ModelLayers
    whole_logits: bool = False
    given: Any = None  # transformers' configuration; None: the outline's
    outline: Outline | None = None

    @cached_property
    def config(self) -> Any:
        """Transformers' configuration."""
        return self.given if self.outline is None else _for_model(self.outline.shape)


def configuration(shape: Shape) -> dict[str, Any]:
    """The ``config.json`` of a model of this shape, without ties."""
    return {
        "model_type": shape.family,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": shape.layers,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": False,
        **shape.more,
    }


def read_model(path: str, revision: str | None = None, trust_remote_code: bool = False) -> Model:
    """The model at ``path``: a folder with a config.json, one of `SHAPES` by its name, or a name on the hub.

    Raises UserError (``model.path``) for a configuration that transformers does not know, and for what `find_layers`
    refuses.
    """
    if (found := named(path)) is not None:
        return Model(path, found.layers, outline=found)
    import transformers as tf

    try:
        if path in SHAPES and not Path(path).exists():
            config = _for_model(SHAPES[path])
        else:
            config = tf.AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        return model_of(config, one_line(Path(path).name))
    except UserError:
        raise
    except Exception as error:  # a config.json can be wrong in many ways
        right = f"expected a folder with a config.json, or one of {', '.join(SHAPES)} ({first_line(error)})"
        raise UserError("model.path", path, right) from error


def named(path: str) -> Outline | None:
    """Of a model that ``model.path`` names, where an outline of it is known: such a one needs no transformers."""
    from ows_ds.model.outline import outline

    return outline(SHAPES[path]) if path in SHAPES and not Path(path).exists() else None


def _for_model(shape: Shape) -> Any:
    import transformers as tf

    return tf.AutoConfig.for_model(**configuration(shape))


def check_shared(config: Any, size: int) -> None:
    """Refuse (UserError) ``train.sequence_parallel`` for a model, by transformers' configuration of it, whose attention
    ``size`` ranks cannot share (`ows_ds.compat.deepspeed.Ulysses`)."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None) or size
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    kinds |= {"chunked_attention"} if getattr(config, "attention_chunk_size", None) else set()
    right = None
    if size > 1 and kinds:
        right = f"1: layers of this model are {', '.join(sorted(kinds))}, which needs all tokens of a row on a rank"
    elif heads % size:
        right = f"a divisor of the {heads} attention heads of this model"
    elif kv_heads % size and size % kv_heads:
        right = f"a divisor or a multiple of the {kv_heads} heads of keys and values of this model"
    if right is not None:
        raise UserError("train.sequence_parallel", size, f"expected {right}")


def kv_copies(config: Any, size: int) -> int:
    """How often each head of keys and values goes out to ``size`` ranks that share rows."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return max(1, size // (getattr(config, "num_key_value_heads", None) or size))


def model_of(config: Any, name: str = "") -> Model:
    """The same, of a configuration of transformers."""
    from ows_ds.model.layers import find_layers

    capped = any(getattr(config, key, None) for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    return Model(name or type(config).__name__, find_layers(without_weights(config)), capped, config)


def without_weights(config: Any) -> Any:
    """The model of a configuration on torch's meta device, in training mode: shapes without numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    from ows_ds.compat.transformers import auto_class, without_sharding

    trusted = type(config).__module__.startswith("transformers_modules")  # a configuration whose own code has run
    auto = AutoModelForCausalLM if trusted else auto_class(config)
    with without_sharding(), torch.device("meta"):
        return auto.from_config(config, trust_remote_code=trusted).train()
