"""Every model type of transformers, tiny: which of them train here, and why the others do not.

    python -m benchmarks.families                     # all, a line each
    python -m benchmarks.families mixtral gemma3      # some
    python -m benchmarks.families --write             # all, and docs/models.md

A tiny random model is made from each type's own configuration class by shrinking its sizes. It trains 4 steps under
ows (2 draws, one refresh), is exported and reloaded, and must then give the same logits.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# ------------------------------------------------------------------ tiny configurations

LAYERS, VOCABULARY = 4, 128

# A size by the pattern of its name, the first that fits.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|vocab_offset|codebook_size|num_embeddings|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"(moe|shared)_.*intermediate_size|moe_ffn_hidden_size|expert_ffn_hidden_size|share_expert_dim", 24),
    (r".*intermediate_size.*|.*ffn_dim|d_ff|dff|dim_ff|n_inner|d_inner|ffn_hidden_size|mlp_dim|feed_forward_size", 48),
    (r"index_n_heads", 2),
    (r".*num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|conf_num_attention_heads", 2),
    (r"linear_num_key_heads", 2),
    (r".*num_.*heads.*|n_heads?|attention_heads|(en|de)coder_attention_heads|resampler_n?_?heads|linear_num_heads|mamba_n_heads"
     r"|mamba_num_heads|n_mamba_heads|num_heads", 4),
    (r"qk_head_dim", 16),
    (r"mamba_d_head|mamba_headdim", 16),
    (r".*head_dim|.*head_size|d_kv|d_head|dim_head|kv_channels|resampler_dim_head|rotary_dim", 8),
    (r"hidden_size_per_layer_input|ple_embed_dim|laurel_rank|adapter_rank|adapter_out_dim|router_hidden_size", 8),
    (r"hidden_size.*|.*hidden_size|d_model|dim_model_base|n_embd|.*embed_dim|embedding_(size|dim)|(in|out)put_embedding_size"
     r"|.*projection_dim|lru_width|emb_dim|output_dim|vision_output_dim|projector_(in|out)put_dim|hidden_dim"
     r"|projection_hidden_dim|ple_.*dim|image_text_hidden_size|input_size|decoder_hidden_size|d_rel", 32),
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
    (r"n_layers_per_attn_res_block|num_layers_per_stack|vision_n_layers", 2),
    (r"num_.*hidden_layers|num_(.*_)?layers|n_layers?|(en|de)coder_layers|(resampler_)?depth|num_blocks|layers",
     LAYERS),
    (r".*max_position_embeddings.*|n_positions|max_seq_len|n_ctx|max_(source|target)_positions|model_max_length"
     r"|context_length|seq_len|position_embedding_size|num_position_embeddings", 64),
    (r"n_routed_experts|.*num_experts|num_local_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|top_k_experts|moe_k", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group|n_shared_experts|.*num_shared_experts|first_k_dense_replace|num_dense_layers", 1),
    (r"moe_layer_start_index", 1),
    (r".*lora_rank|hc_lowrank|gated_norm_rank|mamba_dt_rank|time_step_rank|index_topk", 16),
    (r".*sliding_window|sliding_window_size|.*window_size|attention_chunk_size|local_attention|keep_window_size", 8),
    (r"mamba_d_state|state_size|ssm_state_size", 8),
    (r"mamba_d_ssm", 64),
    (r"mamba_n_groups|n_groups|mamba_ngroups|o_groups", 2),
    (r".*chunk_size|block_size|index_block_size", 4),
    (r"image_size|resolution|crop_size|max_image_size|scale", 32),
    (r".*patch_size", 8),
    (r"query_pre_attn_scalar", 8),
    (r"max_window_layers", LAYERS),
    (r"ngram_vocab_size_base", 64),
    (r".*(token_id|token_index|_id|_index)", 3),
    (r"layer_group_size|attn_layer_period|expert_layer_period|global_attn_every_n_layers|sliding_window_pattern", 2),
    (r"attn_layer_offset|expert_layer_offset", 1),
)  # fmt: skip

# What its own names do not say.
OWN: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 4, "IMGIMGA": 5}},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", *["sparse"] * 3]},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "dots1": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    },
    "dots3_note": {"adapter_in_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 2]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 3},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 3},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attn_layers": ["local"] * 4},
    "step3p7_text": {"sliding_window": 8},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        "mamba_headdim": 16, "n_mamba_heads": 4, "attention_head_dim": 16, "attention_hidden_size": 64,
    },
}  # fmt: skip
DERIVED = (
    "transformers_version", "architectures", "dtype", "id2label", "label2id", "problem_type",
    "ignore_keys_at_rope_validation", "qk_head_dim",
)  # fmt: skip

NOT_SAID = {"head_dim": 8, "num_key_value_heads": 2}
THREE_AXES = r"_vl_|glm(4|46)v|glm_ocr|glmga|paddleocr|cosmos"
AS_IT_IS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tiny_config(model_type: str) -> Any:
    """The configuration of a tiny model of this type, without dropout."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind(**_shrunk(kind()))


def _shrunk(config: Any) -> dict[str, Any]:
    """Its settings with small sizes: to make it again from."""
    from transformers import PreTrainedConfig

    values = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    layers = next((n for key in ("num_hidden_layers", "n_layer", "n_layers") if (n := values.get(key))), 0)
    per_layer = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == layers > LAYERS}
    kept = _every_kind(list(per_layer.values()), layers)
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in DERIVED:
            continue
        if isinstance(value, PreTrainedConfig):
            found[key] = {**_shrunk(value), "model_type": value.model_type}
        elif key == "rope_parameters" and isinstance(value, dict):
            found[key] = _rope(value, values, bool(re.search(THREE_AXES, config.model_type)))
        elif key in per_layer:
            found[key] = [value[i] for i in kept]
        elif key in AS_IT_IS:
            found[key] = AS_IT_IS[key] if value is not None else None
        elif isinstance(value, float) and ("drop" in key or "layerdrop" in key):
            found[key] = 0.0
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
            small = next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), value)
            found[key] = min(value, small)
        elif value is not None:
            found[key] = value
        elif key in NOT_SAID:
            found[key] = NOT_SAID[key]
    if found.get("kv_lora_rank"):  # all heads have keys and values of their own
        found["num_key_value_heads"] = found["num_attention_heads"]
    return {**found, **OWN.get(config.model_type, {})}


def _rope(rope: dict[str, Any], config: dict[str, Any], axes: bool) -> dict[str, Any]:
    """Of one kind of attention, or of each. axes: positions are of time, height and width."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {kind: _rope(value, config, axes) if isinstance(value, dict) else value for kind, value in rope.items()}
    found = {k: v for k, v in rope.items() if k != "partial_rotary_factor" or "qk_rope_head_dim" not in config}
    if "mrope_section" in found or axes:
        half = int(8 * found.get("partial_rotary_factor", 1.0)) // 2
        found["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return found


def _every_kind(lists: list[list[Any]], layers: int) -> list[int]:
    """Positions of `LAYERS` layers among which is every kind of layer, if possible."""
    kinds = [tuple(map(str, kind)) for kind in zip(*lists, strict=True)]
    first = sorted({kinds.index(kind) for kind in kinds})[:LAYERS]
    others = [i for i in range(layers) if i not in first]
    return sorted([*first, *others[: LAYERS - len(first)]])


def tiny_model(model_type: str, seed: int = 0) -> Any:
    """A random model of this type with the class that trains it, float32, in training mode.

    Norms and biases are random, too: zeros and ones would hide mistakes.
    """
    import torch
    import transformers as tf
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = tiny_config(model_type)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(seed)
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = tf.AutoModelForCausalLM if causal else tf.AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.config.use_cache = False
    return model.train()


# ------------------------------------------------------------------ what is tried

STEPS, ROWS, TOKENS, SECONDS = 4, 2, 12, 120
SETTINGS: dict[str, Any] = {
    "scheme": "fixed", "gamma": 2, "period": 2, "rank": 4, "update_proj_gap": 2, "lr": 1e-2, "seed": 1,
}  # fmt: skip


class Impossible(Exception):
    """A tiny model of a type cannot be made, or run forward and backward on text, whoever trains it."""


def try_type(model_type: str, experts: str | None = None) -> str:
    """Train, export and reload a tiny model of this type. Returns what it has in its layers.

    experts: an implementation of transformers' experts; None: the model's own choice.
    Raises Impossible, or whatever goes wrong here.
    """
    import torch

    from ows_ds.distributed.communicator import Communicator
    from ows_ds.distributed.weights import Replicated
    from ows_ds.optim.ows import OWS
    from ows_ds.train.export import save_model
    from ows_ds.train.loss import token_losses

    generator = torch.Generator().manual_seed(0)
    batches = [_batch(torch.randint(4, VOCABULARY - 8, (ROWS, TOKENS), generator=generator)) for _ in range(STEPS)]
    try:
        model = tiny_model(model_type)
        weights = Replicated(model, Communicator())
        token_losses(weights, batches[0]).backward()
        used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    except Exception as error:
        raise Impossible(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}") from error
    if experts is not None:
        model.set_experts_implementation(experts)
    model.zero_grad()
    names = [name for name, _ in model.named_parameters()]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    from ows_ds.model.layers import find_layers

    count = len(find_layers(model).layers)
    ows = OWS(weights, [1.0] * count, **{**SETTINGS, "gamma": min(2, count)})
    trained = set()
    for batch in batches:
        trained |= set(ows.active.trained_names)
        loss = token_losses(weights, batch) / batch["labels"].numel()
        ows.backward(loss)
        ows.step()
        ows.zero_grad()
        assert loss.isfinite(), "the loss is not finite"
    layers = ows.layers
    ows.close()
    changed = {n for n, old, new in zip(names, before, model.parameters(), strict=True) if not torch.equal(old, new)}
    assert changed <= trained, f"{sorted(changed - trained)[0]} was not to train, and changed"
    for block in layers.layers:
        matrices = {matrix.name for matrix in block.matrices} & trained & used  # text alone does not use all
        assert not matrices or matrices & changed, f"nothing of {block.name} has changed"

    ids = batches[0]["input_ids"]
    logits = _logits(weights, ids)
    with tempfile.TemporaryDirectory() as folder:
        save_model(weights, _NoTokenizer(), Path(folder) / "model")
        again = type(model).from_pretrained(Path(folder) / "model", dtype=torch.float32)
    if experts is not None:
        again.set_experts_implementation(experts)
    try:
        torch.testing.assert_close(_logits(Replicated(again, Communicator()), ids), logits, rtol=1e-4, atol=1e-5)
    except AssertionError as error:
        if not _reloads(model, ids):
            raise Impossible("transformers' own save_pretrained and from_pretrained do not give the same") from error
        raise
    return _contents(model, layers)


def _reloads(model: Any, ids: Any) -> bool:
    """Whether transformers alone writes and reads the model."""
    import torch

    from ows_ds.distributed.communicator import Communicator
    from ows_ds.distributed.weights import Replicated

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=torch.float32)
    mine, theirs = (_logits(Replicated(one, Communicator()), ids) for one in (model, again))
    return torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def _batch(ids: Any) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape), "labels": ids}


def _logits(weights: Any, ids: Any) -> Any:
    import torch

    from ows_ds.data.attention import inputs

    weights.module.eval()
    with torch.no_grad():
        return weights(**inputs(weights, _batch(ids))).logits


class _NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """Nothing."""


def _contents(model: Any, layers: Any) -> str:
    """What there is beside matrices, biases and norms."""
    matrices = [matrix for block in layers.layers for matrix in block.matrices]
    vectors = [vector.name for block in layers.layers for vector in block.vectors]
    names = {name.rpartition(".")[2] for name in vectors if model.get_parameter(name).dim() > 1}
    convolutions = any("conv" in name and model.get_parameter(name).dim() == 3 for name in vectors)
    kinds = {
        "stacks of matrices": any(matrix.experts for matrix in matrices),
        "convolutions": convolutions,
        f"as vectors: {', '.join(sorted(names - {'weight'})[:3])}": bool(names - {"weight"}),
        "towers": any(
            word in name for name, _ in model.named_children() or () for word in ("vision", "visual", "audio")
        ) or any(re.search(r"vision|visual|audio|image_encoder", name) for name, _ in model.named_modules()),
    }  # fmt: skip
    return ", ".join(kind for kind, there in kinds.items() if there)


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def model_types() -> list[str]:
    """All of transformers' causal language models, and of its models of images and text."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def outcome(model_type: str) -> tuple[str, str]:
    """(trains | cannot | fails, what is in it or why)."""
    try:
        with _limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "trains", try_type(model_type)
    except Impossible as error:
        return "cannot", str(error)
    except Exception as error:
        return "fails", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def page(found: dict[str, tuple[str, str]]) -> str:
    """The text of docs/models.md."""
    import transformers as tf

    trains, fails, cannot = (
        {name: said for name, (what, said) in found.items() if what == word} for word in ("trains", "fails", "cannot")
    )
    kinds: dict[str, list[str]] = {}
    for name, contents in trains.items():
        kinds.setdefault(contents or "nothing", []).append(name)
    rows = "\n".join(f"| {kind} | {', '.join(f'`{n}`' for n in names)} |" for kind, names in sorted(kinds.items()))
    others = "\n".join(
        f"| `{name}` | {'not tried' if name in cannot else 'does not train'} | {said.replace('|', '/')} |"
        for name, said in sorted({**fails, **cannot}.items())
    )
    return f"""# Models

Made by `python -m benchmarks.families --write` with transformers {tf.__version__}: of each of its {len(found)} types of
causal language models and of models of images and text, a tiny random one was trained for 4 steps under `ows` on the
CPU, exported and reloaded. **{len(trains)} train**, {len(fails)} do not; of {len(cannot)} no tiny model could be made,
or run forward and backward on text alone.

Nothing in the code knows a type by its name. In a transformer layer

* a weight of a linear layer, and each expert's in a stack (one parameter of three dimensions), trains in a low-rank
  subspace;
* all else, such as norms, biases, kernels of convolutions, decays of linear attention, trains at full rank as a vector;
* the router, which has one output for each expert, stays as it is. It was trained on far more tokens than a fine-tuning
  run has, with a loss for balance that few recipes keep; a router that drifts on small batches starves experts, and all
  other ranks wait for the busiest. `optim.router: train` trains it.

Experts have a low rank of their own, `optim.expert_rank`. Without it, coordinates of all E experts of a layer take as
much memory as those of the k experts of one token would at `optim.rank`: rank r k / E, at least 8, a divisor of r. An
expert that no token went to keeps its bits, and its subspace. A loss for the balance of experts is added where the
model's config.json asks for it (`"output_router_logits": true`), and recorded as `aux_loss`.

Of a model of images and text, rows of text train the language model; towers and projectors stay, and the export is the
whole checkpoint.

## What trains

| beside linear layers, norms and biases | types |
|---|---|
{rows}

## What does not, or was not tried

| type | | why |
|---|---|---|
{others}
"""


def main() -> None:
    """See the module."""
    import torch
    import transformers as tf

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; none: all")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    parser.add_argument("--json", type=Path, help="file for the outcomes")
    given = parser.parse_args()
    tf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    found: dict[str, tuple[str, str]] = {}
    for model_type in given.types or model_types():
        start = time.perf_counter()
        found[model_type] = outcome(model_type)
        print(f"{model_type:28} {found[model_type][0]:7} {time.perf_counter() - start:5.1f} s  {found[model_type][1]}")
    counts = {word: sum(what == word for what, _ in found.values()) for word in ("trains", "fails", "cannot")}
    print(counts)
    if given.write:
        (Path(__file__).parent.parent / "docs" / "models.md").write_text(page(found), encoding="utf-8")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
