"""layers.py: the layers, matrices and vectors of every family are found, each parameter once; the rest is refused."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from ows_ds.errors import UserError
from ows_ds.model.layers import Matrix, ModelLayers, find_layers
from tests.support.families import FAMILIES, tiny

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


def mixtral() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(vocab_size=64, **sizes, **heads))


def other_linear() -> nn.Module:
    class Rescaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = tiny("llama")
    model.model.layers[1].mlp.up_proj = Rescaled(32, 48)
    return model


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
        (mixtral, r"model\.layers\.0\.mlp\.\S+ has shape \(2, .*only linear weights"),
        (other_linear, r"model\.layers\.1\.mlp\.up_proj is a Rescaled of torch\.float32"),
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
