"""layers.py: the layers, matrices and vectors of every family are found, each parameter once; the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from ows_ds.errors import UserError
from ows_ds.model.blocks import Matrix, ModelLayers, Vector
from ows_ds.model.layers import find_layers
from tests.support.families import FAMILIES, MIXED, tiny

# hidden 32, inner 48, 4 heads of 8 of which 2 are key and value heads, 64 tokens
LLAMA = [
    ("self_attn.q_proj", (32, 32)),
    ("self_attn.k_proj", (16, 32)),
    ("self_attn.v_proj", (16, 32)),
    ("self_attn.o_proj", (32, 32)),
    ("mlp.gate_proj", (48, 32)),
    ("mlp.up_proj", (48, 32)),
    ("mlp.down_proj", (32, 48)),
]
STACKS = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}
SHAPES = {
    "llama": LLAMA,
    "llama with biases": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gemma3": LLAMA,
    "phi3": [
        ("self_attn.o_proj", (32, 32)),
        ("self_attn.qkv_proj", (64, 32)),
        ("mlp.gate_up_proj", (96, 32)),
        ("mlp.down_proj", (32, 48)),
    ],
    "gpt_neox": [
        ("attention.query_key_value", (96, 32)),
        ("attention.dense", (32, 32)),
        ("mlp.dense_h_to_4h", (48, 32)),
        ("mlp.dense_4h_to_h", (32, 48)),
    ],
    "gpt2": [  # Conv1D: stored with inputs first
        ("attn.c_attn", (32, 96)),
        ("attn.c_proj", (32, 32)),
        ("mlp.c_fc", (32, 48)),
        ("mlp.c_proj", (48, 32)),
    ],
}
EMBEDDINGS = {"gpt_neox": "gpt_neox.embed_in", "gpt2": "transformer.wte"}


def every_name(layers: ModelLayers) -> list[str]:
    names = [part.name for block in layers.layers for part in (*block.matrices, *block.vectors)]
    return names + [part.name for part in (*layers.embeddings, *layers.final)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tied: bool) -> None:
    model = tiny(family, tied)
    layers = find_layers(model)
    stack = STACKS.get(family, "model.layers")
    assert [block.name for block in layers.layers] == [f"{stack}.{index}" for index in range(3)]
    for block in layers.layers:
        assert block.matrices == tuple(
            Matrix(f"{block.name}.{name}.weight", shape, (f"{block.name}.{name}",), inputs_first=family == "gpt2")
            for name, shape in SHAPES[family]
        )

    names = every_name(layers)
    assert len(names) == len(set(names))
    assert set(names) == {name for name, _ in model.named_parameters()}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for vector in (*layers.final, *(v for block in layers.layers for v in block.vectors)):
        assert vector.numel == sizes[vector.name]

    embedding = EMBEDDINGS.get(family, "model.embed_tokens")
    expected = [Matrix(f"{embedding}.weight", (64, 32), (embedding, "lm_head") if tied else (embedding,))]
    if not tied:
        expected.append(Matrix("lm_head.weight", (64, 32), ("lm_head",)))
    if family == "gpt2":
        expected.append(Matrix("transformer.wpe.weight", (64, 32), ("transformer.wpe",)))
    assert list(layers.embeddings) == expected


@pytest.mark.parametrize("family", [*FAMILIES, *MIXED])
def test_modules_share_what_a_layer_has(family: str) -> None:
    """Each weight of a layer is in exactly one block of its modules, with one matrix where the layer has any."""
    layers = find_layers(tiny(family)).with_routers(True)
    modules, owners = layers.by_module()
    assert len(owners) == len(modules.layers)
    for index, layer in enumerate(layers.layers):
        own = [block for block, owner in zip(modules.layers, owners, strict=True) if owner == index]
        parts = [part.name for block in own for part in (*block.matrices, *block.vectors)]
        assert sorted(parts) == sorted(layer.names)
        assert [len(block.matrices) for block in own] == [1] * len(layer.matrices)
    assert len({block.name for block in modules.layers}) == len(owners)
    assert (modules.embeddings, modules.final) == (layers.embeddings, layers.final)


def test_sides_of_a_matrix() -> None:
    linear = Matrix("a.weight", (48, 32), ("a",))
    conv = Matrix("b.weight", (32, 48), ("b",), inputs_first=True)
    assert (linear.long, linear.short, linear.in_features) == (48, 32, 32)
    assert (conv.long, conv.short, conv.in_features) == (48, 32, 32)


def test_shapes_may_come_from_elsewhere() -> None:
    model = tiny("llama")
    expected = find_layers(model)
    shapes = {parameter: tuple(parameter.shape) for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.data = torch.empty(0)  # as ZeRO-3 leaves them
    assert find_layers(model, shapes.__getitem__) == expected


def t5() -> nn.Module:
    config = tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return tf.T5ForConditionalGeneration(config)


def test_experts_and_their_router() -> None:
    """Of 4 experts, 2 for each token: at rank 16 a stack has rank 16 * 2 / 4."""
    layers = find_layers(tiny("mixtral"))
    up, down = (m for m in layers.layers[0].matrices if m.experts)
    assert (up.shape, up.experts, up.active, up.numel) == ((96, 32), 4, 2, 4 * 96 * 32)
    assert (down.shape, down.long, down.short, down.inputs_first) == ((32, 48), 48, 32, False)
    assert layers.router_names == {f"model.layers.{i}.mlp.gate.weight" for i in range(3)}
    assert not any(part.name in layers.router_names for part in layers.layers[0].vectors)
    assert layers.with_routers(True).layers[0].vectors[-1] == Vector("model.layers.0.mlp.gate.weight", 4 * 32)
    assert layers.with_routers(False).router_names == frozenset()
    ranks = {m.name: m.rank for m in layers.at_rank(16).layers[0].matrices}
    assert (ranks[up.name], ranks["model.layers.0.self_attn.q_proj.weight"]) == (8, None)
    assert {m.rank for m in layers.at_rank(16, 4).layers[0].matrices if m.experts} == {4}
    oss = find_layers(tiny("gpt_oss")).layers[0]
    assert all(m.inputs_first for m in oss.matrices if m.experts)
    assert Vector("model.layers.0.mlp.experts.down_proj_bias", 4 * 32) in oss.vectors


def test_what_is_no_matrix_is_a_vector() -> None:
    """A kernel of a convolution, decays; and matrices that are narrower than the rank."""
    layers = find_layers(tiny("qwen3_5"))
    assert Vector("model.layers.0.linear_attn.conv1d.weight", 64 * 3) in layers.layers[0].vectors
    narrow = "model.layers.0.linear_attn.in_proj_a.weight"
    assert narrow in {m.name for m in layers.layers[0].matrices}
    assert narrow in {v.name for v in layers.at_rank(8).layers[0].vectors}


def test_a_linear_module_with_a_forward_of_its_own() -> None:
    class Rescaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model: Any = tiny("llama")
    model.model.layers[1].mlp.up_proj = Rescaled(32, 48)
    assert "model.layers.1.mlp.up_proj.weight" in {m.name for m in find_layers(model).layers[1].matrices}


def test_the_stack_beside_the_embedding_is_the_language_model() -> None:
    """Though a tower for images has more weights."""
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    text = {key: value for key, value in tiny("gemma3").config.to_dict().items() if key != "model_type"}
    config = tf.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 8})
    layers = find_layers(tf.AutoModelForImageTextToText.from_config(config))
    assert [block.name for block in layers.layers] == [f"model.language_model.layers.{i}" for i in range(3)]
    names = {*layers.heads, *(m.name for m in layers.embeddings), *(v.name for v in layers.final)}
    assert names == {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}


def quantised() -> nn.Module:
    model = tiny("llama")
    linear = model.model.layers[2].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return model


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (t5, "encoder-decoder"),
        (quantised, r"model\.layers\.2\.mlp\.down_proj is a Linear of torch\.int8"),
        (adapted, "without adapters"),
        (lambda: nn.Linear(4, 4), "no list of layers"),
    ],
)
def test_refusals(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=says) as caught:
        find_layers(make())
    assert caught.value.key == "model.path"


# ---- which side carries the projector


@pytest.mark.parametrize(
    ("shape", "inputs_first", "tall", "saves_low_rank"),
    [
        ((7, 4), False, True, True),
        ((4, 7), False, False, False),
        ((5, 5), False, True, True),
        ((4, 7), True, False, True),  # inputs are the rows
        ((7, 4), True, True, False),
    ],
)
def test_sides(shape: tuple[int, int], inputs_first: bool, tall: bool, saves_low_rank: bool) -> None:
    one = Matrix("w", shape, ("m",), inputs_first)
    assert (one.tall, one.long, one.short) == (tall, max(shape), min(shape))
    assert one.saves_low_rank == saves_low_rank
