"""The plainest families of models in words, so that a plan for one of them needs neither torch nor transformers.

What is written here of a family is what `ows_ds.model.layers` finds in transformers' own model of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ows_ds.model.blocks import Block, Matrix, ModelLayers, Vector
from ows_ds.model.shapes import Shape

STACK = "model.layers"
EMBEDDING, FINAL, HEAD = "model.embed_tokens", "model.norm", "lm_head"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")  # in the order in which they are made
MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")
RUN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")  # in the order in which they run
RUN_MLP = ("gate_proj", "act_fn", "up_proj", "down_proj")
RUN_ATTENTION = ATTENTION[:4]


@dataclass(frozen=True)
class Family:
    """How the layers of a family run. biased: its modules with a bias."""

    run: tuple[str, ...] = RUN
    attention: tuple[str, ...] = RUN_ATTENTION
    biased: tuple[str, ...] = ()


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(biased=ATTENTION[:3]),
    "qwen3": Family(attention=("q_proj", "q_norm", "k_proj", "k_norm", "v_proj", "o_proj")),
    "gemma3_text": Family(
        (*RUN[:3], "pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
        (*ATTENTION[:3], "q_norm", "k_norm", "o_proj"),
    ),
}


@dataclass(frozen=True)
class Outline:
    """A decoder of one of `FAMILIES`. Names of a layer's modules are those inside of the layer."""

    shape: Shape

    @property
    def family(self) -> Family:
        """Its family."""
        return FAMILIES[self.shape.family]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.shape.more.get("tie_word_embeddings"))

    @cached_property
    def layer(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The modules of a layer with their own weights' shapes, in the order in which they are made."""
        found: dict[str, dict[str, tuple[int, ...]]] = {"self_attn": {}}
        for name in ATTENTION:
            if name in self.family.attention:
                found[f"self_attn.{name}"] = self._weights(name)
        found |= {"mlp": {}, **{f"mlp.{name}": self._weights(name) for name in MLP}}
        return found | {name: {"weight": (self.shape.hidden,)} for name in self.family.run if name not in found}

    def _weights(self, name: str) -> dict[str, tuple[int, ...]]:
        shape = self.shape
        head = shape.more.get("head_dim", shape.hidden // shape.heads)
        queries, keys, hidden, between = shape.heads * head, shape.kv_heads * head, shape.hidden, shape.intermediate
        weights: dict[str, tuple[int, ...]] = {
            "q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden),
            "o_proj": (hidden, queries), "q_norm": (head,), "k_norm": (head,),
            "gate_proj": (between, hidden), "up_proj": (between, hidden), "down_proj": (hidden, between),
        }  # fmt: skip
        if name not in weights:
            return {}
        return {"weight": weights[name]} | ({"bias": weights[name][:1]} if name in self.family.biased else {})

    def running(self, index: int) -> Iterator[tuple[str, bool]]:
        """(module, whether it is entered) of a layer as it runs, full names."""
        layer = f"{STACK}.{index}"
        inner = {"self_attn": self.family.attention, "mlp": RUN_MLP}
        yield layer, True
        for name in self.family.run:
            yield f"{layer}.{name}", True
            for one in inner.get(name, ()):
                yield f"{layer}.{name}.{one}", True
                yield f"{layer}.{name}.{one}", False
            yield f"{layer}.{name}", False
        yield layer, False

    @cached_property
    def modules(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """All modules of the model: full name -> its own weights' shapes by full name, in the order of the model."""
        layers = {
            ".".join(filter(None, (STACK, str(index), name))): own
            for index in range(self.shape.layers)
            for name, own in {"": {}, **self.layer}.items()
        }
        hidden, vocab = self.shape.hidden, self.shape.vocab
        own: dict[str, dict[str, tuple[int, ...]]]
        own = {"": {}, "model": {}, EMBEDDING: {"weight": (vocab, hidden)}, STACK: {}, **layers,
               FINAL: {"weight": (hidden,)}, "model.rotary_emb": {}, HEAD: {"weight": (vocab, hidden)}}  # fmt: skip
        full = {name: {f"{name}.{key}": shape for key, shape in some.items()} for name, some in own.items()}
        return full | ({HEAD: full[EMBEDDING]} if self.tied else {})

    @cached_property
    def layers(self) -> ModelLayers:
        """As `ows_ds.model.layers.find_layers` finds them."""
        blocks = []
        for index in range(self.shape.layers):
            name = f"{STACK}.{index}"
            inside = [(module, self.modules[f"{name}.{module}"]) for module in self.layer]
            weights = [(f"{name}.{module}", key, shape) for module, own in inside for key, shape in own.items()]
            matrices = tuple(Matrix(key, (s[0], s[1]), (module,)) for module, key, s in weights if len(s) == 2)
            vectors = tuple(Vector(key, math.prod(s)) for _, key, s in weights if len(s) == 1)
            blocks.append(Block(name, matrices, vectors))
        sides = (self.shape.vocab, self.shape.hidden)
        ends = (EMBEDDING, HEAD)
        outside = [Matrix(f"{EMBEDDING}.weight", sides, ends)]
        if not self.tied:
            outside = [Matrix(f"{name}.weight", sides, (name,)) for name in ends]
        return ModelLayers(tuple(blocks), tuple(outside), (Vector(f"{FINAL}.weight", self.shape.hidden),))


def outline(shape: Shape) -> Outline | None:
    """None: of this family, or of what the shape says of it, nothing is written here."""
    plain = shape.more.keys() <= {"head_dim", "tie_word_embeddings"}
    return Outline(shape) if shape.family in FAMILIES and plain else None
